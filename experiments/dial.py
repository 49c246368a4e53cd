"""The mantissa dial: how the mismatch grows as bits go, where learning breaks, and what answers' length has to do with it.

    python -m experiments.dial

Above: mismatch of a fixed model against mantissa bits, e8m1 to e8m23, rollout rounded and training in FP32, and both sides
rounded; theory says that each bit halves the gap and quarters the KL, the fitted slopes are printed. Beside it what the
exponent costs, e5mY and e8mY. Below: RL with one side in e8mY and the other in FP32, at 1 to 4 digits (12 to 41 tokens):
accuracy against the KL of a whole answer, and the map of bits against length. A coarse format can fail in two ways, by its
roundings and by the disagreement; beside each pair stands its twin that rounds the same on both sides, exact, without any
mismatch. Writes results/dial.json and .png.
"""
import sys

import numpy as np

from experiments.lab import GPU, LAB, QUICK, Job, Lab, formats, last, paired, summary
from experiments.mismatch import random, spread_e, trained
from operators import numerics
from run.console import run_main
from run.meter import mismatch
from sample import Sampler
from train_rl import Batch, score

BITS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 18, 20, 23)
SHORT = (1, 2, 3, 5, 7, 10)
# one architecture for all lengths; more digits need more imitation, and less noise for the same accuracy
LENGTHS = {1: "--digits 1 --noise 0.35 --pool 70 --base-steps 400", 2: "--digits 2 --noise 0.2 --base-steps 600",
           3: "--digits 3 --noise 0.13 --base-steps 800", 4: "--digits 4 --noise 0.1 --base-steps 1200"}


def static(lab, seed):
    """Mismatch without RL: (model, kind of rounding, exponent bits, mantissa bits) -> metrics."""
    rows, base = [], trained(lab, seed, lab.pick(LAB, QUICK, GPU), lab.pick(128, 16, 128))
    for name, case in (("trained on the task", base), ("random, deeper and wider", random(lab, seed))):
        model, prompts, new, stop, cfg = case
        prompts = prompts[:lab.pick(16, 4, 64)] if model is not base[0] else prompts
        device, group = model.embedding.device, lab.pick(2, 2, 8) if model is not base[0] else 8
        fp32 = numerics("fp32", device, cfg.fast).hold(model.parameters())
        for exp, bits in ((8, (3, 7, 10) if lab.quick else BITS), (5, (3, 7) if lab.quick else SHORT)):
            for man in bits:
                num = numerics(f"e{exp}m{man}", device, cfg.fast).hold(model.parameters())
                rollout = Sampler(model.use(num), stop=stop, fast=cfg.fast).generate(prompts, group, new, seed=(seed, 51))
                where, lengths = rollout.is_answer, rollout.length - rollout.prompt_length
                for kind, train in (("train fp32", fp32), ("train the same", num)):
                    logp = score(model.use(train), Batch(rollout), cfg)
                    m = mismatch(rollout.logp[where], logp[where], lengths)
                    rows.append(dict(model=name, kind=kind, exp=exp, man=man, seed=seed, gap=m["logp_gap_mean"], kl=m["kl_k3"]))
    return rows


def slope(rows, key, low, high):
    """Fitted log2 of a quantity per mantissa bit, over low to high bits: -1 is half a bit, -2 a quarter."""
    at = [(r["man"], np.log2(r[key])) for r in rows if low <= r["man"] <= high and r[key] > 0]
    return float(np.polyfit(*zip(*at), 1)[0]) if len({x for x, _ in at}) > 1 else float("nan")


