"""The laboratory: its rules on made-up runs, its runner on a real one, and every experiment's --quick."""
import importlib
import json
import math

import numpy as np
import pytest
import torch

from experiments import anatomy, bias_variance, command, dial, grid, lab, loss_scale
from precision import InputError, parse_format

JOB = ("--digits 1 --noise 0.3 --n-layers 1 --width 32 --base-steps 30 --base-batch 32 --base-lr 4e-3 --pool 40 "
       "--heldout 0 --prompts 4 --steps 3 --keep 0 1").split()


def record(name="x", seed=0, accuracy=(0.5,), **kw):
    curves = {k: [0.0] * len(accuracy) for k in lab.CURVES} | dict(accuracy=list(accuracy))
    end = accuracy[-1] if accuracy else 0.0
    return dict(name=name, seed=seed, command=[], wall=1.0, curves=curves, accuracy=end) | kw


# --- the rules


def test_paired_differences_by_hand():
    rows = ("x", [0.5, 0.6, 0.7, 0.9]), ("y", [0.4, 0.5, 0.5, 0.8])
    records = [record(m, s, [a]) for m, row in rows for s, a in enumerate(row)]
    d = lab.paired(records, "x", "y")                              # 0.1, 0.1, 0.2, 0.1: mean 0.125, sd 0.05, se 0.025
    assert d["mean"] == pytest.approx(0.125) and d["se"] == pytest.approx(0.025) and d["seeds"] == 4
    assert d["significant"] is True                                # 5 standard errors, more than 3.18
    records[0]["failed"] = "it stopped"
    assert lab.paired(records, "x", "y")["mean"] == pytest.approx(0)       # it counts as 0: 0 - 0.4, 0.1, 0.2, 0.1
    assert lab.paired(records, "x", "x")["significant"] is False
    few = [r for r in records if r["seed"] == 1]
    assert lab.paired(few, "x", "y") == dict(seeds=1, mean=None, se=None, significant=None)


def test_what_a_collapse_is():
    """20 points below the best, at the end, over ten steps: a dip that recovers is none, one that broke off is."""
    up = list(np.linspace(0.5, 0.9, 30))
    assert not lab.collapsed(record(accuracy=up)) and lab.best(record(accuracy=up)) == pytest.approx(np.mean(up[-10:]))
    assert lab.collapsed(record(accuracy=up + [0.6] * 10)) and not lab.collapsed(record(accuracy=up + [0.75] * 10))
    assert not lab.collapsed(record(accuracy=up + [0.1] * 5 + [0.9] * 10))
    assert lab.collapsed(record(accuracy=[0.1] * 5, failed="stopped"))                 # however low it was
    assert lab.collapsed(record(accuracy=up, failed="stopped")) and lab.last(record(accuracy=up, failed="stopped")) == 0
    assert lab.best(record(accuracy=[])) == 0 and lab.best(record(accuracy=[0.2, 0.4])) == pytest.approx(0.3)


def test_a_summary_counts_what_broke_off():
    rs = [record(seed=0, accuracy=[0.5] * 12), record(seed=1, accuracy=[0.6] * 12),
          record(seed=2, accuracy=[0.9] * 4, failed="train_rl.py: stopped: no longer finite")]
    s = lab.summary(rs)["x"]
    assert s["failed"] == 1 and s["collapsed"] == 1 and s["accuracy"]["mean"] == 0.55 and s["last"]["min"] == 0
    none = lab.summary([record(accuracy=[], failed="stopped")])["x"]
    assert none["accuracy"] is None and none["step_seconds"] is None and none["kl_k3"] is None
    json.dumps(none, allow_nan=False)


def test_numbers_that_are_not_finite_are_kept_apart():
    assert command.tidy(1.23456789e-7) == 1.2346e-7 and command.tidy(dict(a=[math.nan, 2, "x"], b=math.inf)) == dict(
        a=[None, 2, "x"], b=None)
    r = record(accuracy=[0.5, 0.6])
    r["curves"]["kl_k3"] = [1.0, None]
    assert lab.middle([r], "kl_k3") == 1.0


def test_slopes_of_the_dial():
    rows = [dict(man=m, gap=0.1 * 2.0 ** -m, kl=0.1 * 4.0 ** -m) for m in range(3, 15)]
    assert dial.slope(rows, "gap", 3, 14) == pytest.approx(-1) and dial.slope(rows, "kl", 3, 14) == pytest.approx(-2)
    assert math.isnan(dial.slope(rows[:1], "gap", 3, 14))


