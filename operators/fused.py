"""operators/fused.py: norm, SwiGLU, rotation and sum as one kernel each, for a GPU.

A plain operator is torch between two casts: several kernels, each of which reads and writes all of
its numbers. torch.compile makes one of them, forward and back, out of the very lines of
precision.py: there is no second version of the arithmetic. Products and attention stay what they
are. Exact mode has operators of its own.

A compiler may leave out a rounding: it drops a cast to half and back between two operators that it
fuses. So each operator is compiled alone and ends in memory, in the format; and the setting that
keeps the casts is on, for those who compile more than that.
"""
import functools

import torch

from precision import Numerics


class _Inside(Numerics):
    """What a compiled operator sees: casts whose gradients are casts, and a gain that was made
    outside. It knows no layer and no weight: one compilation serves all of them."""
    up = staticmethod(lambda x: x.float())
    gain = staticmethod(lambda p: p)

    def down(self, y):
        return y.to(self.dtype)


@functools.cache
def compiled(operator):
    """A method of Numerics, compiled. One compilation each for a token and for many, with and
    without gradients, for either format."""
    import torch._inductor.config
    torch._inductor.config.emulate_precision_casts = True
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(operator, dynamic=True)


class Fused(Numerics):
    """Numerics in half precision whose add, rms_norm, swiglu and rope are compiled by torch, unless
    someone looks at the numbers."""
    operators = "fused"

    def __init__(self, fmt, device):
        super().__init__(fmt, device)
        self.inside = _Inside(self.fmt, device)

    def add(self, x, y, scale=1.0):
        return self._run(Numerics.add, x, y, scale)

    def rms_norm(self, x, w, eps):
        return self._run(Numerics.rms_norm, x, w if self.spy else self.gain(w), eps)

    def swiglu(self, x):
        return self._run(Numerics.swiglu, x)

    def rope(self, x, cos, sin):
        return self._run(Numerics.rope, x, cos, sin)

    def _run(self, operator, *args):
        return operator(self, *args) if self.spy else compiled(operator)(self.inside, *args)


@functools.cache
def why_plain(device):
    """Why the fused operators are not used, in words; or nothing. Each is tried once: a compiler
    that is not there, or that gives other bits, shall not stop a run."""
    try:
        return differs(Fused("fp16", device), Numerics("fp16", device))
    except Exception as e:                              # whatever a compiler may come up with
        return f"torch.compile: {type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0][:80]}"


@torch.enable_grad()
def differs(fused, plain):
    """The first operator whose output or whose input's gradient has other bits, in words. rms_norm
    is left out: it has a sum, whose order is the compiler's own."""
    x = torch.linspace(-3, 3, 256, device=plain.device).view(2, 1, 2, 64).to(plain.dtype)
    cos, sin = torch.linspace(0, 1, 128, device=plain.device).view(2, 2, 32)
    for name, *rest in (("add", x.flip(0)), ("swiglu",), ("rope", cos, sin)):
        found = []
        for num in fused, plain:
            leaf = x.clone().requires_grad_()
            y = getattr(num, name)(leaf, *rest)
            found += y, *torch.autograd.grad(y, leaf, y.detach() / 3)
        if not all(map(torch.equal, found[:2], found[2:])):
            return f"torch.compile gives other bits in {name}"
    return ""
