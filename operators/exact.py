"""operators/exact.py: rollout and training agree bit for bit.

The same token after the same tokens gets the same log-prob, however many rows, positions or
micro-batches share the call, cached or not. Ordinarily it does not: libraries choose their kernel,
and with it an order of summation, by the shape of the whole call, and rounding makes the order
visible. Here a token's value depends on its own row and on the keys at or before its position:

    products     always of one shape and layout, filled up with zeros: `slab` rows, or `slab` pairs
                 of a row and a key head
    row sums     (norms, softmax) by a fixed tree of elementwise additions
    attention    the keys in chunks at absolute positions. A masked key weighs exactly 0, and adding
                 0 times what is finite changes nothing
    elementwise  without torch's silu: on a CPU its vector and scalar versions differ, and the place
                 in memory decides which a number gets. exp and IEEE's arithmetic do not differ

The way back is the plain operator's: a gradient has nothing to agree with. One assumption is left:
a product's row does not depend on its place among the other rows of its slab. So nothing is claimed
unchecked: a run begins with a self-test, and measures exact_share on every step. Source: He et al.,
"Defeating Nondeterminism in LLM Inference" (2025).
"""
import math

import torch
import torch.nn.functional as F

from precision import Numerics, mm32


class ExactNumerics(Numerics):
    exact, slab, operators = True, 64, "exact"

    def __init__(self, fmt, device="cpu"):
        super().__init__(fmt, device)
        if self.device.type == "cuda":
            self.slab = 512

    def product(self, x, w, b=None):
        return self._slabs(x.reshape(-1, x.shape[-1]), w, b, x.dtype).view(*x.shape[:-1], len(w))

    def logits(self, h, w):
        return self._slabs(h, self.weight(w), None, torch.float32)

    def log_softmax(self, logits, temperature=1.0):
        x = logits if temperature == 1 else logits / temperature
        x = x - x.amax(-1, keepdim=True).detach()           # a maximum is the same in any order
        return x - tree_sum(x.exp()).log()

    def rms_norm(self, x, w, eps):
        return _Exact.apply(self, Numerics.rms_norm, norm, x, w, eps)

    def swiglu(self, x):
        return _Exact.apply(self, Numerics.swiglu, swiglu, x)

    def attention(self, q, k, v, mask=None):
        assert mask is not None or q.shape[2] in (1, k.shape[2])
        return _Exact.apply(self, Numerics.attention, attention, q, k, v, mask)

    def _slabs(self, x, w, b, dtype):
        """x (N, I) wᵀ + b in pieces of `slab` rows, of fewer if w is a large vocabulary -> (N,
        O)."""
        rows = min(self.slab, 1 << max(4, ((1 << 23) // len(w)).bit_length() - 1))
        y, wide = x.new_empty(len(x), len(w), dtype=dtype), -(-w.shape[1] // 16) * 16
        w = filled(w, max(len(w), 16), wide)            # a narrow product's order goes by addresses
        b = b if b is None or len(b) == len(w) else F.pad(b, (0, len(w) - len(b)))
        for part, out in zip(x.split(rows), y.split(rows)):
            part = filled(part, rows, wide)
            full = F.linear(part, w, b) if dtype == part.dtype else mm32(part, w.t())
            out.copy_(full[:len(out), :out.shape[1]])
        return y


class _Exact(torch.autograd.Function):
    """Forward: `exact`, rounded. Backward: the plain operator's, done again for its gradient."""

    @staticmethod
    def forward(ctx, num, plain, exact, *args):
        ctx.num, ctx.where, ctx.plain = num, num.where, plain
        ctx.masters = [a if isinstance(a, torch.nn.Parameter) else None for a in args]
        ctx.others = [None if isinstance(a, torch.Tensor) else a for a in args]
        ctx.save_for_backward(*(a if isinstance(a, torch.Tensor) and m is None else None
                                for a, m in zip(args, ctx.masters)))
        return num.down(exact(num, *args))

    @staticmethod
    def backward(ctx, dy):
        num, needs = ctx.num, ctx.needs_input_grad[3:]
        args = [x.detach().requires_grad_(n) if x is not None else m if m is not None else o
                for x, m, o, n in zip(ctx.saved_tensors, ctx.masters, ctx.others, needs)]
        spy, num.spy, num.where = num.spy, None, ctx.where
        with torch.enable_grad():
            y = ctx.plain(num, *args)
        num.spy = spy
        grads = iter(torch.autograd.grad(y, [a for a, n in zip(args, needs) if n], dy))
        return None, None, None, *(next(grads) if n else None for n in needs)


def norm(num, x, w, eps):
    x = x.float()
    return x * (tree_sum(x * x) / x.shape[-1] + eps).rsqrt() * num.weight(w)


def swiglu(num, x):
    gate, value = x.float().chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * value


QUERIES, KEYS = 16, 32


def attention(num, q, k, v, mask):
    """In products of one shape: up to 16 queries (those of the heads that share a key head
    together) by 32 keys at absolute positions, for `slab` pairs of a row and a key head. Chunks of
    keys are added up from position 0 on."""
    (B, H, Tq, D), (KV, Tk) = q.shape, k.shape[1:3]
    G, pairs, S, wide, causal = H // KV, B * KV, num.slab, -(-D // 16) * 16, mask is None and Tq > 1
    n = max(1, QUERIES // G)                              # positions whose queries make one product
    if mask is None:
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device)
        mask = mask.tril_() if causal else mask
    mask = F.pad(mask.view(-1, 1, Tq, Tk), (0, -Tk % KEYS))
    mask = mask.repeat_interleave(KV, 0) if len(mask) > 1 else mask    # (pairs or 1, 1, Tq, chunks)
    q = q.reshape(pairs, G, Tq, D).float() * D ** -0.5
    k, v = (t.reshape(pairs, Tk, D).float() for t in (k, v))
    out = torch.empty_like(q)

    def product(x, y, width):                          # x (pairs, G, positions, .), y (S, width, .)
        full = torch.bmm(filled(x, S, G, n, width).view(S, G * n, width), y).view(S, G, n, -1)
        return full[:x.shape[0], :, :x.shape[2]]
    for a in range(0, pairs, S):
        mine = slice(a, min(a + S, pairs))
        ks, vs = ([filled(c, S, KEYS, wide) for c in t[mine].split(KEYS, 1)] for t in (k, v))
        for t in range(0, Tq, n):
            here = slice(t, min(t + n, Tq))
            chunks = -(-(here.stop if causal else Tk) // KEYS)          # the others weigh 0
            scores = [product(q[mine, :, here], c.transpose(1, 2), wide) for c in ks[:chunks]]
            seen = mask[mine if len(mask) > 1 else slice(None), :, here, :chunks * KEYS]
            scores = torch.cat(scores, -1).masked_fill_(~seen, -math.inf)
            p = (scores - scores.amax(-1, keepdim=True)).exp_()
            total, y = 0, 0
            for pc, vc in zip(p.split(KEYS, -1), vs):
                total, y = total + tree_sum(pc), y + product(pc, vc, KEYS)
            out[mine, :, here] = (y / total)[..., :D]
    return out.view(B, H, Tq, D)


def filled(x, *shape):
    """x in a contiguous tensor of this shape, with zeros after it in each dimension."""
    if x.shape == shape:
        return x.contiguous()
    return F.pad(x, [n for have, want in zip(x.shape[::-1], shape[::-1]) for n in (0, want - have)])


def tree_sum(x):
    """Sum over the last dimension, kept with length 1: the right half is added to the left one
    until one number is left. Only elementwise additions, so the order depends on the length
    alone."""
    n = x.shape[-1]
    while n > 1:
        half = n // 2
        y = x[..., :half] + x[..., half:2 * half]
        if n % 2:
            y = torch.cat((y[..., :1] + x[..., n - 1:n], y[..., 1:]), -1)
        x, n = y, half
    return x
