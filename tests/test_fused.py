"""operators/fused.py: the lines of precision.py, compiled by torch, give the bits that they give uncompiled. On a CPU here,
whose compiler is another part of torch than a GPU's; what both share is what decides which roundings stay."""
import re
import shutil

import pytest
import torch
import torch._inductor.config as inductor
from conftest import Native
from torch._inductor.utils import run_and_get_code

from model import GPT, GPTConfig
from operators import fused
from operators.fused import Fused
from precision import Numerics

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")


def on_cpu(fmt):
    """Fused, with tensors in half precision on a CPU."""
    num = Fused(fmt, "cpu")
    for n in (num, num.inside):
        n.dtype, n.half, n.emulated = num.fmt.native, True, False
    return num


def test_a_model_of_fused_operators_is_the_plain_one():
    """Forward and back, many tokens and one, several layers and weights, and few compilations for all of them. The norm's
    sum has an order of the compiler's own: a rounding goes the other way now and then, and nothing else is apart."""
    cfg = GPTConfig(vocab_size=67, n_layers=3, width=48, n_heads=4, n_kv_heads=2, head_dim=16, mlp_width=80, context=32)
    found = []
    for num in (Native("fp16"), on_cpu("fp16")):
        model = GPT(cfg, seed=0)
        model.use(num.hold(model.parameters()))
        torch._dynamo.utils.counters.clear()
        tokens = torch.arange(21).view(3, 7)
        with torch.inference_mode():
            found.append(model(tokens[:, :1]))                                  # as a rollout's steps are
        found.append(model(tokens))                                             # as a training step's
        (found[-1] * torch.linspace(-1, 1, 48).half()).sum().backward()
        found += [p.grad for p in model.parameters() if p.grad is not None]
    plain, ours = found[:len(found) // 2], found[len(found) // 2:]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4 * 4                # of four operators
    for a, b in zip(plain, ours):
        assert a.dtype == b.dtype and (a - b).float().norm() < 5e-3 * a.float().norm()
    assert all((a == b).float().mean() > 0.9 for a, b in zip(plain[:2], ours[:2]))


def test_the_very_lines_of_precision_are_compiled(monkeypatch):
    """An edit of an operator changes what runs."""
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).half()
    before = on_cpu("fp16").swiglu(x)
    monkeypatch.setattr(Numerics, "swiglu", lambda self, x: self.down(-self.up(x.chunk(2, -1)[0])))
    after = on_cpu("fp16").swiglu(x)
    assert torch.equal(after, -x[..., :32]) and not torch.equal(before, after)


def test_who_looks_at_the_numbers_sees_all_of_them():
    num, seen = on_cpu("fp16"), []
    num.spy = lambda kind, where, rounded, before: seen.append((kind, float((rounded - before).abs().max())))
    num.swiglu(torch.randn(2, 3, 64).half())
    assert seen and seen[0][0] == "forward" and seen[0][1] > 0


@pytest.mark.skipif(torch.__version__ < "2.13", reason="seen with torch 2.11: the setting has no effect on a CPU")
def test_a_rounding_between_two_operators_stays():
    """The compiler leaves it out by default, and the setting that fused.py switches on keeps it: both are seen in the
    numbers, and the cast in the code."""
    inside, x = on_cpu("fp16").inside, torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(0)).half()
    fused.compiled(Numerics.add)                                                 # switches the setting on
    assert inductor.emulate_precision_casts

    def two(x, y):
        return inside.add(inside.add(x, y), inside.add(x, x))
    want = two(x, x.flip(0))
    for keep in (True, False):
        torch._dynamo.reset()
        with inductor.patch(emulate_precision_casts=keep):
            got, (code,) = run_and_get_code(torch.compile(two), x, x.flip(0))
        assert torch.equal(got, want) == keep
        back = len(re.findall(r"(?:convert|static_cast)<float\b", code))              # two inputs, two sums that were rounded
        assert back == (4 if keep else 2), code


def test_a_compiler_that_fails_or_differs_is_left_alone(monkeypatch):
    assert fused.differs(on_cpu("fp16"), Native("fp16")) == ""
    monkeypatch.setattr(fused, "compiled", lambda operator: lambda num, x, *rest: (x.float() * 1.01).to(x.dtype))
    assert fused.differs(on_cpu("fp16"), Native("fp16")) == "torch.compile gives other bits in add"
    if not torch.cuda.is_available():
        assert fused.why_plain("cuda").startswith("torch.compile: ")                  # one line, and the run goes on plain
