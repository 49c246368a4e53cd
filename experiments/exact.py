"""Is it the rounding that hurts, or the disagreement? And is exact mode exact?

    python -m experiments.exact             # twins of BF16, with fp32 and fp16 beside them, from the same base models, 5 seeds
    python -m experiments.exact --formats e8m2        # twins of another format
    python -m experiments.exact --check     # exact fp32, bf16 and fp16 with 1 and 2 threads: every token of every step
    python -m experiments.exact --quick     # on a job of seconds: do the commands work?

A coarse format X can hurt in two ways: by its roundings as such, or because rollout and training disagree. Modes tell them apart:

    X          roundings on both sides, and what one forward code leaves of a disagreement
    X exact    the same roundings, no disagreement: the same bits on both sides
    X/fp32     the rollout rounds, training does not: disagreement in full, as between two engines, and no rounding in training

All runs of a seed share one base model, one pool of problems and one stream of random numbers. Each picks its perfectible set
from that pool, and is scored, as it samples, in its own rollout format; so the sets differ by a few problems. Two runs go on at
a time, with one thread each: times are for comparison among themselves only, `experiments.speed --only modes` measures cost.
A run that is finished with the same commit is not done again; one that fails is an outcome, and counted. Writes
results/exact-twins.json and .png, or results/exact-check.json (--quick: into out/).
"""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from experiments.seeds import ROOT, spread
from precision import parse_format
from sample import Parser, ranged, run_main

QUICK = ("--digits 1 --noise 0.3 --n-layers 2 --width 64 --mlp-width 192 --base-steps 300 --base-batch 64 --base-lr 4e-3 "
         "--pool 70 --heldout 10 --prompts 16 --lr 1e-3").split()
COLORS = {"fp32": "black", "bf16": "C3", "fp16": "C0", "bf16/fp32": "C1"}


