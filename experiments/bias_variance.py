"""What the corrections trade: bias and variance of the policy gradient, by algorithm and by pair of formats.

    python -m experiments.bias_variance

Sampling from mu and differentiating pi gives a biased gradient; importance weights pi / mu take the bias away and pay with
variance, truncated and rejecting ones something between (arXiv 2510.26788, section 2). Here both are measured at a fixed policy,
the base model:

    reference   FP32 on both sides, policy gradient with a leave-one-out baseline: unbiased for the FP32 policy
    estimate    the same problems and random numbers, sampled in one format, differentiated in another, by each algorithm
    bias        |mean(estimate - reference)| / |mean reference|. Its square is estimated without bias of its own, as the mean
                product of differences of two *different* batches; within its noise it is given as an upper bound
    variance    sum over parameters of the variance between batches, relative to the reference's own

The reference's policy is FP32's. A gradient in BF16 or FP16 is that of the rounded policy: what pg shows with one format on both
sides is the rounding, what it shows more than that is the mismatch. Writes results/bias_variance.json and .png.
"""
import dataclasses
import sys

import numpy as np
import torch

from algorithms import ALGORITHMS, leave_one_out
from data import draw_problems, stream
from experiments.lab import GPU, LAB, QUICK, Lab
from operators import numerics
from operators.device import pick_device
from precision import make_scaler
from run.base import get_base, load_task
from run.console import run_main
from run.flags import PAPER
from sample import Sampler
from train_rl import Batch, collect, learn, parse_config

PAIRS = ("fp16/fp16", "bf16/bf16", "fp16/fp32", "bf16/fp32", "e8m5/fp32", "e8m2/fp32")
NAMES = {"pg": ("pg", {}), "PG-Token-TIS": ("pg-token-tis", {}), "PG-Seq-IS": ("pg-seq-is", {}), "PG-Seq-TIS": ("pg-seq-tis", {}),
         "PG-Seq-MIS": ("pg-seq-mis", {}), "PG-Geometric": ("pg", dict(correction="geometric")),
         "GRPO, ratio to the rollout": ("dr-grpo", {}), "GRPO, recomputed": ("dr-grpo", dict(old_policy="recomputed"))}


def gradient(model, rollout, advantage, cfg, room):
    """-> the gradient as one FP32 vector, on the CPU. As an estimate of the reward's gradient, so upwards."""
    scaler = make_scaler(model.num)
    learn(model, Batch(rollout, advantage=advantage), cfg, scaler, room)
    g = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return -(g / scaler.get_scale()).cpu()


class Moments:
    """Of a stream of vectors d (the difference to the reference) and g: what the two estimates above need, in a pass."""

    def __init__(self):
        self.n, self.d, self.g, self.dd, self.gg = 0, 0.0, 0.0, 0.0, 0.0

    def add(self, g, reference):
        d = (g - reference).double()
        self.n, self.d, self.g = self.n + 1, self.d + d, self.g + g.double()
        self.dd, self.gg = self.dd + float(d @ d), self.gg + float(g.double() @ g.double())

    def bias2(self):
        """|E d|^2 without bias: (|sum d|^2 - sum |d|^2) / (n (n - 1))."""
        return (float(self.d @ self.d) - self.dd) / (self.n * (self.n - 1))

    def norm2(self):
        """|E g|^2, likewise."""
        return (float(self.g @ self.g) - self.gg) / (self.n * (self.n - 1))

    def variance(self):
        return (self.gg - float(self.g @ self.g) / self.n) / (self.n - 1)


def measure(lab, seed, pairs, batches):
    size = lab.pick(LAB, QUICK, GPU)
    cfg = parse_config([*lab.device(), *size, "--seed", str(seed)])[0]
    device, env = pick_device(cfg.device), load_task(cfg)
    model = get_base(cfg, device, env)
    nums = {f: numerics(f, device, cfg.fast).hold(model.parameters()) for f in {"fp32", *"/".join(pairs).split("/")}}
    sampler, out, true = Sampler(model, fast=cfg.fast), {}, Moments()
    for batch in range(batches):
        problems = draw_problems(env.task, cfg.prompts, stream(seed, 30, batch))
        drawn = {}

        def act(fmt, problems=problems, drawn=drawn, batch=batch):
            if fmt not in drawn:
                model.use(nums[fmt])
                rollout, rewards = collect(sampler, env, problems, cfg, (seed, 31, batch))
                drawn[fmt] = rollout, leave_one_out(rewards).flatten().to(device)
            return drawn[fmt]
        one = dataclasses.replace(cfg, algo="pg")
        answers = act("fp32")
        reference = gradient(model.use(nums["fp32"]), *answers, one, env.answer_length)
        true.add(reference, reference * 0)
        for pair in pairs:
            fmt, training = pair.split("/")
            answers = act(fmt)
            for name, (algo, kw) in NAMES.items():
                own = PAPER.get(algo, dict(algo=algo))
                settings = dataclasses.replace(cfg, **{**ALGORITHMS[own["algo"]].settings, **own, **kw})
                g = gradient(model.use(nums[training]), *answers, settings, env.answer_length)
                out.setdefault(f"{name} {pair}", Moments()).add(g, reference)
    scale = true.norm2()
    estimates = {k: dict(bias2=m.bias2() / scale, variance=m.variance() / true.variance()) for k, m in out.items()}
    return dict(config=dataclasses.asdict(cfg), reference_norm=scale ** 0.5, reference_variance=true.variance() / scale,
                estimates=estimates)


