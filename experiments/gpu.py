"""All that is to be known of a GPU, in one command, the most valuable first.

    python -m experiments.gpu                   # all parts; what is done already is not done again
    python -m experiments.gpu --minutes 9       # no longer than that; the same again does the rest
    python -m experiments.gpu --only probe job  # these parts
    python -m experiments.gpu --quick           # toy sizes, on a CPU too: does the command work?

Each row of a part is a process with a limit of its own: a failure, a hang or an illegal memory
access in one hides nothing of the others. What a row had found by then is kept, and the JSON file
is written anew after each. A row is done if it has figures, no failure, and the sources are what
they were. What failed is tried again, after all others. Logs are in out/lab/gpu. A row imports what
it needs itself: without the tokenizer's package the first part still runs.
"""
import argparse
import importlib.util
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np
import torch

from experiments import command
from experiments.probe import TOY, Probe, bandwidth, gemm_peak, products
from model import GPT
from operators import numerics
from operators.code import ROOT
from operators.device import pick_device
from precision import InputError
from run.console import ranged, run_main
from run.folder import Run, read

SOURCES = command.sources()             # without experiments/: after a change there, another --out
CHILD = [sys.executable, "-m", "experiments.gpu", "--row"]
TINY = ("--digits 1 --noise 0.3 --n-layers 1 --width 32 --base-steps 100 --base-batch 32 "
        "--base-lr 4e-3 --pool 40 --keep 0 1 --heldout 10 --prompts 8 --lr 1e-3 --steps 3").split()


def note(**kinds):
    """figures=, failed= or lacks=, a dict each: a line of the row's log, that `noted` reads."""
    print("\n::", json.dumps(kinds), flush=True)         # pytest may be in the middle of a line


def noted(log):
    found = {}
    for line in log.rpartition("\n")[0].splitlines():
        if line.startswith(":: "):
            for kind, what in json.loads(line[3:]).items():
                found.setdefault(kind, {}).update(what)
    return found


