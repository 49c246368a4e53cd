"""The real commands, as a user starts them, on jobs of a few seconds."""
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import COMPILED, tiny

import train_rl
from algorithms import ALGORITHMS
from data.addition import Addition
from precision import InputError
from run import flags as settings
from run.checkpoint import load_checkpoint, save_checkpoint
from run.console import run_main

ROOT = pathlib.Path(__file__).resolve().parent.parent
# One digit, one layer: a base in a few seconds, and RL that learns
SMALL = ("--digits 1 --noise 0.3 --n-layers 2 --width 64 --base-steps 300 --base-batch 64 --base-lr 4e-3 --pool 70 "
         "--heldout 10 --steps 6 --prompts 16 --save-every 2 --device cpu").split()


@pytest.fixture(scope="module")
def home(tmp_path_factory, cache):
    """One folder for runs, with the cache in it."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "cache").symlink_to(cache)
    return folder


@pytest.fixture(scope="module")
def learns(home):
    """A finished run of 25 steps: its folder, exit status and output."""
    return home / "learns", *run(home, *SMALL, "--steps", "25", "--out", "learns", "--lr", "1e-3")


@pytest.fixture(scope="module")
def whole(home):
    """An uninterrupted run of 6 steps."""
    assert run(home, *SMALL, "--out", "whole")[0] == 0
    return home / "whole"


@pytest.fixture
def here(home, monkeypatch):
    """The same folder and cache for calls in this process."""
    monkeypatch.chdir(home)
    monkeypatch.setattr("run.base.CACHE", home / "cache")
    return home


def start(home, *flags, program="train_rl.py", **kw):
    """program: a file, or a module such as experiments.bench, which is run from the repository's folder."""
    env = {**os.environ, "TENBIT_CACHE": str(home / "cache"), "PYTHONUNBUFFERED": "1"}
    file = program.endswith(".py")
    command = [str(ROOT / program)] if file else ["-m", program]
    return subprocess.Popen([sys.executable, *command, *flags], cwd=home if file else ROOT, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)


def run(home, *flags, program="train_rl.py"):
    p = start(home, *flags, program=program)
    out, err = p.communicate(timeout=300)
    return p.returncode, out, err


def refuse(home, *flags, program="train_rl.py"):
    code, out, err = run(home, *flags, program=program)
    assert code not in (0, None) and "Traceback" not in err and err.count("\n") == 1, (code, out, err)
    return err


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_short_run_learns(learns):
    """25 steps of RL take a base that is right 6 times in 10 to 19 in 20 (LOG.md has ten seeds; 0.85 is well below
    them)."""
    folder, code, out, err = learns
    assert code == 0 and err == "", err
    first, *steps, last = rows(folder / "metrics.jsonl")
    assert first["config"]["digits"] == 1 and first["torch"] == torch.__version__ and "git" in first
    assert [r["step"] for r in steps] == list(range(1, 26))
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    first_column = " ".join(re.findall(r"^\| (`.*?) \|", page, re.M))
    explained = set(re.findall(r"\w+", first_column)) - {"route_flips", "expert_balance"}
    assert all(set(r) == explained for r in steps)                  # those two: with experts
    early, late = (sum(r["accuracy"] for r in part) / 5 for part in (steps[:5], steps[-5:]))
    assert late > early + 0.1 and last["result"]["accuracy"] > 0.85, (early, late, last)
    gaps = [r["logp_gap_mean"] for r in steps]
    assert 0 < max(gaps) < 1e-3 and min(gaps) >= 0                                    # measured, and FP16-small
    assert last["result"]["passed"] is None and "no verdict" in out and "\r" not in out
    assert {"prompt", "right_answer", "answers", "step"} in [set(r) for r in rows(folder / "samples.jsonl")]
    assert f"curves: {folder.name}/curves.png" in out and (folder / "curves.png").stat().st_size > 10_000


