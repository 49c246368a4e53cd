"""The paper's sanity test, algorithm by algorithm: which of them survive which mismatch?

    python -m experiments.sanity

Every problem of the set is known to be solvable and none is trivial, so a sound algorithm comes near 100 % (arXiv 2510.26788,
section 4.2). In the paper BF16 collapses with GRPO and with token-TIS, is slow with sequence-level corrections, and FP16 is
stable with all of them. Its two engines disagree in BF16 by a KL of about 1e-3 nats a token, in FP16 by 1e-5.

Here rollout and training share one forward code and models are small, so BF16 disagrees with itself by far less. Two pairs of
formats therefore stand beside each other: fp16 and bf16 as they are; and e8m5/fp32 and e8m2/fp32, the rollout rounded and
training not, three mantissa bits apart like FP16 and BF16, with KLs a token below and far above the paper's BF16. Writes
results/sanity.json and .png.
"""
import sys

from experiments.lab import GPU, LAB, QUICK, Job, Lab, band, collapsed, formats, number, paired, spread, summary
from run.console import run_main

# as the paper names them: flags. GRPO is the paper's own baseline: the ratio forgets the sampler.
ALGORITHMS = {
    "GRPO": "--algo dr-grpo --old-policy recomputed",
    "GRPO-Token-TIS": "--algo grpo-token-tis",
    "GRPO-Seq-MIS": "--algo grpo-seq-mis",
    "GSPO": "--algo gspo --old-policy recomputed",
    "PG-Seq-IS": "--algo pg-seq-is",
    "GRPO, ratio to the rollout": "--algo dr-grpo",
}
MODES = ("fp16", "bf16", "e8m5/fp32", "e8m2/fp32")
COLORS = dict(zip(MODES, ("C0", "C3", "C2", "C1")))


def main(argv=None):
    def add(p):
        p.add_argument("--modes", nargs="+", default=[], help="other pairs of formats, rollout/train; into a file of their own")
    lab = Lab("sanity", __doc__, argv, seeds=5, add=add)
    size = lab.pick([*LAB, "--steps", "100"], [*QUICK, "--heldout", "0", "--steps", "3"], [*GPU, "--steps", "60"])
    algorithms = dict(list(ALGORITHMS.items())[1:2]) if lab.quick else ALGORITHMS
    modes = lab.args.modes or (MODES[::3] if lab.quick else MODES)
    name = "-".join(["sanity", *(m.replace("/", "-").replace(" ", "-") for m in lab.args.modes)])
    jobs = [Job(f"{a} {m}", s, (*lab.device(), *size, *formats(m), *flags.split()))
            for s in range(lab.seeds) for a, flags in algorithms.items() for m in modes]
    records = lab.sweep(jobs)
    result = summary(records)
    compared = [("fp16", "bf16"), ("e8m5/fp32", "e8m2/fp32")] if modes == MODES else list(zip(modes, modes[1:]))
    pairs = {f"{a}: {x} - {y}": paired(records, f"{a} {x}", f"{a} {y}") for a in algorithms for x, y in compared}
    first = list(algorithms)[0]
    pairs |= {f"{m}: {a} - {first}": paired(records, f"{a} {m}", f"{first} {m}") for m in modes for a in list(algorithms)[1:]}
    print(f"\n{'':28}" + "".join(f"{m:>22}" for m in modes) + "   training accuracy, sampled; sd over seeds; collapsed")
    for a in algorithms:
        print(f"{a:28}" + "".join(cell(result[f"{a} {m}"]) for m in modes))
    learned = {n: spread([r["accuracy_train"] for r in records if r["name"] == n and "failed" not in r])
               for n, s in result.items() if s["accuracy"] and "/" in n}
    for n, s in learned.items():
        print(f"{n}: the policy that learned, answering in training's format {s['mean']:.3f} sd {s['sd'] or 0:.3f}")
    for k, d in pairs.items():
        if d["se"] is not None:
            verdict = "differ" if d["significant"] else "no difference shown"
            print(f"{k}: {d['mean']:+.3f} (standard error {d['se']:.3f}): {verdict}")
    lab.save(dict(summary=result, pairs=pairs, collapsed=sum(map(collapsed, records)), learned=learned), records, name)
    draw(lab, records, algorithms, modes, name)


def cell(s):
    a = s["accuracy"]
    text = f"{a['mean']:.3f} sd {a['sd'] or 0:.3f}" if a else "all broke off"
    if s["collapsed"]:
        text += f" ({s['collapsed']}/{s['seeds']})"
    return f"{text:>22}"


def draw(lab, records, algorithms, modes, name):
    plot = lab.figure(2, -(-len(algorithms) // 2), (12, 6.6), sharex=True, sharey=True)
    if not plot:
        return
    fig, axes = plot
    for ax, a in zip(axes.flat, algorithms):
        for m in modes:
            rs = [r for r in records if r["name"] == f"{a} {m}"]
            kl = summary(rs)[f"{a} {m}"]["kl_k3"]
            band(ax, rs, "accuracy", f"{m} (KL {number(kl, '.0e')})", window=min(5, len(rs[0]["curves"]["accuracy"])) or 1,
                 color=COLORS.get(m))
        ax.axhline(0.95, color="gray", lw=0.8, ls=":")
        ax.set(title=a, xlabel="RL step (4 updates each)", ylabel="sampled accuracy", ylim=(0, 1.02))
        ax.legend(fontsize=7, loc="lower right", title="rollout / train, nats a token", title_fontsize=7)
    fig.suptitle(f"sanity test: mean and range of {len({r['seed'] for r in records})} seeds, dotted: the paper's pass mark")
    lab.draw(fig, name)


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
