"""Runs of train_rl.py over seeds, and the rules by which they are judged.

    python -m experiments.NAME --preset gpu # sizes for one GPU

Each run is a process with one thread, as many at a time as there are cores: times are for
comparison among themselves only. All runs of a seed share one base model and one perfectible set,
whatever their formats. A run is not done again if its command and the program's sources are what
they were. One that fails is an outcome, and counted. Seeds are 0 to N-1, none is left out.
"""
import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from experiments.command import Command, short, slug, sources, tidy
from operators.code import ROOT
from operators.device import pick_device
from report import page
from run.base import find_base, get_base, load_task
from run.checkpoint import replacing
from run.console import ranged
from run.folder import read
from train_rl import parse_config

# The job of most experiments: sums of two digits with 22 tokens of working, 0.13 M parameters, four
# updates a batch as in the paper. 100 steps take half a minute on one core, and reach 98 % in FP32.
LAB = ("--digits 2 --noise 0.2 --n-layers 2 --width 64 --base-steps 600 --base-batch 64 "
       "--base-lr 4e-3 --heldout 0 --prompts 32 --updates-per-batch 4 --lr 1e-4 "
       "--lr-schedule constant --steps 100").split()
# The same for a GPU, 60 tokens of working, 3 M parameters: a guess of what ten minutes hold.
GPU = ("--digits 6 --noise 0.08 --n-layers 4 --width 256 --base-steps 1000 --base-batch 128 "
       "--base-lr 1e-3 --heldout 0 --prompts 32 --updates-per-batch 4 --lr 1e-4 "
       "--lr-schedule constant --steps 60").split()
QUICK = ("--digits 1 --noise 0.3 --n-layers 2 --width 64 --base-steps 300 --base-batch 64 "
         "--base-lr 4e-3 --pool 70 --heldout 10 --prompts 16 --lr 1e-3 --steps 3").split()
CURVES = ("accuracy kl_k3 logp_gap_mean logp_gap_max seq_kl entropy grad_norm kept_share "
          "clipped_share weight_sd exact_share skipped_steps loss_scale tokens t_rollout t_train "
          "route_flips").split()                               # route_flips: of models with experts


@dataclass(frozen=True)
class Job:
    name: str                          # what is compared: runs of one name differ by their seed
    seed: int
    flags: tuple                       # for train_rl.py
    threads: int = 1
    env: tuple = ()                    # (name, value) pairs, such as a TENBIT_CACHE of its own


def parts(mode):
    """A mode, "bf16", "bf16 exact" or "bf16/fp32" -> the rollout's format, training's, exact."""
    pair, *exact = mode.split()
    rollout, _, training = pair.partition("/")
    return rollout, training or rollout, bool(exact)


def formats(mode):
    """A mode as flags; "" is none."""
    if not mode:
        return []
    rollout, training, exact = parts(mode)
    return ["--precision", training, "--rollout-precision", rollout, *["--exact"] * exact]


def place(job, folder):
    return folder / f"{slug(job.name)}-seed{job.seed}-{job.threads}"


def run(job, folder, about):
    """One run of train_rl.py -> its record. `about`: the sources' hash."""
    path, begin = place(job, folder), time.time()
    command, record = ["train_rl.py", "--seed", str(job.seed), *job.flags], path / "record.json"
    if record.exists():
        done = json.loads(record.read_text(encoding="utf-8"))
        if (done["sources"], done["command"]) == (about, command):
            return {**done, "again": True}
    shutil.rmtree(path, ignore_errors=True)                # what a stopped sweep left of this run
    path.mkdir(parents=True)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(job.threads))
    full = [sys.executable, *command, "--save-every", "1000000", "--out", str(path / "run")]
    with open(path / "log.txt", "w", encoding="utf-8") as log:
        status = subprocess.run(full, cwd=ROOT, env={**os.environ, **threads, **dict(job.env)},
                                stdout=log, stderr=log).returncode
    out = dict(name=job.name, seed=job.seed, threads=job.threads, command=command, sources=about,
               wall=time.time() - begin)
    rows = [*read(path / "run" / "metrics.jsonl")] or [{}]
    steps = [r for r in rows if "step" in r]
    out["config"] = rows[0].get("config", {})
    out["curves"] = {k: [tidy(float(m[k])) for m in steps if k in m] for k in CURVES}
    said = ((path / "log.txt").read_text(encoding="utf-8").strip().splitlines() or [""])[-1]
    if status in (0, 1) and "result" in rows[-1]:
        out |= rows[-1]["result"]
    elif status == 1 and "stopped: " in said:              # not finite, or not exact
        out["failed"] = said.replace(str(path / "run"), "the run")
    else:                                                  # killed, or wrong flags: not an outcome
        raise SystemExit(f"{job.name}, seed {job.seed} (exit status {status}): {said}")
    (path / "run" / "checkpoint.pt").unlink(missing_ok=True)                # a sweep has hundreds
    with replacing(record) as f:
        f.write(json.dumps(out).encode())
    return out


