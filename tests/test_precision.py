"""Formats, operators, loss scale and mismatch metrics, against torch's own casts, FP64 and numbers worked by hand."""
import math

import pytest
import torch
from conftest import VARIANTS, fused, numerics, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import gpt_logits, round_to_format

from precision import FORMATS, Format, InputError, Numerics, emulate, make_scaler, parse_format
from run.lines import banner
from run.meter import mismatch


def bits(x):
    """FP32 bit patterns, all NaNs alike: equality of these is equality of numbers, signed zeros told apart."""
    return torch.where(x.isnan(), torch.full_like(x, math.nan), x).view(torch.int32)


def around(values):
    """Each FP32 value, the midpoint to its successor in the list, and the FP32 neighbours of both."""
    v = values[values.isfinite()].sort().values
    mid = ((v[1:].double() + v[:-1].double()) / 2).float()
    out = torch.cat((v, mid))
    inf = torch.tensor(math.inf)
    special = torch.tensor([math.inf, -math.inf, math.nan, 0, -0.0, 3.4e38, -3.4e38, 1e-45, 65519.9, 65520, 65536])
    return torch.cat((out, torch.nextafter(out, inf), torch.nextafter(out, -inf), special))


@pytest.mark.parametrize("dtype, exp, man", [(torch.float16, 5, 10), (torch.bfloat16, 8, 7)])
def test_emulation_is_torchs_own_cast_on_every_16_bit_pattern(dtype, exp, man):
    every = torch.arange(-2 ** 15, 2 ** 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    assert torch.equal(bits(emulate(every, Format("x", exp, man))), bits(every))                # its numbers stay put
    x = around(every)                                                             # ties, and just beside them
    assert len(x) > 190_000
    assert torch.equal(bits(emulate(x, Format("x", exp, man))), bits(x.to(dtype).float()))


def test_emulated_e5m2_is_torchs_float8():
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e5m2).float()
    x = around(every)
    x = x[x.abs() <= 57344]                                  # torch's 8-bit casts may saturate above the largest number
    assert torch.equal(bits(emulate(x, Format("x", 5, 2))), bits(x.to(torch.float8_e5m2).float()))


@given(st.integers(2, 8), st.integers(1, 23), st.lists(st.floats(width=32), min_size=1, max_size=20))
@settings(max_examples=300, deadline=None)
def test_any_format_rounds_as_the_textbook_says(exp, man, values):
    x = torch.tensor(values, dtype=torch.float32)
    y = emulate(x, Format("x", exp, man))
    expected = torch.tensor([round_to_format(v, exp, man) for v in x.tolist()], dtype=torch.float64).float()
    assert torch.equal(bits(y), bits(expected))
    assert torch.equal(bits(emulate(y, Format("x", exp, man))), bits(y))                       # rounding twice is once


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32"])
def test_the_table_of_formats_agrees_with_torch(name):
    f, info = FORMATS[name], torch.finfo(FORMATS[name].native)
    assert (f.max, f.tiny, f.eps, f.smallest) == (info.max, info.tiny, info.eps, info.smallest_normal * info.eps)


def test_format_names():
    assert parse_format("FP16") is FORMATS["fp16"] and parse_format("e5m10") is FORMATS["fp16"]
    assert parse_format("e8m7") is FORMATS["bf16"] and parse_format("e4m3").max == 240
    for bad in ("e0m3", "e9m3", "e5m0", "e8m24", "fp17", "", "m3e5"):
        with pytest.raises(InputError, match="format"):
            parse_format(bad)


# --- operators


