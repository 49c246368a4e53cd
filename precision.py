"""precision.py: number formats, rounding, and the model's operators.

RL fine-tuning acts with one set of roundings and learns with another. This file makes both the
same. `Numerics` is one number format on one device. The model, the sampler and the trainer call its
operators and nothing else. Each operator is plain differentiable torch in FP32 between two casts:

    up(x)     the FP32 view of an input; on the way back, its gradient is rounded to the format
    down(y)   the output, rounded to the format; on the way back, the gradient passes in FP32

Weights are rounded too (`hold`, `refresh`), and the gradient of the logits; nothing else is. Two
operators have a backward pass of their own: the product, since the gradient of a weight must stay
in FP32, and the token log-probs, whose logits come in chunks. How is a value stored?

    CUDA   in the format itself. Tensor cores multiply, add up in FP32, round on output.
    CPU    in FP32 tensors that hold only numbers of the format. An FP32 product, then one rounding.

That is the same arithmetic. (One exception: a GPU's fused attention also rounds the probabilities.)
A CPU's native half product is 5 to 40 times slower than its FP32 product and is never used. The
FP32 master weights live in the model; `refresh` rounds them once per update, and rollout and
training read the same rounded ones. Left out: torch.autocast, which hides what is rounded.
"""
import difflib
import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F


class InputError(ValueError):
    """The user gave something that cannot work. The commands print it as one line."""


def nearest(name, known):
    """`, did you mean X?` for the known name that is closest to `name`, or nothing."""
    close = [k for k in known if sorted(k) == sorted(name)]         # letters in another order
    close += difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


# --------------------------------------------------------------------------------------------------
# Formats are data


@dataclass(frozen=True)
class Format:
    """A binary floating-point format with IEEE semantics: one sign bit, `exp` exponent bits, `man`
    mantissa bits, the top exponent for inf and nan, subnormals, round to nearest even."""
    name: str
    exp: int
    man: int
    native: torch.dtype | None = None   # the torch dtype that is this very format, if any

    eps = property(lambda f: 2.0 ** -f.man)                    # spacing of the numbers just above 1
    tiny = property(lambda f: 2.0 ** (2 - 2 ** (f.exp - 1)))        # smallest normal number
    smallest = property(lambda f: f.tiny * f.eps)                   # half of it and less becomes 0
    max = property(lambda f: 2.0 ** (2 ** (f.exp - 1) - 1) * (2 - f.eps))         # more becomes inf
    # Gradients of an RL loss are around 1e-4 / tokens: a narrow format loses most of them.
    needs_loss_scaling = property(lambda f: f.exp < 8)


FORMATS = {f.name: f for f in (
    Format("fp32", 8, 23, torch.float32),
    Format("tf32", 8, 10),              # FP16's mantissa with FP32's range: a storage format here
    Format("bf16", 8, 7, torch.bfloat16),
    Format("fp16", 5, 10, torch.float16),
)}


def parse_format(text):
    """`fp32`, `tf32`, `bf16`, `fp16`, or any `eXmY` with 2 <= X <= 8 and 1 <= Y <= 23 -> Format."""
    name = str(text).lower()
    if name in FORMATS:
        return FORMATS[name]
    m = re.fullmatch(r"e(\d{1,3})m(\d{1,3})", name)
    if not m:
        raise InputError(f"unknown number format {str(text)[:40]!r}{nearest(name, FORMATS)} "
                         f"(use {', '.join(FORMATS)} or eXmY such as e5m7)")
    exp, man = int(m[1]), int(m[2])
    if not (2 <= exp <= 8 and 1 <= man <= 23):
        raise InputError(f"number format {text!r} makes no sense: e2m1 to e8m23 are known")
    known = {(f.exp, f.man): f for f in FORMATS.values()}
    return known.get((exp, man), Format(name, exp, man))


