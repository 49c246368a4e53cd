"""The default job over many seeds: how often does it PASS, how long does it take, and how much do the curves differ?

    python -m experiments.seeds                       # seeds 0 to 9, cold: each makes its own base model
    python -m experiments.seeds --seeds 3 --precision bf16

Every flag that is not the runner's goes to train_rl.py. One run at a time, with all cores, in an empty cache of its own. Writes
results/seeds-NAME.json and .png.
"""
import os
import sys
import tempfile

import numpy as np

from experiments.lab import QUICK, Job, Lab, spread
from run.console import run_main


def main(argv=None):
    lab = Lab("seeds", __doc__, argv, seeds=10, rest=True)
    lab.workers = 1
    flags = (*lab.device(), *([*QUICK, "--heldout", "10", "--steps", "3"] if lab.quick else []), *lab.rest)
    name = "seeds-" + ("-".join(f.lstrip("-").replace("/", "_") for f in lab.rest) or "default")
    with tempfile.TemporaryDirectory() as cold:
        records = lab.sweep([Job(name, s, flags, os.cpu_count() or 1, (("TENBIT_CACHE", f"{cold}/{s}"),))
                             for s in range(lab.seeds)])
    done = [r for r in records if "failed" not in r]
    columns = {k: spread([r[k] for r in done]) for k in ("accuracy", "heldout_before", "heldout_after", "kept")}
    columns["cold_seconds"] = spread([r["wall"] for r in records])
    passed = sum(r.get("passed") is True for r in records)
    print(f"{passed} of {len(records)} PASS (training accuracy of 0.95, sampled over the whole kept set)")
    for k, v in columns.items():
        print(f"{k:15} mean {v['mean']:8.3f}  sd {v['sd'] or 0:7.3f}  {v['min']:8.3f} to {v['max']:8.3f}")
    lab.save(dict(seeds=len(records), passed=passed, failed=len(records) - len(done), **columns), records, name)
    plot = lab.figure(1, 2, (11, 4))
    if plot:
        fig, (axes,) = plot
        for ax, key in zip(axes, ("accuracy", "kl_k3")):
            y = np.maximum([r["curves"][key] for r in done], 1e-16)
            x = np.arange(1, y.shape[1] + 1)
            for row in y:
                ax.plot(x, row, color="C0", lw=0.5, alpha=0.4)
            ax.plot(x, np.median(y, 0), color="C0", lw=2, label=f"median of {len(y)} seeds")
            ax.fill_between(x, y.min(0), y.max(0), color="C0", alpha=0.12, label="smallest to largest")
            ax.set_xlabel("RL step")
            ax.legend(fontsize=8)
        axes[0].axhline(0.95, color="gray", lw=0.8, ls=":")
        axes[0].set(title=f"accuracy of the step's sampled answers ({name[6:]})", ylabel="share right", ylim=(0, 1.02))
        axes[1].set(title="KL(rollout || train) per token, before the update", ylabel="nats", yscale="log")
        lab.draw(fig, name)


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