def main(argv=None):
    lab = Lab("dial", __doc__, argv)
    seeds = lab.seeds
    jobs, lengths = [], (1,) if lab.quick else LENGTHS
    for s in range(seeds):
        for d in lengths:
            size = lab.pick([*LAB, *LENGTHS[d].split(), "--steps", "60"], [*QUICK, "--heldout", "0", "--steps", "3"],
                            [*GPU, "--digits", str(3 * d), "--noise", str(round(0.45 / (3 * d), 3)), "--steps", "60"])
            modes = ["fp32/e8m2", "e8m2 exact"] if lab.quick else [
                "fp32/e8m2", "fp32/e8m3", "fp32/e8m4", "e8m2/fp32", "e8m3/fp32", "e8m2 exact", "e8m3 exact"]
            jobs += [Job(f"{d} digits {m}", s, (*lab.device(), *size, *formats(m), "--old-policy", "recomputed"))
                     for m in (*modes, "fp32")]
    records = lab.sweep(jobs)
    result, rows = summary(records), []
    for seed in range(seeds):
        rows += static(lab, seed)
    print("\nfitted slope in log2 per mantissa bit, e8m3 to e8m14, training in FP32 (theory: gap -1, KL -2)")
    slopes = {}
    for name in dict.fromkeys(r["model"] for r in rows):
        for kind in ("train fp32", "train the same"):
            some = [[r for r in rows if (r["model"], r["kind"], r["exp"], r["seed"]) == (name, kind, 8, seed)]
                    for seed in range(seeds)]
            slopes[f"{name}, {kind}"] = {k: spread_e([slope(x, k, 3, 14) for x in some]) for k in ("gap", "kl")}
            g, k = (slopes[f"{name}, {kind}"][x] for x in ("gap", "kl"))
            print(f"  {name}, {kind}: gap {g['mean']:+.2f} (sd {g['sd'] or 0:.2f}), KL {k['mean']:+.2f} (sd {k['sd'] or 0:.2f})")
    pairs = {}
    print(f"\n{'':22}accuracy at the end    KL of an answer    against fp32    against its exact twin")
    for name, s in result.items():
        d, mode = name.split(" digits ")
        twin = mode.replace("/fp32", " exact") if mode.endswith("/fp32") else mode.replace("fp32/", "") + " exact"
        one = paired(records, name, f"{d} digits fp32", last) if mode != "fp32" else None
        two = paired(records, name, f"{d} digits {twin}", last) if twin != mode and f"{d} digits {twin}" in result else None
        pairs |= {f"{name} - {k}": v for k, v in (("fp32", one), ("twin", two)) if v}
        told = "".join(f"{v['mean']:+12.3f}{'*' if v['significant'] else ' '}" if v and v["mean"] is not None else " " * 13
                       for v in (one, two))
        print(f"{name:22}{s['last']['mean']:8.3f} sd {s['last']['sd'] or 0:.3f} {answer_kl(records, name):18.1e} {told}")
    print("* differ, by Student's t at 5 %")
    lab.save(dict(slopes=slopes, static=rows, summary=result, pairs=pairs,
                  answer_kl={name: answer_kl(records, name) for name in result}), records)
    draw(lab, rows, records, result)


def answer_kl(records, name):
    """KL of a whole answer at the start: KL a token times tokens an answer, mean of the first ten steps and the seeds."""
    rs = [r for r in records if r["name"] == name]
    tokens = [np.mean(r["curves"]["tokens"]) / int(r["command"][r["command"].index("--prompts") + 1]) / 8 for r in rs]
    return float(np.mean([t * np.mean(r["curves"]["kl_k3"][:10]) for t, r in zip(tokens, rs)]))


