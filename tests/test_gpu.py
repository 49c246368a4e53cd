"""What a GPU would run, on a machine without one: the graph of a decoding step, recorded and replayed by a stand-in."""
import contextlib
import json

import pytest
import torch
from conftest import VARIANTS, Native, NativeExact, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_rl
from model import GPT, KVCache
from operators.graph import GraphStep
from precision import Numerics, make_scaler
from run.base import gpt_config, load_task, train_base
from run.lines import banner
from sample import Sampler
from train_rl import parse_config

PROMPTS = [[1, 2, 3], [4] * 9, [5, 6], [7, 8, 9, 10, 11]]
# a capture refuses what the host must wait for: a number, a shape that depends on numbers
HOST = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default,
        torch.ops.aten.bincount.default, torch.ops.aten._unique2.default, torch.ops.aten.equal.default,
        torch.ops.aten.is_nonzero.default, torch.ops.aten.repeat_interleave.Tensor}


def waits(func, args):
    """Whether the host must wait for the GPU here."""
    masks = [t for t in args[1] if t is not None and t.dtype == torch.bool] if "index" in func.__name__ and len(
        args) > 1 and isinstance(args[1], (list, tuple)) else []
    return func in HOST or bool(masks)


def storages(x):
    return {t.untyped_storage().data_ptr(): t for t in tree_leaves(x) if isinstance(t, torch.Tensor)}


class Reads(TorchDispatchMode):
    """Counts how often the host must wait for a number."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += waits(func, args)
        return func(*args, **(kwargs or {}))


class Graph(TorchDispatchMode):
    """A stand-in for torch.cuda.CUDAGraph: what runs inside `with` is recorded, operator by operator, with the very
    tensors; what it wrote is put back, since a recording does not run. `replay` runs the same operators on the same
    memory. Between two replays, what a step made for itself is filled with NaN: on a GPU another graph of the pool may
    have written there."""

    def __init__(self):
        super().__init__()
        self.tape, self.own, self.before = [], {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if waits(func, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        given = storages((args, kwargs))
        if func._schema.is_mutable:
            for at, t in given.items():
                if at not in self.own and at not in self.before:
                    self.before[at] = t.untyped_storage(), t.untyped_storage().clone()
        out = func(*args, **kwargs)
        made = storages(out)
        new = {at: t for at, t in made.items() if at not in given}
        self.own |= new
        if new or func._schema.is_mutable:                        # a view is the same memory: nothing to do again
            self.tape.append((func, args, kwargs, out if new else None))
        return out

    def __exit__(self, *what):
        super().__exit__(*what)
        for storage, was in self.before.values():
            storage.copy_(was)
        self.poison()

    def poison(self):
        for t in self.own.values():
            t.untyped_storage().fill_(255)                        # NaN in every float format, -1 in every integer

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, out in self.tape:
                again = func(*args, **kwargs)
                if out is not None:
                    for old, new in zip(tree_leaves(out), tree_leaves(again)):
                        old.copy_(new)
        self.poison()


class Stream:
    made = 0

    def __init__(self):
        Stream.made += 1

    def wait_stream(self, other):
        pass


@pytest.fixture
def graphs(monkeypatch):
    """torch.cuda's graphs and streams, by the stand-in."""
    here = Stream()
    Stream.made = 0
    monkeypatch.setattr(GraphStep, "side", None)
    for name, what in dict(Stream=Stream, current_stream=lambda: here, stream=lambda s: contextlib.nullcontext(),
                           graph_pool_handle=object, CUDAGraph=Graph, graph=lambda g, pool, stream: g).items():
        monkeypatch.setattr(torch.cuda, name, what)


def samplers(model):
    """Steps one operator after another; a graph's steps without a graph; recorded and replayed. An answer ends with one
    of the two tokens that the model says most often."""
    said = Sampler(model, stop=-1, pad=66).generate(PROMPTS, 16, 20, seed=9)
    stop = tuple(torch.bincount(said.tokens[said.is_answer]).topk(2).indices.tolist())
    eager, twin, recorded = (Sampler(model, stop=stop, pad=66) for _ in range(3))
    twin.graphs, recorded.graphs = {}, {}
    return eager, twin, recorded