def cases(num, dtype, device):
    """name -> (function of Numerics, the same in plain FP64 torch, inputs, parameters). Parameters are FP32 masters."""
    g = torch.Generator().manual_seed(1)

    def rand(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(device, dtype)

    def master(*shape, keep_fp32=False):
        p = torch.nn.Parameter(rand(*shape, scale=0.2).float())
        p.keep_fp32 = keep_fp32
        return p
    w, b, gain, table = master(24, 16), master(24), master(16), master(30, 16)
    router, share = master(6, 16, keep_fp32=True), master(7, 3, keep_fp32=True)
    num.hold([w, b, gain, table, router, share])
    cos, sin = torch.randn(2, 9, 4, generator=g).to(device)
    own_cos, own_sin = torch.randn(2, 5, 1, 9, 4, generator=g).to(device)           # a table for each row
    mask = torch.ones(9, 9, dtype=torch.bool, device=device).tril()
    tokens = torch.randint(0, 30, (5, 9), generator=g).to(device)

    def rope(x, cos, sin):
        x1, x2 = x.chunk(2, -1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)

    def attend(q, k, v):
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        s = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -math.inf)
        return s.softmax(-1) @ v
    qkv = [rand(2, 4, 9, 16), rand(2, 2, 9, 16), rand(2, 2, 9, 16)]
    x, y, heads = rand(5, 9, 16), rand(5, 9, 16), rand(5, 4, 9, 8)
    return {
        "embed": (lambda: num.embed(tokens, table), lambda table: table[tokens], [], [table]),
        "linear": (lambda x: num.linear(x, w, b), lambda x, w, b: x @ w.T + b, [x], [w, b]),
        "rms_norm": (lambda x: num.rms_norm(x, gain, 1e-6),
                     lambda x, g: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * g, [x], [gain]),
        "swiglu": (num.swiglu, lambda x: x[..., :8] * torch.sigmoid(x[..., :8]) * x[..., 8:], [x], []),
        "add": (num.add, lambda x, y: x + y, [x, y], []),
        "scaled add": (lambda x, y: num.add(x, y, 2.5), lambda x, y: x + 2.5 * y, [x, y], []),
        "mix": (lambda xs: num.mix(xs, share), lambda xs, s: (xs * s[..., None]).sum(1), [rand(7, 3, 16)], [share]),
        "router_logits": (lambda x: num.router_logits(x, router), lambda x, w: x @ w.T, [rand(7, 16)], [router]),
        "rope": (lambda x: num.rope(x, cos, sin), lambda x: rope(x, cos.double(), sin.double()), [heads], []),
        "rope, a table a row": (lambda x: num.rope(x, own_cos, own_sin),
                                lambda x: rope(x, own_cos.double(), own_sin.double()), [heads], []),
        "attention": (num.attention, attend, qkv, []),
        "masked attention": (lambda q, k, v: num.attention(q, k, v, mask[None, None]), attend, qkv, []),
    }


NAMES = list(cases(Numerics("fp32"), torch.float32, "cpu"))


@pytest.mark.parametrize("fmt", ["fp32", "fp16", "bf16", "e5m7", "tf32"])
@pytest.mark.parametrize("name", NAMES)
def test_operator_against_fp64(name, fmt, device):
    """Output and gradients are the FP64 ones, rounded once: within one spacing of the format (half for the rounding,
    and a little for a tie that FP32 arithmetic tips over), plus FP32's own error."""
    num = numerics(fmt, device)
    op, reference, inputs, params = cases(num, num.dtype, device)[name]
    inputs = [num.round(x).requires_grad_() for x in inputs]
    y = op(*inputs)
    fp32 = name == "router_logits"                            # never rounded
    assert y.dtype == (torch.float32 if fp32 else num.dtype)
    dy = num.round(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(device)).to(y.dtype)
    y.backward(dy)
    in64 = [x.detach().double().requires_grad_() for x in inputs]
    p64 = [num.weight(p).detach().double().requires_grad_() for p in params]
    y64 = reference(*in64, *p64)
    y64.backward(dy.double())
    eps = num.fmt.eps

    def close(got, want, exact32=False):
        # fused attention rounds its probabilities too: one more rounding, relative to the largest value
        extra = 2 * eps * want.abs().max() if fused() and "attention" in name and eps > 1e-5 else 0
        bound = (2.0 ** -22 if exact32 else eps) * want.abs() + 3e-6 * want.abs().max() + num.fmt.smallest + extra
        assert (got.double() - want).abs().le(bound).all(), (got.double() - want).abs().max()
    close(y, y64, exact32=fp32)
    for x, x64 in zip(inputs, in64):
        close(x.grad, x64.grad)
    for p, w64 in zip(params, p64):
        assert p.grad.dtype == torch.float32                 # weight gradients are FP32 and never rounded to the format
        close(p.grad, w64.grad, exact32=fmt != "bf16" or device.type == "cpu")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fmt", ["fp16", "bf16", "e4m3"])
