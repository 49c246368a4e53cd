"""A grid of runs: every row (what is varied, as flags) in every mode (a pair of formats).

    grid(Lab("mine", __doc__, argv), compare=[("GSPO", "GRPO")], modes=("fp16", "bf16/fp32"),
         rows={"GRPO": "--old-policy recomputed", "GSPO": "--algo gspo --old-policy recomputed"})

It prints a line a cell and the paired differences, and leaves mine.json and mine.png.
"""
from math import ceil

from experiments.command import band, short, show
from experiments.lab import GPU, LAB, QUICK, Job, formats, paired, smooth, summary

AXES = dict(accuracy="sampled accuracy", kl_k3="KL(rollout || train) a token, nats",
            loss_scale="loss scale")


def title(row, mode):
    """What the runs of a cell are called."""
    return ": ".join(x for x in (row, mode) if x)


def other_modes(p):
    p.add_argument("--modes", nargs="+", default=[],
                   help="other pairs of formats, rollout/train; into a file of their own")


def grid(lab, rows={"": ""}, modes=("",), flags="", job=None, compare=(),  # noqa: B006
         value=lambda r: r["accuracy"], curves=("accuracy",), panels=None,
         change=lambda job: job, also=lambda records, summary: {}, draw=None, name=""):
    """rows: name -> flags; modes: as lab.parts reads them; flags: of all; job: the sizes, if not
    the laboratory's own. compare: pairs of rows, each in all modes, or of modes, each in all rows:
    their `value` is compared seed by seed. curves: what is drawn, a panel a row; panels: others,
    title -> names. What a command has of its own: change(job) -> job;
    also(records, summary) -> more results; draw(plt, result, records) -> another figure."""
    cells = {title(r, m): (rows[r], m) for r in rows for m in modes}
    pairs = [(title(a, m), title(b, m)) for a, b in compare if a in rows for m in modes]
    pairs += [(title(r, a), title(r, b)) for a, b in compare if a in modes for r in rows]
    one = {"": list(cells)} if modes == ("",) else {r: [title(r, m) for m in modes] for r in rows}
    size = lab.pick(LAB, LAB, GPU) if job is None else job

    def make():
        jobs = [Job(name, seed, (*lab.device(), *size, *flags.split(), *own.split(),
                                 *formats(mode), *(QUICK if lab.quick else ())))
                for seed in range(lab.seeds) for name, (own, mode) in cells.items()]
        jobs = dict.fromkeys((jobs[0], jobs[-1])) if lab.quick else jobs
        records = lab.sweep([change(job) for job in jobs])
        found = summary(records)
        show({name: line(s) for name, s in found.items()})
        compared = {f"{a} - {b}": paired(records, a, b, value) for a, b in pairs}
        tell(compared)
        return dict(summary=found, pairs=compared, **also(records, found)), records
    name = " ".join([name or lab.name, *getattr(lab.args, "modes", ())])

    def usual(plt, result, records):
        return figure(plt, lab.name, panels or one, curves, result["summary"], records)
    lab.curves = {*curves, "accuracy"}
    lab.present(make, draw or usual, name)


def line(s):
    """A summary as cells."""
    return {"": f"{s['failed']} failed".ljust(10) if s["failed"] else "",
            "accuracy": s["accuracy"] and s["accuracy"]["mean"],
            "sd": s["accuracy"] and s["accuracy"]["sd"],
            "as trained": s["accuracy_train"] and s["accuracy_train"]["mean"],
            "last 10": s["last"]["mean"], "collapsed": f"{s['collapsed']} of {s['seeds']}",
            "KL a token": s["kl_k3"], "mean gap": s["gap_mean"], "largest gap": s["gap_max"],
            "skipped": s["skipped"], "other routes": s["route_flips"], "s/step": s["step_seconds"]}


def tell(pairs):
    pairs = {k: d for k, d in pairs.items() if d["se"] is not None}
    if pairs:
        print(f"\npaired differences; of {len(pairs)}, one in twenty is shown by chance alone")
    for k, d in pairs.items():
        print(f"  {k}: {d['mean']:+.4f} (standard error {d['se']:.4f}, {d['seeds']} seeds): "
              + ("differ" if d["significant"] else "no difference shown"))


def figure(plt, what, panels, curves, found, records):
    """A panel for each of `panels`, for each of `curves`."""
    shown = [(key, text, [n for n in names if n in found])
             for key in curves for text, names in panels.items()]
    shown = [x for x in shown if x[2]]
    columns = len(panels) if min(len(panels), len(curves)) > 1 else ceil(len(shown) ** 0.5)
    down = -(-len(shown) // columns)
    fig, axes = plt.subplots(down, columns, figsize=(max(11, 3.6 * columns), 3.2 * down + 0.8),
                             squeeze=False)
    for ax, (key, text, names) in zip(axes.flat, shown):
        panel(ax, found, records, names, key, text)
    for ax in axes.flat[len(shown):]:
        ax.set_axis_off()
    seeds = max(s["seeds"] for s in found.values())
    fig.suptitle(f"{what}: mean and range of {seeds} seeds")
    return fig


def panel(ax, summary, records, names, key, text=""):
    """The runs of these names against the step, a band each."""
    window = 5 if key == "accuracy" else 1
    for i, name in enumerate(names):
        s, curves = summary[name], [r["curves"][key] for r in records if r["name"] == name]
        steps, label = max(map(len, curves)), name.removeprefix(text + ": ")
        label += f", stopped after {steps} steps" if s["failed"] else ""
        if key == "kl_k3" and s["route_flips"] is not None:
            label += f" ({s['route_flips']:.2%} of routes differ)"
        elif key == "accuracy":
            label += f" (KL {short(s['kl_k3'])})"
        w = min(window, steps or 1)
        y = band(ax, [smooth(c, w) if len(c) >= w else [] for c in curves], f"C{i}", label, w)
        if len(names) == 1:                                        # room for its seeds
            ax.plot(range(w, w + y.shape[1]), y.T, color=f"C{i}", lw=0.4, alpha=0.5)
    if key == "accuracy":
        ax.axhline(0.95, color="gray", lw=0.8, ls=":")             # the paper's pass mark
        ax.set_ylim(0, 1.02)
    elif ax.dataLim.y1 > 0:                                        # KL is 0 in exact mode
        ax.set_yscale("log")
    ax.set(title=text, xlabel="RL step", ylabel=AXES[key])
    ax.legend()