def tail(text):
    """The last lines of an error."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith(":: ")][-10:]


@contextmanager
def trying(what):
    """A failure inside is noted, and the row goes on."""
    try:
        yield
    except ImportError as e:
        note(lacks={what: str(e)})
    except Exception as e:
        traceback.print_exc()
        note(failed={what: [str(e)] if isinstance(e, InputError) else tail(traceback.format_exc())})


# --------------------------------------------------------------------------------------------------
# Rows, each in a process and an empty folder of its own. quick: toy sizes


def probe(row, quick):
    """What the program takes for granted of torch, and what the machine can do at best."""
    device = pick_device()
    for fmt in ("fp16", "bf16", "fp32") if device.type == "cuda" else ("fp32",):
        num = numerics(fmt, device, fast=False)
        if row == "attention":
            small = Probe(num, *((4, 20) if quick else (64, 200)))
            for step in (small.learning, small.recomputing, small.decoding):
                with trying(f"{fmt}: {step.__name__}"):
                    note(figures={f"{fmt}: {step.__name__}": small.kernels(step)})
            with trying(f"{fmt}: same bits"):
                note(figures={f"{fmt}: same bits, of 20": small.same_bits()})
        else:
            with trying(f"{fmt}: mm"):
                note(figures={f"{fmt}: error of {k} mm": e for k, e in products(num).items()})
            with trying(f"{fmt}: peaks"):
                copied = bandwidth(device, 1 << (20 if quick else 28))
                note(figures={f"{fmt}: matrix peak, TFLOP/s": gemm_peak(device, num.dtype) / 1e12,
                              "copy, GB/s": copied / 1e9})


def tests(row, quick):
    """pytest: what takes the device fixture, and what simulates a GPU."""
    import pytest
    import tiktoken  # noqa: F401  without it every test fails
    found = dict(passed=0, failed=0, skipped=0)

    class Counting:
        def pytest_runtest_logreport(self, report):
            if report.when == "call" or not report.passed:
                found[report.outcome] += 1
                note(figures=found)
            self.pytest_collectreport(report)

        def pytest_collectreport(self, report):
            if report.failed:
                note(failed={report.nodeid: tail(report.longreprtext)[-1:]})
    os.chdir(ROOT)
    many = ["-n", "8", "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    what = ["tests", "-k", "cuda or test_gpu", *many]
    if quick:
        what = ["tests/test_gpu.py", "-k", "refuses or wait_for"]
    return pytest.main(["-o", "addopts=", "-o", "faulthandler_timeout=60", "-v", "--tb=short",
                        "--continue-on-collection-errors", *what], plugins=[Counting()])


def job(row, quick):
    """The default job as a newcomer runs it, with an empty cache: seconds by phase, the result."""
    import train_rl
    from run import base
    shutil.rmtree(base.CACHE, ignore_errors=True)
    flags, begin = TINY * quick, time.time()
    cfg = train_rl.parse_config(flags)[0]
    base.get_base(cfg, pick_device(), base.load_task(cfg))
    note(figures={"imitation, s": time.time() - begin})
    status = train_rl.main([*flags, "--out", "run"])
    *_, end = read(Run("run").metrics)
    steps = Run("run").history()
    note(figures={"all, s": time.time() - begin, "rollouts, s": sum(r["t_rollout"] for r in steps),
                  "learning, s": sum(r["t_train"] for r in steps), "steps": len(steps)}
         | {k: v for k, v in end["result"].items() if k not in ("changed", "seconds")})
    return status


def promises(row, quick):
    """What must hold bit for bit, and what must run: a few steps of a small job."""
    import train_rl
    from experiments import lab
    wide = "--n-layers 4 --width 256 --base-steps 400 --base-batch 128 --base-lr 1e-3".split()
    size = [*(TINY if quick else [*lab.LAB, *wide]), "--keep", "0", "1", "--heldout", "0",
            "--lr-schedule", "constant", "--steps", "6"]

    def go(name, *flags):
        """-> the run's steps, without their times."""
        train_rl.main([*([] if "--resume" in flags else [*size, "--out", name]), *flags])
        rows = Run(name).history()
        assert max(r["grad_norm"] for r in rows) > 0, "there was no gradient"
        seconds = [r.pop("t_rollout") + r.pop("t_train") for r in rows if r.pop("tokens_per_s")]
        note(figures={"accuracy": rows[-1]["accuracy"], "mean gap": rows[-1]["logp_gap_mean"],
                      "step, s": min(seconds), name: rows[-1]})
        return rows
    if row == "exact":
        for fmt in ("fp16", "bf16", "fp32"):
            with trying(fmt):
                gap = max(r["logp_gap_max"] for r in go(fmt, "--exact", "--precision", fmt))
                note(figures={f"largest gap, {fmt}": gap})
                assert gap == 0, f"{fmt} is not exact"
    elif row == "resume":
        go("resumed", "--steps", "3")
        resumed = go("resumed", "--resume", "resumed", "--steps", "6")
        assert resumed == go("at once"), "not the same steps"
    elif row == "recompute":
        assert go("kept") == go("recomputed", "--recompute"), "not the same steps"
    elif row == "LoRA":
        go("LoRA", "--lora-rank", "8")
    else:
        go("replay", "--n-experts", "4", "--replay-routing")
        go("experts", "--n-experts", "4")