def test_what_a_format_loses():
    """FP16 keeps what rounds to 2^-24 at least: 2^-25, half of it, is rounded to even, to 0."""
    x, fp16 = 1.5 * 2.0 ** torch.tensor([-30, -26, -25, -10]), parse_format("fp16")
    assert [anatomy.landing(x * 2 ** k, fp16)["lost"] for k in (0, 1, 5)] == [0.5, 0.25, 0]
    assert anatomy.landing(x / 1.5, fp16)["lost"] == 0.75 == ((x / 1.5).half() == 0).float().mean()
    assert anatomy.landing(x, parse_format("bf16"))["lost"] == 0
    counts = loss_scale.exponents(torch.cat([torch.zeros(3), x, x]))
    assert counts[0] == 3 and sum(counts) == 11 and counts[1 - 30 - loss_scale.LOW] == 2


def test_moments_of_gradients():
    """The squared bias is estimated without the noise's own square: over many batches of pure noise it is 0, of noise
    and an offset, the offset's."""
    g = torch.Generator().manual_seed(0)
    noise, offset = bias_variance.Moments(), bias_variance.Moments()
    for _ in range(2000):
        d, ref = torch.randn(10, generator=g), torch.randn(10, generator=g)
        noise.add(ref + d, ref)
        offset.add(ref + d + 0.5, ref)
    assert abs(noise.bias2()) < 0.02 and offset.bias2() == pytest.approx(2.5, abs=0.15)
    assert noise.variance() == pytest.approx(20, rel=0.05) and abs(noise.norm2()) < 0.05


# --- the runner


def test_a_sweep_runs_resumes_and_reports(monkeypatch, tmp_path, cache, capsys):
    """Two formats, one that overflows; a second sweep runs nothing; other sources run all of it again."""
    monkeypatch.setenv("TENBIT_CACHE", str(cache))
    monkeypatch.setattr("run.base.CACHE", cache)
    jobs = [lab.Job("bf16/fp32", 0, (*JOB, *lab.formats("bf16/fp32"))),
            lab.Job("e2m3", 0, (*JOB, *lab.formats("fp32/e2m3")))]
    records = lab.sweep(jobs, tmp_path / "runs", 2)
    said = capsys.readouterr().out
    assert [r["name"] for r in records] == ["bf16/fp32", "e2m3"] and "min to go" in said and "  2/2 " in said
    good, bad = records
    assert 0 <= good["accuracy_train"] <= 1                                 # the deployment gap, formats being two
    assert len(good["curves"]["accuracy"]) == 3 and 0 <= good["accuracy"] <= 1 and min(good["curves"]["kl_k3"]) > 0
    assert "stopped: log-probs are no longer finite" in bad["failed"] and str(tmp_path) not in bad["failed"]
    assert not list((tmp_path / "runs").glob("*/run/checkpoint.pt"))              # a sweep has hundreds
    logs = sorted((tmp_path / "runs").glob("*/log.txt"))
    times = [p.stat().st_mtime_ns for p in logs]
    assert lab.sweep(jobs, tmp_path / "runs", 2) == records and [p.stat().st_mtime_ns for p in logs] == times
    monkeypatch.setattr(lab, "sources", lambda: "changed")
    again = lab.sweep(jobs[:1], tmp_path / "runs", 1)[0]
    assert again["sources"] == "changed"
    assert again["curves"]["accuracy"] == good["curves"]["accuracy"]              # and the same numbers
    with pytest.raises(SystemExit, match="nonsense"):                             # a mistake is no outcome
        lab.run(lab.Job("nonsense", 0, (*JOB, *lab.formats("nonsense"))), tmp_path / "runs", "x")