def emulate(x, fmt):
    """FP32 x -> the nearest number of any `fmt`, ties to even, as a new FP32 tensor. A float's bit
    pattern is an integer that grows with the number, so rounding is integer addition: add just less
    than half of the last kept bit (exactly half if that bit is odd) and cut. A carry runs into the
    exponent, which is right. Subnormals have a fixed spacing: adding and then subtracting 2^23
    spacings lets the FP32 adder round them."""
    cut = 23 - fmt.man
    y = x.clone()
    if cut:
        bits = y.view(torch.int32)
        bits += ((bits >> cut) & 1) + ((1 << (cut - 1)) - 1)
        bits &= -(1 << cut)
    if fmt.exp < 8:
        big = 2.0 ** 23 * fmt.smallest
        subnormal = torch.copysign((x.abs() + big) - big, x)      # what becomes zero keeps its sign
        y.masked_fill_(y > fmt.max, math.inf).masked_fill_(y < -fmt.max, -math.inf)
        y = torch.where(x.abs() < fmt.tiny, subnormal, y)
    return torch.where(torch.isfinite(x), y, x)                   # inf and nan are what they were


# --------------------------------------------------------------------------------------------------
# The operators


class Numerics:
    """One number format on one device: it rounds, multiplies, and keeps the rounded weights.

    fmt: Format or its name. Activations, rounded weights and the KV cache are kept in `dtype`: the
    format's own on CUDA, FP32 wherever the format is emulated. `where` is the layer at work, for
    messages. `spy`, if set, is called as spy(kind, where, rounded, before) with the output of each
    operator (kind "forward") and the gradient of each input ("backward")."""

    exact = False                       # operators/exact.py: rollout and training agree bit for bit
    operators = "plain"

    def __init__(self, fmt, device="cpu"):
        self.fmt = parse_format(fmt) if isinstance(fmt, str) else fmt
        self.device = torch.device(device)
        on_tensor_cores = self.device.type == "cuda" and self.fmt.native is not None
        self.dtype = self.fmt.native if on_tensor_cores else torch.float32
        self.half = self.dtype != torch.float32
        self.emulated = not self.half and self.fmt.name != "fp32"
        self.where, self.spy, self._rounded = "", None, {}

    # -- rounding

    def round(self, x):
        """FP32 x -> the nearest numbers of the format, in `dtype`."""
        if not self.emulated:
            return x.to(self.dtype)
        return x.to(self.fmt.native).float() if self.fmt.native else emulate(x, self.fmt)

    def up(self, x):
        """The FP32 view of an input. On the way back, its gradient is rounded to the format."""
        return _Up.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else x.float()

    def down(self, y):
        """The output, rounded to the format. On the way back, the gradient passes in FP32."""
        x = _Down.apply(y, self) if torch.is_grad_enabled() and y.requires_grad else self.round(y)
        if self.spy:
            self.spy("forward", self.where, x.detach(), y.detach())
        return x

    def operand(self, x):
        """An input of a product: `up`, or x itself where tensor cores take the format as it is."""
        return x if self.half else self.up(x)

    # -- weights

    @torch.no_grad()
    def hold(self, parameters):
        """Keep a rounded copy of these FP32 master weights, and of no others. What needs no copy:
        masters in fp32, a parameter marked `keep_fp32`, a frozen one that is rounded already."""
        self._rounded = {}
        for p in parameters:
            fp32 = self.fmt.name == "fp32" and p.dtype == torch.float32
            if fp32 or getattr(p, "keep_fp32", False):
                self._rounded[p] = p.detach()
            else:
                r = self.round(p.detach().float())
                own = not p.requires_grad and p.dtype == r.dtype and torch.equal(p, r)
                self._rounded[p] = p.detach() if own else r
        return self

    @torch.no_grad()
    def refresh(self):
        """Round the trained masters again, once per update. In place: graphs read addresses."""
        for p, r in self._rounded.items():
            if p.requires_grad and r.data_ptr() != p.data_ptr():
                r.copy_(self.round(p))

    def weight(self, p):
        """The rounded copy of master weight `p`, in `dtype`, without a gradient."""
        return self._rounded[p]

    def gain(self, p, r=None):
        """r, the rounded copy of a master's numbers p, in FP32. p + (r - p) is exactly r, and gives
        the gradient to p in FP32: a straight-through estimator (Bengio et al. 2013)."""
        r = self.weight(p) if r is None else r
        return p + (r - p).detach() if torch.is_grad_enabled() else r.float()

    # -- operators. x is (..., C) in `dtype`, weights are FP32 masters

    def embed(self, tokens, w):
        """tokens (B, T) int64, w (V, C) -> (B, T, C): the rows of the rounded table."""
        return self.down(self.gain(F.embedding(tokens, w), F.embedding(tokens, self.weight(w))))

    def linear(self, x, w, b=None):
        """x (..., I), w (O, I), b (O) or None -> x wᵀ + b, (..., O)."""
        return self.down(_Product.apply(self.operand(x), w, b, self))

    def add(self, x, y, scale=1.0):
        """x + scale * y. The residual stream adds two gradients; their sum is rounded here."""
        return self.down(self.up(x) + (self.up(y) if scale == 1 else scale * self.up(y)))

    def mix(self, xs, weights):
        """xs (N, K, C), weights (N, K) FP32 -> sum over k of weights * xs, (N, C), in order."""
        xs = self.up(xs)
        return self.down(sum(xs[:, k] * weights[:, k, None] for k in range(xs.shape[1])))

    def rms_norm(self, x, w, eps):
        """x / sqrt(mean(x²) + eps) * w over the last dimension (Zhang & Sennrich 2019)."""
        return self.down(F.rms_norm(self.up(x), w.shape, self.gain(w), eps))

    def swiglu(self, x):
        """x (..., 2F), gate, then value -> silu(gate) * value, (..., F) (Shazeer 2020)."""
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)

    def rope(self, x, cos, sin):
        """x (B, heads, T, D) -> the same, rotated by FP32 tables (T, D/2) or (B, 1, T, D/2).
        Feature i is paired with i + D/2, as in the Llama and Qwen checkpoints (Su et al. 2021)."""
        a, b = self.up(x).chunk(2, -1)
        return self.down(torch.cat((a * cos - b * sin, b * cos + a * sin), -1))

    def attention(self, q, k, v, mask=None):
        """softmax(q kᵀ / sqrt(D)) v, with grouped key/value heads.

        q (B, H, Tq, D), k and v (B, KV, Tk, D), H a multiple of KV. mask None: causal if Tq == Tk,
        all visible if Tq == 1; else bool, broadcast to (B, 1, Tq, Tk), True where a query may look.
        SDPA's own is_causal lines up the top left corners: wrong for a chunk after a cache."""
        (B, H, Tq, D), (KV, Tk) = q.shape, k.shape[1:3]
        assert mask is not None or Tq in (1, Tk)
        q, k, v = self.operand(q), self.operand(k), self.operand(v)
        if Tq == 1 and H != KV:          # one query: the heads that share a key head become queries
            y = F.scaled_dot_product_attention(q.reshape(B, KV, -1, D), k, v, mask)
            return self.down(y.reshape(B, H, 1, D))
        causal, grouped = mask is None and Tq > 1, H != KV
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
        return self.down(y)

    def block(self, block, x, cos, sin, mask, cache):
        """A model.Block's output if these numerics have it in one piece. None: run its lines."""
        return None

    # -- log-probs: the two sides of the mismatch, side by side

    def log_softmax(self, logits, temperature=1.0):
        """FP32 log-probs of the tempered policy (..., V). Sampler and trainer both call this one. A
        temperature divides the *logits* on both sides: on one alone it would make two policies."""
        return torch.log_softmax(logits if temperature == 1 else logits / temperature, -1)

    def logits(self, h, w):
        """h (N, C), w (V, C) -> h wᵀ (N, V) in FP32: logits are never rounded. No gradient."""
        return mm32(h, self.weight(w).t())

    def router_logits(self, x, w):
        """x (N, C), w (E, C) FP32 -> x wᵀ (N, E) FP32: rounding would send tokens elsewhere."""
        return _Product.apply(self.up(x), w, None, self)

    def draw(self, logits, u, temperature=1.0):
        """Sample one token a row by inverting the cumulative distribution at u. logits (R, V) FP32,
        may be overwritten; u (R,) FP64 in [0, 1) -> token (R,) int64 and its FP32 log-prob under
        softmax(logits / temperature) (R,): the log-prob that the rollout records.

        Sums run in FP64: in FP32, a sixth of a vocabulary of 150,000 could never be drawn. First a
        piece of it is drawn, then a token in the piece. Its probability is always above 0."""
        logp = self.log_softmax(logits, temperature)
        p, odd = logp.exp(), -logp.shape[-1] % 128
        p = (F.pad(p, (0, odd)) if odd else p).unflatten(-1, (-1, 128))     # no copy of a large one
        pieces = p.sum(-1, dtype=torch.float64).cumsum(-1)                          # (R, V / 128)
        goal = u[:, None] * pieces[:, -1:]
        piece = (pieces <= goal).sum(-1, keepdim=True)
        cdf = p[torch.arange(len(p), device=p.device), piece[:, 0]].double().cumsum(-1)  # (R, 128)
        rest = (goal - pieces.gather(1, piece) + cdf[:, -1:]).clamp(min=0)
        token = ((cdf <= rest) & (cdf < cdf[:, -1:])).sum(-1) + 128 * piece[:, 0]
        return token, logp.gather(1, token[:, None])[:, 0]

    def likeliest(self, logits):
        """logits (R, V) FP32 -> the likeliest token (R,) int64, and its FP32 log-prob (R,)."""
        return self.log_softmax(logits).max(-1)[::-1]

    def token_logprobs(self, h, w, targets, rows=None, temperature=1.0, chunk_bytes=64 << 20):
        """log softmax(h wᵀ / temperature) at `targets`, and the entropy of each distribution, nats.

        h (M, C); rows (N) picks the positions of h that are scored (None: all); targets (N) int64.
        Returns two FP32 (N), both with gradients: training compares the first with `draw`'s. The
        logits exist for one chunk of rows at a time: memory is chunk_bytes, not N x V."""
        chunk = max(1, chunk_bytes // (4 * w.shape[0]))
        return _TokenLogprobs.apply(h, w, targets, rows, temperature, chunk, self)

    # -- what the operators above are made of, and faster or stricter numerics have otherwise

    def product(self, x, w, b=None):
        """x wᵀ + b of tensors in one dtype, not yet rounded by us."""
        return F.linear(x, w, b)

    def logits_back(self, d, w):
        """d (N, V), the rounded gradient of logits -> d w (N, C), not yet rounded by us."""
        return d @ self.weight(w)

    def probabilities(self, h, w, targets, temperature):
        """-> softmax(h wᵀ / temperature) (N, V), its log at targets (N), its entropy (N)."""
        lp = self.log_softmax(self.logits(h, w), temperature)
        p = lp.exp()
        return p, lp.gather(1, targets[:, None])[:, 0], torch.special.entr(p).sum(-1)

    def logits_gradient(self, p, targets, dlogp, dentropy):
        """The rounded gradient of the logits: dlogp (onehot - p) - dentropy p (log p + entropy)."""
        d = torch.zeros_like(p)
        if dlogp is not None:
            d = (p * -dlogp[:, None]).scatter_add_(1, targets[:, None], dlogp[:, None])
        if dentropy is not None:
            e = torch.special.entr(p)                           # -p log p, and 0 where p is 0
            d += (e - p * e.sum(-1, keepdim=True)) * dentropy[:, None]
        return self.round(d)


def mm32(a, b):
    """a b with an FP32 result, whatever the dtype of a and b."""
    return torch.mm(a, b) if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, num):
        ctx.num, ctx.where = num, num.where
        return x.float()

    @staticmethod
    def backward(ctx, dy):
        dx = ctx.num.round(dy)
        if ctx.num.spy:
            ctx.num.spy("backward", ctx.where, dx, dy)
        return dx, None