def main(argv=None):
    lab = Lab("bias_variance", __doc__, argv)
    pairs, batches = (PAIRS[1:2] + PAIRS[-1:], 3) if lab.quick else (PAIRS[:4] if lab.gpu else PAIRS, 40)
    runs = []
    for seed in range(lab.seeds):
        runs.append(measure(lab, seed, pairs, batches))
        print(f"seed {seed}: {batches} batches; the reference gradient's variance is {runs[-1]['reference_variance']:.1f} times "
              "its squared norm", flush=True)
    table = {}
    for k in runs[0]["estimates"]:
        for what in ("bias2", "variance"):
            x = [r["estimates"][k][what] for r in runs]
            table.setdefault(k, {})[what] = dict(mean=float(np.mean(x)), sd=float(np.std(x, ddof=1)) if len(x) > 1 else None)
    for title, text in (("relative bias", bias), ("variance / the reference's", lambda s: f"{s['variance']['mean']:.3f}")):
        print(f"\n{title:30}" + "".join(f"{p:>14}" for p in pairs))
        for name in NAMES:
            print(f"{name:30}" + "".join(f"{text(table[f'{name} {p}']):>14}" for p in pairs))
    config = [r.pop("config") for r in runs][0]
    answers = config["prompts"] * config["group"]
    lab.save(dict(table=table, batches=batches, answers_per_batch=answers, seeds=runs), config=config)
    draw(lab, table, pairs)


def bias(s):
    """The root of the mean squared bias, or, where that is within its standard deviation over the seeds, the sum of both."""
    b = s["bias2"]
    noise = b["sd"] or abs(b["mean"])
    return f"{b['mean'] ** 0.5:.4f}" if b["mean"] > noise else f"<{(max(b['mean'], 0) + noise) ** 0.5:.4f}"


def draw(lab, table, pairs):
    plot = lab.figure(1, 2, (13, 4.6))
    if not plot:
        return
    fig, axes = plot
    for i, name in enumerate(NAMES):
        for j, p in enumerate(pairs):
            at, s = j + (i - len(NAMES) / 2 + 0.5) * 0.1, table[f"{name} {p}"]
            mean, noise = s["bias2"]["mean"], s["bias2"]["sd"] or abs(s["bias2"]["mean"])
            label = name if j == 0 else None
            if mean > noise:
                low, high = (mean - noise) ** 0.5, (mean + noise) ** 0.5
                axes[0, 0].errorbar([at], [mean ** 0.5], yerr=[[mean ** 0.5 - low], [high - mean ** 0.5]], fmt="o", ms=5, lw=1,
                                    color=f"C{i}")
            else:
                axes[0, 0].plot([at], [(max(mean, 0) + noise) ** 0.5], "v", ms=5, mfc="none", color=f"C{i}")
            v = s["variance"]
            axes[0, 1].errorbar([at], [v["mean"]], yerr=[v["sd"] or 0], fmt="o", ms=5, lw=1, color=f"C{i}", label=label)
    axes[0, 0].set(title="bias of the gradient (triangles: less than this)", ylabel="relative to the gradient's norm",
                   yscale="log")
    axes[0, 1].set(title="variance between batches", ylabel="relative to the reference's", yscale="log")
    axes[0, 1].axhline(1, color="gray", lw=0.8, ls=":")
    for ax in axes.flat:
        ax.set_xticks(range(len(pairs)), pairs, fontsize=8)
        ax.set_xlabel("rollout / train; mean over seeds, bars: one standard deviation")
    axes[0, 1].legend(fontsize=7, loc="upper left")
    lab.draw(fig)


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
