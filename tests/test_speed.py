"""The speed benchmark compares like with like: the same model, as many tokens, and it says what it leaves out."""
import json
import sys

import pytest
import torch
from conftest import VARIANTS, tiny

from experiments import bench, probe, speed
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


def test_taking_turns_and_ratios(monkeypatch):
    """Every turn runs each contender once; the first turn is not counted; a ratio is the median of
    the turns' ratios, not the ratio of the medians."""
    order, now = [], [0.0]
    monkeypatch.setattr(bench, "gemm_peak", lambda device: order.append("gemm") or 1.0)
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])
    seconds = {"a": [99, 1, 3, 4], "b": [99, 2, 30, 4]}

    class Contender:
        size = speed.Size(None, prompts=2, prompt=3, new=5, micro=1, group=2)

        def __init__(self, name):
            self.name, self.stages = name, (self.run,)

        def run(self, turn):
            order.append((self.name, turn))
            now[0] += seconds[self.name][turn]
    rows, peak = bench.race({"a": Contender("a"), "b": Contender("b")}, 3, torch.device("cpu"))
    assert order == [x for t in range(4) for n in "ab" for x in ("gemm", (n, t))] and peak == 1
    assert rows["a"] == dict(rollout_s=3, rollout_tokens_per_s=20 / 3, rollout_ratio=1)
    assert rows["b"] == dict(rollout_s=4, rollout_tokens_per_s=5, rollout_ratio=2)     # of 2, 10 and 1


def test_the_clock_times_each_stage(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(probe.time, "perf_counter", lambda: next(times))
    turns = []
    assert probe.timed([turns.append] * 3, 5, torch.device("cpu")).tolist() == [1, 2, 4]
    assert turns == [5, 5, 5]


@pytest.fixture
def quick(monkeypatch, tmp_path, capsys):
    """The command at toy sizes on a CPU -> what its file says."""
    monkeypatch.setattr(speed, "pick_device", lambda: torch.device("cpu"))

    def command(name, *flags):
        speed.main(["--quick", "--out", str(tmp_path), *flags])
        report = json.loads((tmp_path / f"{name}.json").read_text())["result"]
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report
        return report
    return command


def test_every_row_is_there(quick):
    pytest.importorskip("trl")
    report = quick("speed-rollout-step-cpu", "--only", "rollout", "step", "--sizes", "0.9M", "0.5B")
    a, b = report["0.9M"], report["0.5B"]
    rows = a["contenders"]
    assert set(rows) == {"tenbit fp32", "tenbit fp16", "tenbit fp16, --no-fast", "generate, dynamic cache",
                         "generate, static cache", "TRL GRPOTrainer"}
    assert a["logits_differ"] < 1e-3 and a["trl_over_fp16"] > 0 and a["gemm_peak"] > 1e9
    fp16 = rows["tenbit fp16"]
    assert fp16["rollout_tokens_per_s"] == pytest.approx(16 * 9 / fp16["rollout_s"], rel=1e-3)
    assert fp16["step_s"] > fp16["rollout_s"] and {"rewards_s", "gradient_s", "update_s"} < set(fp16)
    assert "step_s" not in rows["generate, static cache"] and rows["tenbit fp32"]["step_ratio"] == 1
    assert "step_s" not in b["contenders"]["tenbit fp16"]
    assert any("no whole step" in x for x in report["left_out"]) and "no GPU: no rows of CUDA" in report["left_out"]


def test_missing_packages_are_named(monkeypatch, quick):
    monkeypatch.setitem(sys.modules, "transformers", None)
    report = quick("speed-rollout-step-cpu", "--only", "rollout", "step", "--sizes", "0.9M")
    assert "transformers is not installed: no rows of generate" in report["left_out"]
    assert set(report["0.9M"]["contenders"]) == {"tenbit fp32", "tenbit fp16", "tenbit fp16, --no-fast"}
    assert report["0.9M"]["contenders"]["tenbit fp16"]["step_s"] > 0


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
    own = speed.Work(speed.GPT(gpt), size, "fp32")
    layer = 2 * (4 * 12 + 4 * 4 + 3 * 4 * 8)                               # multiply-adds of all matrices, counted as 2
    head = 2 * 4 * 10
    prefill = 3 * (layer + 4 * 4 * 1.5) + head                             # scores and values: 2 * 2 * width * keys
    decode = 8 * 4 * (layer + 4 * 4 * 5.5 + head)
    forward = 8 * (7 * (layer + 4 * 4 * 4) + 5 * head)
    assert own.flops() == (prefill + decode, prefill + decode + 3 * forward)


def test_modes_are_what_they_say(monkeypatch, quick):
    """Each mode has its operators, and every exact one is compared with its own ordinary twin."""
    size, alone = speed.sizes(False, True)["0.9M"], []

    def in_a_process(work, size, mode):
        alone.append(mode)
        return 100.0 + 20 * ("exact" in mode)
    monkeypatch.setattr(speed, "alone", in_a_process)
    report = quick("speed-modes-cpu", "--only", "modes")["modes"]["0.9M"]
    assert list(report) == list(speed.MODES) == alone
    for m, r in report.items():
        num = speed.Work(GPT(size.gpt), size, m).num
        assert num.exact == ("exact" in m) and num.fmt.name == m[:4]
        assert (num.operators == "plain" or num.operators == "exact") or "--no-fast" not in m
        if "exact" not in m:
            assert r["step_over_ordinary"] == 1.0
        assert r["memory_over_ordinary"] == (1.2 if "exact" in m else 1.0)


def test_memory_is_that_of_a_process_of_its_own(quick):
    held = torch.ones(1 << 27)                                       # half a GiB, in this process
    size = speed.sizes(False, True)["0.9M"]
    there = speed.alone(speed.peak_of_steps, size, "fp16 exact")
    assert 10 < there < speed.peak_memory(held.device) - 256
    report = quick("speed-memory-cpu", "--only", "memory")["logprob_memory"]
    assert report["tokens"] == 256 and report["extra_mib"] >= 0


def test_a_line_through_the_costs(monkeypatch, capsys, tmp_path):
    """Cost per token of made-up steps: 2 us, and 10 ns for each key; one length costs a tenth more."""
    def race(work, turns, device):
        rows = {}
        for name, w in work.items():
            keys = (w.size.prompt + w.size.new) / 2
            us = (2 + 0.01 * keys) * (1.1 if name == "64 rows of 256" else 1)
            rows[name] = {f"{k}_s": 1e-6 * us * w.size.tokens for k in ("step", *speed.STAGES)}
        return rows, 1.0
    monkeypatch.setattr(speed, "race", race)
    monkeypatch.setattr(speed, "pick_device", lambda: torch.device("cpu"))
    speed.main(["--only", "scaling", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "speed-scaling-cpu.json").read_text())["result"]["scaling"]
    assert report["rows"]["off"] == pytest.approx(0, abs=1e-9) and report["rows"]["a"] == pytest.approx(2.32)
    length = report["length"]
    assert length["a"] == pytest.approx(2, rel=0.1) and length["b"] == pytest.approx(0.01, rel=0.1)
    assert 0.05 < length["off"] < 0.1
    assert (tmp_path / "speed-scaling-cpu.png").stat().st_size > 5_000
