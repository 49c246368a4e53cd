"""Exact mode: the log-prob of every token as sampled and as trained on, equal bit for bit."""
import json
import os

import pytest
import torch
from conftest import COMPILED, VARIANTS, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import gpt_logits
from test_sample import PROMPTS, stopping_model

import operators.exact
import train_rl
from algorithms import centred
from experiments import exact as twins
from experiments import explain, lab
from model import KVCache
from operators.exact import ExactNumerics, tree_sum
from operators.graph import GraphStep
from precision import InputError, Numerics, make_scaler
from run import checks
from run.meter import Meter
from sample import Sampler
from train_rl import Batch, Config, learn, parse_config

CASES = int(os.environ.get("TENBIT_CASES", 300))              # results/exact-cases.txt is a longer run
PAD, STOP = 66, 65
KINDS = ["exact"] + ["compiled exact"] * COMPILED + ["exact cuda"] * torch.cuda.is_available()
FORMATS = ["fp32", "bf16", "fp16", "tf32", "e5m7", "e8m4", "e4m3"]


def numerics(fmt, kind, exact=True):
    return operators.numerics(fmt, "cuda" if "cuda" in kind else "cpu", fast="compiled" in kind, exact=exact)


def exact_model(fmt, kind, exact=True, lora=0, **kw):
    model = tiny("cuda" if "cuda" in kind else "cpu", **{**dict(gain=2.0), **kw})
    if lora:
        model.adapt(lora)
        g = torch.Generator().manual_seed(1)
        for n, p in model.named_parameters():
            if ".B." in n:
                p.data = (torch.randn(p.shape, generator=g) * 0.2).to(p.device)
    return model.use(numerics(fmt, kind, exact).hold(model.parameters()))


@st.composite
def shapes(draw):
    """A model's shape, as GPTConfig's arguments: grouped heads, odd widths, biases, QK-norm, experts; adapters."""
    kv = draw(st.sampled_from([1, 2, 3]))
    heads = kv * draw(st.sampled_from([1, 2, 3]))
    head = draw(st.sampled_from([4, 6, 16, 32]))
    return dict(n_layers=draw(st.integers(1, 3)), width=draw(st.integers(3, 40)) * 2, n_heads=heads, n_kv_heads=kv,
                head_dim=head, mlp_width=draw(st.integers(1, 90)), context=80, qkv_bias=draw(st.booleans()),
                qk_norm=draw(st.booleans()), n_experts=draw(st.sampled_from([0, 0, 3])),
                experts_per_token=draw(st.integers(1, 3)), expert_width=draw(st.integers(1, 40)),
                lora=draw(st.sampled_from([0, 0, 1, 5])), tied_head=draw(st.booleans()),
                seed=draw(st.integers(0, 10 ** 6)), gain=draw(st.sampled_from([0.5, 1.0, 2.0])))


def same_bits(a, b):
    return torch.equal(a, b) or (a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all()))


# --- the claim


@pytest.mark.parametrize("kind", KINDS)
@given(shape=shapes(), fmt=st.sampled_from(FORMATS), data=st.data())
@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_tokens_value_does_not_depend_on_the_company_it_is_in(kind, shape, fmt, data):
    """Any model, ragged prompts, any number of rows, of which some stop early; then training in micro-batches of any
    size and order, on another number of threads: the same log-probs, with a gradient and without."""
    prompts = data.draw(st.lists(st.lists(st.integers(0, 64), min_size=1, max_size=40), min_size=1, max_size=5))
    n, new = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 30))
    temperature, micro = data.draw(st.sampled_from([0.7, 1.0, 1.9])), data.draw(st.integers(1, 20))
    acting, learning = (data.draw(st.integers(1, 2)) for _ in range(2))
    model = exact_model(fmt, kind, **shape)
    try:
        torch.set_num_threads(acting)
        sampler = Sampler(model, stop=STOP, pad=PAD, fast=False)
        rollout = sampler.generate(prompts, n, new, temperature, seed=shape["seed"])
        torch.set_num_threads(learning)
        order = torch.tensor(data.draw(st.permutations(range(len(rollout.length)))))
        for rows in order.split(micro):
            end = int(rollout.length[rows].max()) + data.draw(st.integers(0, 2))
            tokens, where = rollout.tokens[rows, :end], rollout.is_answer[rows, :end]
            with torch.set_grad_enabled(data.draw(st.booleans())):
                logp, _ = model.token_logprobs(tokens, where, temperature)
            assert same_bits(logp.detach(), rollout.logp[rows, :end][where])
    finally:
        torch.set_num_threads(2)


