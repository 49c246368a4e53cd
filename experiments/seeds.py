"""The default job over many seeds: how often does it PASS, how long does it take, and how much do the curves differ?

    python -m experiments.seeds                       # seeds 0 to 9, cold: each makes its own base model
    python -m experiments.seeds --seeds 3 --precision bf16

The seeds are the first N numbers, none is left out. Every flag that is not --seeds goes to train_rl.py. Seeds that are
finished with the same commit are not run again, so a stopped sweep goes on where it was. Writes results/seeds-NAME.json and .png.
"""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run_seed(seed, folder, flags):
    """One cold run of the real command in a process of its own, with an empty cache. Returns its record."""
    shutil.rmtree(folder, ignore_errors=True)                  # what a stopped sweep left of this seed
    with tempfile.TemporaryDirectory() as cache:
        begin = time.time()
        command = [sys.executable, "train_rl.py", "--seed", str(seed), "--out", str(folder.relative_to(ROOT)), *flags]
        done = subprocess.run(command, env={**os.environ, "TENBIT_CACHE": cache}, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        wall = time.time() - begin
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if done.returncode not in (0, 1) or "result" not in rows[-1]:
        raise SystemExit(f"seed {seed} did not finish (exit status {done.returncode}): {done.stdout[-500:]}")
    record = dict(
        seed=seed,
        exit_status=done.returncode,
        cold_seconds=wall,
        **rows[-1]["result"],
        about={k: v for k, v in rows[0].items() if k != "config"},
        accuracy_curve=[r["accuracy"] for r in rows if "step" in r],
        kl_k3=[r["kl_k3"] for r in rows if "step" in r],
        skipped_steps=[r["skipped_steps"] for r in rows if "step" in r][-1],
    )
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    return record


def spread(x):
    x = np.array(x, dtype=float)
    return dict(
        mean=round(x.mean(), 4),
        sd=round(x.std(ddof=1), 4) if len(x) > 1 else None,
        min=round(x.min(), 4),
        max=round(x.max(), 4),
    )


def main():
    args = sys.argv[1:]
    n = 10
    if "--seeds" in args:
        i = args.index("--seeds")
        n = int(args[i + 1])
        del args[i:i + 2]
    name = "-".join(a.lstrip("-").replace("/", "_") for a in args) or "default"
    records, begin, out = [], time.time(), ROOT / "results" / f"seeds-{name}.json"
    out.parent.mkdir(exist_ok=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    for seed in range(n):
        folder = ROOT / "out" / f"seeds-{name}" / str(seed)
        done = json.loads((folder / "record.json").read_text(encoding="utf-8")) if (folder / "record.json").exists() else None
        if done and done["about"]["git"] == head and not done["about"]["git_dirty"]:
            records.append(done)                                    # of this very code
        else:
            records.append(run_seed(seed, folder, args))
        r, spent = records[-1], time.time() - begin
        print(
            f"seed {seed}: training accuracy {r['accuracy']:.3f}, held-out {r['heldout_before']:.3f} -> "
            f"{r['heldout_after']:.3f}, {'PASS' if r['passed'] else 'no PASS'}, {r['cold_seconds']:.0f} s cold; "
            f"{spent / (seed + 1) * (n - seed - 1) / 60:.0f} min to go",
            flush=True,
        )
    summary = dict(
        seeds=n,
        passed=sum(r["passed"] is True for r in records),
        rule="PASS is training accuracy >= 0.95, sampled over the whole kept set; the seeds are 0 to N-1, all reported",
        **{k: spread([r[k] for r in records]) for k in ("accuracy", "heldout_before", "heldout_after", "kept", "cold_seconds")},
    )
    print(json.dumps(summary, indent=1))
    out.write_text(
        json.dumps(
            dict(command=f"python -m experiments.seeds --seeds {n} {' '.join(args)}".strip(), summary=summary, runs=records),
            indent=1,
        ),
        encoding="utf-8",
    )
    draw(records, out.with_suffix(".png"), name)


def draw(records, path, name):
    try:
        import matplotlib
    except ImportError:
        return print("no picture: matplotlib is not installed (pip install -e '.[plot]')")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (a, b) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for ax, key in ((a, "accuracy_curve"), (b, "kl_k3")):
        y = np.array([r[key] for r in records])
        if key == "kl_k3":
            y = np.maximum(y, 1e-16)
        x = np.arange(1, y.shape[1] + 1)
        for row in y:
            ax.plot(x, row, color="C0", lw=0.5, alpha=0.4)
        ax.plot(x, np.median(y, 0), color="C0", lw=2, label=f"median of {len(y)} seeds")
        ax.fill_between(x, y.min(0), y.max(0), color="C0", alpha=0.12, label="smallest to largest")
        ax.set_xlabel("RL step")
        ax.legend(fontsize=8)
    a.axhline(0.95, color="gray", lw=0.8, ls=":")
    a.set(title=f"accuracy of the step's sampled answers ({name})", ylabel="share right", ylim=(0, 1.02))
    b.set(title="KL(rollout || train) per token, before the update", ylabel="nats", yscale="log")
    fig.savefig(path, dpi=120)
    print(f"{path}")


if __name__ == "__main__":
    main()