def pairs(row, quick):
    """How far apart pairs of formats are, measured as experiments.mismatch does."""
    import train_rl
    from experiments import mismatch
    from run import base
    layers, n = int(row.split()[0]), 4 if quick else 64
    if "trained" in row:
        cfg = train_rl.parse_config(TINY if quick else ["--n-layers", str(layers)])[0]
        model = base.find_base(cfg, pick_device())[0]
        if model is None:
            raise ImportError(f"there is no base model of {layers} layers in this command's cache")
        case = mismatch.trained((cfg, base.load_task(cfg), model), 0, n, 4)
    else:
        shape = (3, 64, 16) if quick else (layers, 512 if layers < 24 else 1024, 256)
        case = mismatch.random([], 0, n, 4, *shape)
    for mode, *out in mismatch.passes(case, mismatch.MODES, (0, 21)):
        note(figures={f"KL, {mode}": (far := mismatch.distance(*out))["kl_k3"], mode: far})


def speeds(row, quick):
    """Decoding, learning, and the peers of experiments.speed."""
    from experiments import speed
    from experiments.bench import Work, race
    os.environ |= speed.QUIET
    size, device, turns = speed.sizes(True, quick)[row], pick_device(), 1 if quick else 3
    model, copied = GPT(size.gpt, device), bandwidth(device, 1 << (20 if quick else 28))
    for n in (1, 8) if quick else (1, 64, 256, 1024):
        with trying(f"decoding {n} rows"):
            rows = replace(size, prompts=-(-n // size.group), group=min(size.group, n))
            work = Work(model, rows, "fp16", step=False)
            r = race({"": work}, turns, device)[0][""]
            share = work.decode_bytes() / r["rollout_s"] / copied
            note(figures={f"{n} rows: tokens/s": r["rollout_tokens_per_s"],
                          f"{n} rows: share of bandwidth": share})
    for mode in ("bf16", "fp16 exact"):
        with trying(f"learning, fp16 and {mode}"):
            both = {m: Work(model, size, m) for m in ("fp16", mode)}
            for m, r in race(both, turns, device)[0].items():
                note(figures={f"{m}: step, s": r["step_s"],
                              f"{m}: step over fp16's": r["step_ratio"],
                              f"{m}: share of matrix peak": r["gradient_gemm_share"]})
    with trying("generate"):
        peer = speed.to_transformers(model)
        peer = peer.half() if device.type == "cuda" else peer
        both = dict(ours=Work(model, size, "fp16", step=False),
                    them=speed.Generate(peer, size, "static"))
        ratio = race(both, turns, device)[0]["them"]["rollout_ratio"]
        note(figures={"generate over our rollout": ratio})
    with trying("TRL"):
        import trl  # noqa: F401
        ours = Work(model, size, "fp16")
        theirs, ours = speed.trl_steps(speed.to_transformers(model), ours, turns)
        note(figures={"TRL's step over ours": float(np.median(theirs / ours))})


def memory(row, quick):
    """Two steps of Qwen2.5's shape, and what torch allocated at most (on a CPU: what the process
    held), beside what --plan says. Random weights take as much as trained ones. No answer ends, and
    rewards are drawn by lot: every answer is as long as can be and goes both ways."""
    import safetensors  # noqa: F401

    import train_rl
    from data.env import Env
    from data.tokenizer import TOKENIZER
    from experiments import speed
    from hf import weights
    from run import base, problems
    from run import memory as plan
    from sample import Sampler
    shape = replace(speed.sizes(True)["0.5B"].gpt, context=4096)
    if quick:
        shape = replace(TOY, vocab_size=TOKENIZER.n_vocab, qkv_bias=True, tied_head=True)
    elif "1.5B" in row:
        shape = replace(shape, n_layers=28, width=1536, n_heads=12, head_dim=128, mlp_width=8960)
    model, rng = pathlib.Path("model"), np.random.default_rng(0)
    weights.save(model, GPT(shape), "bf16")
    if not (model / "tokenizer.json").exists():            # bytes, a part of a large vocabulary
        path = model / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | weights.byte_tokenizer(model)
        path.write_text(json.dumps(config), encoding="utf-8")
    Sampler.ends = lambda self, tokens: torch.zeros_like(tokens, dtype=torch.bool)
    Env.rewards = lambda self, asked, rollout: rng.integers(0, 2, len(rollout.length)).tolist()
    flags = ["--model", "model", "--task", str(ROOT / "data" / "example_task.py"), "--out", "run",
             "--heldout", "0", "--steps", "2", *["--lora-rank", "32"] * ("LoRA" in row),
             *("--prompts 4 --max-answer 24" if quick else "--prompts 32 --max-answer 512").split()]
    cfg, device = train_rl.parse_config(flags)[0], pick_device()
    env = base.load_task(cfg)
    problems.choose_problems(cfg, env)
    note(figures={"--plan, MiB": plan.total(cfg, device, env) / plan.MIB})
    train_rl.main(flags)
    last = Run("run").history()[-1]
    note(figures={"peak, MiB": plan.peak_memory(device)} | {
        k: last[k] for k in ("tokens", "t_rollout", "t_train", "grad_norm")})
    for folder in ("model", "run"):
        shutil.rmtree(folder)


# part -> what does it, and the seconds that each of its rows may take. Three times nine minutes
# hold all, even if each row takes what it may.
PARTS = {
    "probe": (probe, {"attention": 25, "products": 25}),
    "tests": (tests, {"pytest": 140}),
    "job": (job, {"default": 330}),
    "promises": (promises, dict.fromkeys(("exact", "resume", "recompute", "LoRA", "experts"), 40)),
    "mismatch": (pairs, {"8 layers, random": 35, "24 layers, random": 50, "8 layers, trained": 35,
                         "24 layers, trained": 35}),
    "speed": (speeds, {"0.9M": 50, "25M": 70, "124M": 110, "0.5B": 110}),
    "memory": (memory, {"0.5B": 75, "1.5B, LoRA": 115, "1.5B": 115}),
}
FEW = {"mismatch": ("8 layers, random", "8 layers, trained"), "speed": ("0.9M",),
       "memory": ("0.5B", "1.5B, LoRA")}                                          # with --quick


# --------------------------------------------------------------------------------------------------
# The command


def child(part, row, quick):
    """A row, in this process -> its exit status."""
    with trying(row):
        return PARTS[part][0](row, quick)


def run(part, row, limit, folder, quick):
    """A row, in a process of its own -> all that is known of it."""
    place = folder / command.slug(f"{part} {row}")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env |= dict(PYTHONUNBUFFERED="1", TENBIT_CACHE=str(folder / "cache"),
                PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])]))
    env |= dict(OMP_NUM_THREADS="1") if quick else {}
    begin, why, path = time.time(), "", place / "log.txt"
    with open(path, "w", encoding="utf-8") as log:
        # a group of its own, to be stopped with all that it started
        process = subprocess.Popen([*CHILD, part, row, *["--quick"] * quick], cwd=place, env=env,
                                   stdout=log, stderr=log, process_group=0)
        try:
            if process.wait(limit):
                why = f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            why = f"stopped after {limit} seconds"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
            with suppress(subprocess.TimeoutExpired):           # a driver may hold it for long
                process.wait(10)
    text = path.read_text(encoding="utf-8", errors="replace")
    found = dict(figures={}, failed={}, lacks={}) | noted(text)
    if why:
        found["failed"]["the process"] = [why, *tail(text)]
    return found | dict(seconds=time.time() - begin, sources=SOURCES)


