"""Every pair of formats: what the rollout rounds to, and what training rounds to.

    python -m experiments.precision_grid

In the paper (arXiv 2510.26788, section 4.4) BF16 on both sides collapses, BF16 training with FP32 rollouts is stable but three
times slower, FP16 on both sides is best. Here GRPO with a ratio that forgets the sampler (--old-policy recomputed, the paper's
baseline) runs with each of fp32, fp16, bf16 and e8m2 on either side; e8m2 is a format so coarse that something happens within
100 steps. Times are of emulated formats on a CPU, where FP32 is no slower than FP16: the paper's factor of three belongs to a
GPU. Writes results/precision_grid.json and .png.
"""
import sys

from experiments.lab import GPU, LAB, QUICK, Job, Lab, band, formats, number, paired, summary
from run.console import run_main

FORMATS = ("fp32", "fp16", "bf16", "e8m2")


def main(argv=None):
    lab = Lab("precision_grid", __doc__, argv)
    size = lab.pick([*LAB, "--steps", "100"], [*QUICK, "--heldout", "0", "--steps", "3"],
                    [*GPU, "--steps", "60"])
    names = ("fp16", "e8m2") if lab.quick else FORMATS[:3] if lab.gpu else FORMATS
    pairs = [f"{a}/{b}" for a in names for b in names]
    jobs = [Job(p, s, (*lab.device(), *size, *formats(p), "--old-policy", "recomputed"))
            for s in range(lab.seeds) for p in pairs]
    records = lab.sweep(jobs)
    result = summary(records)
    fastest = min(s["step_seconds"] or float("inf") for s in result.values())
    for title, text in (("training accuracy", lambda s: f"{s['accuracy']['mean']:.3f}" if s["accuracy"] else "broke off"),
                        ("runs that collapsed", lambda s: f"{s['collapsed']} of {s['seeds']}"),
                        ("mean gap, nats", lambda s: number(s["gap_mean"], ".1e")),
                        ("KL a token, nats", lambda s: number(s["kl_k3"], ".1e")),
                        ("time of a step", lambda s: number(s["step_seconds"] and s["step_seconds"] / fastest, ".2f"))):
        print(f"\n{title}; training in\nrollout in" + "".join(f"{b:>12}" for b in names))
        for a in names:
            print(f"{a:10}" + "".join(f"{text(result[f'{a}/{b}']):>12}" for b in names))
    against = {f"{p} - fp16/fp16": paired(records, p, "fp16/fp16") for p in pairs if p != "fp16/fp16"}
    for k, d in against.items():
        if d["se"] is not None:
            verdict = "differ" if d["significant"] else "no difference shown"
            print(f"{k}: {d['mean']:+.3f} (standard error {d['se']:.3f}): {verdict}")
    lab.save(dict(summary=result, pairs=against), records)
    plot = lab.figure(len(names), len(names), (3 * len(names), 2.5 * len(names)), sharex=True, sharey=True)
    if plot:
        fig, axes = plot
        for i, a in enumerate(names):
            for j, b in enumerate(names):
                rs, s = [r for r in records if r["name"] == f"{a}/{b}"], result[f"{a}/{b}"]
                band(axes[i, j], rs, "accuracy", "", window=min(5, len(rs[0]["curves"]["accuracy"])), color="C0")
                axes[i, j].axhline(0.95, color="gray", lw=0.8, ls=":")
                axes[i, j].set(title=f"rollout {a}, train {b}: KL {number(s['kl_k3'], '.0e')}", ylim=(0, 1.02),
                               xlabel="RL step" if i == len(names) - 1 else "", ylabel="sampled accuracy" if j == 0 else "")
                axes[i, j].title.set_fontsize(9)
        fig.suptitle(f"GRPO, mean and range of {len({r['seed'] for r in records})} seeds; KL in nats a token")
        lab.draw(fig)


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