def weights(folder):
    return load_checkpoint(folder)["model"]


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_resume_is_bit_for_bit(home, whole):
    """6 steps at once; and 6 steps with an interruption: Ctrl-C after the third, a torn last line in the log. The
    weights, the optimizer's moments and the log end up equal. (tests/test_loop.py has all that a run remembers.)"""
    p = start(home, *SMALL, "--out", "parts")
    for line in p.stdout:
        if re.match(r"step +3/", line):
            p.send_signal(signal.SIGINT)
            break
    out, err = p.communicate(timeout=120)
    assert p.returncode == 130 and "--resume" in out and err == "", (out, err)
    parts = home / "parts"
    assert 3 <= load_checkpoint(parts)["step"] < 6
    with open(parts / "metrics.jsonl", "a") as f:
        f.write('{"step": 99, "rew')                                               # what a power cut leaves behind
    code, out, err = run(home, "--resume", str(parts))
    assert code == 0 and err == "" and "resumed" in out, err
    assert same(weights(parts), weights(whole))
    a, b = (load_checkpoint(x)["optimizer"]["state"] for x in (parts, whole))
    assert all(torch.equal(a[i][k], b[i][k]) for i in a for k in a[i])
    timing = {"t_rollout", "t_train", "tokens_per_s"}
    a, b = (
        [{k: v for k, v in r.items() if k not in timing} for r in rows(x / "metrics.jsonl") if "step" in r]
        for x in (parts, whole)
    )
    assert a == b


def test_killed_run_goes_on_from_its_last_checkpoint(home, whole):
    p = start(home, *SMALL, "--out", "killed")
    for line in p.stdout:
        if re.match(r"step +5/", line):
            p.kill()
            break
    p.wait()
    p.stdout.close(), p.stderr.close()
    assert load_checkpoint(home / "killed")["step"] in (4, 6)
    code, _, err = run(home, "--resume", "killed")
    assert code == 0, err
    assert same(weights(home / "killed"), weights(whole))
    assert [r["step"] for r in rows(home / "killed" / "metrics.jsonl") if "step" in r] == [1, 2, 3, 4, 5, 6]


def test_more_steps_after_the_end_and_sampling_from_a_run(home, learns):
    """--resume may name the checkpoint itself; what a run once changed, resuming it does not make a test with a
    verdict."""
    code, out, err = run(home, "--resume", "learns/checkpoint.pt", "--steps", "27", "--precision", "bf16")
    assert code == 0 and "step 27/27" in out and "rollout bf16, train bf16" in out and "no verdict" in out, err
    log = rows(home / "learns" / "metrics.jsonl")
    assert [r["step"] for r in log if "step" in r] == list(range(1, 28)) and sum("result" in r for r in log) == 1
    assert {"resumed_at": 25, "given": {"steps": 27, "precision": "bf16"}} in log
    code, out, err = run(home, "--model", "learns", "--prompt", "3+4=", "--temperature", "0", program="sample.py")
    assert code == 0 and out == "3+4=3+4+0=7;#7\n", (out, err)


