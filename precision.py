"""precision.py: the only file in which a number is rounded.

RL fine-tuning acts with one set of roundings and learns with another. This file makes both the same: `Numerics` is one
number format on one device, and the model, the sampler and the trainer call its operators and nothing else.

    python precision.py            # the formats in one table, and where a real training step's numbers lie in each
    python precision.py --explain  # operator by operator: where the first bit differs between rollout and training

Where is a number rounded? At the end of every operator here, once: on the way forward its output, on the way back its
input gradient. Inside an operator everything is FP32: products accumulate in FP32, norms and softmax are computed in FP32.
(One exception: a GPU's fused attention also rounds the probabilities before it multiplies the values with them.)

    CUDA   values are stored in the format (torch.float16, ...), tensor cores multiply, accumulate in FP32, round on output
    CPU    values are stored in FP32 tensors that hold only numbers of the format; an FP32 GEMM, then one rounding

That is the same arithmetic. A CPU's native half GEMM is 5 to 40 times slower than its FP32 one and is never issued.
The FP32 master weights live in the model; `refresh` rounds them once per update, in place, and rollout and training both
read the rounded ones. Left out on purpose: torch.autocast, whose lists of operators decide out of sight what is rounded.
"""
import difflib
import math
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")    # read when CUDA starts; see reproducible


class InputError(ValueError):
    """The user gave something that cannot work. The commands print it as one line, without a stack trace."""


