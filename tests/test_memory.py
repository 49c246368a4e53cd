"""The estimate of --plan against what torch keeps, and a run that cannot fit."""
import dataclasses

import pytest
import torch
from conftest import VARIANTS, kind, tiny

import train_rl
from model import GPT
from precision import InputError
from run import memory
from run.base import gpt_config, load_task
from run.memory import needs, params, plan, saved_per_token
from run.problems import choose_problems
from train_rl import Config

EXPERTS = dict(n_experts=8, experts_per_token=2, expert_width=48)
SHAPES = {**VARIANTS, "experts": EXPERTS, "qwen3 moe": {**EXPERTS, **VARIANTS["qwen3"]}, "lora": {},
          "small heads": dict(head_dim=16)}


def kept(model, tokens):
    """Bytes that autograd holds for the way back: every storage counted once; no weights, tables and whole numbers."""
    num, found = model.num, {}
    known = {t.data_ptr() for p in model.parameters() for t in (p, num.weight(p))}
    known |= {model.cos.data_ptr(), model.sin.data_ptr()}

    def pack(t):
        if t.is_floating_point() and t.data_ptr() not in known:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        assert model(tokens).requires_grad
    return sum(found.values())


@pytest.mark.parametrize("variant", SHAPES)
@pytest.mark.parametrize("fmt", ["fp32", "fp16"])
def test_activations_stay_below_the_plan(variant, fmt, device):
    """The bound holds what one layer more makes autograd hold for the way back, and not much more."""
    if kind() == "native" and fmt == "fp16":
        pytest.skip("a CPU's attention in half precision keeps what a GPU's does not")
    B, T, rank, held = 6, 31, 8 if variant == "lora" else 0, []
    for layers in (2, 3):
        model = tiny(device, fmt, **{**dict(head_dim=32), **SHAPES[variant]}, width=96, mlp_width=200, n_layers=layers)
        if rank:
            model.adapt(rank)
            model.num.hold(model.parameters())
        held.append(kept(model, torch.zeros(B, T, dtype=torch.int64, device=device)))
    got, num = (held[1] - held[0]) / (B * T), model.num
    block = hasattr(num, "takes") and num.takes(model.blocks[0])
    want = saved_per_token(model.cfg, num.dtype.itemsize, block, rank)
    assert want / 2.3 < got <= 1.02 * want, (got, want)                     # scales, a few constants


@pytest.mark.parametrize("variant", SHAPES)
def test_parameters_are_counted_right(variant):
    model = tiny(**SHAPES[variant])
    dense = sum(p.numel() for p in model.parameters())
    assert params(model.cfg) == (dense, 0)
    assert params(model.cfg, 5) == (dense, model.adapt(5).n_params() - dense) and params(model.cfg, 5)[1] > 0


def total(cfg):
    return sum(size for size, _ in needs(cfg, torch.device("cpu"), load_task(cfg)).values())


def test_the_plan_says_what_to_lower(monkeypatch, capsys):
    cfg = dataclasses.replace(Config(), micro_batch=512, device="cpu")
    assert plan(cfg) == 0 and "it fits" in capsys.readouterr().out
    small = total(dataclasses.replace(cfg, micro_batch=128))
    assert small < total(cfg)
    monkeypatch.setattr(memory, "available", lambda device: small + 1)
    assert plan(cfg) == 1
    said = capsys.readouterr().out
    assert "it does not fit" in said and "--micro-batch 128 fits" in said


def test_the_plan_counts_the_model_that_the_run_makes(capsys):
    """With experts, with adapters, in exact mode: a positive estimate, of the weights that there will be."""
    for flags in ([], ["--n-experts", "4"], ["--lora-rank", "4"], ["--exact"]):
        cfg, _ = train_rl.parse_config(["--preset", "cpu", "--device", "cpu", *flags])
        env = load_task(cfg)
        choose_problems(cfg, env)
        rows = needs(cfg, torch.device("cpu"), env)
        model = GPT(gpt_config(cfg, env))
        whole = model.n_params()
        trained = model.adapt(4).n_params() - whole if "--lora-rank" in flags else whole
        assert rows["master weights, FP32"][0] == rows["gradients, FP32"][0] == 4 * trained
        assert all(size > 0 for size, _ in rows.values())
        assert train_rl.main(["--preset", "cpu", "--device", "cpu", "--plan", *flags]) == 0
        assert f"{whole / 1e6:.2f} M parameters" in capsys.readouterr().out


def test_a_run_that_cannot_fit_stops_at_once_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "available", lambda device: 2 ** 20)
    with pytest.raises(InputError, match="this run needs about .* MiB, 1 are free") as e:
        train_rl.main(["--device", "cpu", "--out", str(tmp_path / "run"), "--width", "512"])
    assert "--micro-batch" in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()                                       # and leaves nothing


def test_out_of_memory_in_the_rehearsal_is_advice(monkeypatch, tmp_path):
    """The longest batch is tried before anything else; torch's own error is told in one line."""
    seen = []

    def full(cfg, model, rollout, scaler, room):
        seen.append(tuple(rollout.tokens.shape))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    monkeypatch.setattr(train_rl, "learn_all", full)
    with pytest.raises(InputError, match="not enough memory for this run's largest batch.*--micro-batch"):
        train_rl.main(["--preset", "cpu", "--out", str(tmp_path / "run"), "--micro-batch", "96"])
    assert seen == [(96, 41)]                                                    # 8 tokens of prompt, 33 of answer
