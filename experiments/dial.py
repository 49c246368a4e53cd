"""The mantissa dial: how the mismatch grows as bits go, and where learning breaks.

    python -m experiments.dial

Above: mismatch of two fixed models against mantissa bits, the rollout rounded and training in FP32,
and both sides rounded; theory says that each bit halves the gap and quarters the KL. Below: RL with
one side in e8mY and the other in FP32, at 1 to 4 digits (12 to 41 tokens): accuracy against the KL
of a whole answer, and the map of bits against length. A coarse format can fail by its roundings or
by the disagreement; beside each pair stands its twin that rounds the same on both sides, exact.
"""
import numpy as np

from experiments.command import heat, show
from experiments.grid import grid, title
from experiments.lab import Lab, last, spread
from experiments.mismatch import SHAPES, distance, passes, random, trained
from run.console import run_main

BITS, FEW = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 18, 20, 23), (1, 2, 3, 5, 7, 10)
LINES = {"e8mY, train fp32": (8, BITS, "/fp32", "-"), "e8mY, train the same": (8, BITS, "", "--"),
         "e5mY, train fp32": (5, FEW, "/fp32", ":")}
MODELS = "trained", "random"
# one architecture for all lengths; more digits need more imitation, and less noise to begin alike
LENGTHS = {1: "--noise 0.35 --pool 70 --base-steps 400", 2: "--noise 0.2 --base-steps 600",
           3: "--noise 0.13 --base-steps 800", 4: "--noise 0.1 --base-steps 1200"}
LENGTHS_GPU = {d: f"--noise {0.45 / d:.3f}" for d in (3, 6, 9, 12)}
MODES = ("fp32/e8m2", "fp32/e8m3", "fp32/e8m4", "e8m2/fp32", "e8m3/fp32", "e8m2 exact",
         "e8m3 exact", "fp32")
TWINS = [(m, m.replace("fp32", "").strip("/") + " exact") for m in MODES[:5]]


def static(lab):
    """Mismatch without RL: (model, line, mantissa bits, seed), mean gap and KL."""
    rows = []
    for seed in range(lab.seeds):
        cases = (trained(lab.base(seed), seed, lab.pick(128, 16, 128), 8),
                 random(lab.device(), seed, lab.pick(16, 4, 64), lab.pick(2, 2, 8),
                        *lab.pick(*SHAPES)))
        for model, case in zip(MODELS, cases):
            for name, (exp, bits, training, _) in LINES.items():
                bits = (3, 7, 10) if lab.quick else bits
                modes = [f"e{exp}m{man}{training}" for man in bits]
                for man, (_, *out) in zip(bits, passes(case, modes, (seed, 51))):
                    m = distance(*out)
                    rows.append(dict(model=model, line=name, man=man, seed=seed,
                                     gap=m["logp_gap_mean"], kl=m["kl_k3"]))
    return rows


def slope(rows, key, low=3, high=14):
    """Fitted log2 of a quantity per mantissa bit: -1 is half a bit, -2 a quarter."""
    at = [(r["man"], np.log2(r[key])) for r in rows if low <= r["man"] <= high and r[key] > 0]
    return float(np.polyfit(*zip(*at), 1)[0]) if len({x for x, _ in at}) > 1 else float("nan")


def slopes(rows):
    """model, line -> slopes of gap and KL, a seed each."""
    out = {}
    for model in MODELS:
        for name in list(LINES)[:2]:
            some = [r for r in rows if (r["model"], r["line"]) == (model, name)]
            seeds = [[r for r in some if r["seed"] == s] for s in {r["seed"] for r in some}]
            out[f"{model}, {name}"] = {k: spread([slope(x, k) for x in seeds], 30)
                                       for k in ("gap", "kl")}
    show({n: {f"{k}, {of}": s[k][of] for k in s for of in ("mean", "sd")} for n, s in out.items()},
         "slope in log2 a bit, e8m3 to e8m14; theory: gap -1, KL -2")
    return out


