"""The runner that all experiments share: runs of train_rl.py over seeds, side by side, resumed where a sweep was stopped.

    python -m experiments.NAME              # the sizes of the README, at most 30 minutes on two CPU cores
    python -m experiments.NAME --quick      # the same in 2 minutes or less: does the command work? Its numbers mean nothing
    python -m experiments.NAME --preset gpu # sizes for one GPU

An experiment makes a list of Jobs, calls `sweep`, and writes what came out with `save`. Each run is a process of its own with one
thread, as many at a time as there are cores: times are for comparison among themselves only. All runs of a seed share one base
model and one perfectible set, whatever their formats. A run is not done again if its command and the program's sources are what
they were; one that fails is an outcome, and counted. Seeds are 0 to N-1, none is left out.
"""
import datetime
import hashlib
import json
import math
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from operators.device import pick_device
from run.base import find_base
from run.console import Parser, ranged
from train_rl import parse_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
# The job of most experiments: sums of two digits with 22 tokens of working, a model of 0.13 M parameters, four updates a batch
# as in the paper, a constant learning rate. 100 steps take half a minute on one core, and in FP32 it comes to 98 %.
LAB = ("--digits 2 --noise 0.2 --n-layers 2 --width 64 --base-steps 600 --base-batch 64 --base-lr 4e-3 "
       "--heldout 0 --prompts 32 --updates-per-batch 4 --lr 1e-4 --lr-schedule constant").split()
# The same for a GPU, 60 tokens of working and 3 M parameters: a guess of what ten minutes hold, not yet run on one.
GPU = ("--digits 6 --noise 0.08 --n-layers 4 --width 256 --base-steps 1000 "
       "--base-batch 128 --base-lr 1e-3 --heldout 0 --prompts 32 --updates-per-batch 4 --lr 1e-4 --lr-schedule constant").split()
QUICK = ("--digits 1 --noise 0.3 --n-layers 2 --width 64 --base-steps 300 --base-batch 64 --base-lr 4e-3 "
         "--pool 70 --prompts 16 --lr 1e-3").split()
CURVES = ("accuracy", "kl_k3", "logp_gap_mean", "logp_gap_max", "seq_kl", "entropy", "grad_norm", "kept_share", "clipped_share",
          "weight_sd", "exact_share", "skipped_steps", "loss_scale", "tokens", "t_rollout", "t_train", "route_flips")


@dataclass(frozen=True)
class Job:
    name: str                          # what is compared: runs of one name differ by their seed alone
    seed: int
    flags: tuple                       # for train_rl.py
    threads: int = 1
    env: tuple = ()                    # (name, value) pairs, such as a TENBIT_CACHE of its own


def formats(mode):
    """Flags of a mode: "bf16", "bf16 exact", or "bf16/fp32", rollout first."""
    pair, *exact = mode.split()
    rollout, _, training = pair.partition("/")
    return ["--precision", training or rollout, "--rollout-precision", rollout, *(["--exact"] if exact else [])]


def sources():
    """A hash of everything that a run's numbers come from."""
    h = hashlib.sha256()
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("run/*.py"), *ROOT.glob("operators/*.*")]):
        h.update(path.read_bytes())
    return h.hexdigest()[:16]


