"""run/curves.py: curves.png of a run. Is it learning, how large is the mismatch, is the loss scale
calm, where does the time go.

    python -m run.curves out/run1          # draw it again from metrics.jsonl
"""
import json
import pathlib
import sys

FEWEST = 10                             # steps that make a curve


def draw(folder, history, formats):
    """history: the step objects of metrics.jsonl. Returns a line to print."""
    if len(history) < FEWEST:
        return f"no curves.png: {len(history)} steps are too few to draw"
    try:
        import matplotlib
    except ImportError:
        return "no curves.png: matplotlib is not installed (pip install -e '.[plot]')"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    x = [m["step"] for m in history]
    fig, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True, sharex=True)
    learning, gap, scale, seconds = axes.flat

    def line(ax, key, label=None, **kw):
        ax.plot(x, [float(m[key]) for m in history], label=label or key.replace("_", " "), **kw)
    line(learning, "accuracy")
    line(learning, "reward", ls="--")
    line(learning, "frac_zero_std", "groups without signal", lw=0.8, color="gray")
    learning.set(title="learning (sampled answers of the step's batch)", ylabel="share", ylim=(0, 1.02))
    line(gap, "logp_gap_mean", "mean |log mu - log pi|")
    line(gap, "logp_gap_p99", "99th percentile")
    line(gap, "logp_gap_max", "largest")
    line(gap, "kl_k3", "KL per token (k3)")
    gap.set(title=f"mismatch before the update: {formats}", ylabel="nats")
    if any(m["logp_gap_max"] > 0 for m in history):
        gap.set_yscale("log")
        low, high = gap.get_ylim()
        gap.set_ylim(low / 100, high)                                   # room for the legend
    line(scale, "loss_scale")
    scale.set(title="loss scale", xlabel="step")
    scale.set_yscale("log", base=2)
    times = [[m[k] for m in history] for k in ("t_rollout", "t_train")]
    seconds.stackplot(x, *times, labels=["rollout", "training"])
    seconds.set(title="time", xlabel="step", ylabel="seconds a step")
    for ax in (learning, gap, seconds):
        ax.legend(fontsize=8, **(dict(loc="lower center", ncols=2) if ax is gap else {}))
    path = pathlib.Path(folder) / "curves.png"
    fig.savefig(path, dpi=130)
    plt.close(fig)
    return f"curves: {path}"


if __name__ == "__main__":
    text = (pathlib.Path(sys.argv[1]) / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    train = rows[0]["config"]["precision"]
    rollout = rows[0]["config"]["rollout_precision"] or train
    print(draw(sys.argv[1], [r for r in rows if "step" in r], f"rollout {rollout}, train {train}"))