def of_twin(monkeypatch, sampler, *args, **kw):
    with monkeypatch.context() as m:
        m.setattr(GraphStep, "capture", False)
        return sampler.generate(*args, **kw)


def same(a, b):
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.length, b.length) and torch.equal(a.logp, b.logp)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fmt", ["fp32", "fp16"])
@pytest.mark.parametrize("device", ["cpu", "exact", "native"], indirect=True)          # C code cannot be recorded
def test_a_replayed_step_is_the_step(fmt, variant, device, graphs, monkeypatch):
    """Ragged prompts, rows that finish and are dropped, another temperature, weights that were rounded again, all that a
    step leaves behind destroyed: bit for bit what the same steps give without a graph. In FP32 and in exact mode, where
    masked slots change nothing, these are the tokens of eager steps."""
    model = tiny(device, fmt, gain=1.5, **VARIANTS[variant])
    eager, twin, recorded = samplers(model)
    monkeypatch.setattr("operators.graph.BUCKET", 8)
    for turn, temperature in enumerate((1.0, 1.0, 0.7, 0.0)):
        asked = PROMPTS, 8, 24, temperature, turn
        a, b, c = eager.generate(*asked), of_twin(monkeypatch, twin, *asked), recorded.generate(*asked)
        assert same(b, c) and b.stopped.any() and len(b.length.unique()) > 3
        if fmt == "fp32" or model.num.exact:
            assert torch.equal(a.tokens, c.tokens) and (a.logp - c.logp).abs().max() < 1e-4
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.01)
        model.num.refresh()
    tapes = [g.tape for step in recorded.graphs.values() for g in step.graphs.values()]
    assert len(tapes) > 4 and all(tapes)
    assert Stream.made == 1                                       # cuBLAS keeps 32 MiB for each


def test_what_an_overflow_left_in_the_cache_is_gone(device, monkeypatch):
    """Slots that no key of this rollout fills are masked: 0 times what is there. 0 times inf is NaN."""
    model = tiny(device, "fp16", gain=1.5)
    _, fresh, used = samplers(model)
    of_twin(monkeypatch, used, PROMPTS, 8, 20, seed=0)
    with torch.inference_mode():
        for step in used.graphs.values():
            step.cache.k.fill_(float("inf")), step.cache.v.fill_(float("inf"))
    a, b = (of_twin(monkeypatch, s, PROMPTS, 8, 20, seed=1) for s in (fresh, used))
    assert same(a, b) and b.logp.isfinite().all()


def test_a_capture_refuses_what_the_host_must_wait_for(graphs):
    x = torch.arange(4.0)
    for bad in (lambda: x.sum().item(), lambda: x[x > 1], lambda: x.nonzero(), lambda: bool((x > 1).any())):
        with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph(), None, None):
            bad()


@pytest.mark.parametrize("kw, reads", [({}, 0), (dict(n_experts=4, experts_per_token=2, expert_width=40), 3)],
                         ids=["dense", "experts"])
def test_a_step_does_not_wait_for_the_gpu(kw, reads, device, monkeypatch):
    """How often the host asks for a number in a step: not at all; with experts once a block, since how many tokens an
    expert gets decides the shape of its product."""
    model = tiny(device, "fp16", **kw)
    step = GraphStep(model, lambda h, u: model.num.draw(model.logits(h), u), 8, 64)
    monkeypatch.setattr(GraphStep, "capture", False)
    cache = KVCache(model.cfg, 4, 5, model.num)
    with torch.no_grad():
        model(torch.arange(20, device=device).view(4, 5), cache)
        row = torch.arange(8, device=device)
        step.start(cache, row // 2, torch.full((8,), 5, device=device))
        token, u = row, torch.rand(8, dtype=torch.float64, device=device)
        step(token, u)
        with Reads() as seen:
            step(token, u)
    assert seen.count == reads


JOB = ("--digits 1 --noise 0.3 --n-layers 2 --width 64 --base-steps 300 --base-batch 64 --base-lr 4e-3 --pool 70 "
       "--heldout 0 --prompts 16 --device cpu --steps").split()


def in_half_precision(monkeypatch, cache, folder, *flags):
    """A run of train_rl.py whose tensors are a GPU's -> its steps, its result."""
    monkeypatch.setattr("run.base.CACHE", cache)
    for module in ("start", "base", "problems"):
        monkeypatch.setattr(f"run.{module}.numerics", lambda fmt, device="cpu", fast=True, exact=False: (
            NativeExact if exact else Native)(fmt, device))
    train_rl.main([*JOB, *flags, "--out", str(folder / "run")])
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    _, *steps, end = map(json.loads, lines)
    return steps, end["result"]


def test_a_job_learns_in_half_precision(monkeypatch, cache, tmp_path, capsys):
    """Half tensors from the embedding to the loss, gradients through GradScaler: it learns as the emulated one does."""
    steps, result = in_half_precision(monkeypatch, cache, tmp_path, "25")
    assert result["accuracy"] > 0.85 > 0.75 > steps[0]["accuracy"], (steps[0]["accuracy"], result)
    assert 0 < max(s["logp_gap_mean"] for s in steps) < 0.01 and steps[-1]["loss_scale"] == 2 ** 16
    assert "fp16" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--precision bf16", "--rollout-precision fp32", "--precision bf16 --rollout-precision fp16",
                                   "--kl-beta 0.1 --updates-per-batch 2 --old-policy recomputed", "--exact"])
