"""The estimate of --plan against what torch keeps, and a run that cannot fit."""
import dataclasses

import pytest
import torch
from conftest import VARIANTS, tiny

import train_rl
from data.env import make_env
from experiments.plan import needs, plan, saved_per_token
from precision import InputError
from train_rl import Config


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fmt", ["fp32", "fp16"])
def test_activations_are_what_the_plan_says(variant, fmt, device):
    """Every storage that autograd holds for the way back, counted once, against the formula: within a tenth."""
    model = tiny(device, fmt, **{**dict(head_dim=32), **VARIANTS[variant]}, width=96, mlp_width=200)
    B, T = 6, 31
    tokens = torch.zeros(B, T + 1, dtype=torch.int64, device=device)
    kept, weights = {}, {p.data_ptr() for p in model.parameters()} | {model.num.weight(p).data_ptr() for p in model.parameters()}

    def pack(t):
        if t.data_ptr() not in weights and t.is_floating_point():
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = model(tokens[:, :-1])
    tables = 2 * T * model.cfg.head_dim // 2 * 4
    got = (sum(kept.values()) - tables) / (B * T * model.cfg.n_layers)
    lanes = getattr(model.num, "lanes", 0)
    attention = "exact" if model.num.exact else "fused" if device.type == "cuda" and fmt != "fp32" else "plain"
    want = saved_per_token(model.cfg, T, model.num.dtype.itemsize, lanes, attention)
    assert hidden.requires_grad and abs(got - want) < 0.1 * want, (got, want)


def test_parameters_are_counted_right():
    for kw in VARIANTS.values():
        model = tiny(**kw)
        assert model.cfg.n_params() == sum(p.numel() for p in model.parameters())


def test_the_plan_says_what_to_lower(monkeypatch, capsys):
    cfg = dataclasses.replace(Config(), micro_batch=512)
    total = sum(size for size, _ in needs(cfg, torch.device("cpu"), make_env(cfg)).values())
    assert plan(cfg, print) == 0 and "it fits" in capsys.readouterr().out
    small = sum(size for size, _ in needs(dataclasses.replace(cfg, micro_batch=128), torch.device("cpu"), make_env(cfg)).values())
    assert small < total
    monkeypatch.setattr("experiments.plan.available", lambda device: small + 1)
    assert plan(cfg, print) == 1
    said = capsys.readouterr().out
    assert "it does not fit" in said and "--micro-batch 128 fits" in said


def test_a_run_that_cannot_fit_stops_at_once_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("experiments.plan.available", lambda device: 2 ** 20)
    with pytest.raises(InputError, match="MiB are free|are free") as e:
        train_rl.main(["--out", str(tmp_path / "run"), "--width", "512"])
    assert "--micro-batch" in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()                                       # and leaves nothing behind


def test_out_of_memory_in_the_rehearsal_is_advice(monkeypatch, tmp_path):
    """The longest batch is tried before anything else; torch's own error is told in one line."""
    seen = []

    def full(model, rollout, advantage, cfg, *_):
        seen.append(tuple(rollout.tokens.shape))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    monkeypatch.setattr(train_rl, "accumulate_gradient", full)
    with pytest.raises(InputError, match="not enough memory for this run's largest batch.*--micro-batch"):
        train_rl.main(["--out", str(tmp_path / "run"), "--micro-batch", "96"])
    assert seen == [(96, 41)]                                                    # 8 tokens of prompt, 33 of answer