def draw(lab, rows, records, result):
    plot = lab.figure(2, 2, (13, 9.5))
    if not plot:
        return
    fig, ((left, middle), (right, grid)) = plot
    for i, name in enumerate(dict.fromkeys(r["model"] for r in rows)):
        for kind, style in (("train fp32", "-"), ("train the same", "--")):
            for ax, exps in ((left, (8,)), (middle, (8, 5))):
                for exp in exps:
                    bits = sorted({r["man"] for r in rows if r["exp"] == exp})
                    of = {m: [r["gap"] for r in rows if (r["model"], r["kind"], r["exp"], r["man"]) == (name, kind, exp, m)]
                          for m in bits}
                    y = [np.mean(of[m]) for m in bits]
                    if ax is left or kind == "train fp32":
                        ax.plot(bits, np.maximum(y, 1e-9), style if ax is left else {8: "-", 5: ":"}[exp], marker="o", ms=3,
                                color=f"C{i}", label=f"{name}, {kind if ax is left else f'e{exp}mY'}")
    bits = np.array([3, 14])
    left.plot(bits, 0.05 * 2.0 ** (3 - bits), color="gray", lw=0.8, label="halved by each bit")
    titles = "mean gap |log mu - log pi|, rollout in e8mY", "rollout in e8mY and e5mY, train fp32"
    for ax, title in zip((left, middle), titles):
        ax.set(title=title, xlabel="mantissa bits Y", ylabel="nats", yscale="log")
        for m, text in ((7, "bf16"), (10, "fp16")):
            ax.axvline(m, color="gray", lw=0.6, ls=":")
            ax.text(m, ax.get_ylim()[0], text, fontsize=7, rotation=90, va="bottom")
        ax.legend(fontsize=7)
    for name in result:
        d, mode = name.split(" digits ")
        rs = [r for r in records if r["name"] == name]
        y = [last(r) for r in rs]
        kl = answer_kl(records, name) if "/" in mode else 10 ** -7.5 if mode != "fp32" else 10 ** -8.2
        spans = [[np.mean(y) - min(y)], [max(y) - np.mean(y)]]
        right.errorbar([kl], [np.mean(y)], yerr=spans, capsize=2, color=f"C{int(d) - 1}",
                       fmt="o" if "/" in mode else "s" if mode != "fp32" else "*", mfc=None if "/e" in mode else "none", ms=6)
        fmt = mode.removeprefix("fp32/").removesuffix("/fp32").removesuffix(" exact")
        right.annotate(fmt, (kl, np.mean(y)), fontsize=6, xytext=(4, 2), textcoords="offset points")
    for d in dict.fromkeys(n.split()[0] for n in result):
        right.plot([], [], "o", color=f"C{int(d) - 1}", label=f"{d} digits")
    right.plot([], [], "o", color="gray", label="training rounds, the rollout does not")
    right.plot([], [], "o", color="gray", mfc="none", label="the rollout rounds, training does not")
    right.plot([], [], "s", color="gray", mfc="none", label="the same rounding on both sides, exact: KL 0")
    right.plot([], [], "*", color="gray", label="fp32")
    right.set(title="RL: last 10 of 60 steps, mean and range of seeds", xscale="log",
              xlabel="KL(mu || pi) of a whole answer, nats, first 10 steps", ylabel="sampled accuracy", ylim=(0, 1.02))
    right.legend(fontsize=7, loc="lower left")
    where_it_breaks(grid, records, result)
    lab.draw(fig)


def where_it_breaks(ax, records, result):
    """Bits against length: accuracy of the last 10 steps, and how many seeds collapsed."""
    digits = list(dict.fromkeys(name.split(" digits ")[0] for name in result))
    modes = [m for m in ("fp32/e8m2", "fp32/e8m3", "fp32/e8m4", "e8m2/fp32", "e8m3/fp32", "e8m2 exact", "e8m3 exact", "fp32")
             if f"{digits[0]} digits {m}" in result]
    value = np.array([[result[f"{d} digits {m}"]["last"]["mean"] for m in modes] for d in digits])
    ax.imshow(value, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for i, d in enumerate(digits):
        for j, m in enumerate(modes):
            s = result[f"{d} digits {m}"]
            ax.text(j, i, f"{value[i, j]:.2f}" + (f"\n{s['collapsed']} of {s['seeds']}\ncollapsed" if s["collapsed"] else ""),
                    ha="center", va="center", fontsize=8)
    tokens = [np.mean([np.mean(r["curves"]["tokens"]) for r in records if r["name"].startswith(f"{d} digits")]) for d in digits]
    command = records[0]["command"]
    prompts = int(command[command.index("--prompts") + 1])
    ax.set_xticks(range(len(modes)), modes, fontsize=8, rotation=20)
    ax.set_yticks(range(len(digits)), [f"{d} digits\n{t / prompts / 8:.0f} tokens" for d, t in zip(digits, tokens)])
    ax.set(title="where it breaks: accuracy of the last 10 steps", xlabel="rollout / train; exact: the same on both sides, KL 0")


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
