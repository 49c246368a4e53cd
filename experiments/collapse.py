"""The open question: what is the smallest setting in which BF16 collapses and FP16, same seeds, does not? A map of where it was
sought.

    python -m experiments.collapse
    python -m experiments.collapse --modes fp32/e8m5 fp32/e8m4 fp32/e8m3     # how many bits fewer it would take

In the paper BF16 collapses after 150 to 1,200 steps with answers of thousands of tokens. Here everything that should bring it
about at a small size is turned up, one thing at a time: learning rate, updates per batch, steps, standardised advantages (a
nearly solved problem has the largest), longer answers, depth, entropy, a task that does not saturate. Each setting runs with
BF16 and FP16 on both sides, and with training in either against FP32 rollouts, the mismatch of two engines (training is where
a coarse format was seen to do harm: experiments.precision_grid). The rule, in LOG.md before the runs: a run has collapsed when
its last 10 steps are 20 points below its best 10; a setting is a candidate when a BF16 run collapses and its FP16 twin does
not, in more seeds than the other way round; a candidate is run again with `--setting NAME --seeds 5`, and is the answer if at
least 4 of 5 BF16 runs collapse and no FP16 run does. Writes results/collapse.json and .png.
"""
import sys

import numpy as np

from experiments.lab import GPU, LAB, QUICK, Job, Lab, best, collapsed, formats, last, summary
from run.console import run_main

GRPO = "--old-policy recomputed"
SETTINGS = {
    "learning rate x 3": GRPO + " --steps 60 --lr 3e-4",
    "learning rate x 10": GRPO + " --steps 60 --lr 1e-3",
    "16 updates a batch": GRPO + " --steps 40 --updates-per-batch 16",
    "250 steps, lr x 3": GRPO + " --steps 250 --lr 3e-4",
    "standardised, lr x 3": GRPO + " --algo grpo --steps 100 --lr 3e-4",
    "4 digits, 41 tokens": GRPO + " --digits 4 --noise 0.1 --base-steps 1200 --steps 60",
    "6 digits, 60 tokens": GRPO + " --digits 6 --noise 0.06 --base-steps 2000 --steps 60",
    "12 layers": GRPO + " --n-layers 12 --base-lr 2e-3 --steps 60",
    "temperature 1.5": GRPO + " --temperature 1.5 --steps 100",
    "hard problems (5 to 40 %)": GRPO + " --noise 0.5 --pool 512 --keep 0.05 0.4 --steps 100 --lr 3e-4",
}
MODES = ("fp16", "bf16", "fp32/fp16", "fp32/bf16")


def main(argv=None):
    def add(p):
        p.add_argument("--setting", choices=tuple(SETTINGS), default="", help="this one alone")
        p.add_argument("--modes", nargs="+", default=[], help="other pairs of formats, rollout/train; into a file of their own")
    lab = Lab("collapse", __doc__, argv, seeds=3, add=add)
    settings = {lab.args.setting: SETTINGS[lab.args.setting]} if lab.args.setting else SETTINGS
    modes, seeds = lab.args.modes or (("fp16", "bf16") if lab.quick else MODES), lab.seeds
    name_of_files = slug(" ".join(["collapse", lab.args.setting, *lab.args.modes]))
    if lab.quick:
        settings = dict(list(settings.items())[:1])
    jobs = []
    for seed in range(seeds):
        for name, flags in settings.items():
            size = lab.pick(LAB, [*QUICK, "--heldout", "0"], GPU)
            short = ["--steps", "3"] if lab.quick else []
            jobs += [Job(f"{name}: {m}", seed, (*lab.device(), *size, *flags.split(), *short, *formats(m))) for m in modes]
    records = lab.sweep(jobs)
    result, candidates = summary(records), []
    print(f"\n{'accuracy of the last 10 steps; (collapsed of ' + str(seeds) + ')':52}" + "".join(f"{m:>16}" for m in modes))
    for name in settings:
        cells = [result[f"{name}: {m}"] for m in modes]
        print(f"{name:52}" + "".join(f"{s['last']['mean']:12.3f} ({s['collapsed']})" for s in cells))
        for fp16, bf16 in (("fp16", "bf16"), ("fp32/fp16", "fp32/bf16")):
            if not {fp16, bf16} <= {*modes}:
                continue
            one, two = ({r["seed"]: collapsed(r) for r in records if r["name"] == f"{name}: {m}"} for m in (bf16, fp16))
            worse, better = (sum(a[s] and not b[s] for s in a if s in b) for a, b in ((one, two), (two, one)))
            if worse > better:
                candidates.append(f"{name}: {bf16} collapsed {worse} times where {fp16} did not")
    print("candidates: " + ("; ".join(candidates) or "none"))
    lab.save(dict(summary=result, candidates=candidates), records, name_of_files)
    draw(lab, records, settings, modes, name_of_files)


def slug(text):
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())


def draw(lab, records, settings, modes, name_of_files):
    plot = lab.figure(1, 2, (14, 0.5 * len(settings) + 3))
    if not plot:
        return
    fig, ((left, right),) = plot
    for ax, value, title, limits in (
            (left, lambda r: last(r), "accuracy of the last 10 steps", (0, 1.02)),
            (right, lambda r: best(r) - last(r), "fall from the best 10 steps to the last 10", (-0.02, 1))):
        for i, m in enumerate(modes):
            for j, name in enumerate(settings):
                y = [value(r) for r in records if r["name"] == f"{name}: {m}"]
                at = j + (i - len(modes) / 2 + 0.5) * 0.15
                ax.plot(y, [at] * len(y), ".", ms=4, color=f"C{i}", alpha=0.6)
                ax.plot([np.mean(y)], [at], "|", ms=9, mew=2, color=f"C{i}", label=m if j == 0 else None)
        ax.set(title=title, xlim=limits, ylim=(len(settings) - 0.4, -0.6), yticks=range(len(settings)),
               yticklabels=settings if ax is left else [])
        ax.grid(axis="x", lw=0.3)
    right.axvline(0.2, color="gray", ls=":", lw=0.8)
    right.text(0.205, -0.45, "collapse", fontsize=8)
    right.legend(fontsize=8, loc="lower right", title="rollout / train; dots: seeds, bar: mean", title_fontsize=8)
    lab.draw(fig, name_of_files)


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
