"""Is it the rounding that hurts, or the disagreement? And is exact mode exact?

    python -m experiments.exact             # twins of BF16, with fp32 and fp16 beside them, from the same base models, 5 seeds
    python -m experiments.exact --formats e8m2        # twins of another format
    python -m experiments.exact --check     # exact fp32, bf16 and fp16 with 1 and 2 threads: every token of every step
    python -m experiments.exact --quick     # on a job of seconds: do the commands work?

A coarse format X can hurt in two ways: by its roundings as such, or because rollout and training disagree. Modes tell them
apart:

    X          roundings on both sides, and what one forward code leaves of a disagreement
    X exact    the same roundings, no disagreement: the same bits on both sides
    X/fp32     the rollout rounds, training does not: disagreement in full, as between two engines, and no rounding in training

All runs of a seed share one base model, one set of problems and one stream of random numbers, and each is scored, as it
samples, in its own rollout format. Runs share the cores: `experiments.speed --only modes` measures what exact mode costs.
Writes results/exact-twins.json and .png, or results/exact-check.json (--quick: into out/).
"""
import sys

import numpy as np

from experiments.lab import QUICK, Job, Lab, formats, paired, summary
from precision import parse_format
from run.console import ranged, run_main

COLORS = {"fp32": "black", "bf16": "C3", "fp16": "C0", "bf16/fp32": "C1"}


def check(lab, modes, size):
    """Exact runs with 1 and 2 threads: is every token of every step the same? Side by side where each has cores of its own."""
    records, workers = [], lab.workers
    for threads in (1, 2):
        lab.workers = max(1, workers // threads)
        records += lab.sweep([Job(m, 0, (*lab.device(), *size, *formats(m)), threads) for m in modes])
    done = [r for r in records if "failed" not in r]
    tokens, steps = (int(sum(f(r["curves"]["tokens"]) for r in done)) for f in (sum, len))
    largest = max((max(r["curves"]["logp_gap_max"]) for r in done), default=float("nan"))
    good = len(done) == len(records) and largest == 0.0
    print(f"{'exact' if good else 'NOT EXACT'}: {tokens} tokens in {steps} steps of {len(done)} runs, largest |gap| {largest}")
    rows = [{k: v for k, v in r.items() if k != "curves"} for r in records]
    lab.save(dict(exact=good, tokens=tokens, steps=steps, largest_gap=largest), rows, "exact-check")
    return 0 if good else 1


def draw(lab, records, name):
    plot = lab.figure(1, 2, (11, 4))
    if not plot:
        return
    fig, ((left, right),) = plot
    for i, mode in enumerate(dict.fromkeys(r["name"] for r in records)):
        fmt, *exact = mode.split()
        rs = [r for r in records if r["name"] == mode and "failed" not in r]
        if not rs:
            continue
        style = dict(color=COLORS.get(fmt, f"C{i + 1}"), ls="--" if exact else "-", lw=1.8)
        y = np.array([r["curves"]["accuracy"] for r in rs])
        x = np.arange(1, y.shape[1] + 1)
        left.plot(x, y.mean(0), label=mode, **style)
        left.fill_between(x, y.min(0), y.max(0), color=style["color"], alpha=0.08)
        kl = np.array([r["curves"]["kl_k3"] for r in rs])
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
    lab.draw(fig, name)


def main(argv=None):
    def add(p):
        p.add_argument("--check", action="store_true", help="exact fp32, bf16, fp16 with 1 and 2 threads: is every token exact?")
        p.add_argument("--formats", nargs="+", default=[], help="formats to run, each in its three modes")
        p.add_argument("--steps", type=ranged(int, 1, 10 ** 6), default=100)
    lab = Lab("exact", __doc__, argv, seeds=5, add=add)
    a = lab.args
    for fmt in a.formats:
        parse_format(fmt)
    size = [*QUICK, "--heldout", "10", "--steps", str(min(a.steps, 12))] if lab.quick else ["--steps", str(a.steps)]
    if a.check:
        return check(lab, [f"{f} exact" for f in a.formats or ("fp32", "bf16", "fp16")], size)
    modes = [m for f in a.formats or ["bf16"] for m in (f, f"{f} exact", f"{f}/fp32")]
    modes = modes if a.formats else ["fp32", "fp16", *modes]
    name = "exact-" + ("-".join(a.formats) or "twins")
    records = lab.sweep([Job(m, s, (*lab.device(), *size, *formats(m))) for s in range(lab.seeds) for m in modes])
    result = summary(records)
    pairs = {f"{x} - {y}": paired(records, x, y) for i, x in enumerate(modes) for y in modes[:i]}
    print(f"\n{'mode':12} {'accuracy':>17} {'mean gap':>9} {'largest':>9} {'KL (k3)':>9} {'s/step':>7}")
    for m, s in result.items():
        largest = max((x for r in records if r["name"] == m for x in r["curves"]["logp_gap_max"] if x is not None), default=0.0)
        s["gap_max"] = largest
        print(f"{m:12} " + (f"{s['failed']} failed " if s["failed"] else "") + (
            f"{s['accuracy']['mean']:8.3f} sd {s['accuracy']['sd'] or 0:5.3f} {s['gap_mean']:9.1e} {largest:9.1e} "
            f"{s['kl_k3']:9.1e} {s['step_seconds']:7.2f}" if s["accuracy"] else ""))
    print(f"\npaired differences of accuracy; of {len(pairs)} pairs, one in twenty is shown to differ by chance alone")
    for k, d in pairs.items():
        if d["se"] is not None:
            print(f"  {k}: {d['mean']:+.4f} (standard error {d['se']:.4f}, {d['seeds']} seeds): "
                  f"{'differ' if d['significant'] else 'no difference shown'} at the 5 % level")
    lab.save(dict(summary=result, pairs=pairs), records, name)
    draw(lab, records, name)
    return 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