def test_what_cannot_be_done_is_said_in_one_line(here, learns):
    """Two through the real command, which must print one line and no stack trace; the others in this process, for
    time."""
    assert "already holds a run: go on with --resume learns" in refuse(here, "--out", "learns")
    assert "which model" in refuse(here, "--prompt", "1+1=", program="sample.py")
    home = here
    (home / "broken.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2=",\n')
    (home / "long.jsonl").write_text('{"prompt": "123456789+1=", "answer": "2"}\n')
    (home / "torn").mkdir()
    (home / "torn" / "checkpoint.pt").write_bytes((home / "learns" / "checkpoint.pt").read_bytes()[:5000])
    bare = home / "bare"
    save_checkpoint(bare / "checkpoint.pt", tiny(), config={})
    for flags, words in (
            (["--resume", "nowhere"], "no checkpoint at nowhere"),
            (["--resume", "learns", "--width", "32"], "--width was settled when the run began"),
            (["--resume", "torn"], "not a complete checkpoint"),
            (["--resume", "bare"], "holds a model but no run"),
            (["--data", "missing.jsonl", *SMALL], "cannot read missing.jsonl"),
            (["--data", "broken.jsonl", *SMALL], "broken.jsonl line 2"),
            (["--data", "long.jsonl", *SMALL], "'123456789.1=' does not fit"),
            (["--digits", "1"], "too few different problems for 256"),
            (["--resume", "learns", "--pool", "9"], "--pool was settled when the run began"),
            (["--resume", "learns", "--updates-per-batch", "4"], "--updates-per-batch was settled"),
            (["--resume", "learns", "--overlong", "99"], "longer than the longest answer"),
            (["--resume", "learns", "--steps", "3"], "has done 2[57] steps")):
        with pytest.raises(InputError, match=words):
            train_rl.main(flags)
    assert not list((home / "out").glob("*/metrics.jsonl"))


def test_another_algorithm_on_resume_brings_its_settings(here, learns, monkeypatch):
    """... and leaves behind those of the old one, but for what is given."""
    seen = []
    monkeypatch.setattr(train_rl, "train", lambda cfg, given, run, saved: seen.append(cfg))
    for flags in (["--algo", "gspo"], ["--algo", "pg-seq-is"], ["--algo", "dapo", "--clip", "0.2", "0.5"], []):
        train_rl.main(["--resume", "learns", *flags])
    gspo, weighted, dapo, same = seen
    assert gspo.clip == ALGORITHMS["gspo"].settings["clip"]
    assert gspo.algo == "gspo" and gspo.correction == "none"
    assert (weighted.algo, weighted.correction, weighted.clip) == ("pg", "seq-is", (0.2, 0.2))
    assert dapo.clip == (0.2, 0.5) and dapo.dynamic_sampling > 1 and same.algo == "dr-grpo" and same.prompts == 16
    train_rl.main(["--resume", "learns", "--algo", "pg", "--correction", "token-tis"])   # fits pg, if not the default


def test_a_base_that_diverged_is_not_kept(here, tmp_path, monkeypatch):
    monkeypatch.setattr("run.base.CACHE", tmp_path)
    monkeypatch.setattr(train_rl.Config, "base_precision", "e4m3")
    with pytest.raises(InputError, match="imitation diverged"):
        train_rl.main([*SMALL, "--base-lr", "1", "--base-steps", "40", "--out", "diverged"])
    assert not list(tmp_path.glob("**/*.pt")) and not (here / "diverged").exists()


def test_overflow_stops_the_run_with_the_layer_and_a_safe_checkpoint(home):
    """e3m6 ends at 15.875: a forward pass with larger activations overflows. The run stops, says where, and loses
    nothing."""
    err = refuse(home, *SMALL, "--precision", "e3m6", "--rollout-precision", "fp16", "--out", "overflow")
    assert "log-probs are no longer finite" in err and "e3m6 ends at 15.9" in err
    assert re.search(r"pass of blocks\.\d", err)
    done = [r["step"] for r in rows(home / "overflow" / "metrics.jsonl") if "step" in r]
    assert load_checkpoint(home / "overflow")["step"] == len(done) // 2 * 2  # saved every second step, the last one too


@pytest.mark.parametrize("precision, words", [("fp16", "the loss scale fell below 1"),
                                              ("bf16", "gradients are no longer finite")])
def test_endless_nan_is_an_error(here, whole, monkeypatch, precision, words):
    """A loss that is NaN however small its scale: the scaler halves and halves, and then the run says so. Without a
    scaler the first such gradient ends the run, before it reaches a weight."""
    before = weights(whole)
    real = train_rl.policy_loss
    monkeypatch.setattr(train_rl, "policy_loss", lambda *args: (real(*args)[0] * math.nan, *real(*args)[1:]))
    with pytest.raises(InputError, match=words) as e:
        train_rl.main(["--resume", "whole", "--precision", precision, "--steps", "60"])
    assert "the loss itself" in str(e.value)
    assert same(weights(whole), before)


def test_a_reward_that_is_no_number_counts_0_and_is_told_once(here, whole, monkeypatch, capsys):
    monkeypatch.setattr(Addition, "reward", lambda *_: math.nan)
    assert train_rl.main(["--resume", "whole", "--steps", "27"]) == 0
    said = capsys.readouterr().out
    assert said.count("counts 0: no finite number: it gave nan") == 1 and "note: the reward of the answer" in said
    assert float(re.search(r"step 27/27  acc ([0-9.]+)", said)[1]) == 0


def test_anatomy_of_a_step(home):
    code, out, err = run(home, program="experiments.anatomy")
    assert code == 0, err
    for word in ("fp16", "bf16", "65504", "weights", "activations", "gradients"):
        assert word in out


def test_bench_is_a_table_of_the_job(home):
    code, out, err = run(home, *SMALL, program="experiments.bench")
    assert code == 0, err
    columns, *rows = (line.split() for line in out.split("\n\n")[1].splitlines())
    assert columns[-2:] == ["fp32", "fp16"]
    rows = {name: tuple(map(float, cells)) for name, *cells in rows}
    assert rows["step_tokens_per_s"][1] > 0 and rows["step_ratio"][0] == rows["rollout_ratio"][0] == 1


# --- flags


def called(capsys, *flags):
    """The command in this process, as its last lines start it -> exit status, standard output, standard error."""
    with pytest.raises(SystemExit) as e:
        run_main(lambda: train_rl.main(list(flags)))
    return e.value.code or 0, *capsys.readouterr()


@pytest.mark.parametrize("flags, words", [
    (["--max-answer", "40"], "--max-answer would have no effect: it counts with --model"),
    (["--prompt-form", "plain"], "--prompt-form would have no effect: it counts with --model"),
    (["--clip", "0.1", "0.1", "--algo", "pg"], "--clip would have no effect"),
    (["--old-policy", "recomputed", "--algo", "rloo"], "--old-policy would have no effect"),
    (["--digits", "2", "--task", "mytask.py"], "--digits would have no effect"),
    (["--init-scale", "4", "--precision", "bf16"], "--init-scale would have no effect"),
    (["--noise", "0.1", "--model", "nowhere"], "--noise would have no effect"),
    (["--width", "64", "--model", "nowhere"], "--width would have no effect"),
    (["--base-steps", "9", "--model", "nowhere"], "--base-steps would have no effect"),
    (["--replay-routing"], "--replay-routing would have no effect"),
    (["--model", "nowhere"], "nowhere"),
    (["--algo", "gpro"], "did you mean grpo"),
])
def test_a_flag_without_effect_is_refused(here, capsys, flags, words):
    """In one line, with exit status 1; and no folder of a run is left."""
    before = sorted(here.glob("out/*"))
    code, out, err = called(capsys, *flags)
    assert (code, out) == (1, "") and err.count("\n") == 1 and words in err, (code, out, err)
    assert sorted(here.glob("out/*")) == before


def test_flags_without_effect_through_the_real_command(home):
    err = refuse(home, "--max-answer", "40")
    assert err.startswith("train_rl.py: --max-answer would have no effect")


def test_exact_mode_says_that_an_edit_needs_a_second_one(here, learns, capsys, monkeypatch):
    """operators/exact.py has operators of its own: an edit of precision.py alone would do nothing with --exact."""
    for edited, told in (["precision.py"], True), (["model.py"], False), ([], False):
        monkeypatch.setattr("run.start.edited", lambda edited=edited: edited)
        _, out, _ = called(capsys, *SMALL, "--exact", "--steps", "1", "--out", f"exact-{len(edited)}-{told}")
        assert ("own in operators/exact.py: make the same edit there" in out) == told
    _, out, _ = called(capsys, *SMALL, "--steps", "1", "--out", "not-exact")
    assert "operators/exact.py" not in out


def test_an_algorithm_that_is_gone_is_one_line():
    saved = dataclasses.asdict(train_rl.Config(algo="mine"))
    with pytest.raises(InputError, match="--algo mine is no longer in algorithms.py"):
        settings.resumed(train_rl.Config, saved, {})
    assert settings.resumed(train_rl.Config, saved, dict(algo="pg"))["algo"] == "pg"


def test_help_is_short_and_help_all_is_whole(capsys):
    code, out, err = called(capsys, "--help")
    lines = out.splitlines()
    assert (code, err) == (0, "") and len(lines) <= 60 and max(map(len, lines)) <= 110
    assert len([x for x in lines if x.startswith("    python train_rl.py")]) == 3
    shown = [x.split()[0] for x in lines if re.match(r"  --\w", x)]
    ours = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(train_rl.Config)}
    assert len([x for x in shown if x in ours]) == 12 and set(shown) - ours == {"--resume", "--plan", "--help-all"}
    code, everything, err = called(capsys, "--help-all")
    assert (code, err) == (0, "") and out.strip() in everything
    named = set(re.findall(r"--[a-z][a-z-]*[a-z]", everything))
    for name in ours:
        assert name in named or "--no-" + name[2:] in named, name
    assert len(ours) <= 49
    assert called(capsys, "-h")[1] == out