def run(job, folder, about):
    """One run of train_rl.py -> its record. `about`: the sources' hash."""
    slug = "".join(c if c.isalnum() else "-" for c in job.name)
    path, begin = folder / f"{slug}-seed{job.seed}-{job.threads}", time.time()
    command = ["train_rl.py", "--seed", str(job.seed), *job.flags]
    record = path / "record.json"
    if record.exists():
        done = json.loads(record.read_text(encoding="utf-8"))
        if (done["sources"], done["command"]) == (about, command):
            return {**done, "again": True}
    shutil.rmtree(path, ignore_errors=True)                    # what a stopped sweep left of this run
    path.mkdir(parents=True)
    env = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads), **dict(job.env)}
    with open(path / "log.txt", "w", encoding="utf-8") as log:
        child = subprocess.Popen([sys.executable, *command, "--save-every", "1000000", "--out", str(path / "run")],
                                 cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
        peak = wait(child)
    out = dict(name=job.name, seed=job.seed, threads=job.threads, command=command, sources=about, wall=time.time() - begin,
               peak_mib=peak)
    metrics = path / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.exists() else []
    steps = [r for r in rows if "step" in r]
    out["config"] = rows[0].get("config", {}) if rows else {}
    out["curves"] = {k: [short(m[k]) for m in steps if k in m] for k in CURVES}         # routes: of models with experts
    said = ((path / "log.txt").read_text(encoding="utf-8").strip().splitlines() or [""])[-1]
    if child.returncode in (0, 1) and rows and "result" in rows[-1]:
        out |= rows[-1]["result"]
    elif child.returncode == 1 and "stopped: " in said:        # what train_rl says of numbers that are no longer finite
        out["failed"] = said.replace(str(path / "run"), "the run")
    else:                                                      # killed, or wrong flags: no outcome of the experiment
        raise SystemExit(f"{job.name}, seed {job.seed} (exit status {child.returncode}): {said}")
    (path / "run" / "checkpoint.pt").unlink(missing_ok=True)   # a sweep has hundreds
    record.with_suffix(".partial").write_text(json.dumps(out), encoding="utf-8")
    os.replace(record.with_suffix(".partial"), record)
    return out


def short(x):
    """Five digits; None for what is not finite, which the run wrote as a string."""
    return float(f"{float(x):.5g}") if math.isfinite(float(x)) else None


def wait(child):
    """-> peak memory of a process that has ended, MiB."""
    if not hasattr(os, "wait4"):                               # Windows
        child.wait()
        return None
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def sweep(jobs, folder, workers):
    """Records in the order of the jobs, with a line and the time to go after each. What makes a base model comes first: two
    processes that make the same one would do it twice."""
    makers, about = {}, sources()
    for job in jobs:
        cfg = parse_config(["--seed", str(job.seed), *job.flags])[0]
        found, path, _ = find_base(cfg, pick_device(cfg.device))
        if found is None or not list(path.parent.glob("solved-*")):
            makers.setdefault(path, job)
    first = set(makers.values())
    begin, fresh, records = time.time(), 0, {}
    for phase in ([j for j in jobs if j in first], [j for j in jobs if j not in first]):
        with ThreadPoolExecutor(workers) as pool:
            for job, r in zip(phase, pool.map(lambda job: run(job, folder, about), phase)):
                records[job] = r
                fresh += not r.pop("again", False)
                to_go = (time.time() - begin) / max(1, fresh) * (len(jobs) - len(records))
                print(f"{len(records):3}/{len(jobs)} {describe(r)}; {to_go / 60:.0f} min to go", flush=True)
    return [records[job] for job in jobs]


def describe(r):
    c = r["curves"]
    end = f"FAILED after {len(c['accuracy'])} steps: {r['failed'][:90]}" if "failed" in r else f"accuracy {r['accuracy']:.3f}"
    kl = f"kl {np.median(c['kl_k3']):.1e}" if c["kl_k3"] else ""
    return f"{r['name']:28} seed {r['seed']} | {end} | best {best(r):.3f} {kl} | {r['wall']:.0f} s"


# ---------------------------------------------------------------------------------------------------------------------
# What is said of runs

WINDOW = 10


def spread(x):
    """Mean, standard deviation over seeds, smallest and largest."""
    x = np.array(x, dtype=float)
    return dict(mean=round(x.mean(), 4), sd=round(x.std(ddof=1), 4) if len(x) > 1 else None, min=round(x.min(), 4),
                max=round(x.max(), 4))


def smooth(curve, window=WINDOW):
    """Mean over the last `window` steps, from the first full window on. Curves shorter than that: their mean."""
    c = np.nan_to_num(np.asarray(curve, float), nan=0.0, posinf=0.0, neginf=0.0)
    return np.convolve(c, np.ones(window) / window, "valid") if len(c) >= window else np.array([c.mean() if len(c) else 0.0])


def best(r):
    """Highest accuracy, over WINDOW steps."""
    return float(smooth(r["curves"]["accuracy"]).max())


def last(r):
    """Accuracy of the last WINDOW steps; 0 for a run that broke off, since a policy of NaN solves nothing."""
    return 0.0 if "failed" in r else float(smooth(r["curves"]["accuracy"])[-1])


def collapsed(r, drop=0.2):
    """The rule, written before the runs: the last WINDOW steps are `drop` or more below the best WINDOW, or the run broke off."""
    return "failed" in r or last(r) <= best(r) - drop


# Student's t, two-sided, 5 %: number of pairs -> limit. Beyond the table the last one, which is a little too strict.
LIMITS = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def paired(records, a, b, value=lambda r: r["accuracy"]):
    """Difference a - b of a value, seed by seed: mean, its standard error, and whether it is more than Student's t allows. A run
    that broke off has the value 0: left out, the format that kills its worst runs would look the better for it."""
    one, two = ({r["seed"]: 0.0 if "failed" in r else value(r) for r in records if r["name"] == m} for m in (a, b))
    d = np.array([one[s] - two[s] for s in sorted(one) if s in two])
    if len(d) < 2:
        return dict(seeds=len(d), mean=None, se=None, significant=None)
    se = float(d.std(ddof=1) / math.sqrt(len(d)))
    return dict(seeds=len(d), mean=float(d.mean()), se=se,
                significant=bool(se > 0 and abs(d.mean()) > LIMITS.get(len(d), 2.26) * se))


def summary(records):
    """name -> what its seeds have in common."""
    out = {}
    for name in dict.fromkeys(r["name"] for r in records):
        rs = [r for r in records if r["name"] == name]
        done = [r for r in rs if "failed" not in r]
        seconds = np.concatenate([np.add(r["curves"]["t_rollout"], r["curves"]["t_train"]) for r in rs])
        out[name] = dict(
            seeds=len(rs), failed=len(rs) - len(done), collapsed=sum(map(collapsed, rs)), best=spread(list(map(best, rs))),
            last=spread(list(map(last, rs))), accuracy=spread([r["accuracy"] for r in done]) if done else None,
            gap_mean=middle(rs, "logp_gap_mean"), kl_k3=middle(rs, "kl_k3"), seq_kl=middle(rs, "seq_kl"),
            skipped=int(sum(max(r["curves"]["skipped_steps"], default=0) for r in rs)),
            step_seconds=float(np.median(seconds)) if len(seconds) else None)
    return out


def middle(rs, key):
    """Mean over steps, then over seeds, of what is finite."""
    values = [v for r in rs for v in [np.asarray(r["curves"].get(key, ()), float)] for v in [v[np.isfinite(v)]] if len(v)]
    return float(np.mean([v.mean() for v in values])) if values else None


def number(x, spec):
    """x in this format, or - where no run came far enough to have one."""
    return "-" if x is None else format(x, spec)


# ---------------------------------------------------------------------------------------------------------------------
# Command line, files, figures


class Lab:
    """What the commands have in common. text: the module's docstring; seeds: how many by default; add(parser): more flags;
    rest: keep flags that are not known, for train_rl.py."""

    def __init__(self, name, text, argv, seeds=3, add=None, rest=False):
        p = Parser(prog=f"experiments.{name}", description=text.split("\n\n")[0], allow_abbrev=False)
        p.add_argument("--seeds", type=ranged(int, 1, 100), default=seeds, help=f"0 to N-1, none left out (default {seeds})")
        p.add_argument("--quick", action="store_true", help="2 minutes or less, to see that it works; writes into out/")
        p.add_argument("--preset", choices=("cpu", "gpu"), default="gpu" if torch.cuda.is_available() else "cpu")
        p.add_argument("--workers", type=ranged(int, 1, 64), default=0, help="runs at a time (default: one a core, 4 on a GPU)")
        p.add_argument("--out", default="", help="folder for JSON, PNG and runs (default results, --quick: out/lab/NAME-quick)")
        if add:
            add(p)
        self.args, self.rest = p.parse_known_args(argv) if rest else (p.parse_args(argv), [])
        a = self.args
        self.name, self.quick, self.gpu = name, a.quick, a.preset == "gpu"
        self.seeds = 1 if a.quick else a.seeds
        self.workers = a.workers or (4 if self.gpu else os.cpu_count() or 1)
        self.folder = pathlib.Path(a.out) / "runs" if a.out else ROOT / "out" / "lab" / f"{name}{'-quick' if a.quick else ''}"
        self.out = pathlib.Path(a.out) if a.out else self.folder if a.quick else ROOT / "results"
        self.out.mkdir(parents=True, exist_ok=True)
        self.suffix = "-gpu" if self.gpu else ""
        argv = sys.argv[1:] if argv is None else argv
        self.command = " ".join([f"python -m experiments.{name}", *argv])
        self.begin = time.time()

    def pick(self, cpu, quick, gpu):
        """The size that was asked for."""
        return quick if self.quick else gpu if self.gpu else cpu

    def device(self):
        return ["--preset", "gpu"] if self.gpu else ["--preset", "cpu", "--device", "cpu"]

    def sweep(self, jobs):
        self.folder.mkdir(parents=True, exist_ok=True)
        return sweep(jobs, self.folder, self.workers)

    def save(self, result, records=(), name=None, config=None):
        """results/NAME.json: the result, the runs, and what is needed to get them again."""
        path = self.out / f"{name or self.name}{self.suffix}.json"
        configs = [r["config"] for r in records if r.get("config")]
        common = {k: v for k, v in configs[0].items() if all(c.get(k) == v for c in configs)} if configs else {}
        records = [{k: v for k, v in r.items() if k != "config"} for r in records]        # what differs is in each run's command
        about = dict(command=self.command, **machine(), seconds=round(time.time() - self.begin), workers=self.workers,
                     run_seconds=round(sum(r["wall"] for r in records)),        # `seconds` leaves out what was run before
                     config=config or common)
        path.write_text(json.dumps(finite(dict(**about, result=result, runs=records)), separators=(",", ":"))
                        .replace('"result":', '\n"result":').replace('"runs":', '\n"runs":')
                        .replace('{"name":', '\n{"name":') + "\n",
                        encoding="utf-8")
        print(path)

    def figure(self, rows=1, cols=2, size=(11, 4.2), **kw):
        """-> (figure, axes), or None and a line that says what to install."""
        try:
            import matplotlib
        except ImportError:
            print("no picture: matplotlib is not installed (pip install -e '.[plot]')")
            return None
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        return plt.subplots(rows, cols, figsize=size, constrained_layout=True, squeeze=False, **kw)

    def draw(self, fig, name=None):
        path = self.out / f"{name or self.name}{self.suffix}.png"
        fig.savefig(path, dpi=130)
        print(path)


def finite(x):
    """The same with None for NaN and infinities, which JSON does not know."""
    if isinstance(x, dict):
        return {k: finite(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def band(ax, records, key, label, low=None, window=1, **style):
    """Mean and range over seeds against the step; a run that broke off ends where it did."""
    curves = [smooth(r["curves"][key], window) if window > 1 else np.asarray(r["curves"][key], float) for r in records]
    n = max(map(len, curves))
    if not n:
        return
    y = np.full((len(curves), n), np.nan)
    for row, c in zip(y, curves):
        row[:len(c)] = c
    y = np.maximum(y, low) if low is not None else y
    seen = ~np.isnan(y).all(0)
    x, y = np.arange(n)[seen] + window, y[:, seen]
    line, = ax.plot(x, np.nanmean(y, 0), label=label, **{"lw": 1.6, **style})
    ax.fill_between(x, np.nanmin(y, 0), np.nanmax(y, 0), color=line.get_color(), alpha=0.12, lw=0)


def machine():
    """Versions and hardware, for the files in results/."""
    processor = platform.processor() or platform.machine()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    if torch.cuda.is_available():
        processor += f" and {torch.cuda.get_device_name()}"
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return dict(date=datetime.date.today().isoformat(), machine=f"{os.cpu_count()} cores, {processor}", torch=torch.__version__,
                numpy=np.__version__, python=platform.python_version(), git=git or None, sources=sources())
