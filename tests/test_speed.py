"""The speed benchmark compares like with like: the same model, as many tokens, and it says what it leaves out."""
import json

import pytest
import torch
from conftest import VARIANTS, tiny

from experiments import speed
from experiments.bench import flops
from model import GPT, GPTConfig


@pytest.mark.parametrize("variant", ["plain", "qwen2.5"])
def test_the_peer_is_the_same_model(variant):
    """transformers' Llama and Qwen2 with our weights give our logits: a check of model.py against a third party too."""
    pytest.importorskip("transformers")
    model = tiny(gain=2.0, **VARIANTS[variant])
    assert speed.agrees(model, speed.to_transformers(model)) < 1e-5
    with torch.no_grad():
        model.blocks[1].qkv[0] += 1                                              # and a difference would be seen
    model.num.refresh()
    assert speed.agrees(model, speed.to_transformers(tiny(gain=2.0, **VARIANTS[variant]))) > 1e-4


def test_taking_turns_and_ratios():
    order = []
    contenders = {"a": lambda t: order.append(("a", t)), "b": lambda t: order.append(("b", t))}
    times = speed.taking_turns(contenders, 2, torch.device("cpu"))
    assert order == [(n, t) for t in (0, 1, 2) for n in "ab"]
    assert [len(x) for x in times.values()] == [2, 2]                            # turn 0 warms up
    assert speed.ratio([2, 30, 4], [1, 3, 4]) == 2                               # the median of 2, 10 and 1


def small(monkeypatch):
    gpt = GPTConfig(vocab_size=258, n_layers=2, width=32, n_heads=2, n_kv_heads=1, mlp_width=48, context=32)
    table = {"0.9M": speed.Size(gpt, 2, 4, 6, 8), "0.5B": speed.Size(gpt, 2, 4, 6, 8, step=False)}
    monkeypatch.setattr(speed, "sizes", lambda gpu: table)


def test_one_json_line_with_every_row(monkeypatch, capsys, tmp_path):
    pytest.importorskip("trl")
    small(monkeypatch)
    assert speed.main(["--turns", "1", "--only", "rollout", "step", "--device", "cpu", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(printed.splitlines()[-1])
    assert json.loads((tmp_path / "speed-rollout-step-cpu.json").read_text()) == report
    a, b = report["0.9M"], report["0.5B"]
    assert set(a["rollout"]) == {"tenbit fp32", "tenbit fp16", "tenbit fp16, --no-fast", "generate, dynamic cache",
                                 "generate, static cache"}
    assert a["logits_differ"] < 1e-3 and a["trl"]["ratio"] > 0 and set(a["step"]["tenbit fp16"]["split"]) == {
        "rollout", "rewards", "gradient", "update"}
    assert a["rollout"]["tenbit fp16"]["tokens_per_s"] == pytest.approx(16 * 6 / a["rollout"]["tenbit fp16"]["seconds"])
    assert "step" not in b and any("no whole step" in x for x in report["left_out"]) and "left out: no GPU" in printed


def test_missing_packages_are_named(monkeypatch, capsys):
    small(monkeypatch)

    def gone(*_):
        raise ImportError("No module named 'transformers'", name="transformers")
    monkeypatch.setattr(speed, "to_transformers", gone)
    speed.main(["--turns", "1", "--only", "rollout", "step", "--sizes", "0.9M", "--device", "cpu"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "transformers is not installed: no rows of generate" in report["left_out"] and "trl" not in report["0.9M"]
    assert "tenbit fp16" in report["0.9M"]["step"]


def test_flops_count_the_products():
    """By hand, for one block: every weight of a matrix is one multiply-add per token, attention two per key and
    channel; of the experts a token meets two, and the router's every row."""
    gpt = dict(vocab_size=10, n_layers=1, width=8, n_heads=2, n_kv_heads=1, mlp_width=6, context=5)
    attention, mlp, rest = (8 + 4 + 4) * 8 + 8 * 8, 12 * 8 + 8 * 6, 3 * 2 * 8 * 5 + 2 * 10 * 8
    assert flops(GPT(GPTConfig(**gpt)), tokens=3, context=5, heads=2) == 2 * (3 * (attention + mlp) + rest)
    sparse = GPT(GPTConfig(**gpt, n_experts=5, experts_per_token=2, expert_width=3))
    experts = 5 * 8 + 2 * (6 * 8 + 8 * 3)
    assert flops(sparse, tokens=3, context=5, heads=2) == pytest.approx(2 * (3 * (attention + experts) + rest))


def test_work_is_counted_by_hand():
    """One layer, no head's worth of context: FLOPs of a rollout and a step against a count by hand."""
    gpt = GPTConfig(vocab_size=10, n_layers=1, width=4, n_heads=1, n_kv_heads=1, mlp_width=8, context=16)
    size = speed.Size(gpt, prompts=1, prompt=3, new=5, micro=8)
    own = speed.Own(speed.GPT(gpt), size, "fp32")
    layer = 2 * (4 * 12 + 4 * 4 + 3 * 4 * 8)                               # multiply-adds of all matrices, counted as 2
    head = 2 * 4 * 10
    prefill = 3 * (layer + 4 * 4 * 1.5) + head                             # scores and values: 2 * 2 * width * keys
    decode = 8 * 4 * (layer + 4 * 4 * 5.5 + head)
    forward = 8 * (7 * (layer + 4 * 4 * 4) + 5 * head)
    assert own.flops() == (prefill + decode, prefill + decode + 3 * forward)


def test_modes_are_what_they_say(monkeypatch, capsys, tmp_path):
    """Each mode has its operators, and every exact one is compared with its own ordinary twin."""
    small(monkeypatch)
    size, probes = speed.sizes(False)["0.9M"], []

    def probe(command, **_):                                # a process of its own would have the real sizes
        probes.append(command[4])
        return type("Done", (), dict(stdout=json.dumps(dict(peak_mib=100.0 + 20 * ("exact" in command[4])))))
    monkeypatch.setattr(speed.subprocess, "run", probe)
    assert speed.main(["--turns", "1", "--only", "modes", "--device", "cpu", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "speed-modes-cpu.json").read_text())["modes"]["0.9M"]
    assert list(report) == list(speed.MODES) == probes
    for m, r in report.items():
        num = speed.in_mode(speed.GPT(size.gpt), size, m).num
        assert num.exact == ("exact" in m) and num.fmt.name == m[:4]
        assert (num.operators == "torch's" or num.operators == "exact") or "--no-fast" not in m
        if "exact" not in m:
            assert r["over_ordinary"] == 1.0
        assert r["memory_over_ordinary"] == (1.2 if "exact" in m else 1.0)


def test_a_mode_probe_prints_its_peak(monkeypatch, capsys):
    small(monkeypatch)
    speed.main(["--mode-probe", "fp16 exact", "--sizes", "0.9M", "--device", "cpu"])
    assert json.loads(capsys.readouterr().out)["peak_mib"] > 10