@pytest.mark.parametrize("kind", KINDS)
@given(shape=shapes(), fmt=st.sampled_from(FORMATS), data=st.data())
@settings(max_examples=max(50, CASES // 3), deadline=None, suppress_health_check=list(HealthCheck))
def test_prefill_in_pieces(kind, shape, fmt, data):
    """Hidden states of a sequence that enters the cache in pieces of any length are those of the whole sequence."""
    model = exact_model(fmt, kind, **shape)
    B, T = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 70))
    tokens = torch.randint(0, 64, (B, T), generator=torch.Generator().manual_seed(shape["seed"]))
    tokens = tokens.to(model.embedding.device)
    cuts = sorted({0, T, *data.draw(st.lists(st.integers(0, T), max_size=4))})
    with torch.no_grad():
        cache = KVCache(model.cfg, B, T, model.num)
        pieces = [model(tokens[:, a:b], cache) for a, b in zip(cuts, cuts[1:])]
        assert same_bits(torch.cat(pieces, 1), model(tokens))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fmt", ["fp32", "fp16"])
def test_the_same_check_finds_the_ordinary_mode_out(fmt, kind):
    """What the tests above would say if nothing were exact."""
    model = exact_model(fmt, kind, exact=False, width=64, n_heads=2, n_layers=3)
    rollout = Sampler(model, stop=STOP, pad=PAD).generate(PROMPTS, 4, 30, seed=1)
    logp, _ = model.token_logprobs(rollout.tokens, rollout.is_answer)
    assert not same_bits(logp.detach(), rollout.logp[rollout.is_answer])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_graph_steps_too(kind, variant, monkeypatch):
    """The static buffers of a decoding graph, whose cache is read further than it is filled (on a CPU, without one)."""
    _, stop = stopping_model(**VARIANTS[variant])
    model = exact_model("fp16", kind, **VARIANTS[variant])
    sampler = Sampler(model, stop=stop, pad=PAD)
    monkeypatch.setattr("operators.graph.BUCKET", 8)
    if "cuda" not in kind:
        sampler.graphs = {}
        monkeypatch.setattr(GraphStep, "capture", False)
    for seed in (1, 2):
        rollout = sampler.generate(PROMPTS, 16, 20, seed=seed)
        logp, _ = model.token_logprobs(rollout.tokens, rollout.is_answer)
        assert len(sampler.graphs) == 1 and same_bits(logp.detach(), rollout.logp[rollout.is_answer])


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_activations(kind):
    """Activations made again on the way back (--recompute) give the same log-probs and the same gradient."""
    results = []
    for again in (False, True):
        model = exact_model("fp16", kind)
        model.recompute = again
        rollout = Sampler(model, stop=STOP, pad=PAD, fast=False).generate(PROMPTS, 4, 20, seed=1)
        logp, _ = model.token_logprobs(rollout.tokens, rollout.is_answer)
        assert same_bits(logp.detach(), rollout.logp[rollout.is_answer])
        logp.sum().backward()
        results.append([logp.detach(), *(p.grad for p in model.parameters())])
    assert all(same_bits(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fmt", ["fp32", "fp16"])
@pytest.mark.parametrize("kw", [
    dict(width=256, mlp_width=1000, n_heads=4, head_dim=64, n_kv_heads=2, n_layers=1, context=96),
    dict(width=16, vocab_size=140_000, n_layers=1)], ids=["wide", "large vocabulary"])
def test_wide_ones_too(kind, fmt, kw):
    """Sums that a product takes in several goes, work enough for all threads, logits in several chunks."""
    model = exact_model(fmt, kind, **{**kw, "gain": 1.0})
    new = min(56, 4000_000 // model.cfg.vocab_size, model.cfg.context - 9)
    rollout = Sampler(model, stop=-1, pad=PAD, fast=False).generate(PROMPTS, 20 if new > 30 else 2, new, seed=1)
    for micro in (7, 80):
        for rows in torch.arange(len(rollout.length)).split(micro):
            logp, _ = model.token_logprobs(rollout.tokens[rows], rollout.is_answer[rows])
            assert same_bits(logp.detach(), rollout.logp[rows][rollout.is_answer[rows]])


@pytest.mark.parametrize("kind", KINDS)
def test_the_likeliest_token_too(kind):
    """At temperature 0 the recorded log-prob is that under temperature 1."""
    model = exact_model("fp16", kind)
    rollout = Sampler(model, stop=STOP, pad=PAD).generate(PROMPTS, 1, 30, temperature=0)
    logp, _ = model.token_logprobs(rollout.tokens, rollout.is_answer)
    assert same_bits(logp.detach(), rollout.logp[rollout.is_answer])


# --- sums and gradients


def test_tree_sum_by_hand():
    x = torch.tensor([[1.0, 2, 4, 8, 16, 32, 64], [1e8, 1, -1e8, 1, 0, 0, 0]])
    before = x.clone()
    # 7 numbers become ((x0 + x3) + x6, x1 + x4, x2 + x5), and these (first + second) + third. From left to right, row
    # 2 gives 1.
    assert tree_sum(x).tolist() == [[127.0], [0.0]]
    assert torch.equal(x, before) and tree_sum(torch.tensor([[5.0]])).item() == 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fmt", ["fp32", "bf16", "fp16"])
def test_gradient_is_the_ordinary_ones_within_rounding(kind, fmt):
    """Against FP64 autograd through an independent model with the same rounded weights: no further off than ordinary
    mode."""
    off = {}
    for exact in (False, True):
        model = exact_model(fmt, kind, exact, gain=1.5)
        tokens = torch.randint(0, 64, (6, 40), generator=torch.Generator().manual_seed(1))
        tokens = tokens.to(model.embedding.device)
        where = torch.ones_like(tokens, dtype=torch.bool)
        where[:, 0] = False
        (model.token_logprobs(tokens, where, 1.3)[0].sum() * 64).backward()
        double = {p: model.num.weight(p).double().cpu().requires_grad_() for p in model.parameters()}
        logits = gpt_logits(model, tokens.cpu(), lambda p, d=double: d[p])[:, :-1] / 1.3
        (logits.log_softmax(-1).gather(2, tokens.cpu()[:, 1:, None]).sum() * 64).backward()
        errors = [(p.grad.double().cpu() - double[p].grad).norm() / double[p].grad.norm()
                  for p in model.parameters()]
        off[exact] = max(map(float, errors))
    assert off[True] < max(1.5 * off[False], 2e-5) and off[True] < dict(fp32=2e-5, bf16=0.2, fp16=0.03)[fmt], off


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_same_every_time(kind):
    """Rollout, log-probs and gradients of one step, done twice."""
    results = []
    for _ in range(2):
        model = exact_model("fp16", kind)
        rollout = Sampler(model, stop=STOP, pad=PAD).generate(PROMPTS, 8, 20, seed=3)
        reward = (rollout.length % 2).float().view(len(PROMPTS), 8)
        batch = Batch(rollout, advantage=centred(reward).flatten())
        meter, grads = Meter(batch), []
        loss = learn(model, batch, Config(micro_batch=5), make_scaler(model.num), 20, meter)
        grads = [p.grad for p in model.parameters()]
        results.append([rollout.tokens, rollout.logp, meter.logp, meter.entropy, torch.tensor(loss), *grads])
        assert torch.equal(meter.logp, rollout.logp) and any((g != 0).any() for g in grads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


# --- the command

# width 128: heads of 32 features, which compiled code takes everywhere
SMALL = ("--digits 1 --noise 0.3 --n-layers 1 --width 128 --base-steps 60 --base-lr 4e-3 --pool 40 --heldout 0 "
         "--steps 3 --prompts 8 --keep 0 1 --device cpu --exact").split()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Runs the command here, with a cache of its own; returns the exit status and the metrics."""
    monkeypatch.setattr("run.base.CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)

    def go(*flags):
        status = train_rl.main([*SMALL, "--out", "run", *flags])
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        return status, [json.loads(line) for line in lines]
    return go


@pytest.mark.parametrize("flags", [(), ("--precision", "bf16"), ("--precision", "fp32", "--no-fast"),
                                   ("--micro-batch", "7"), ("--updates-per-batch", "2")])
def test_a_run_is_exact_on_every_step(small, capsys, flags):
    status, rows = small(*flags)
    steps = [r for r in rows if "step" in r]
    assert status == 0 and len(steps) == 3
    assert all(m["exact_share"] == 1.0 and m["logp_gap_max"] == 0.0 and m["kl_k3"] == 0.0 for m in steps)
    said = capsys.readouterr().out
    assert "self-test of exact mode" in said and said.count("gap 0       kl 0 ") == 3
    assert "one order of summation on both sides" in said
    compiled = COMPILED and "--no-fast" not in flags
    assert ("compiled exact operators" if compiled else "exact operators") in said


def test_two_formats_are_refused():
    with pytest.raises(InputError, match="one format on both sides, not bf16 and fp32"):
        parse_config(["--exact", "--rollout-precision", "bf16", "--precision", "fp32"])


def test_the_self_test_stops_a_run_that_is_not_exact(small, monkeypatch):
    """Attention whose order of summation depends on the number of queries: the run ends before its first step, and says
    so."""
    monkeypatch.setattr(ExactNumerics, "attention", Numerics.attention)
    with pytest.raises(InputError, match=r"not exact here: \d+ of \d+ tokens.*blocks.0.attention, attention:"):
        small("--no-fast", "--precision", "fp32")


def test_the_self_test_names_a_dependence_on_the_number_of_rows(small, monkeypatch):
    """Products that know how many rows share the call: found by decoding a row among others and reading it alone."""
    product = ExactNumerics.product
    monkeypatch.setattr(ExactNumerics, "product", lambda self, x, w, b=None:
                        product(self, x, w, b) * (1 + 1e-6 * (x.shape[:-1].numel() <= 64)))
    with pytest.raises(InputError, match="First difference: blocks.0.attention, qkv product:.*Run without --exact"):
        small("--no-fast", "--precision", "fp32")


def test_the_self_test_changes_nothing(small, monkeypatch, tmp_path):
    """A run with it and a run without it have the same metrics, but for the time they took."""
    def numbers(rows):
        return [{k: v for k, v in r.items() if not k.startswith(("t_", "tokens_per"))} for r in rows if "step" in r]
    _, tested = small()
    called = []
    monkeypatch.setattr(train_rl.checks, "self_test", lambda *_: called.append(1))
    (tmp_path / "run").rename(tmp_path / "tested")
    _, untested = small()
    assert numbers(tested) == numbers(untested) and len(numbers(tested)) == 3 and called


def test_on_and_off_when_resumed(small, tmp_path):
    small("--steps", "2")
    resume = ["--resume", str(tmp_path / "run")]
    for flags in (["--steps", "3", "--no-exact"], ["--steps", "4", "--exact"]):
        assert train_rl.main([*resume, *flags]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shares = [r["exact_share"] for r in rows if "step" in r]
    assert len(shares) == 4 and shares[0] == shares[1] == shares[3] == 1.0 and shares[2] < 1.0


def test_a_step_that_is_not_exact_stops_the_run(small, monkeypatch, tmp_path):
    """After the self-test, in the second step, something changes."""
    collect, calls = train_rl.collect, []

    def spoiled(*args):
        rollout, *rest = collect(*args)
        calls.append(1)
        if len(calls) == 3:                                           # self-test, step 1, step 2
            rollout.logp[0, int(rollout.prompt_length[0])] += 1e-6
        return rollout, *rest
    monkeypatch.setattr(train_rl, "collect", spoiled)
    with pytest.raises(InputError, match=r"not exact here: 1 of \d+ tokens.*step 2; .*--resume run --no-exact"):
        small()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len([1 for line in lines if '"step"' in line]) == 1


# --- the lesson


def test_explain_finds_the_first_operator(monkeypatch):
    """A number changed on one side only, in one operator: it is that operator which is named."""
    model = exact_model("fp16", "exact", n_layers=2)
    tokens = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    assert not any(op.differ or op.differ_raw for op in checks.compare(model, tokens, 4))
    assert "not found again" in checks.first_difference(model, tokens, 4)
    for name, (where, words) in {"swiglu": ("mlp", "swiglu"), "norm": ("attention", "norm"),
                                 "attention": ("attention", "attention")}.items():
        with monkeypatch.context() as m:
            right = getattr(operators.exact, name)
            m.setattr(operators.exact, name, lambda num, x, *rest, right=right:
                      right(num, x, *rest) * (1.01 if x.shape[-2] == 1 else 1))
            assert checks.first_difference(model, tokens, 4).startswith(f"blocks.0.{where}, {words}: ")


def test_where_the_hardware_rounds_there_is_less_to_tell(capsys):
    """On a GPU nothing is known from before the rounding; a difference is told all the same."""
    x = torch.tensor([[1.0, 2.0]])
    explain.story("fp16", [checks.Operator("blocks.0.mlp", "norm", x, x, None, None),
                           checks.Operator("blocks.0.mlp", "swiglu", x, x + 0.5, None, None)])
    said = capsys.readouterr().out
    assert "first differing bit is in blocks.0.mlp, swiglu" in said
    assert "+1.500000000 (0x3fc00000) in the rollout" in said
    assert explain.percent(None) == ""


def test_explain_tells_the_story(capsys):
    explain.main()
    said = capsys.readouterr().out
    ordinary, exact = said.split("EXACT")
    assert "fp32: the first differing bit is in blocks.0.attention, " in ordinary and "(0x" in ordinary
    for fmt in explain.FORMATS:                 # the embedding, 11 operators in each of 4 blocks, the last norm
        assert f"{fmt}: 46 of 46 operators give the same bits" in exact
        row = next(line for line in exact.splitlines() if line.startswith(fmt + " ")).split()
        assert row[4] != "100.0%" and float(row[2]) > 0 and row[8] == "100.0%" and float(row[6]) == 0


# --- the experiment


def fake_run(spoil=None):
    def run(job, folder, about):
        curves = {k: [0.5, 0.7, 0.9] for k in lab.CURVES}
        gap = 0.0 if "exact" in job.name else 1e-3
        curves |= dict(logp_gap_max=[gap] * 3, logp_gap_mean=[gap] * 3, kl_k3=[gap] * 3, tokens=[3, 3, 4])
        out = dict(name=job.name, seed=job.seed, threads=job.threads, command=[], sources="", wall=1.0)
        out["curves"] = curves
        if (job.name, job.seed, job.threads) == spoil:
            return out | dict(failed="train_rl.py: stopped: exact mode is not exact here")
        return out | dict(accuracy=0.9 + 0.01 * job.seed)
    return run


def test_the_check_says_so_when_a_run_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(lab, "run", fake_run())
    assert twins.main(["--check", "--quick", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "exact-check.json").read_text())
    assert report["result"]["exact"] is True and report["result"]["tokens"] == 60 and len(report["runs"]) == 6
    assert "\nexact: 60 tokens in 18 steps of 6 runs" in capsys.readouterr().out
    monkeypatch.setattr(lab, "run", fake_run(spoil=("bf16 exact", 0, 2)))
    assert twins.main(["--check", "--quick", "--out", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "exact-check.json").read_text())["result"]["exact"] is False
    assert "NOT EXACT: 50 tokens" in capsys.readouterr().out


def test_twins_report_every_mode_and_every_failure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(lab, "run", fake_run(spoil=("bf16", 1, 1)))
    assert twins.main(["--seeds", "3", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "exact-twins.json").read_text())["result"]
    assert list(report["summary"]) == ["fp32", "fp16", "bf16", "bf16 exact", "bf16/fp32"]
    assert len(report["pairs"]) == 10
    assert report["summary"]["bf16"]["failed"] == 1 and report["summary"]["fp32"]["failed"] == 0
    assert report["summary"]["fp32"]["accuracy"]["mean"] == 0.91
    assert report["pairs"]["bf16 - fp32"]["seeds"] == 3
    said = capsys.readouterr().out
    assert "bf16         1 failed" in said and said.count("no difference shown") == 10