def show(parts):
    """A table a part; then what is missing."""
    for part, rows in parts.items():
        lines = {}
        for row, r in rows.items():
            for k, v in dict(seconds=r["seconds"], **r["figures"]).items():
                if not isinstance(v, dict):
                    lines.setdefault(k, {})[row] = v
        if rows:
            command.show(lines, part)
    for part, rows in parts.items():
        for row, r in rows.items():
            for what, text in r["lacks"].items():
                print(f"{part}, {row}: left out: {what}: {text}")
            for what, text in r["failed"].items():
                print(f"{part}, {row}: FAILED: {what}", *text, sep="\n    ")
            if r["sources"] != SOURCES:
                print(f"{part}, {row}: of other sources than these")


def draw(plt, parts):
    """The mismatch as a map; decoding and memory as points."""
    of = {part: {row: r["figures"] for row, r in rows.items()} for part, rows in parts.items()}
    fig, (far, decoding, held) = plt.subplots(1, 3, figsize=(15, 4.5))
    cases = {k: f for k, f in of["mismatch"].items() if f}
    if cases:
        modes = [k[4:] for k in next(iter(cases.values())) if k.startswith("KL, ")]

        def kl(mode, case):
            return cases[case].get(f"KL, {mode}") or 0.0
        command.heat(far, modes, list(cases), lambda m, c: math.log10(kl(m, c) + 1e-17),
                  lambda m, c: f"{kl(m, c):.1e}", cmap="YlOrRd")
    for size, f in of["speed"].items():
        at = {int(k.split()[0]): v for k, v in f.items() if k.endswith("of bandwidth")}
        decoding.plot(at.keys(), at.values(), "o-", label=size)
    for name in ("--plan, MiB", "peak, MiB"):
        at = {row: f[name] for row, f in of["memory"].items() if name in f}
        held.plot(at.keys(), at.values(), "o", label=name)
    far.set(title="KL(mu || pi) a token")
    decoding.set(title="decoding: share of the bandwidth", xlabel="rows", xscale="log")
    held.set(title="memory")
    decoding.legend(), held.legend()
    return fig


