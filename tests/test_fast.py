"""What is there for speed alone must change nothing: compiled operators and graph steps against the plain path."""
import numpy as np
import pytest
import torch
from conftest import VARIANTS, numerics, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sample import PAD, PROMPTS, stopping_model

import fast
from fast.cpu import CPUNumerics, build
from fast.graph import GraphStep
from model import Block
from precision import ExactNumerics, Numerics
from sample import Sampler

compiled = pytest.mark.skipif(fast.library()[0] is None, reason=f"no compiled operators: {fast.library()[1]}")


# --- compiled operators


@compiled
@given(st.integers(2, 8), st.integers(1, 23), st.lists(st.floats(width=32), min_size=1, max_size=40))
@settings(max_examples=300, deadline=None)
def test_compiled_rounding_is_emulate(exp, man, values):
    """Bit for bit, in every format, signed zeros and infinities included, at every length of a vector's tail."""
    x = torch.tensor(values, dtype=torch.float32)
    plain, quick = (num.round_(x.clone()) for num in (Numerics(f"e{exp}m{man}"), fast.numerics(f"e{exp}m{man}")))
    same = (plain.view(torch.int32) == quick.view(torch.int32)) | (plain.isnan() & quick.isnan())
    assert same.all(), (x[~same], plain[~same], quick[~same])


@compiled
@pytest.mark.parametrize("fmt", ["fp16", "bf16"])
def test_compiled_rounding_of_every_half_and_every_tie(fmt):
    num, dtype = fast.numerics(fmt), {"fp16": torch.float16, "bf16": torch.bfloat16}[fmt]
    every = torch.arange(-2 ** 15, 2 ** 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()].sort().values
    ties = ((every[1:].double() + every[:-1].double()) / 2).float()
    x = torch.cat([every, ties, *(torch.nextafter(ties, torch.tensor(s)) for s in (np.inf, -np.inf))])
    assert torch.equal(num.round_(x.clone()).view(torch.int32), x.to(dtype).float().view(torch.int32))


@compiled
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_compiled_products_of_any_shape(data):
    """Rows, terms and columns around the edges of every tile; one row of a product does not depend on how many others there
    are."""
    draw = data.draw
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    terms = draw(st.sampled_from([1, 3, 16, 100, 384, 385, 900]))
    g = torch.Generator().manual_seed(rows * terms + columns)
    x, w, b = torch.randn(rows, terms, generator=g), torch.randn(columns, terms, generator=g), torch.randn(columns, generator=g)
    w, b = torch.nn.Parameter(w), torch.nn.Parameter(b)
    num = fast.numerics("fp32").hold([w, b])
    y = num.linear(x, w, b)
    want = x.double() @ w.double().T + b.double()
    assert torch.allclose(y.double(), want, atol=1e-5 * terms ** 0.5, rtol=1e-5)
    alone = torch.cat([num.linear(x[i:i + 1], w, b) for i in range(rows)])
    assert torch.equal(alone, y)
    y.sum().backward()
    assert torch.allclose(w.grad, x.sum(0).expand_as(w), atol=1e-4) and torch.allclose(b.grad, torch.full_like(b, rows))


@compiled
@pytest.mark.parametrize("lengths", [(1, 1), (5, 5), (70, 70), (129, 129), (1, 33), (7, 40)], ids=str)
def test_compiled_attention_against_torchs(lengths):
    """Causal, one query behind a cache, and masked chunks; grouped heads; queries in more than one block."""
    Tq, Tk = lengths
    plain, quick = Numerics("fp32"), fast.numerics("fp32")
    g = torch.Generator().manual_seed(Tk)
    D = 2 * quick.lanes
    inputs = [torch.randn(3, h, t, D, generator=g) for h, t in ((6, Tq), (2, Tk), (2, Tk))]
    mask = None
    if 1 < Tq < Tk:
        mask = torch.rand(3, 1, Tq, Tk, generator=g) < 0.6
        mask[..., 0] = True
    dy = torch.randn(3, 6, Tq, D, generator=g)
    results = []
    for num in (plain, quick):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = num.attention(*leaves, mask)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
        with torch.no_grad():
            assert torch.allclose(num.attention(*inputs, mask), y, atol=1e-5)       # one query takes another function here
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=2e-5), (a - b).abs().max()