@pytest.mark.parametrize("ends", ["well", "with an error in the loop"])
def test_ctrl_c_means_what_it_meant_before(here, whole, monkeypatch, ends):
    """The run's own handler is at work while it runs, and not afterwards."""
    def mine(*_):
        raise KeyboardInterrupt
    seen, act, learn = [], train_rl.act, train_rl.policy_loss

    def watched(*args):
        seen.append(signal.getsignal(signal.SIGINT))
        return act(*args)
    monkeypatch.setattr(train_rl, "act", watched)
    before = signal.signal(signal.SIGINT, mine)
    try:
        flags = [*SMALL, "--precision", "bf16", "--steps", "1", "--out", f"interrupt-{len(ends)}"]
        if ends == "well":
            assert train_rl.main(flags) == 0
        else:
            monkeypatch.setattr(train_rl, "policy_loss", lambda *args: (learn(*args)[0] * math.nan, learn(*args)[1]))
            with pytest.raises(InputError, match="gradients are no longer finite"):
                train_rl.main(flags)
        assert signal.getsignal(signal.SIGINT) is mine and len(seen) == 1 and seen[0] is not mine
    finally:
        signal.signal(signal.SIGINT, before)


# --- what you read is what runs

JOB = ("--digits 1 --noise 0.3 --n-layers 2 --width 128 --base-steps 30 --base-batch 16 --pool 40 --keep 0 1 "
       "--heldout 0 --prompts 4 --steps 2 --device cpu").split()