def test_a_grid_is_every_row_in_every_mode(monkeypatch, tmp_path, capsys):
    """Its runs, what is compared with what, and the files; --quick takes the first run and the last."""
    ran = []

    def run(job, folder, about):
        ran.append(job)
        return record(job.name, job.seed, [0.5 + 0.1 * ("GSPO" in job.name)] * 12, config={})
    monkeypatch.setattr(lab, "run", run)
    monkeypatch.setattr(lab, "find_base", lambda cfg, device: (None, "base", None))

    def mine(*flags):
        ran.clear()
        one = lab.Lab("mine", "Mine.", [*flags, "--out", str(tmp_path), "--preset", "cpu"], seeds=2,
                      add=grid.other_modes)
        grid.grid(one, {"GRPO": "--lr 1e-5", "GSPO": "--algo gspo"}, one.args.modes or ("fp16", "bf16/fp32"),
                  "--lr 1e-6", compare=[("GSPO", "GRPO"), ("fp16", "bf16/fp32")])
    mine()
    assert [(j.name, j.seed) for j in ran] == [(f"{r}: {m}", s) for s in (0, 1) for r in ("GRPO", "GSPO")
                                               for m in ("fp16", "bf16/fp32")]
    flags = " ".join(ran[1].flags)
    assert flags.startswith(" ".join(["--preset cpu --device cpu", *lab.LAB, "--lr 1e-6 --lr 1e-5"]))
    assert flags.endswith("--precision fp32 --rollout-precision bf16")         # the row's flags after the grid's
    result = json.loads((tmp_path / "mine.json").read_text())["result"]
    assert {k: round(d["mean"], 6) for k, d in result["pairs"].items()} == {
        "GSPO: fp16 - GRPO: fp16": 0.1, "GSPO: bf16/fp32 - GRPO: bf16/fp32": 0.1,
        "GRPO: fp16 - GRPO: bf16/fp32": 0, "GSPO: fp16 - GSPO: bf16/fp32": 0}
    assert (tmp_path / "mine.png").exists() and "0 of 2" in capsys.readouterr().out
    mine("--quick")
    assert [j.name for j in ran] == ["GRPO: fp16", "GSPO: bf16/fp32"]
    assert ran[0].flags[-len(lab.QUICK):] == tuple(lab.QUICK)
    mine("--modes", "e8m2")
    assert [j.name for j in ran] == ["GRPO: e8m2", "GSPO: e8m2"] * 2 and (tmp_path / "mine-e8m2.json").exists()
    with pytest.raises(InputError, match="mine-e8m3.json is not there"):
        mine("--modes", "e8m3", "--redraw")
    assert not ran


def test_what_results_keep_of_a_run():
    """The curves that are drawn, and the means of the others."""
    r = record(accuracy=[0.5, 0.6], config=dict(lr=1))
    r["curves"]["seq_kl"], r["command"] = [1.0, None], ["train_rl.py", "--seed", "0"]
    kept = lab.shorter(r, {"accuracy"})
    assert kept["curves"] == dict(accuracy=[0.5, 0.6]) and kept["means"]["seq_kl"] == 1
    assert "accuracy" not in kept["means"]
    assert kept["command"] == "train_rl.py --seed 0" and "config" not in kept


def test_a_band_of_runs_that_end_early():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    ax = plt.subplots()[1]
    y = command.band(ax, [[1, 2, 3], [3, None], []], "C0", "x", first=5)
    line = ax.lines[0]
    assert line.get_xdata().tolist() == [5, 6, 7] and np.ma.filled(line.get_ydata(), -1).tolist() == [2, 2, 3]
    assert y.count() == 4 and command.band(ax, [[]], "C0", "nothing").count() == 0


@pytest.mark.parametrize("name", [
    "mismatch", "sanity", "precision_grid", "bias_variance", "loss_scale", "overflow", "dial", "collapse", "variants"])
def test_every_experiment_has_a_quick_version(name, tmp_path, cache, monkeypatch):
    """It runs, and leaves a JSON file with its provenance and a picture."""
    monkeypatch.setenv("TENBIT_CACHE", str(cache))
    monkeypatch.setattr("run.base.CACHE", cache)
    importlib.import_module(f"experiments.{name}").main(["--quick", "--out", str(tmp_path)])
    text, picture = (tmp_path / f"{name}.json").read_text(), (tmp_path / f"{name}.png").read_bytes()
    report = json.loads(text)
    names = "command config machine torch git sources date seconds result runs"
    assert set(names.split()) <= set(report)
    assert "NaN" not in text and "Infinity" not in text
    assert f"experiments.{name} --quick" in report["command"] and report["seconds"] < 120
    assert len(picture) > 5_000
    if report["runs"] and (tmp_path / "runs").exists() and list(tmp_path.glob("runs/*/run/metrics.jsonl")):
        assert "runs; details of the first" in (tmp_path / "runs" / "report.html").read_text(encoding="utf-8")
    (tmp_path / f"{name}.png").unlink()
    importlib.import_module(f"experiments.{name}").main(["--quick", "--redraw", "--out", str(tmp_path)])
    assert (tmp_path / f"{name}.json").read_text() == text                        # nothing was run
    assert (tmp_path / f"{name}.png").read_bytes() == picture