@compiled
@pytest.mark.parametrize("variant", VARIANTS)
def test_token_for_token_with_the_plain_path(variant):
    """The same answers from the same seed, by torch's operators and by the compiled ones; their log-probs to FP32's error."""
    model, stop = stopping_model(**VARIANTS[variant])
    sampler = Sampler(model, stop=stop, pad=PAD)
    outs = []
    for quick in (False, True):
        model.use(fast.numerics("fp32", fast=quick).hold(model.parameters()))
        assert isinstance(model.num, CPUNumerics) == quick
        outs.append(sampler.generate(PROMPTS, 16, 20, seed=3))
    assert torch.equal(outs[0].tokens, outs[1].tokens) and torch.equal(outs[0].length, outs[1].length)
    assert torch.allclose(outs[0].logp, outs[1].logp, atol=1e-4)


@compiled
@pytest.mark.parametrize("variant", ["plain", "one head each", "qwen2.5"])
@pytest.mark.parametrize("fmt", ["fp32", "fp16", "e5m7"])
def test_a_block_in_one_call_is_its_lines_bit_for_bit(variant, fmt, monkeypatch):
    """Log-probs, sampled tokens and what was recorded: the same bits. Weight gradients: summed in another order, FP32's error."""
    model = tiny(fmt="fp32", width=96, head_dim=32, mlp_width=200, gain=1.5, **VARIANTS[variant])
    model.use(fast.numerics(fmt).hold(model.parameters()))
    g = torch.Generator().manual_seed(0)
    tokens, where = torch.randint(0, 67, (19, 41), generator=g), torch.ones(19, 41, dtype=torch.bool)
    where[:, 0] = False
    results, calls = [], []
    for known in (True, False):
        monkeypatch.setattr("fast.cpu._block_is_known", lambda known=known: calls.append(known) or known)
        model.zero_grad()
        logp, _ = model.token_logprobs(tokens, where)
        (logp * torch.linspace(-1, 1, len(logp))).sum().backward()
        with torch.no_grad():
            again, _ = model.token_logprobs(tokens, where)
        assert torch.equal(again, logp)                              # with nothing kept for the way back, too
        sampler, gradients = Sampler(model, stop=3, pad=PAD), [p.grad.clone() for p in model.parameters()]
        out = [sampler.generate(prompts, 8, 20, seed=1) for prompts in (PROMPTS, [[1, 2, 3], [4, 5, 6]])]
        results.append((logp.detach(), [x for o in out for x in (o.tokens, o.logp)], gradients))
    (a, sampled_a, grads_a), (b, sampled_b, grads_b) = results
    assert {True, False} == set(calls) and torch.equal(a, b)
    assert all(torch.equal(x, y) for x, y in zip(sampled_a, sampled_b))
    for x, y in zip(grads_a, grads_b):
        assert (x - y).norm() <= 3e-6 * y.norm()


@compiled
def test_a_changed_block_is_no_longer_taken_from_cpu_c(monkeypatch):
    """Block.forward is what counts. The compiled block is used only while that method is the one it was written after; if this
    fails, bring block and block_back of cpu.c up to date, then fast.cpu.BLOCK."""
    from fast import cpu
    cpu._block_is_known.cache_clear()
    assert cpu._block_is_known()
    cpu._block_is_known.cache_clear()

    def forward(self, x, cos, sin, mask, num, name, cache=None, layer=0):
        return num.add(x, x)
    monkeypatch.setattr(Block, "forward", forward)
    assert not cpu._block_is_known()
    monkeypatch.undo()
    cpu._block_is_known.cache_clear()


@compiled
def test_nan_and_infinity_come_through():
    """The search for a first bad layer and the loss scaler need them: no operator may swallow one."""
    num = fast.numerics("fp16")
    for bad in (float("nan"), float("inf")):
        x = torch.full((2, 32), 1.0)
        x[0, 3] = bad
        w = torch.nn.Parameter(torch.ones(32))
        eye = torch.nn.Parameter(torch.eye(32))
        num.hold([w, eye])
        q = x.view(2, 1, 1, 32).expand(2, 2, 3, 32)
        for y in (num.add(x, x), num.rms_norm(x, w, 1e-6), num.swiglu(x), num.attention(q, q, q),
                  num.linear(x, eye), num.token_logprobs(x, eye, torch.tensor([3, 3]))[0]):
            assert not y[0].isfinite().all() and y[1].isfinite().all()
    assert num.add(torch.full((8,), 60000.0), torch.full((8,), 60000.0)).isinf().all()              # FP16 overflows