PROGRAM = ["*.py", "report/*.*"]
PROGRAM += [f"{folder}/**/*.{end}" for folder in ("operators", "run", "data", "hf") for end in ("py", "c")]
EDITS = {
    "swiglu": ("precision.py", "F.silu(gate) * value", "F.gelu(gate) * value"),
    "draw": ("precision.py", "logp = self.log_softmax(logits, temperature)\n",
             "logits = logits * 1.5\n        logp = self.log_softmax(logits, temperature)\n"),
    "block": ("model.py", "return num.add(x, y)", "return num.add(x, y, 0.5)"),
    "sampler": ("sample.py", "logits = model.logits(hidden)", "logits = 2 * model.logits(hidden)"),
    "reward": ("data/addition.py", "return float(text.partition", "return 1.0 - float(text.partition"),
    "demonstrator": ("data/addition.py", 'carry}={total};")', 'carry}={total},")'),
}


class Copies:
    """The program in folders of its own, edited, with one cache for all of them."""

    def __init__(self, home):
        self.home, self.done = home, {}

    def run(self, name, *flags, edit=None):
        """A job of the program with this edit -> the metrics of its steps without times, and what it said."""
        folder = self.home / "copies" / name
        for file in (f for pattern in PROGRAM for f in ROOT.glob(pattern)):
            to = folder / file.relative_to(ROOT)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, to)
        for file, old, new in edit or ():
            text = (folder / file).read_text(encoding="utf-8")
            assert text.count(old) == 1, f"{file} has no longer one {old!r}: this test has to follow"
            (folder / file).write_text(text.replace(old, new), encoding="utf-8")
        env = {**os.environ, "TENBIT_CACHE": str(self.home / "cache")}
        command = [sys.executable, "train_rl.py", *JOB, "--out", "run", *flags]
        p = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, timeout=300)
        assert p.returncode == 0 and p.stderr == "", p.stderr
        steps = [r for r in rows(folder / "run" / "metrics.jsonl") if "step" in r]
        assert len(steps) == 2
        timing = ("t_rollout", "t_train", "tokens_per_s")
        return [{k: v for k, v in r.items() if k not in timing} for r in steps], p.stdout

    def unedited(self, *flags):
        if flags not in self.done:
            self.done[flags] = self.run("-".join(["unedited", *flags]), *flags)
        return self.done[flags]