def test_every_output_and_gradient_is_a_number_of_the_format(name, fmt, device):
    if device.type == "cuda":
        pytest.skip("there the dtype is the format")
    num = numerics(fmt)
    op, _, inputs, _ = cases(num, torch.float32, "cpu")[name]
    inputs = [num.round(x).requires_grad_() for x in inputs]
    y = op(*inputs)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))   # not rounded: the operator has to
    for t in (y.detach(), *(x.grad for x in inputs)):
        assert torch.equal(t, num.round(t)) or t.shape == y.shape and name == "router_logits"


@pytest.mark.parametrize("fmt", ["fp16", "e5m7"])
def test_a_norm_of_large_numbers(fmt, device):
    """Numbers that fit the format and whose squares do not: the statistics are FP32's."""
    num, gain = numerics(fmt, device), torch.nn.Parameter(torch.ones(16, device=device))
    num.hold([gain])
    x = num.round(torch.linspace(-20_000, 20_000, 16, device=device))[None]
    want = x.double() / x.double().square().mean().sqrt()
    assert (num.rms_norm(x, gain, 1e-6).double() - want).abs().max() <= num.fmt.eps * want.abs().max()


@pytest.mark.parametrize("fmt", ["fp16", "bf16", "e5m7"])
def test_a_gain_is_exactly_the_rounded_master_and_passes_its_gradient_on(fmt, device):
    """p + (round(p) - p) is round(p), whatever p: all magnitudes, what becomes 0, a subnormal or infinity included."""
    g = torch.Generator().manual_seed(0)
    every = torch.randint(-2 ** 31, 2 ** 31, (1 << 20,), generator=g).to(torch.int32).view(torch.float32)
    spread = torch.randn(1 << 20, generator=g) * 2.0 ** torch.randint(-30, 20, (1 << 20,), generator=g)
    x = torch.cat((every[every.isfinite()], spread, around(num_bits(fmt))))
    p = torch.nn.Parameter(x[x.isfinite()].to(device))
    num = numerics(fmt, device).hold([p])
    gain = num.gain(p)
    want = num.round(p.detach()).float()
    assert gain.dtype == torch.float32 and torch.equal(gain, want) and len(p) > 2_000_000
    assert (want == 0).any() and want.isinf().any() and (want.abs() < num.fmt.tiny).any()
    with torch.no_grad():
        assert torch.equal(num.gain(p), want)
    dy = torch.randn(len(p), generator=g).to(device)
    gain.backward(dy)
    assert torch.equal(p.grad, dy)                           # in FP32, not rounded


def num_bits(fmt):
    """Every number of a format of 16 bits or fewer, as FP32."""
    f = parse_format(fmt)
    low = 2 ** (f.exp + f.man)
    code = torch.arange(low)
    exponent, mantissa = code >> f.man, (code & (2 ** f.man - 1)).double()
    normal = (1 + mantissa * f.eps) * 2.0 ** (exponent.double() - (2 ** (f.exp - 1) - 1))
    positive = torch.where(exponent == 0, mantissa * f.smallest, normal)[exponent < 2 ** f.exp - 1].float()
    return torch.cat((positive, -positive))