def sweep(jobs, folder, workers):
    """Records in the order of the jobs, with a line and the time to go after each. The first job of
    a base model goes first: two processes that make the same one would do it twice."""
    first, about = {}, sources()
    for job in jobs:
        cfg = parse_config(["--seed", str(job.seed), *job.flags])[0]
        first.setdefault((find_base(cfg, pick_device(cfg.device))[1], job.env), job)
    makers, begin, fresh, records = [*first.values()], time.time(), 0, {}
    for phase in (makers, [job for job in jobs if job not in makers]):
        with ThreadPoolExecutor(workers) as pool:
            for job, r in zip(phase, pool.map(lambda job: run(job, folder, about), phase)):
                records[job] = r
                fresh += not r.pop("again", False)
                to_go = (time.time() - begin) / max(1, fresh) * (len(jobs) - len(records)) / 60
                print(f"{len(records):3}/{len(jobs)} {describe(r)}; {to_go:.0f} min to go",
                      flush=True)
    return [records[job] for job in jobs]


def describe(r):
    steps = len(r["curves"]["accuracy"])
    end = (f"FAILED after {steps} steps: {r['failed'][:90]}" if "failed" in r else
           f"accuracy {r['accuracy']:.3f}, kl {short(middle([r], 'kl_k3'))}")
    return f"{r['name']:28} seed {r['seed']} | {end} | best {best(r):.3f} | {r['wall']:.0f} s"


# --------------------------------------------------------------------------------------------------
# What is said of runs

WINDOW = 10


def spread(x, digits=4):
    """Mean, standard deviation over seeds, smallest and largest."""
    x = np.array(x, dtype=float)
    sd = round(x.std(ddof=1), digits) if len(x) > 1 else None
    mean, low, high = (round(v, digits) for v in (x.mean(), x.min(), x.max()))
    return dict(mean=mean, sd=sd, min=low, max=high)


def smooth(curve, window=WINDOW):
    """Mean over the last `window` steps, from the first full window on; or over a shorter curve."""
    c = np.nan_to_num(np.asarray(curve, float), nan=0.0, posinf=0.0, neginf=0.0)
    if len(c) < window:
        return np.array([c.mean() if len(c) else 0.0])
    return np.convolve(c, np.ones(window) / window, "valid")


def best(r):
    """Highest accuracy, over WINDOW steps."""
    return float(smooth(r["curves"]["accuracy"]).max())


def last(r):
    """Accuracy of the last WINDOW steps; 0 for a run that broke off: a policy of NaN is never
    right."""
    return 0.0 if "failed" in r else float(smooth(r["curves"]["accuracy"])[-1])


def collapsed(r, drop=0.2):
    """The rule, written before the runs: the last WINDOW steps are `drop` or more below the best
    WINDOW, or the run broke off."""
    return "failed" in r or last(r) <= best(r) - drop


# Student's t, two-sided, 5 %: number of pairs -> limit. For more pairs the last one, which is a
# little too strict.
LIMITS = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def paired(records, a, b, value=lambda r: r["accuracy"]):
    """Difference a - b of a value, seed by seed: mean, its standard error, and whether it is more
    than Student's t allows. A run that broke off has the value 0: left out, the format that kills
    its worst runs would look the better for it."""
    one, two = ({r["seed"]: 0.0 if "failed" in r else value(r) for r in records if r["name"] == m}
                for m in (a, b))
    d = np.array([one[s] - two[s] for s in sorted(one) if s in two])
    if len(d) < 2:
        return dict(seeds=len(d), mean=None, se=None, significant=None)
    mean, se = float(d.mean()), float(d.std(ddof=1) / math.sqrt(len(d)))
    return dict(seeds=len(d), mean=mean, se=se,
                significant=se > 0 and abs(mean) > LIMITS.get(len(d), 2.26) * se)


SCALARS = "accuracy", "accuracy_train", "heldout_before", "heldout_after", "kept", "wall"


def over(records, key, digits=4):
    """The spread of a number that a run ends with; None if none has it."""
    found = [r[key] for r in records if r.get(key) is not None]
    return spread(found, digits) if found else None