def nearest(name, known):
    """`, did you mean X?` for the known name that is closest to `name`, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


# ---------------------------------------------------------------------------------------------------------------------
# Formats are data


@dataclass(frozen=True)
class Format:
    """A binary floating-point format with IEEE semantics: one sign bit, `exp` exponent bits, `man` mantissa bits, the
    top exponent kept for inf and nan, subnormals below the smallest normal number, round to nearest even."""
    name: str
    exp: int
    man: int
    native: torch.dtype | None = None   # a torch dtype that is exactly this format, if there is one

    @property
    def eps(self):                      # spacing of the numbers just above 1
        return 2.0 ** -self.man

    @property
    def tiny(self):                     # smallest normal number
        return 2.0 ** (2 - 2 ** (self.exp - 1))

    @property
    def smallest(self):                 # smallest subnormal number; half of it and less becomes 0
        return self.tiny * self.eps

    @property
    def max(self):                      # largest finite number; more becomes inf
        return 2.0 ** (2 ** (self.exp - 1) - 1) * (2 - self.eps)

    @property
    def needs_loss_scaling(self):
        """Gradients of an RL loss are around 1e-4 / tokens: with fewer exponent bits than FP32 they fall below `smallest`."""
        return self.exp < 8


FORMATS = {f.name: f for f in (
    Format("fp32", 8, 23, torch.float32),
    Format("tf32", 8, 10),              # FP16's mantissa with FP32's range: a storage format here, exact on TF32 tensor cores
    Format("bf16", 8, 7, torch.bfloat16),
    Format("fp16", 5, 10, torch.float16),
)}


def parse_format(text):
    """`fp32`, `tf32`, `bf16`, `fp16`, or any `eXmY` with 2 <= X <= 8 exponent and 1 <= Y <= 23 mantissa bits -> Format."""
    name = str(text).lower()
    if name in FORMATS:
        return FORMATS[name]
    m = re.fullmatch(r"e(\d+)m(\d+)", name)
    if not m:
        raise InputError(
            f"unknown number format {text!r}{nearest(name, FORMATS)}: use {', '.join(FORMATS)} or eXmY such as e5m7"
        )
    exp, man = int(m[1]), int(m[2])
    if not (2 <= exp <= 8 and 1 <= man <= 23):
        raise InputError(f"number format {text!r} makes no sense: eXmY needs 2 to 8 exponent bits and 1 to 23 mantissa bits")
    return next((f for f in FORMATS.values() if (f.exp, f.man) == (exp, man)), Format(name, exp, man))


def emulate_(x, fmt):
    """Round an FP32 tensor in place to the nearest number of any `fmt`, ties to even. Returns x.

    A float's bit pattern is an integer that grows with the number, so rounding is integer addition: add just under half
    of the last kept bit (exactly half if that bit is odd) and cut. A carry runs into the exponent, which is right.
    Subnormals have a fixed spacing; adding and subtracting 2^23 spacings lets the FP32 adder do that rounding."""
    cut = 23 - fmt.man
    if cut == 0 and fmt.exp == 8:
        return x
    original = x.clone()
    small = x.abs() < fmt.tiny if fmt.exp < 8 else None
    if small is not None:
        big = 2.0 ** 23 * fmt.smallest
        subnormal = torch.copysign((x.abs() + big) - big, x)       # copysign: what becomes zero keeps its sign
    if cut:
        bits = x.view(torch.int32)
        bits += ((bits >> cut) & 1) + ((1 << (cut - 1)) - 1)
        bits &= -(1 << cut)
    if small is not None:
        torch.where(small, subnormal, x, out=x)
        x.masked_fill_(x > fmt.max, math.inf).masked_fill_(x < -fmt.max, -math.inf)
    return torch.where(torch.isfinite(original), x, original, out=x)       # inf and nan are what they were


# ---------------------------------------------------------------------------------------------------------------------
# The operators


class Numerics:
    """One number format on one device: rounds, multiplies, and keeps the rounded copy of the master weights.

    fmt: Format; device: torch.device. `dtype` is the dtype in which activations, rounded weights and the KV cache are
    kept: the format's own on CUDA, FP32 tensors of rounded numbers wherever the format is emulated.
    `exact` is True where rollout and training agree bit for bit (ExactNumerics).
    `spy`, if set, is called as spy(where, kind, tensor) with each operator's rounded output ("forward") and input
    gradient ("backward"): the anatomy below and the search for a first NaN both look through it."""

    exact = False

    def __init__(self, fmt, device="cpu"):
        self.fmt = parse_format(fmt) if isinstance(fmt, str) else fmt
        self.device = torch.device(device)
        on_tensor_cores = self.device.type == "cuda" and self.fmt.native is not None
        self.dtype = self.fmt.native if on_tensor_cores else torch.float32
        self.emulated = self.dtype == torch.float32 and self.fmt.name != "fp32"
        self.operators = "torch's"
        self.where = self.operator = ""        # the layer and the operator at work, for messages
        self.spy = None
        self._rounded = {}

    # -- weights

    @torch.no_grad()
    def hold(self, parameters):
        """Keep a rounded copy of these FP32 master weights and round them now. What needs no rounding serves itself: FP32
        masters in fp32, a parameter marked `keep_fp32`, a frozen one that holds only numbers of the format in its dtype."""
        for p in parameters:
            if self.fmt.name == "fp32" and p.dtype == torch.float32 or getattr(p, "keep_fp32", False):
                self._rounded[p] = p.detach()
            else:
                r = self.round_(p.detach().to(self.dtype, copy=True))
                self._rounded[p] = p.detach() if not p.requires_grad and p.dtype == r.dtype and torch.equal(p, r) else r
        return self

    @torch.no_grad()
    def refresh(self):
        """Round the masters again, in place: whoever reads the rounded weights (a CUDA graph, say) keeps its addresses. Frozen
        ones are as they were."""
        for p, r in self._rounded.items():
            if p.requires_grad and r.data_ptr() != p.data_ptr():
                self.round_(r.copy_(p))

    def release(self):
        """Forget all weights held."""
        self._rounded.clear()

    def weight(self, p):
        """The rounded copy of master weight `p`, in `dtype`."""
        return self._rounded[p]

    # -- rounding

    def round_(self, x):
        """Round x in place to the format. Nothing to do where the dtype is the format: the hardware has rounded."""
        if not self.emulated:
            return x
        if self.fmt.native is not None:
            return x.copy_(x.to(self.fmt.native))
        return emulate_(x, self.fmt)

    def rounded(self, x):
        """x in the format, as a new tensor where anything is rounded."""
        if not self.emulated:
            return x
        return x.to(self.fmt.native).float() if self.fmt.native else emulate_(x.clone(), self.fmt)

    def _out(self, x, kind="forward", where=None):
        """The end of every operator: from FP32 to the format. Overwrites x where the format is emulated."""
        x = self.round_(x) if x.dtype == self.dtype else x.to(self.dtype)
        if self.spy:
            self.spy(where or self.where, kind, x)
        return x

    # -- operators (x is ... x C in `dtype`; parameters are FP32 masters)

    def _apply(self, op, *args):
        """Run an operator below; with no gradient wanted (every rollout) autograd's bookkeeping is left out."""
        self.operator = op.__name__
        return op.apply(*args, self) if torch.is_grad_enabled() else op.forward(NO_GRADIENT, *args, self)

    def embed(self, tokens, w):
        """tokens (B, T) int64, w (V, C) -> (B, T, C)."""
        return self._apply(_Embed, tokens, w)

    def linear(self, x, w, b=None, lora=None):
        """x (..., I), w (O, I), b (O) or None -> x wᵀ + b, (..., O). lora: a model.Adapter, whose product is added.

        The adapter stays apart, in rollout as in training: merged into W, it would be rounded away to W's spacing (an update
        of 1e-4 to a weight of 1 is below half of FP16's), and the policy that acts would not be the one that learns."""
        if lora is None:
            return self._apply(_Linear, x, w, b)
        return self._apply(_LoRALinear, x, w, b, lora, lora.A, *lora.B)

    def experts(self, x, router, gate_up, down, k, normalised, replay=None):
        """A mixture of experts in an MLP's place (Shazeer et al. 2017; as in Qwen3-MoE): each token goes to the k experts whose
        router probabilities are largest, and gets their SwiGLU MLPs' outputs, weighted by these probabilities.

        x (B, T, C); router (E, C), FP32 as all that it computes; gate_up (E, 2F, C), down (E, C, F); normalised: the k weights
        are divided by their sum; replay: (B, T, k), experts to go to in place of its own choice. Returns (B, T, C) and its own
        choice (B, T, k) int16, most likely first. Rounded: each expert's products and SwiGLU, and the weighted sum, once."""
        return self._apply(_Experts, x, router, gate_up, down, k, normalised, replay)

    def add(self, x, y):
        """x + y. The residual stream is where gradients meet, so their sum is rounded here on the way back."""
        return self._apply(_Add, x, y)

    def rms_norm(self, x, w, eps):
        """x / sqrt(mean(x²) + eps) * w over the last dimension (Zhang & Sennrich 2019); statistics in FP32."""
        return self._apply(_RMSNorm, x, w, eps)

    def swiglu(self, x):
        """x (..., 2F), gate in the first half, value in the second -> silu(gate) * value, (..., F) (Shazeer 2020)."""
        return self._apply(_SwiGLU, x)

    def rope(self, x, cos, sin, H, KV):
        """x (B, T, H + 2 KV, D), the query, key and value heads of a QKV product -> q, k, v (B, heads, T, D), the layout of
        attention, with q and k rotated by the FP32 tables cos, sin (T, D/2) or (B, T, D/2). Feature i is paired with
        i + D/2, as in the Llama and Qwen checkpoints (Su et al. 2021)."""
        return self._apply(_Rope, x, cos, sin, H, KV)

    def attention(self, q, k, v, mask=None):
        """softmax(q kᵀ / sqrt(D)) v, with grouped key/value heads.

        q (B, H, Tq, D), k and v (B, KV, Tk, D), H a multiple of KV. mask None: causal when Tq == Tk, everything visible
        when Tq == 1; else a bool mask that broadcasts to (B, 1, Tq, Tk), True where a query may look. SDPA's own
        is_causal lines up the top left corners, which is wrong for a chunk behind a cache: it is used for Tq == Tk only."""
        assert mask is not None or q.shape[2] in (1, k.shape[2])
        self.operator = "_Attention"
        if self.dtype == torch.float32:
            return self._apply(_Attention, q, k, v, mask)
        if q.shape[2] == 1 and q.shape[1] != k.shape[1]:                 # one query: heads that share a key head become queries
            B, H, _, D = q.shape
            y = F.scaled_dot_product_attention(q.view(B, k.shape[1], -1, D), k, v, attn_mask=mask)
            return self._out(y.reshape(B, H, 1, D))
        causal, grouped = mask is None and q.shape[2] > 1, q.shape[1] != k.shape[1]
        if grouped and mask is not None:                          # no fused kernel takes a mask and grouped heads
            k, v, grouped = *(t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v)), False
        return self._out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped))

    def block(self, block, x, cos, sin, mask, cache, layer):
        """A model.Block's output if these numerics have it in one piece, else None: then its lines are run one by one."""
        return None

    def logits(self, h, w):
        """h (N, C), w (V, C) -> h wᵀ (N, V) in FP32: logits are never rounded to the format."""
        return self._mm32(h, self.weight(w).t())

    def draw(self, logits, u, temperature=1.0):
        """Sample one token a row by inverting the cumulative distribution at u. logits (R, V) FP32, which may be overwritten,
        u (R,) FP32 in [0, 1) -> token (R,) int64 and its FP32 log-prob under softmax(logits / temperature) (R,).

        u * total < total in FP32 for every u below 1, so the token found always has a probability above 0. One uniform number
        a token, drawn beforehand: a row's answer depends on its own numbers only, not on which rows share the batch."""
        logp = self.log_softmax(logits, temperature)
        p = logp.exp()
        cdf = (p.double() if p.is_cuda else p).cumsum(-1)     # a GPU sums in parallel: in FP32 that need not be monotone
        token = (cdf <= u[:, None] * cdf[:, -1:]).sum(-1)
        return token, logp.gather(1, token[:, None])[:, 0]

    def likeliest(self, logits):
        """logits (R, V) FP32 -> the likeliest token (R,) int64 and its FP32 log-prob under softmax(logits) (R,)."""
        logp, token = self.log_softmax(logits, 1.0).max(-1)
        return token, logp

    def token_logprobs(self, h, w, targets, rows=None, temperature=1.0, chunk_bytes=64 << 20):
        """log softmax(h wᵀ / temperature) at `targets`, and the entropy of each distribution (nats, no gradient).

        h (M, C); rows (N) picks the positions of h that are scored (None: all); targets (N) int64. Returns two FP32 (N).
        The logits exist for one chunk of rows at a time, forward and backward: memory is chunk_bytes, not N x V."""
        return self._apply(_TokenLogprobs, h, w, targets, rows, temperature, max(1, chunk_bytes // (4 * w.shape[0])))

    def _add_mm32(self, out, a, b):
        """out += a b in FP32; without a second tensor of out's size, which for a head is vocabulary x width."""
        if a.dtype == torch.float32:
            out.addmm_(a, b)
        else:
            for part, rows in zip(out.split(1 << 14), a.split(1 << 14)):
                part += self._mm32(rows, b)

    def _mm32(self, a, b):
        """a b with an FP32 result, whatever the dtype of a and b."""
        return torch.mm(a, b, out_dtype=torch.float32) if a.dtype != torch.float32 else torch.mm(a, b)

    def log_softmax(self, logits, temperature):
        """FP32 log-probabilities of the tempered policy (..., V). Sampler and trainer both call this one: a temperature
        divides the *logits*; dividing log-probs, or tempering one side only, is a mismatch that no number format can mend."""
        return self._log_softmax(logits if temperature == 1 else logits / temperature)

    def affine(self, x, w, b=None):
        """x wᵀ + b in the format, for the rounded weight of master w."""
        return self.round_(self._product(x, self.weight(w), None if b is None else self.weight(b)))

    def affine_back(self, dy, w):
        """dy w in the format: the input gradient of `affine`."""
        return self.round_(dy @ self.weight(w))

    # -- where torch may add up in an order that depends on how many rows share the call: ExactNumerics replaces these

    def _product(self, x, w, b=None):
        """x wᵀ + b, not yet rounded by us; x (..., I), w (O, I), b (O) or None."""
        return F.linear(x, w, b)

    def _square_sum(self, x):
        """Sum of squares over the last dimension, kept with length 1; x FP32."""
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()

    def _silu(self, x):
        return F.silu(x)

    def _log_softmax(self, x):
        return torch.log_softmax(x, -1)


class ExactNumerics(Numerics):
    """Numerics whose rollout and training agree bit for bit: the same token behind the same tokens gets the same log-prob,
    however many rows, positions or micro-batches share the call, cached or not.

    Libraries choose their kernel, and with it an order of summation, by the shape of the whole call; rounding makes the order
    visible. So a token's value may here depend on its own row, the keys at or before its position, and nothing else:

      products    always of one shape and layout, filled up with zeros: `slab` rows, or `slab` pairs of a row and a key head
      row sums    (norms, softmax) by a fixed tree of elementwise additions
      attention   the keys in chunks at absolute positions; a masked key weighs exactly 0, and adding 0 (times what is finite)
                  changes nothing
      elementwise torch's silu is left out: on a CPU its vector and scalar versions differ, and which one a number meets depends
                  on where it lies. exp, and the arithmetic that IEEE defines, do not have that

    The way back has the ordinary formulas: a gradient has nothing to agree with. What is left to trust is that a product's row
    does not depend on its place among the others of its slab. So nothing is claimed unchecked: train_rl has a self-test, and
    measures exact_share on every step. Source: the causes are those of He et al., "Defeating Nondeterminism in LLM Inference"
    (2025)."""

    exact, slab = True, 64

    def __init__(self, fmt, device="cpu"):
        super().__init__(fmt, device)
        self.operators = "exact"
        if self.device.type == "cuda":
            self.slab = 512

    def attention(self, q, k, v, mask=None):
        assert mask is not None or q.shape[2] in (1, k.shape[2])
        return self._apply(_ExactAttention, q, k, v, mask)

    def logits(self, h, w):
        return self._slabs(h, self.weight(w), None, torch.float32)

    def _product(self, x, w, b=None):
        return self._slabs(x.reshape(-1, x.shape[-1]), w, b, self.dtype).view(*x.shape[:-1], len(w))

    def _slabs(self, x, w, b, dtype):
        """x (N, I) wᵀ + b in pieces of `slab` rows, of fewer if w is a large vocabulary -> (N, O) in dtype."""
        rows = min(self.slab, 1 << max(4, ((1 << 23) // len(w)).bit_length() - 1))
        y, wide = x.new_empty(len(x), len(w), dtype=dtype), -(-w.shape[1] // 16) * 16
        w = _filled(w, max(len(w), 16), wide)                            # a narrow product's order goes by its rows' addresses
        b = b if b is None or len(b) == len(w) else F.pad(b, (0, len(w) - len(b)))
        for part, out in zip(x.split(rows), y.split(rows)):
            part = _filled(part, rows, wide)
            out.copy_((F.linear(part, w, b) if dtype == part.dtype else self._mm32(part, w.t()))[:len(out), :out.shape[1]])
        return y

    def _square_sum(self, x):
        return tree_sum(x * x)

    def _silu(self, x):
        return x / (1 + torch.exp(-x))

    def _log_softmax(self, x):
        x = x - x.amax(-1, keepdim=True)                                 # a maximum is the same in any order
        return x - tree_sum(x.exp()).log_()


def _filled(x, *shape):
    """x in a contiguous tensor of this shape, with zeros behind it in each dimension."""
    if x.shape == shape:
        return x.contiguous()
    return F.pad(x, [n for have, want in zip(x.shape[::-1], shape[::-1]) for n in (0, want - have)])


def tree_sum(x):
    """Sum over the last dimension, kept with length 1: the right half is added to the left one until one number is left. Only
    elementwise additions, so the order depends on the length alone. x is not changed."""
    n = x.shape[-1]
    while n > 1:
        half = n // 2
        y = x[..., :half] + x[..., half:2 * half]
        if n % 2:
            y[..., :1] += x[..., n - 1:n]
        x, n = y, half
    return x


# Each operator below spells out its backward pass, for two reasons: its rounding is then as visible as the forward one,
# and the gradient of a rounded weight goes, in FP32 and unrounded, to the FP32 master (torch.amp.GradScaler refuses FP16
# gradients, rightly: they would overflow while micro-batches are summed).


class _NoGradient:
    """Stands in for an operator's autograd context when nothing will be differentiated: forgets what it is given."""
    def save_for_backward(self, *_): pass
    def mark_non_differentiable(self, *_): pass
    def __setattr__(self, *_): pass


NO_GRADIENT = _NoGradient()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, num):
        wr = num.weight(w)
        y = num._product(x, wr, None if b is None else num.weight(b))
        ctx.save_for_backward(x, wr)
        ctx.num, ctx.where, ctx.bias = num, num.where, b is not None
        return num._out(y)

    @staticmethod
    def backward(ctx, dy):
        x, wr = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])
        dx = ctx.num._out(dy @ wr, "backward", ctx.where).view(x.shape) if ctx.needs_input_grad[0] else None
        dw = ctx.num._mm32(dy.t(), x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        return dx, dw, dy.sum(0, dtype=torch.float32) if ctx.bias and ctx.needs_input_grad[2] else None, None


class _LoRALinear(torch.autograd.Function):
    """x wᵀ + b, then + scale * (x Aᵀ) Bᵀ on the rows that are adapted. Rounded: the frozen product, x Aᵀ, and the sum. Only A
    and B have gradients, in FP32 and unrounded like those of all masters."""

    @staticmethod
    def forward(ctx, x, w, b, lora, A, *rest):
        *B, num = rest
        y, a = num.affine(x, w, b), num.affine(x, A)                        # (..., O), (..., parts * rank)
        out = y.float()
        for (first, rows), a_part, b_part in zip(lora.parts.values(), a.split(lora.rank, -1), B):
            z = num.logits(a_part.reshape(-1, lora.rank), b_part)           # FP32, not rounded
            out[..., first:first + rows] += z.view(*a.shape[:-1], rows).mul_(lora.scale)
        ctx.save_for_backward(x, a)
        ctx.num, ctx.where, ctx.w, ctx.lora, ctx.A, ctx.B = num, num.where, w, lora, A, B
        return num._out(out)

    @staticmethod
    def backward(ctx, dy):
        (x, a), num, lora, r = ctx.saved_tensors, ctx.num, ctx.lora, ctx.lora.rank
        x, a, flat = x.reshape(-1, x.shape[-1]), a.reshape(-1, a.shape[-1]), dy.reshape(-1, dy.shape[-1])
        da, dB = torch.empty_like(a, dtype=torch.float32), []
        for i, ((first, rows), b_part) in enumerate(zip(lora.parts.values(), ctx.B)):
            d = flat[:, first:first + rows]
            da[:, i * r:(i + 1) * r] = num._mm32(d, num.weight(b_part)).mul_(lora.scale)
            dB.append(num._mm32(d.t(), a[:, i * r:(i + 1) * r]).mul_(lora.scale))
        da = num._out(da, "backward", ctx.where)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = num.affine_back(flat, ctx.w).float() + num.affine_back(da, ctx.A)
            dx = num._out(dx, "backward", ctx.where).view(*dy.shape[:-1], -1)
        return dx, None, None, None, num._mm32(da.t(), x), *dB, None


class _Experts(torch.autograd.Function):
    @staticmethod
    def by_expert(index, n_experts):
        """index (N, k) -> for each expert that has tokens: (expert, which of the N k places go to it)."""
        place = torch.argsort(index.flatten(), stable=True)
        counts = torch.bincount(index.flatten(), minlength=n_experts).tolist()
        return [(e, p) for e, p in enumerate(place.split(counts)) if len(p)]

    @staticmethod
    def forward(ctx, x, router, gate_up, down, k, normalised, replay, num):
        (B, T, C), N, where = x.shape, x.shape[0] * x.shape[1], num.where
        x = x.reshape(N, C)
        p = num.log_softmax(num.logits(x.float(), router), 1.0).exp_()                                # (N, E)
        own = p.topk(k, -1).indices
        index = own if replay is None else replay.reshape(N, k).long()
        weight = p.gather(1, index)
        total = weight.sum(-1, keepdim=True) if normalised else None
        share = weight / total if normalised else weight
        wg, wd = num.weight(gate_up), num.weight(down)
        groups = _Experts.by_expert(index, len(router))
        out, kept = x.new_empty(N * k, C), []
        for e, place in groups:
            h = num.round_(num._product(x[place // k], wg[e]))
            gate, value = h.float().chunk(2, -1)
            s = num.round_((num._silu(gate) * value).to(num.dtype))
            out[place] = num.round_(num._product(s, wd[e]))
            kept += [h, s]
        y = torch.zeros(N, C, device=x.device)
        for j in range(k):                                                   # one after another: an order of its own
            y += out.view(N, k, C)[:, j].float() * share[:, j, None]
        ctx.save_for_backward(x, p, index, weight, total, out, *kept)
        ctx.num, ctx.where, ctx.groups, ctx.k, ctx.router, ctx.wg, ctx.wd = num, where, groups, k, router, wg, wd
        own = own.view(B, T, k).to(torch.int16)
        ctx.mark_non_differentiable(own)
        return num._out(y).view(B, T, C), own

    @staticmethod
    def backward(ctx, dy, _):
        x, p, index, weight, total, out, *kept = ctx.saved_tensors
        num, k, (N, C), wg, wd = ctx.num, ctx.k, x.shape, ctx.wg, ctx.wd
        shape, dy = dy.shape, dy.reshape(N, C).float()
        share = weight / total if total is not None else weight
        dshare = (out.view(N, k, C).float() * dy[:, None]).sum(-1)                                    # (N, k)
        dx = torch.zeros(N, C, device=x.device)
        learn = ctx.needs_input_grad[2]
        dwg, dwd = (torch.zeros(w.shape, device=x.device) if learn else None for w in (wg, wd))
        for (e, place), h, s in zip(ctx.groups, kept[::2], kept[1::2]):
            token = place // k
            d = num._out((dy[token] * share.flatten()[place, None]), "backward", ctx.where)           # of the expert's output
            ds = num._out(d @ wd[e], "backward", ctx.where).float()
            gate, value = h.float().chunk(2, -1)
            dh = torch.empty_like(h, dtype=torch.float32)
            dgate, dvalue = dh.chunk(2, -1)
            torch.mul(ds, torch.nn.functional.silu(gate), out=dvalue)
            torch.ops.aten.silu_backward.grad_input(ds * value, gate, grad_input=dgate)
            dh = num._out(dh, "backward", ctx.where)
            dx.index_add_(0, token, num._mm32(dh, wg[e]))
            if learn:
                dwg[e], dwd[e] = num._mm32(dh.t(), x[token]), num._mm32(d.t(), s)
        if total is not None:                                                # share = weight / sum(weight)
            dshare = (dshare - (dshare * share).sum(-1, keepdim=True)) / total
        dp = torch.zeros_like(p).scatter_(1, index, dshare)
        dlogits = p * (dp - (dp * p).sum(-1, keepdim=True))
        dx += dlogits @ num.weight(ctx.router)
        dx = num._out(dx, "backward", ctx.where).view(shape)
        return dx, dlogits.t() @ x.float() if learn else None, dwg, dwd, None, None, None, None


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, w, num):
        ctx.save_for_backward(tokens)
        ctx.rows = w.shape[0]
        return F.embedding(tokens, num.weight(w))

    @staticmethod
    def backward(ctx, dy):
        if not ctx.needs_input_grad[1]:
            return None, None, None
        return None, torch.ops.aten.embedding_dense_backward(dy.float(), ctx.saved_tensors[0], ctx.rows, -1, False), None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, num):
        ctx.num, ctx.where = num, num.where
        return num._out(x + y)

    @staticmethod
    def backward(ctx, dy):
        # autograd has summed two branches into dy, and others may hold the same tensor: round into a new one
        dy = ctx.num._out(ctx.num.rounded(dy), "backward", ctx.where)
        return dy, dy, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, eps, num):
        wr = num.weight(w)
        xf = x.float()
        scale = num._square_sum(xf).div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, wr, scale)
        ctx.num, ctx.where = num, num.where
        return num._out((xf * scale).mul_(wr))

    @staticmethod
    def backward(ctx, dy):
        x, wr, scale = ctx.saved_tensors
        dy, unit, wr = dy.float(), x.float() * scale, wr.float()
        p = dy * unit
        dw = p.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        mean = torch.mv(p.view(-1, len(wr)), wr).div_(len(wr)).view(scale.shape)               # of dy * w * unit, row by row
        dx = (dy * wr).addcmul_(unit, mean, value=-1).mul_(scale)
        return ctx.num._out(dx, "backward", ctx.where), dw, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, num):
        gate, value = x.float().chunk(2, -1)
        silu = num._silu(gate)
        ctx.save_for_backward(x, silu)
        ctx.num, ctx.where = num, num.where
        return num._out(silu * value)

    @staticmethod
    def backward(ctx, dy):
        x, silu = ctx.saved_tensors
        gate, value = x.float().chunk(2, -1)
        dy = dy.float()
        dx = torch.empty_like(x, dtype=torch.float32)
        dgate, dvalue = dx.chunk(2, -1)
        torch.mul(dy, silu, out=dvalue)
        torch.ops.aten.silu_backward.grad_input(dy * value, gate, grad_input=dgate)
        return ctx.num._out(dx, "backward", ctx.where), None


def _rotate(x, cos, sin, out):
    """out[..., i], out[..., i + D/2] = the pair of x rotated; all (B, H, T, D), FP32 or any float dtype of x."""
    x1, x2 = x.float().chunk(2, -1)
    o1, o2 = out.chunk(2, -1)
    torch.mul(x1, cos, out=o1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=o2).addcmul_(x1, sin)
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, H, KV, num):
        B, T, _, D = x.shape
        cos, sin = (t.view(-1, 1, T, D // 2) for t in (cos, sin))          # (1 or B, 1, T, D/2)
        ctx.save_for_backward(cos, sin)
        ctx.num, ctx.where = num, num.where
        q, k, v = x.transpose(1, 2).split((H, KV, KV), 1)
        return (
            *(num._out(_rotate(t, cos, sin, torch.empty(t.shape, dtype=torch.float32, device=t.device))) for t in (q, k)),
            v.clone(memory_format=torch.contiguous_format),
        )

    @staticmethod
    def backward(ctx, dq, dk, dv):                                           # the inverse of a rotation by a is one by -a
        cos, sin = ctx.saved_tensors
        (B, H, T, D), KV = dq.shape, dk.shape[1]
        dx = dq.new_empty(B, T, H + 2 * KV, D)
        q, k, v = dx.transpose(1, 2).split((H, KV, KV), 1)
        for d, out in ((dq, q), (dk, k)):
            turned = _rotate(d, cos, -sin, torch.empty(d.shape, dtype=torch.float32, device=d.device))
            out.copy_(ctx.num._out(turned, "backward", ctx.where))
        v.copy_(ctx.num._out(ctx.num.rounded(dv), "backward", ctx.where))
        return dx, None, None, None, None, None


class _Attention(torch.autograd.Function):
    """Plain attention on FP32 tensors. At the short lengths that a CPU trains, twice as fast as the fused kernel there."""

    @staticmethod
    def probabilities(q, k, v, mask):
        """-> q, k, v as (B KV, rows, D) and softmax(q kᵀ / sqrt(D)): query heads that share a key head are stacked, then every
        (row, key head) pair is one product of the batch."""
        B, H, Tq, D = q.shape
        KV, Tk = k.shape[1], k.shape[2]
        q, k, v = q.reshape(B * KV, H // KV * Tq, D), k.reshape(B * KV, Tk, D), v.reshape(B * KV, Tk, D)
        if mask is None and Tq > 1:
            mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril_()
        if mask is None:
            scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=D ** -0.5)
        else:                                                                # 0 or -inf, added by the product itself
            bias = torch.zeros(mask.shape, device=q.device).masked_fill_(~mask, -math.inf)
            rows = B if mask.dim() == 4 and mask.shape[0] > 1 else 1
            bias = (
                bias.view(rows, 1, 1, Tq, Tk).expand(rows, KV if rows > 1 else 1, H // KV, Tq, Tk).reshape(-1, q.shape[1], Tk)
            )
            scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=D ** -0.5)
        return q, k, v, torch.softmax(scores, -1)

    @staticmethod
    def gradients(num, where, dy, q, k, v, p, of_q, of_k):
        """dy and what `probabilities` gave -> dq, dk, dv in the shapes of_q, of_k, rounded."""
        dy = dy.reshape(q.shape)
        dv = torch.bmm(p.transpose(1, 2), dy)
        ds = torch._softmax_backward_data(torch.bmm(dy, v.transpose(1, 2)), p, -1, torch.float32).mul_(of_q[-1] ** -0.5)
        dq, dk = torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q)
        return (num._out(d.view(shape), "backward", where) for d, shape in ((dq, of_q), (dk, of_k), (dv, of_k)))

    @staticmethod
    def forward(ctx, q, k, v, mask, num):
        ctx.num, ctx.where, ctx.shapes, of_q = num, num.where, (q.shape, k.shape), q.shape
        q, k, v, p = _Attention.probabilities(q, k, v, mask)
        ctx.save_for_backward(q, k, v, p)
        return num._out(torch.bmm(p, v).view(of_q))

    @staticmethod
    def backward(ctx, dy):
        return *_Attention.gradients(ctx.num, ctx.where, dy, *ctx.saved_tensors, *ctx.shapes), None, None


class _ExactAttention(torch.autograd.Function):
    """Attention in products of one shape: up to 16 queries (those of the heads that share a key head together) by 32 keys at
    absolute positions, for `slab` pairs of a row and a key head. Chunks of keys are added up from position 0 on."""
    queries, keys = 16, 32

    @staticmethod
    def forward(ctx, q, k, v, mask, num):
        ctx.save_for_backward(q, k, v, mask)
        ctx.num, ctx.where = num, num.where
        (B, H, Tq, D), (KV, Tk), C = q.shape, k.shape[1:3], _ExactAttention.keys
        G, pairs, S, wide, causal = H // KV, B * KV, num.slab, -(-D // 16) * 16, mask is None and Tq > 1
        n = max(1, _ExactAttention.queries // G)                                # positions whose queries make one product
        if mask is None:
            mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device)
            mask = mask.tril_() if causal else mask
        mask = F.pad(mask.view(-1, 1, Tq, Tk), (0, -Tk % C))
        mask = mask.repeat_interleave(KV, 0) if len(mask) > 1 else mask         # (pairs or 1, 1, Tq, whole chunks)
        q, (k, v) = q.reshape(pairs, G, Tq, D).float() * D ** -0.5, (t.reshape(pairs, Tk, D).float() for t in (k, v))
        out = torch.empty_like(q)
        for a in range(0, pairs, S):
            mine = slice(a, min(a + S, pairs))
            ks, vs = ([_filled(c, S, C, wide) for c in t[mine].split(C, 1)] for t in (k, v))
            for t in range(0, Tq, n):
                here = slice(t, min(t + n, Tq))
                chunks = -(-(here.stop if causal else Tk) // C)                 # those behind it weigh 0

                def product(x, y, width):                                       # x (pairs, G, positions, .), y (S, width, .)
                    full = torch.bmm(_filled(x, S, G, n, width).view(S, G * n, width), y).view(S, G, n, -1)
                    return full[:x.shape[0], :, :x.shape[2]]
                scores = torch.cat([product(q[mine, :, here], kc.transpose(1, 2), wide) for kc in ks[:chunks]], -1)
                scores.masked_fill_(~mask[mine if len(mask) > 1 else slice(None), :, here, :chunks * C], -math.inf)
                p = (scores - scores.amax(-1, keepdim=True)).exp_()
                total, y = 0, 0
                for pc, vc in zip(p.split(C, -1), vs):
                    total, y = total + tree_sum(pc), y + product(pc, vc, C)
                out[mine, :, here] = (y / total)[..., :D]
        return num._out(out.view(B, H, Tq, D))

    @staticmethod
    def backward(ctx, dy):
        q, k, v, mask = ctx.saved_tensors
        again = _Attention.probabilities(q.float(), k.float(), v.float(), mask)
        return *_Attention.gradients(ctx.num, ctx.where, dy.float(), *again, q.shape, k.shape), None, None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, w, targets, rows, temperature, chunk, num):
        ctx.save_for_backward(h, targets, rows)
        ctx.w, ctx.temperature, ctx.chunk, ctx.num, ctx.where = w, temperature, chunk, num, num.where
        logp = torch.empty(len(targets), device=h.device)
        entropy = torch.empty_like(logp)
        ctx.kept = None
        for s in range(0, len(targets), chunk):
            s = slice(s, s + chunk)
            lp = num.log_softmax(num.logits(h[s] if rows is None else h[rows[s]], w), temperature)
            logp[s] = lp.gather(1, targets[s, None])[:, 0]
            p = lp.exp()
            entropy[s] = -(p * lp).sum(-1)
            if len(targets) <= chunk:                            # one chunk is all there is: keep it, and save the way back
                ctx.kept = p
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, dlogp, _):
        h, targets, rows = ctx.saved_tensors
        num, wr = ctx.num, ctx.num.weight(ctx.w)
        dh = torch.zeros_like(h)
        dw = torch.zeros_like(wr, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for s in range(0, len(targets), ctx.chunk):
            s = slice(s, s + ctx.chunk)
            hs = h[s] if rows is None else h[rows[s]]
            d = ctx.kept if ctx.kept is not None else num.log_softmax(num.logits(hs, ctx.w), ctx.temperature).exp_()
            ctx.kept = None
            # d logp / d logits = onehot - softmax
            d[torch.arange(len(d), device=d.device), targets[s]] -= 1
            d = num._out(d.mul_(dlogp[s, None] * (-1 / ctx.temperature)), "backward", ctx.where)
            if dw is not None:
                num._add_mm32(dw, d.t(), hs)
            d = num._out(d @ wr, "backward", ctx.where)
            if rows is None:
                dh[s] = d
            else:
                dh[rows[s]] = d
        return dh, dw, None, None, None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# Device, loss scale, mismatch


def pick_device(name="auto"):
    """`auto`, `cpu`, `cuda` or `cuda:N` -> torch.device, with the process set up so that nothing is rounded elsewhere."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        n = torch.cuda.device_count()
        if (device.index or 0) >= n:
            raise InputError(f"device {name!r} is not there: torch {torch.__version__} sees {n} CUDA device{'s' * (n != 1)}")
        if device.index is None:                                             # set_device refuses a device without an index
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)
        # By default cuBLAS may add partial sums of a product in 16 bit. Then the accumulator is no longer FP32.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_tf32 = False                        # FP32 means FP32
    return device


@contextmanager
def reproducible(device):
    """Backward passes inside give the same bits every time. On a GPU, fused attention otherwise adds up its gradients in
    whatever order the blocks finish. Only around backward: torch would refuse the sampler's cumsum, wrongly for its shapes."""
    if device.type != "cuda":
        yield
        return
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def make_scaler(num, init_scale=2.0 ** 16):
    """The loss scaler: on for formats with few exponent bits, a no-op otherwise, so that the loop is the same for all.

    Growth interval 400 as in the paper. Per update: scale(loss).backward() for every micro-batch, unscale_ once, clip,
    step (skipped if a gradient is inf or nan), update (halves after a skip)."""
    return torch.amp.GradScaler(num.device.type, init_scale=init_scale, growth_interval=400, enabled=num.fmt.needs_loss_scaling)


def banner(rollout, train, scaler):
    """One line: what is computed in which format, and why."""
    where = (
        torch.cuda.get_device_name(train.device) if train.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads, {train.operators} operators"
    )
    how = "FP32 GEMM, result rounded (a CPU's own half GEMM is slow, a GPU has none of this format)" if train.emulated else \
        "FP32" if train.dtype == torch.float32 else "FP32 on tensor cores, 16-bit reductions off"
    same = "DIFFERENT roundings on the two sides" if rollout.fmt != train.fmt else \
        "exact, one order of summation on both sides" if train.exact else "same roundings on both sides"
    scale = f"loss scale {scaler.get_scale():.0f} ({train.fmt.exp} exponent bits)" if scaler.is_enabled() else \
        f"no loss scale ({train.fmt.exp} exponent bits reach as far as FP32)"
    return f"{where} | rollout {rollout.fmt.name}, train {train.fmt.name}: {same} | accumulate {how} | {scale}"


def mismatch(logp_rollout, logp_train, lengths):
    """How far the policy that acted (mu) is from the policy that learns (pi), on the tokens of one batch, before any update.

    logp_rollout, logp_train: FP32 (N,), the answers' tokens one answer after another; lengths: (R,) tokens per answer,
    N in all. With d = log mu(y_t) - log pi(y_t):
      logp_gap_mean, _p99, _max   of |d|, nats                      prob_gap_mean   mean |mu - pi|  (verl's rollout_probs_diff)
      kl_k1   mean d, unbiased KL[mu||pi] per token                 kl_k3   mean (e^-d - 1 + d), never negative
      seq_kl  mean over answers of sum_t d, the paper's figure      ratio_outliers  share of pi/mu outside [0.9, 1.1]
      exact_share   share of tokens with d == 0, bit for bit
    Source: arXiv 2510.26788 section 3; Schulman, "Approximating KL divergence" (2020)."""
    d = (logp_rollout - logp_train).double()
    gap = d.abs()
    ratio = torch.exp(-d)
    answer = torch.repeat_interleave(torch.arange(len(lengths), device=d.device), lengths.to(d.device))
    seq = torch.zeros(len(lengths), dtype=d.dtype, device=d.device).index_add_(0, answer, d)
    return {k: float(v) for k, v in dict(
        logp_gap_mean=gap.mean(), logp_gap_p99=gap.sort().values[min(len(d) - 1, int(0.99 * len(d)))], logp_gap_max=gap.max(),
        prob_gap_mean=(logp_rollout.double().exp() - logp_train.double().exp()).abs().mean(),
        kl_k1=d.mean(), kl_k3=(torch.expm1(-d) + d).mean(), seq_kl=seq.mean(),
        ratio_outliers=((ratio < 0.9) | (ratio > 1.1)).double().mean(), exact_share=(d == 0).double().mean()).items()}


if __name__ == "__main__":
    import sys
    if sys.argv[1:] == ["--explain"]:
        from experiments.explain import main
    elif sys.argv[1:]:
        sys.exit("precision.py: python precision.py, or python precision.py --explain")
    else:
        from experiments.anatomy import main
    main()