def run(name, mode, seed, threads, flags, folder):
    """One run of train_rl.py in a process of its own, in a folder of its own -> its record."""
    path, begin = folder / f"{name}-{mode.replace(' ', '-').replace('/', '-')}-{threads}-seed{seed}", time.time()
    formats, *exact = mode.split()
    rollout, _, training = formats.partition("/")
    command = ["train_rl.py", "--seed", str(seed), "--rollout-precision", rollout, "--train-precision", training or rollout,
               *(["--exact"] if exact else []), "--no-plot", *flags]
    record, code = path / "record.json", version()
    if record.exists():
        done = json.loads(record.read_text(encoding="utf-8"))
        if code and (done["code"], done["command"]) == (code, command):
            return done
    shutil.rmtree(path, ignore_errors=True)                    # what a stopped sweep left of this run
    path.mkdir(parents=True)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with open(path / "log.txt", "w", encoding="utf-8") as log:
        child = subprocess.Popen([sys.executable, *command, "--out", str(path / "run")], cwd=ROOT, env=env, stdout=log,
                                 stderr=subprocess.STDOUT)
        if hasattr(os, "wait4"):
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            peak = usage.ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)
        else:                                                  # Windows
            child.wait()
            peak = float("nan")
    out = dict(mode=mode, seed=seed, threads=threads, command=command, code=code, wall=time.time() - begin, peak_mib=peak)
    metrics = path / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.exists() else []
    if child.returncode not in (0, 1) or not rows or "result" not in rows[-1]:
        out["failed"] = (path / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
        print(f"{mode}, seed {seed} failed: {' '.join(out['failed'])}", flush=True)
        return out
    steps = [r for r in rows if "step" in r]

    def of(key):
        return [float(m[key]) for m in steps]                 # what is not finite was written as a string
    out |= dict(
        torch=rows[0]["torch"], **rows[-1]["result"], steps=len(steps), tokens=sum(m["tokens"] for m in steps),
        exact_share_min=min(of("exact_share")), gap_max=max(of("logp_gap_max")), gap_mean=float(np.mean(of("logp_gap_mean"))),
        kl_k3=float(np.mean(of("kl_k3"))), step_seconds=float(np.median(np.add(of("t_rollout"), of("t_train")))),
        curve=of("accuracy"), kl_curve=of("kl_k3"))
    record.write_text(json.dumps(out), encoding="utf-8")
    return out


def version():
    """The commit, if the sources are just as it has them, else None."""
    def ask(*command):
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return None if ask("status", "--porcelain", "--", "*.py", "*.c") else ask("rev-parse", "HEAD") or None


def sweep(name, jobs, flags, workers, folder):
    """jobs: (mode, seed, threads). Runs `workers` at a time, with a line and the time to go after each. The first job of each
    seed makes its base model, so these come first."""
    first = {seed: i for i, (_, seed, _) in reversed(list(enumerate(jobs)))}
    begin, records = time.time(), []
    for phase in ([j for i, j in enumerate(jobs) if first[j[1]] == i], [j for i, j in enumerate(jobs) if first[j[1]] != i]):
        with ThreadPoolExecutor(workers) as pool:
            for r in pool.map(lambda job: run(name, *job, flags, folder), phase):
                records.append(r)
                to_go = (time.time() - begin) / len(records) * (len(jobs) - len(records))
                about = "FAILED" if "failed" in r else (
                    f"accuracy {r['accuracy']:.3f}, gap {r['gap_mean']:.1e} largest {r['gap_max']:.1e}, kl {r['kl_k3']:.1e}, "
                    f"exact share at least {r['exact_share_min']:.6f}, {r['step_seconds']:.2f} s a step")
                print(f"{r['mode']:12} seed {r['seed']} threads {r['threads']}: {about}; {to_go / 60:.0f} min to go", flush=True)
    return records


# Student's t, two-sided, 5 %: number of pairs -> limit. Beyond the table the last one, which is a little too strict.
LIMITS = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def paired(records, a, b):
    """Difference of accuracy a - b, seed by seed: mean, its standard error, and whether it is more than Student's t allows."""
    one, two = ({r["seed"]: r["accuracy"] for r in records if r["mode"] == m and "failed" not in r} for m in (a, b))
    d = np.array([one[s] - two[s] for s in sorted(one) if s in two])
    if len(d) < 2:
        return dict(seeds=len(d), mean=None, se=None, significant=None)
    se = float(d.std(ddof=1) / np.sqrt(len(d)))
    return dict(seeds=len(d), mean=float(d.mean()), se=se,
                significant=bool(se > 0 and abs(d.mean()) > LIMITS.get(len(d), 2.26) * se))


def summary(records):
    modes = list(dict.fromkeys(r["mode"] for r in records))
    of = {m: [r for r in records if r["mode"] == m and "failed" not in r] for m in modes}
    failed = {m: sum(r["mode"] == m and "failed" in r for r in records) for m in modes}
    return {m: dict(failed=failed[m], accuracy=spread([r["accuracy"] for r in rs]),
                    heldout_after=spread([r["heldout_after"] for r in rs]),
                    lowest_step=spread([min(r["curve"]) for r in rs]),
                    gap_mean=float(np.mean([r["gap_mean"] for r in rs])), gap_max=max(r["gap_max"] for r in rs),
                    kl_k3=float(np.mean([r["kl_k3"] for r in rs])), exact_share_min=min(r["exact_share_min"] for r in rs),
                    step_seconds=float(np.median([r["step_seconds"] for r in rs])),
                    peak_mib=float(np.median([r["peak_mib"] for r in rs]))) if rs else dict(failed=failed[m])
            for m, rs in of.items()}


def draw(records, path):
    try:
        import matplotlib
    except ImportError:
        return print("no picture: matplotlib is not installed (pip install -e '.[plot]')")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for i, mode in enumerate(dict.fromkeys(r["mode"] for r in records)):
        fmt, *exact = mode.split()
        rs = [r for r in records if r["mode"] == mode and "failed" not in r]
        if not rs:
            continue
        style = dict(color=COLORS.get(fmt, f"C{i + 1}"), ls="--" if exact else "-", lw=1.8)
        y = np.array([r["curve"] for r in rs])
        x = np.arange(1, y.shape[1] + 1)
        left.plot(x, y.mean(0), label=mode, **style)
        left.fill_between(x, y.min(0), y.max(0), color=style["color"], alpha=0.08)
        kl = np.array([r["kl_curve"] for r in rs])
        if kl.max() > 0:
            right.plot(x, np.maximum(np.median(kl, 0), 1e-16), label=mode, **style)
        else:
            right.plot([], [], label=f"{mode}: 0 on every step", **style)
    left.set(title=f"sampled accuracy, mean and range of {len(rs)} seeds", xlabel="RL step", ylabel="share right", ylim=(0, 1.02))
    right.set(title="KL(rollout || train) per token, median", xlabel="RL step", ylabel="nats", yscale="log")
    low, high = right.get_ylim()
    right.set_ylim(low / 1e4, high)                              # room for the legend
    left.legend(fontsize=8, loc="lower right")
    right.legend(fontsize=8, loc="lower center", ncols=3)
    fig.savefig(path, dpi=120)
    print(path)


def main(argv=None):
    p = Parser(prog="experiments.exact", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--check", action="store_true", help="exact fp32, bf16, fp16 with 1 and 2 threads: is every token exact?")
    p.add_argument("--formats", nargs="+", default=[], help="formats to run, each in its three modes")
    p.add_argument("--seeds", type=ranged(int, 1, 100), default=5, help="seeds 0 to N-1, none left out")
    p.add_argument("--steps", type=ranged(int, 1, 10 ** 6), default=100)
    p.add_argument("--quick", action="store_true", help="a job of seconds and fewer seeds")
    p.add_argument("--workers", type=ranged(int, 1, 64), default=max(1, (os.cpu_count() or 2)), help="runs at a time")
    p.add_argument("--out", default="", help="folder for JSON and PNG (default results, with --quick out/exact-quick)")
    a = p.parse_args(argv)
    for fmt in a.formats:
        parse_format(fmt)
    flags = ["--steps", str(a.steps)]
    if a.quick:
        a.steps, a.seeds = min(a.steps, 12), min(a.seeds, 2)
        flags = [*QUICK, "--steps", str(a.steps)]
    folder = ROOT / "out" / ("exact-quick" if a.quick else "exact")
    out = pathlib.Path(a.out or (folder if a.quick else ROOT / "results"))
    out.mkdir(parents=True, exist_ok=True)
    about = dict(command=" ".join(["python -m experiments.exact", *(sys.argv[1:] if argv is None else argv)]), flags=flags,
                 workers=a.workers)
    if a.check:
        modes = [f"{f} exact" for f in a.formats or ("fp32", "bf16", "fp16")]
        records = []
        for threads in (1, 2):                             # processes side by side only where each has a core of its own
            records += sweep("check", [(m, 0, threads) for m in modes], flags, max(1, a.workers // threads), folder)
        done = [r for r in records if "failed" not in r]
        tokens, steps = sum(r["tokens"] for r in done), sum(r["steps"] for r in done)
        good = len(done) == len(records) and all(r["exact_share_min"] == 1.0 and r["gap_max"] == 0.0 for r in done)
        print(f"{'exact' if good else 'NOT EXACT'}: {tokens} tokens in {steps} steps of {len(done)} runs, largest |gap| "
              f"{max((r['gap_max'] for r in done), default=float('nan'))}")
        rows = [{k: v for k, v in r.items() if "curve" not in k} for r in records]
        (out / "exact-check.json").write_text(json.dumps(dict(**about, exact=good, tokens=tokens, runs=rows), indent=1),
                                              encoding="utf-8")
        return 0 if good else 1
    modes = [m for f in a.formats or ["bf16"] for m in (f, f"{f} exact", f"{f}/fp32")]
    modes = modes if a.formats else ["fp32", "fp16", *modes]
    name = "exact-" + ("-".join(a.formats) or "twins")
    records = sweep("twin", [(m, s, 1) for s in range(a.seeds) for m in modes], flags, a.workers, folder)
    result = summary(records)
    pairs = {f"{x} - {y}": paired(records, x, y) for i, x in enumerate(modes) for y in modes[:i]}
    print(f"\n{'mode':12} {'accuracy':>17} {'held-out':>9} {'mean gap':>9} {'largest':>9} {'KL (k3)':>9} {'s/step':>7} "
          f"{'MiB':>6}")
    for m, s in result.items():
        print(f"{m:12} " + (f"{s['failed']} failed " if s["failed"] else "") + (
            f"{s['accuracy']['mean']:8.3f} sd {s['accuracy']['sd'] or 0:5.3f} {s['heldout_after']['mean']:9.3f} "
            f"{s['gap_mean']:9.1e} {s['gap_max']:9.1e} {s['kl_k3']:9.1e} {s['step_seconds']:7.2f} {s['peak_mib']:6.0f}"
            if "accuracy" in s else ""))
    print(f"\npaired differences of accuracy; of {len(pairs)} pairs, one in twenty is shown to differ by chance alone")
    for k, d in pairs.items():
        if d["se"] is not None:
            print(f"  {k}: {d['mean']:+.4f} (standard error {d['se']:.4f}, {d['seeds']} seeds): "
                  f"{'differ' if d['significant'] else 'no difference shown'} at the 5 % level")
    (out / f"{name}.json").write_text(json.dumps(dict(**about, summary=result, pairs=pairs, runs=records), indent=1),
                                      encoding="utf-8")
    draw(records, out / f"{name}.png")
    return 0


if __name__ == "__main__":
    run_main(main)