def test_other_jobs_run_in_half_precision(flags, monkeypatch, cache, tmp_path):
    steps, _ = in_half_precision(monkeypatch, cache, tmp_path, "2", *flags.split())
    gaps = [s["logp_gap_max"] for s in steps]
    assert len(gaps) == 2 and max(gaps) < 0.3 and (max(gaps) == 0) == ("--exact" in flags), gaps
    assert all(s["grad_norm"] > 0 for s in steps)


# --- the command line on a machine that says it has a GPU


@pytest.fixture
def card(monkeypatch):
    """card(GiB, capability): torch says that there is one GPU of this kind."""
    def there(gib, capability):
        free = (gib << 30) - (500 << 20)
        for name, what in dict(
                is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0,
                set_device=lambda d: torch.cuda._utils._get_device_index(d), mem_get_info=lambda d=None: (free, gib << 30),
                get_device_name=lambda d=None: "Some GPU", get_device_capability=lambda d=None: capability).items():
            monkeypatch.setattr(torch.cuda, name, what)
    return there


@pytest.mark.parametrize("gib, flags, code", [(10, "", 0), (16, "", 0), (16, "--exact --precision fp32", 0),
                                              (16, "--micro-batch 512", 1), (80, "--micro-batch 512", 0)])
def test_the_default_job_fits_a_small_card(gib, flags, code, card, capsys):
    card(gib, (9, 0))
    assert train_rl.main(["--plan", *flags.split()]) == code
    said = capsys.readouterr().out
    assert "25.44 M parameters" in said and "on cuda:0" in said                        # the GPU's preset, of itself
    assert ("it fits" in said) == (code == 0) and ("--micro-batch 128 fits" in said) == (code == 1), said


@pytest.mark.parametrize("capability, fmt, said", [
    ((9, 0), "fp16", "Some GPU: tensor cores, 16-bit reductions off: sums in FP32"),
    ((9, 0), "e5m7", "Some GPU: products in FP32, results rounded (not a format of the GPU)"),
    ((7, 5), "fp16", "Some GPU (tensor cores for FP16, none for BF16): tensor cores")])
def test_the_banner_names_the_card(capability, fmt, said, card):
    card(16, capability)
    num = Numerics(fmt, "cuda:0")
    assert banner(num, num, make_scaler(num)).startswith(said)


def test_a_base_model_learns_from_micro_batches(monkeypatch):
    """The base's batch goes forward and back in pieces that fit, and its gradient is the whole one."""
    gradients = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda parameters, most: gradients.append([p.grad.clone() for p in parameters]))
    for micro in ("32", "5"):
        cfg = parse_config([*JOB, "1", "--base-steps", "1", "--base-batch", "32", "--micro-batch", micro])[0]
        env = load_task(cfg)
        train_base(GPT(gpt_config(cfg, env), "cpu", 0), env, cfg)
    for whole, parts in zip(*gradients):
        assert (whole - parts).abs().max() <= 1e-5 * whole.abs().max()