def test_no_native_half_arithmetic_on_a_cpu():
    """A CPU's half GEMM is 5 to 40 times slower: no operator may see a 16-bit floating tensor, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        casts = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func not in self.casts:
                for t in torch.utils._pytree.tree_leaves((args, kwargs)):
                    assert not (isinstance(t, torch.Tensor) and t.dtype in (torch.float16, torch.bfloat16)), func
            return func(*args, **(kwargs or {}))
    model = tiny(fmt="fp16")
    tokens = torch.randint(0, 67, (3, 12), generator=torch.Generator().manual_seed(0))
    where = torch.ones(3, 12, dtype=torch.bool)
    where[:, 0] = False
    with Watch():
        logp, _ = model.token_logprobs(tokens, where)
        logp.sum().backward()
        model.num.refresh()


def test_fp16_model_against_an_fp64_reference(device):
    """The same rounded weights in FP64: FP16's log-probs are off by what ten mantissa bits cost, BF16's by about 8
    times that, FP32's by next to nothing. Measured on one CPU: 3.9e-3, 3.2e-2 and 2.1e-6; the bounds are about twice
    the first two."""
    tokens = torch.randint(0, 67, (8, 30), generator=torch.Generator().manual_seed(0)).to(device)
    where = torch.ones_like(tokens, dtype=torch.bool)
    where[:, 0] = False
    errors = {}
    for fmt in ("fp32", "fp16", "bf16"):
        model = tiny(device, fmt, gain=2.0)
        logp, _ = model.token_logprobs(tokens, where)
        cpu = tiny("cpu", fmt, gain=2.0)
        logits = gpt_logits(cpu, tokens.cpu(), lambda p, num=cpu.num: num.weight(p).double())[:, :-1]
        want = logits.log_softmax(-1).gather(2, tokens.cpu()[:, 1:, None]).flatten()
        errors[fmt] = (logp.detach().cpu().double() - want).abs().mean().item()
    assert errors["fp32"] < 1e-5 and errors["fp16"] < 8e-3 and errors["bf16"] < 6e-2, errors
    assert 3 < errors["bf16"] / errors["fp16"] < 20, errors


def test_gradients_against_fp64_autograd(device):
    """Every parameter's gradient in FP32 numerics is FP64 autograd's through an independent model, for all variants."""
    if device.type == "cuda":
        pytest.skip("covered by the operators, one by one")
    for kw in VARIANTS.values():
        model = tiny(gain=1.5, **kw)
        tokens = torch.randint(0, 67, (4, 11), generator=torch.Generator().manual_seed(1))
        where = torch.ones_like(tokens, dtype=torch.bool)
        where[:, 0] = False
        model.token_logprobs(tokens, where, 1.3)[0].sum().backward()
        double = {p: p.detach().double().requires_grad_() for p in model.parameters()}
        logits = gpt_logits(model, tokens, lambda p, d=double: d[p])[:, :-1] / 1.3
        logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).sum().backward()
        for name, p in model.named_parameters():
            want = double[p].grad
            assert (p.grad.double() - want).norm() <= 2e-5 * want.norm(), name


# --- log-probs in chunks


@pytest.mark.parametrize("fmt", ["fp32", "fp16"])
def test_chunked_logprobs_are_the_whole_ones(fmt, device, monkeypatch):
    num = numerics(fmt)
    g = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.randn(211, 32, generator=g))
    num.hold([w])
    h = num.round(torch.randn(50, 32, generator=g)).requires_grad_()
    rows, targets = torch.randperm(50, generator=g)[:37], torch.randint(0, 211, (37,), generator=g)
    sizes, probabilities = [], type(num).probabilities
    monkeypatch.setattr(type(num), "probabilities",
                        lambda self, h, *rest: sizes.append(len(h)) or probabilities(self, h, *rest))

    def both(chunk_bytes):
        h.grad = w.grad = None
        logp, entropy = num.token_logprobs(h, w, targets, rows, 0.7, chunk_bytes)
        (logp * torch.arange(37)).sum().backward()
        return logp.detach(), entropy.detach(), h.grad.clone(), w.grad.clone()
    whole = both(1 << 30)
    sizes.clear()
    chunked = both(211 * 4 * 5)
    assert max(sizes) == 5 and sum(sizes) == 2 * 37                        # five rows of logits at a time, never more
    for a, b in zip(whole, chunked):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-4)
    lp = (h.detach()[rows].double() @ num.weight(w).double().T / 0.7).log_softmax(-1)
    assert torch.allclose(whole[0].double(), lp.gather(1, targets[:, None])[:, 0], atol=1e-4)
    assert torch.allclose(whole[1].double(), -(lp.exp() * lp).sum(-1), atol=1e-4)


@pytest.mark.parametrize("chunk", [64 << 20, 211 * 4 * 5], ids=["one chunk", "eight chunks"])
@pytest.mark.parametrize("fmt", ["fp32", "fp16"])
def test_logprob_and_entropy_have_the_gradients_of_fp64_autograd(fmt, chunk, device):
    """Of a logp + b entropy, of each alone, and of a distribution with tokens of probability 0."""
    num, g = numerics(fmt, device), torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.randn(211, 32, generator=g).to(device))
    num.hold([w])
    h, rows = torch.randn(50, 32, generator=g), torch.randperm(50, generator=g)[:37]
    h[rows[0]] *= 30                                       # so sharp that most probabilities are 0 in FP32
    h, rows = num.round(h.to(device)), rows.to(device)
    targets = torch.randint(0, 211, (37,), generator=g).to(device)
    c, d = torch.randn(2, 37, generator=g).to(device)
    bound = 1e-5 if fmt == "fp32" else 2 * num.fmt.eps
    for a, b in ((c, d), (c, 0 * d), (0 * c, d), (c, None), (None, d)):
        got = h.clone().requires_grad_(), w
        want = [t.detach().double().requires_grad_() for t in (h, num.weight(w))]
        w.grad = None
        logp, entropy = num.token_logprobs(got[0], w, targets, rows, 0.7, chunk)
        lp = (want[0][rows] @ want[1].T / 0.7).log_softmax(-1)
        logp64, entropy64 = lp.gather(1, targets[:, None])[:, 0], -(lp.exp() * lp).sum(-1)
        for x, y in ((logp, entropy), (logp64, entropy64)):
            sum((k * t).sum() for k, t in ((a, x), (b, y)) if k is not None).backward()
        assert torch.allclose(entropy.double(), entropy64, atol=1e-4)
        for x, y in zip(got, want):
            assert y.grad.norm() > 1 and (x.grad.double() - y.grad).norm() <= bound * y.grad.norm()


@pytest.mark.parametrize("vocabulary, tokens", [(3000, 500), (5000, 900)])
def test_nothing_of_tokens_times_vocabulary_is_ever_whole(vocabulary, tokens, device):
    """The largest tensor that log-probs, entropies and their gradients make, by watching every operator: one chunk of
    logits, or the gradients themselves."""
    from torch.utils._python_dispatch import TorchDispatchMode
    num, C, chunk = numerics("fp16", device), 16, 1 << 18
    num.slab = 4                                             # of the exact ones: in proportion to this small vocabulary
    w = torch.nn.Parameter(torch.randn(vocabulary, C, device=device))
    num.hold([w])
    h = num.round(torch.randn(tokens, C, device=device)).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    num.token_logprobs(h[:3], w, targets[:3])[0].sum().backward()
    w.grad = None
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    largest[0] = max(largest[0], t.numel())
            return out
    with Watch():
        logp, entropy = num.token_logprobs(h, w, targets, chunk_bytes=chunk)
        (logp + 0.1 * entropy).sum().backward()
    assert w.grad.shape == w.shape and h.grad.shape == h.shape
    assert chunk // 8 <= largest[0] <= max(chunk // 4, w.numel(), h.numel()) < tokens * vocabulary / 10


# --- weights


def test_masters_stay_fp32_and_the_rounded_copy_keeps_its_address(device):
    p = torch.nn.Parameter(torch.randn(5, 7).to(device))
    num = numerics("fp16", device).hold([p])
    address, before = num.weight(p).data_ptr(), num.weight(p).clone()
    with torch.no_grad():
        p.add_(0.3)
    assert torch.equal(num.weight(p), before)                                # once per update, not before
    num.refresh()
    assert num.weight(p).data_ptr() == address and not torch.equal(num.weight(p), before)
    assert p.dtype == torch.float32 and torch.equal(num.weight(p).float(), p.detach().half().float())


def test_updates_below_half_precision_are_kept_by_the_master():
    """1 + 1e-4 is 1 in FP16. Ten such steps are lost to a model without masters, and arrive with them."""
    p = torch.nn.Parameter(torch.ones(1))
    num = Numerics("fp16").hold([p])
    for _ in range(10):
        with torch.no_grad():
            p.add_(1e-4)
        num.refresh()
    assert num.weight(p).item() == 1 + 2 ** -10


# --- loss scale


def test_small_gradients_underflow_without_a_scale_and_survive_with_one(device):
    tokens = torch.randint(0, 67, (2, 8), generator=torch.Generator().manual_seed(0))
    where = torch.ones_like(tokens, dtype=torch.bool)
    where[:, 0] = False

    def gradient(fmt, scale=2.0 ** 16):
        model = tiny(device, fmt)
        scaler = make_scaler(model.num, scale)
        logp, _ = model.token_logprobs(tokens.to(device), where.to(device))
        scaler.scale(logp.sum() * 1e-9).backward()
        return model.blocks[0].qkv.grad.cpu() / scaler.get_scale()
    assert gradient("fp16", 1.0).abs().max() == 0                             # below 2^-25 everything is flushed to 0
    exact, scaled = gradient("fp32"), gradient("fp16")
    assert (scaled - exact).norm() < 0.05 * exact.norm()


def test_scaler_skips_halves_and_regrows(device):
    num = Numerics("fp16", device)
    p = torch.nn.Parameter(torch.ones(3, device=device))
    opt = torch.optim.AdamW([p], lr=0.1, fused=True, weight_decay=0.0)
    scaler = make_scaler(num, 1024.0)
    scaler.set_growth_interval(2)                            # not 400 updates, for time

    def step(gradient):
        p.grad = torch.full_like(p, gradient) * scaler.scale(torch.ones((), device=device))
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        return scaler.get_scale()
    assert step(math.inf) == 512 and torch.equal(p, torch.ones_like(p))       # skipped: the weights did not move
    assert step(1.0) == 512 and (p < 1).all()
    assert step(1.0) == 1024                                                   # two clean steps: grown again
    for wide in ("bf16", "fp32"):
        assert not make_scaler(Numerics(wide, device)).is_enabled()


# --- mismatch


def test_mismatch_on_numbers_worked_by_hand():
    """Two answers of 2 and 1 tokens; log mu - log pi = 0, ln 2, -ln 4."""
    mu = torch.tensor([-1.0, -1.0, -2.0])
    pi = torch.tensor([-1.0, -1.0 - math.log(2), -2.0 + math.log(4)])
    m = mismatch(mu, pi, torch.tensor([2, 1]))
    want = dict(logp_gap_mean=math.log(8) / 3, logp_gap_p99=math.log(4), logp_gap_max=math.log(4),
                kl_k1=-math.log(2) / 3,
                kl_k3=((0.5 - 1 + math.log(2)) + (4 - 1 - math.log(4))) / 3, seq_kl=(math.log(2) - math.log(4)) / 2,
                prob_gap_mean=(math.exp(-1) / 2 + 3 * math.exp(-2)) / 3, ratio_outliers=2 / 3, exact_share=1 / 3)
    assert set(m) == set(want)
    for k in want:
        assert m[k] == pytest.approx(want[k], rel=1e-5, abs=1e-7), k


def test_the_sampled_kl_estimators_agree_with_the_exact_kl():
    """k1 and k3, weighted by mu's own probabilities, are KL[mu || pi] exactly (the mean over all outcomes)."""
    g = torch.Generator().manual_seed(0)
    mu, pi = torch.randn(2, 50, generator=g).double().log_softmax(-1)
    copies = (mu.exp() * 4e6).round().long()
    m = mismatch(
        torch.repeat_interleave(mu, copies),
        torch.repeat_interleave(pi, copies),
        torch.ones(int(copies.sum()), dtype=torch.long),
    )
    exact = float((mu.exp() * (mu - pi)).sum())
    assert m["kl_k1"] == pytest.approx(exact, rel=1e-4) and m["kl_k3"] == pytest.approx(exact, rel=1e-4)


def test_banner_names_formats_and_reasons():
    a, b = Numerics("fp16"), Numerics("bf16")
    line = banner(a, a, make_scaler(a))
    assert "rollout fp16, train fp16" in line and "loss scale 2^16" in line and line.count("\n") == 2
    assert "DIFFERENT" in banner(b, a, make_scaler(a))
