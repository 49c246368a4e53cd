"""The paper's further runs (section 5) at toy scale: LoRA and a mixture of experts, in BF16 and in FP16.

    python -m experiments.variants

In the paper a LoRA run in BF16 collapses after 600 steps and a MoE of 30 B parameters is less stable in BF16 than in FP16. Here
the same job as in the other experiments, two digits, four updates a batch, a ratio that forgets the sampler, is run with all
weights trained, with LoRA of rank 1 and 32 upon the same base, and with a base of 8 experts, of which a token meets 2. Each in
FP16 and in BF16 on both sides, and with training in BF16 or e8m2 against FP32 rollouts, the mismatch of two engines; the experts
also with the rollout's routes replayed. Beside accuracy and mismatch stands how often a token's experts were others in training
than in the rollout. Writes results/variants.json and .png.
"""
import sys

import numpy as np

from experiments.lab import GPU, LAB, QUICK, Job, Lab, band, formats, middle, number, paired, summary
from run.console import run_main

EXPERTS = "--n-experts 8"
VARIANTS = {
    "all weights": "",
    "LoRA, rank 1": "--lora-rank 1 --lr 3e-3",
    "LoRA, rank 32": "--lora-rank 32 --lr 3e-4",
    "8 experts": EXPERTS,
    "8 experts, replayed": EXPERTS + " --replay-routing",
}
MODES = ("fp16", "bf16", "fp32/bf16", "fp32/e8m2")
COLORS = dict(zip(MODES, ("C0", "C3", "C2", "C1")))


def main(argv=None):
    lab = Lab("variants", __doc__, argv, seeds=3)
    size = lab.pick([*LAB, "--steps", "80"], [*QUICK, "--heldout", "0", "--steps", "3"], [*GPU, "--steps", "60"])
    variants = dict(list(VARIANTS.items())[1::3]) if lab.quick else VARIANTS
    modes = MODES[1:3] if lab.quick else MODES
    jobs = [Job(f"{v} {m}", s, (*lab.device(), *size, "--old-policy", "recomputed", *flags.split(), *formats(m)))
            for s in range(lab.seeds) for v, flags in variants.items() for m in modes]
    records = lab.sweep(jobs)
    result = summary(records)
    for name, s in result.items():
        s["route_flips"] = middle([r for r in records if r["name"] == name], "route_flips")
    pairs = {f"{v}: {a} - {b}": paired(records, f"{v} {a}", f"{v} {b}")
             for v in variants for a, b in (("fp16", "bf16"), ("fp16", "fp32/bf16"), ("fp16", "fp32/e8m2")) if {a, b} <= {*modes}}
    pairs |= {f"8 experts, replayed - not: {m}": paired(records, f"8 experts, replayed {m}", f"8 experts {m}")
              for m in modes if "8 experts, replayed" in variants}
    print(f"\n{'':36}{'last 10 steps':>14}{'collapsed':>12}{'KL a token':>12}{'routes that differ':>20}")
    for name, s in result.items():
        print(f"{name:36}{s['last']['mean']:14.3f}{s['collapsed']:9} of {s['seeds']}{number(s['kl_k3'], '.1e'):>12}"
              f"{number(s['route_flips'], '.2%'):>20}")
    for k, d in pairs.items():
        if d["se"] is not None:
            verdict = "differ" if d["significant"] else "no difference shown"
            print(f"{k}: {d['mean']:+.3f} (standard error {d['se']:.3f}): {verdict}")
    lab.save(dict(summary=result, pairs=pairs), records)
    draw(lab, records, variants, modes)


def draw(lab, records, variants, modes):
    plot = lab.figure(2, len(variants), (3.1 * len(variants) + 1, 6), sharex=True, sharey="row")
    if not plot:
        return
    fig, axes = plot
    for (top, low), v in zip(axes.T, variants):
        for m in modes:
            rs = [r for r in records if r["name"] == f"{v} {m}"]
            n = len(rs[0]["curves"]["accuracy"])
            band(top, rs, "accuracy", m, window=min(5, n) or 1, color=COLORS[m])
            flips = [np.nanmean(np.array(r["curves"]["route_flips"], float)) for r in rs if r["curves"].get("route_flips")]
            band(low, rs, "kl_k3", f"{m}: {np.mean(flips):.2%} of routes differ" if flips else m, low=1e-12, color=COLORS[m])
        top.set(title=v, ylim=(0, 1.02))
        low.set(xlabel="RL step (4 updates each)", yscale="log", ylim=(1e-17, 10))       # room for the legend
        low.legend(fontsize=6, loc="lower right")
    axes[0, 0].set_ylabel("sampled accuracy")
    axes[1, 0].set_ylabel("KL a token, nats")
    axes[0, 0].legend(fontsize=7, loc="lower right", title="rollout / train", title_fontsize=7)
    fig.suptitle(f"LoRA and experts: mean and range of {len({r['seed'] for r in records})} seeds")
    lab.draw(fig)


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
