"""run/curves.py: curves.png of a run. Is it learning, is it still exploring, how large are its
gradients, how large is the mismatch?

    python -m run.curves out/run1          # draw it again from metrics.jsonl
"""
import math
import pathlib

from precision import InputError
from run.console import Parser, run_main
from run.folder import read

FEWEST = 10                             # steps that make a curve


def draw(folder, mark=0.95):
    """folder: of a run, with its metrics.jsonl. mark: accuracy that the test asks for. Returns a
    line to print."""
    rows = [*read(pathlib.Path(folder) / "metrics.jsonl")]
    if not rows or "config" not in rows[0]:
        raise InputError(f"no metrics.jsonl of a run in {folder}")
    steps, cfg = [r for r in rows if "step" in r], rows[0]["config"]
    result = rows[-1].get("result", {})
    if len(steps) < FEWEST:
        return f"no curves.png: fewer than {FEWEST} steps"
    try:
        import matplotlib
    except ImportError:
        return "no curves.png: matplotlib is not installed (pip install -e '.[plot]')"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    x = [m["step"] for m in steps]
    fig, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True, sharex=True)
    accuracy, gap, entropy, norm = axes.flat

    def line(ax, key, label=None, **kw):
        y = [float(m[key]) for m in steps]               # what is not finite is text in the file
        hide_zeros = ax in (gap, norm) and any(y)           # the axis is logarithmic
        y = [math.nan if not math.isfinite(v) or hide_zeros and v == 0 else v for v in y]
        ax.plot(x, y, label=label, **kw)
    line(accuracy, "accuracy", "sampled answers of the step")
    accuracy.axhline(mark, color="gray", lw=0.8, ls=":", label=f"{mark:g}: the sanity test's mark")
    if result.get("heldout_before") is not None:
        ends = [result["heldout_before"], result["heldout_after"]]
        accuracy.plot([x[0], x[-1]], ends, "s", color="C1", label="held-out problems, before and after")
    accuracy.set(title="accuracy", ylabel="share right", ylim=(0, 1.02))
    line(gap, "logp_gap_mean", "mean |log mu - log pi|")
    line(gap, "logp_gap_max", "largest", lw=0.8)
    line(gap, "kl_k3", "KL[mu || pi] a token")
    train = cfg["precision"]
    gap.set(title=f"mismatch before the update: rollout {cfg['rollout_precision'] or train}, train {train}",
            ylabel="nats")
    if any(m["logp_gap_max"] > 0 for m in steps):
        gap.set_yscale("log")
        low, high = gap.get_ylim()
        gap.set_ylim(low / 100, high)                                   # room for the legend
    line(entropy, "entropy")
    entropy.set(title="entropy: how unsure it is of the next token", xlabel="step", ylabel="nats")
    line(norm, "grad_norm")
    skipped = [m["step"] for m, before in zip(steps[1:], steps)
               if m["skipped_steps"] > before["skipped_steps"]]
    for step in skipped:
        norm.axvline(step, color="C3", lw=0.6)
    norm.set(title="norm of the gradient |g|" + ("; red: the loss scaler skipped an update" if skipped else ""),
             xlabel="step", yscale="log")
    for ax in (accuracy, gap):
        ax.legend(fontsize=8, loc="lower right" if ax is accuracy else "lower center",
                  ncols=1 if ax is accuracy else 3)
    path = pathlib.Path(folder) / "curves.png"
    fig.savefig(path, dpi=130)
    plt.close(fig)
    return f"curves: {path}"


def main(argv=None):
    p = Parser(prog="run.curves", description=__doc__.split("\n\n")[0])
    p.add_argument("folder", help="of a run")
    print(draw(p.parse_args(argv).folder))


if __name__ == "__main__":
    run_main(main)