class _Down(torch.autograd.Function):
    forward = staticmethod(lambda ctx, y, num: num.round(y))
    backward = staticmethod(lambda ctx, dy: (dy.float(), None))


class _Product(torch.autograd.Function):
    """x wᵀ + b for the rounded weights. The gradients of w and b go to their masters in FP32, not
    rounded: GradScaler refuses FP16 ones, which would overflow as micro-batches add up."""

    @staticmethod
    def forward(ctx, x, w, b, num):
        wr = num.weight(w)
        ctx.save_for_backward(x, wr)
        return num.product(x, wr, None if b is None else num.weight(b))

    @staticmethod
    def backward(ctx, dy):
        x, wr = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1])
        dx = dy @ wr if ctx.needs_input_grad[0] else None
        dw = mm32(flat.t(), x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        return dx, dw, flat.sum(0, dtype=torch.float32) if ctx.needs_input_grad[2] else None, None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, w, targets, rows, temperature, chunk, num):
        ctx.save_for_backward(h, targets, rows)
        ctx.w, ctx.temperature, ctx.chunk, ctx.num = w, temperature, chunk, num
        ctx.where = num.where
        ctx.set_materialize_grads(False)
        (logp, entropy), ctx.kept = torch.empty(2, len(targets), device=h.device), None
        for s in (slice(i, i + chunk) for i in range(0, len(targets), chunk)):
            hs = h[s] if rows is None else h[rows[s]]
            p, logp[s], entropy[s] = num.probabilities(hs, w, targets[s], temperature)
            if len(targets) <= chunk:                           # one chunk is all there is: keep it
                ctx.kept = p
        return logp, entropy

    @staticmethod
    def backward(ctx, dlogp, dentropy):
        h, targets, rows = ctx.saved_tensors
        num, w, dh = ctx.num, ctx.w, torch.zeros_like(h)
        dw = torch.zeros(w.shape, device=h.device) if ctx.needs_input_grad[1] else None
        for s in (slice(i, i + ctx.chunk) for i in range(0, len(targets), ctx.chunk)):
            hs = h[s] if rows is None else h[rows[s]]
            p, ctx.kept = ctx.kept, None
            if p is None:
                p, _, _ = num.probabilities(hs, w, targets[s], ctx.temperature)
            dl, de = (None if d is None else d[s] / ctx.temperature for d in (dlogp, dentropy))
            d = num.logits_gradient(p, targets[s], dl, de)
            if dw is not None:
                for part, columns in zip(dw.split(1 << 14), d.t().split(1 << 14)):
                    part += mm32(columns, hs)                  # no second tensor of the head's size
            d = num.round(num.logits_back(d, w))
            if num.spy:
                num.spy("backward", ctx.where, d, d)
            dh[s if rows is None else rows[s]] = d
        return dh, dw, None, None, None, None, None


def make_scaler(num, init_scale=2.0 ** 16):
    """The loss scaler: on for formats with few exponent bits, else a no-op. Growth interval 400 as
    in the paper. Per update: scale(loss).backward() for each micro-batch, unscale_ once, clip, step
    (skipped if a gradient is inf or nan), update (halves after a skip)."""
    return torch.amp.GradScaler(num.device.type, init_scale=init_scale, growth_interval=400,
                                enabled=num.fmt.needs_loss_scaling)