@pytest.fixture(scope="module")
def copies(home):
    return Copies(home)


def test_words_are_not_code(copies):
    """A comment and a docstring in precision.py change nothing: the base model stays in the cache, the compiled
    operators at work."""
    unedited, said = copies.unedited()
    assert "base model: none in the cache" in said
    steps, said = copies.run("words", edit=[
        ("precision.py", '"""precision.py:', '"""This file is precision.py:'),
        ("precision.py", "class Numerics:\n", "# The operators\nclass Numerics:\n")])
    assert steps == unedited and "base model: none in the cache" not in said
    if COMPILED:
        assert "compiled operators:" in said and "note: plain operators" not in said


def test_code_that_does_the_same_gives_the_same(copies):
    """An operator written otherwise, to the same effect: plain code runs, and gives what it gives unedited. So if an
    edit below changes the numbers, it is not because plain code adds up in another order than compiled code."""
    unedited, _ = copies.unedited("--no-fast")
    steps, said = copies.run("same", edit=[("precision.py", "F.silu(gate) * value", "value * F.silu(gate)")])
    assert steps == unedited
    if COMPILED:
        assert steps != copies.unedited()[0]
        assert re.search("^note: plain operators.*precision.py", said, re.M) and "plain operators:" in said


@pytest.mark.parametrize("name", EDITS)
def test_what_you_read_is_what_runs(copies, name):
    """An edit of an operator, of the model, the sampler or the task shows in the numbers of a run, although runs of the
    unedited program have left its compiled code and its base models in the cache."""
    file, operator = EDITS[name][0], EDITS[name][0] in ("precision.py", "model.py")
    before = [copies.unedited()[0], copies.unedited("--no-fast")[0]]
    steps, said = copies.run(name, edit=[EDITS[name]])
    for step, *unedited in zip(steps, *before):
        assert step not in unedited
    if operator and COMPILED:
        assert re.search(f"^note: plain operators.*{file}", said, re.M) and "plain operators:" in said
    elif COMPILED:
        assert "compiled operators:" in said and "note: plain operators" not in said


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_short_run_on_the_gpu(home):
    """The command of the first test on tensor cores: native FP16, flash attention, the loss scaler on the device."""
    flags = [f if f != "cpu" else "cuda" for f in SMALL]
    code, _, err = run(home, "--preset", "cpu", *flags, "--steps", "25", "--out", "gpu", "--lr", "1e-3")
    assert code == 0, err
    *_, last = rows(home / "gpu" / "metrics.jsonl")
    assert last["result"]["accuracy"] > 0.85