def answers(records, summary):
    """name -> tokens of an answer, and KL of a whole one over the first ten steps."""
    out = {}
    for name in summary:
        rs = [r for r in records if r["name"] == name]
        tokens = [np.mean(r["curves"]["tokens"]) / r["config"]["prompts"] / 8 for r in rs]
        kl = [n * np.mean(r["curves"]["kl_k3"][:10]) for n, r in zip(tokens, rs)]
        out[name] = dict(tokens=float(np.mean(tokens)), kl=float(np.mean(kl)))
    show(out, "of an answer")
    return out


def draw_static(ax, rows, model):
    for key, color in (("gap", "C0"), ("kl", "C3")):
        for name, (*_, style) in LINES.items():
            at = {}
            for r in rows:
                if (r["model"], r["line"]) == (model, name):
                    at.setdefault(r["man"], []).append(r[key])
            ax.plot(list(at), [max(np.mean(y), 1e-16) for y in at.values()], style, marker=".",
                    color=color, label=f"{dict(gap='mean gap', kl='KL a token')[key]}, {name}")
    bits = np.array([3, 14])
    for by, style in ((2.0, "-"), (4.0, "-.")):
        ax.plot(bits, 0.05 * by ** (3 - bits), style, color="gray", lw=0.8,
                label=f"each bit divides by {by:.0f}")
    ax.set(title=f"{model} model, rollout in eXmY", yscale="log", ylabel="nats",
           xlabel="mantissa bits Y (bf16 has 7, fp16 10)")
    ax.legend()


def draw(plt, result, records):
    fig, (top, (left, right)) = plt.subplots(2, 2, figsize=(13, 9.5))
    for ax, model in zip(top, MODELS):
        draw_static(ax, result["static"], model)
    found, of = result["summary"], result["answers"]
    lengths = list(dict.fromkeys(name.partition(": ")[0] for name in found))
    for name, s in found.items():
        (length, _, mode), y = name.partition(": "), s["last"]
        both, color = "/" not in mode, f"C{lengths.index(length)}"
        kl = 1e-5 if both else of[name]["kl"]
        left.vlines(kl, y["min"], y["max"], color=color, lw=1)
        left.plot([kl], [y["mean"]], "s" if both else "o", color=color,
                  mfc=color if "/e" in mode else "none")
        left.annotate(mode, (kl, y["mean"]), fontsize=6, xytext=(4, 2), textcoords="offset points")
    for i, d in enumerate(lengths):
        tokens = next(a["tokens"] for name, a in of.items() if name.startswith(d))
        left.plot([], [], "o", color=f"C{i}", label=f"{d}, {tokens:.0f} tokens")
    left.set(title="RL, last 10 steps: mean and range of seeds (filled: training rounds)",
             xlabel="KL(mu || pi) of an answer, nats, first 10 steps (squares: one format, no KL)",
             ylabel="sampled accuracy", xscale="log", ylim=(0, 1.02))
    left.legend(loc="lower left")

    def mean(d, mode):
        return found[title(d, mode)]["last"]["mean"] if title(d, mode) in found else np.nan

    def told(d, mode):
        n = found.get(title(d, mode), {}).get("collapsed")
        return f"{mean(d, mode):.2f}" + f"\n{n} collapsed" * bool(n)
    heat(right, lengths, MODES, mean, told, cmap="RdYlGn", vmin=0, vmax=1)
    right.set(title="where it breaks: accuracy of the last 10 steps", xlabel="rollout / train")
    return fig


def main(argv=None):
    lab = Lab("dial", __doc__, argv)
    lengths = LENGTHS_GPU if lab.gpu else LENGTHS

    def told(records, summary):
        rows = static(lab)
        return dict(static=rows, slopes=slopes(rows), answers=answers(records, summary))
    grid(lab, {f"{d} digits": f"--digits {d} {flags}" for d, flags in lengths.items()}, MODES,
         "--old-policy recomputed --steps 60", also=told, draw=draw, value=last,
         compare=[*TWINS, *((m, "fp32") for m in MODES[:-1])])


if __name__ == "__main__":
    run_main(main)