def main(argv=None):
    def add(p):
        p.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS),
                       metavar="PART", help=f"of {', '.join(PARTS)}")
        p.add_argument("--minutes", type=ranged(float, 0, 1e6), default=1e6,
                       help="a row begins only if its limit ends before that")
        p.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    cmd = command.Command("gpu", __doc__, argv, add)
    if cmd.args.row:
        return child(*cmd.args.row, cmd.quick)
    gpu = torch.cuda.is_available()
    if not (gpu or cmd.quick):
        raise InputError(f"torch {torch.__version__} sees no GPU; --quick runs on a CPU too")
    path = cmd.file(f"gpu {torch.cuda.get_device_name() if gpu else 'cpu'}")
    known = json.loads(path.read_text(encoding="utf-8"))["result"] if path.exists() else {}
    parts = {part: known.get(part, {}) for part in PARTS}
    cmd.folder.mkdir(parents=True, exist_ok=True)
    left = [] if cmd.args.redraw else work_off(cmd, parts, path)
    show(parts)
    command.picture(path.with_suffix(".png"), draw, parts)
    if left:
        print(f"left: {', '.join(left)}. The same command does them")
    return int(any(r["failed"] for part in cmd.args.only for r in parts[part].values()))


def work_off(cmd, parts, path):
    """Do the rows that are asked for and not done yet -> those that the time was too short for."""
    left, begin = [], time.time()

    def known(part, row):
        """0: nothing of these sources, 1: it failed, 2: it is done."""
        r = parts[part].get(row)
        fresh = r is not None and r["sources"] == SOURCES
        return fresh + (fresh and r["figures"] != {} and not r["failed"])
    asked = [(part, row) for part in PARTS if part in cmd.args.only for row in PARTS[part][1]
             if not cmd.quick or row in FEW.get(part, PARTS[part][1])]
    todo = [x for x in asked if known(*x) < 2]
    for part, row in sorted(todo, key=lambda x: known(*x) == 1):
        limit = 120 if cmd.quick else PARTS[part][1][row]
        if time.time() + limit > begin + 60 * cmd.args.minutes:
            left.append(f"{part} {row}")
            continue
        r = parts[part][row] = run(part, row, limit, cmd.folder, cmd.quick)
        print(f"{part} {row}: {r['seconds']:.0f} s{', FAILED' * bool(r['failed'])}", flush=True)
        cmd.save(path, parts)
    return left


if __name__ == "__main__":
    run_main(main)