def summary(records):
    """name -> what its seeds have in common."""
    out = {}
    for name in dict.fromkeys(r["name"] for r in records):
        rs = [r for r in records if r["name"] == name]
        done, curves = [r for r in rs if "failed" not in r], [r["curves"] for r in rs]
        seconds = np.concatenate([np.add(c["t_rollout"], c["t_train"]) for c in curves])
        gaps = [x for c in curves for x in c["logp_gap_max"] if x is not None]
        out[name] = dict(
            seeds=len(rs), failed=len(rs) - len(done), collapsed=sum(map(collapsed, rs)),
            best=spread(list(map(best, rs))), last=spread(list(map(last, rs))),
            **{k: over(done, k) for k in SCALARS},
            gap_mean=middle(rs, "logp_gap_mean"), gap_max=max(gaps, default=None),
            kl_k3=middle(rs, "kl_k3"), seq_kl=middle(rs, "seq_kl"),
            route_flips=middle(rs, "route_flips"),
            skipped=int(sum(max(c["skipped_steps"], default=0) for c in curves)),
            step_seconds=float(np.median(seconds)) if len(seconds) else None)
    return out


def middle(rs, key):
    """Mean over steps, then over seeds, of what is finite."""
    curves = [np.asarray(r["curves"].get(key, ()), float) for r in rs]
    means = [c[np.isfinite(c)].mean() for c in curves if np.isfinite(c).any()]
    return float(np.mean(means)) if means else None


def over_seeds(records, keys):
    """name -> key -> its spread over the seeds, however small."""
    return {name: {k: over([r for r in records if r["name"] == name], k, 30) for k in keys}
            for name in dict.fromkeys(r["name"] for r in records)}


# --------------------------------------------------------------------------------------------------
# The command


class Lab(Command):
    """A command with runs of train_rl.py. seeds: how many by default."""
    curves = ()                          # the ones that the JSON file has, of others it has means

    def __init__(self, name, text, argv, seeds=3, add=lambda parser: None):
        def more(p):
            p.add_argument("--seeds", type=ranged(int, 1, 100), default=seeds,
                           help=f"0 to N-1, none left out (default {seeds})")
            p.add_argument("--preset", choices=("cpu", "gpu"),
                           default="gpu" if torch.cuda.is_available() else "cpu")
            add(p)
        super().__init__(name, text, argv, more)
        self.seeds, self.gpu = 1 if self.quick else self.args.seeds, self.args.preset == "gpu"
        self.workers = 4 if self.gpu else os.cpu_count() or 1

    def file(self, name=""):
        return super().file((name or self.name) + " gpu" * self.gpu)

    def pick(self, cpu, quick, gpu):
        """The size that was asked for."""
        return quick if self.quick else gpu if self.gpu else cpu

    def base(self, seed, size=None):
        """The base model that the runs of a seed start from -> (settings, task, model)."""
        flags = [*self.device(), *(size or self.pick(LAB, QUICK, GPU)), "--seed", str(seed)]
        cfg = parse_config(flags)[0]
        env = load_task(cfg)
        return cfg, env, get_base(cfg, pick_device(cfg.device), env)

    def device(self):
        return ["--preset", "gpu"] if self.gpu else ["--preset", "cpu", "--device", "cpu"]

    def sweep(self, jobs):
        """Records of all jobs; and a page of their runs side by side, beside them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        records = sweep(jobs, self.folder, self.workers)
        runs = [place(job, self.folder) / "run" for job in jobs]
        runs = [r for r in runs if (r / "metrics.jsonl").exists()]
        if runs:
            print(page.write(runs, self.folder / "report.html"))
        return records

    def save(self, path, result, records, **about):
        """A record's command says in what it differs from the common settings."""
        configs = [r["config"] for r in records if r.get("config")] or [{}]
        common = {k: v for k, v in configs[0].items() if all(c.get(k) == v for c in configs)}
        walls = round(sum(r.get("wall", 0) for r in records))       # with what was run before
        super().save(path, result, [shorter(r, self.curves) for r in records], **about,
                     workers=self.workers, run_seconds=walls, config=common)


def shorter(r, curves):
    """A record as results/ has it: its command says in what it differs from the common config."""
    out = {k: v for k, v in r.items() if k not in ("config", "curves", "sources")}
    if "curves" in r:
        out["command"] = " ".join(r["command"])
        out["means"] = {k: middle([r], k) for k in r["curves"] if k not in curves}
        out["curves"] = {k: c for k, c in r["curves"].items() if k in curves}
    return out