@compiled
def test_packed_weights_follow_the_masters():
    w = torch.nn.Parameter(torch.randn(40, 24))
    num = fast.numerics("fp16").hold([w])
    x = torch.randn(5, 24, requires_grad=True)
    num.linear(x, w).sum().backward()                                            # packed for both directions
    address = [p.data_ptr() for p in num._packed.values()]
    with torch.no_grad():
        w.mul_(-3)
    num.refresh()
    x2 = x.detach().requires_grad_()
    y = num.linear(x2, w)
    y.sum().backward()
    assert torch.allclose(y, x @ num.weight(w).T, rtol=2e-3, atol=1e-2)
    assert torch.allclose(x2.grad, num.weight(w).sum(0).expand(5, 24), rtol=2e-3, atol=1e-2)
    assert [p.data_ptr() for p in num._packed.values()] == address


def test_without_a_compiler_the_plain_path_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    lib, why = build(tmp_path)
    assert lib is None and "/nowhere/cc" in why and "\n" not in why
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'error: no such processor' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    lib, why = build(tmp_path / "new")
    assert lib is None and "no such processor" in why
    assert not list((tmp_path / "new").iterdir())                                # nothing half-made is left
    assert type(fast.numerics("fp16", fast=False)) is Numerics


# --- graph steps: the same static buffers, with a graph on a GPU and without one on a CPU


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_graph_steps_are_token_for_token_the_eager_ones(variant, temperature, device, monkeypatch):
    """Ragged prompts, rows that finish and are dropped, several buckets of the cache."""
    model, stop = stopping_model(**VARIANTS[variant])
    model = tiny(device, gain=2.0, **VARIANTS[variant])
    eager = Sampler(model, stop=stop, pad=PAD, fast=False)
    graph = Sampler(model, stop=stop, pad=PAD)
    monkeypatch.setattr("fast.graph.BUCKET", 8)
    if device.type == "cpu":                                                     # the graph-free twin
        graph.graphs = {}
        monkeypatch.setattr(GraphStep, "capture", False)
    assert graph.graphs == {}
    for seed in (1, 2):                                                          # the second time the buffers are not fresh
        a, b = (s.generate(PROMPTS, 16, 20, temperature, seed=seed) for s in (eager, graph))
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.length, b.length) and torch.equal(a.stopped, b.stopped)
        assert torch.allclose(a.logp, b.logp, atol=1e-4)
    assert len(graph.graphs) == 1


def test_a_graph_sees_new_weights(device, monkeypatch):
    """A graph replays addresses: after an update it must sample from the updated policy, and not from the one it was
    recorded with."""
    model, stop = stopping_model()
    model = tiny(device, "fp16", gain=2.0)
    graph = Sampler(model, stop=stop, pad=PAD)
    if device.type == "cpu":
        graph.graphs = {}
        monkeypatch.setattr(GraphStep, "capture", False)
    before = graph.generate(PROMPTS, 16, 20, seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.7)
    stale = graph.generate(PROMPTS, 16, 20, seed=1)
    assert torch.equal(stale.tokens, before.tokens)                              # rounded once per update, not before
    model.num.refresh()
    after = graph.generate(PROMPTS, 16, 20, seed=1)
    fresh = Sampler(model, stop=stop, pad=PAD, fast=False).generate(PROMPTS, 16, 20, seed=1)
    assert len(graph.graphs) == 1 and not torch.equal(after.tokens, before.tokens)
    same = (after.tokens == fresh.tokens).float().mean()                         # FP16: a rounding may go the other way
    assert same > 0.95, same
    where = after.is_answer
    with torch.no_grad():
        logp, _ = model.token_logprobs(after.tokens, where)
    assert (after.logp[where] - logp).abs().mean() < 5e-3


def test_numerics_fixture_is_what_it_says(device):
    num = numerics("fp16", device)
    assert num.operators == {CPUNumerics: "compiled", ExactNumerics: "exact", Numerics: "torch's"}[type(num)]
