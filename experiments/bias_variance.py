"""What the corrections trade: bias and variance of the policy gradient.

    python -m experiments.bias_variance

Sampling from mu and differentiating pi gives a biased gradient; importance weights pi / mu take the
bias away and pay with variance, truncated and rejecting ones something between (arXiv 2510.26788,
section 2). Both are measured at a fixed policy, the base model:

    reference   FP32 on both sides, policy gradient with a leave-one-out baseline: unbiased
    estimate    the same problems and random numbers, sampled in one format, learned in another
    bias        |mean(estimate - reference)| / |mean reference|; within its noise an upper bound
    variance    sum over parameters of the variance between batches, relative to the reference's

The reference's policy is FP32's, a gradient in BF16 or FP16 is that of the rounded policy: what pg
shows with one format on both sides is the rounding, what it shows more is the mismatch.
"""
import dataclasses

import numpy as np
import torch

from algorithms import leave_one_out
from data import draw_problems, stream
from experiments.command import heat, show
from experiments.lab import GPU, LAB, QUICK, Lab, over_seeds, parts
from operators import numerics
from precision import make_scaler
from run.console import run_main
from sample import Sampler
from train_rl import Batch, collect, learn, parse_config

PAIRS = "fp16/fp16", "bf16/bf16", "fp16/fp32", "bf16/fp32", "e8m5/fp32", "e8m2/fp32"
NAMES = {"pg": "--algo pg", "PG-Token-TIS": "--algo pg-token-tis", "PG-Seq-IS": "--algo pg-seq-is",
         "PG-Seq-TIS": "--algo pg-seq-tis", "PG-Seq-MIS": "--algo pg-seq-mis",
         "PG-Geometric": "--algo pg --correction geometric",
         "GRPO, ratio to the rollout": "--algo dr-grpo",
         "GRPO, recomputed": "--algo dr-grpo --old-policy recomputed"}


def gradient(model, batch, cfg, room):
    """-> the gradient as one FP32 vector, on the CPU. As an estimate of the reward's gradient, so
    upwards."""
    scaler = make_scaler(model.num)
    learn(model, batch, cfg, scaler, room)
    g = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                   for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return -(g / scaler.get_scale()).cpu()


class Moments:
    """Of a stream of vectors g and d, their differences to the reference."""

    def __init__(self):
        self.n, self.d, self.g, self.dd, self.gg = 0, 0.0, 0.0, 0.0, 0.0

    def add(self, g, reference):
        g, d = g.double(), (g - reference).double()
        self.n, self.d, self.g = self.n + 1, self.d + d, self.g + g
        self.dd, self.gg = self.dd + float(d @ d), self.gg + float(g @ g)

    def bias2(self):
        """|E d|^2 without bias of its own, the mean product of the d of two different batches:
        (|sum d|^2 - sum |d|^2) / (n (n - 1))."""
        return (float(self.d @ self.d) - self.dd) / (self.n * (self.n - 1))

    def norm2(self):
        """|E g|^2, likewise."""
        return (float(self.g @ self.g) - self.gg) / (self.n * (self.n - 1))

    def variance(self):
        return (self.gg - float(self.g @ self.g) / self.n) / (self.n - 1)


def measure(lab, seed, pairs, batches):
    cfg, env, model = lab.base(seed)
    size = [*lab.device(), *lab.pick(LAB, QUICK, GPU), "--seed", str(seed)]
    each = {name: parse_config([*size, *flags.split()])[0] for name, flags in NAMES.items()}
    device, room = model.embedding.device, env.answer_length
    nums = {f: numerics(f, device, cfg.fast).hold(model.parameters())
            for f in {"fp32", *"/".join(pairs).split("/")}}
    sampler, true = Sampler(model, fast=cfg.fast), Moments()
    moments = {(name, pair): Moments() for name in NAMES for pair in pairs}
    for i in range(batches):
        problems, drawn = draw_problems(env.task, cfg.prompts, stream(seed, 30, i)), {}
        for fmt in {"fp32", *(parts(p)[0] for p in pairs)}:
            model.use(nums[fmt])
            rollout, rewards = collect(sampler, env, problems, cfg, (seed, 31, i))
            drawn[fmt] = Batch(rollout, advantage=leave_one_out(rewards).flatten().to(device))
        reference = gradient(model.use(nums["fp32"]), drawn["fp32"], each["pg"], room)
        true.add(reference, reference * 0)
        for (name, pair), m in moments.items():
            rollout, training, _ = parts(pair)
            m.add(gradient(model.use(nums[training]), drawn[rollout], each[name], room), reference)
    print(f"seed {seed}: {batches} batches; the reference gradient's variance is "
          f"{true.variance() / true.norm2():.1f} times its squared norm", flush=True)
    return [dict(name=f"{name} {pair}", seed=seed, config=dataclasses.asdict(cfg),
                 bias2=m.bias2() / true.norm2(), variance=m.variance() / true.variance())
            for (name, pair), m in moments.items()]


def make(lab):
    pairs, batches = (PAIRS[1::4], 3) if lab.quick else (PAIRS, 40)
    runs = [r for seed in range(lab.seeds) for r in measure(lab, seed, pairs, batches)]
    table = over_seeds(runs, ("bias2", "variance"))
    of = {n: {p: table[f"{n} {p}"] for p in pairs} for n in NAMES}
    show({n: {p: "{}{:.4f}".format(*bias(s)) for p, s in of[n].items()} for n in of}, "bias")
    show({n: {p: s["variance"]["mean"] for p, s in of[n].items()} for n in of}, "variance")
    return dict(table=table, batches=batches), runs


def bias(s):
    """The root of the mean squared bias, or, where that is within its standard deviation over the
    seeds, "<" and the root of the sum of both."""
    mean, noise = s["bias2"]["mean"], s["bias2"]["sd"] or abs(s["bias2"]["mean"])
    return ("", mean ** 0.5) if mean > noise else ("<", (max(mean, 0) + noise) ** 0.5)


def draw(plt, result, runs):
    fig, (left, right) = plt.subplots(1, 2, figsize=(14, 4.6), sharey=True)
    pairs, table = [p for p in PAIRS if f"pg {p}" in result["table"]], result["table"]

    def variance(name, pair):
        return table[f"{name} {pair}"]["variance"]
    heat(left, list(NAMES), pairs, lambda n, p: np.log10(bias(table[f"{n} {p}"])[1]),
         lambda n, p: "{}{:.4f}".format(*bias(table[f"{n} {p}"])), cmap="YlOrRd")
    heat(right, list(NAMES), pairs, lambda n, p: abs(np.log10(variance(n, p)["mean"])),
         lambda n, p: f"{variance(n, p)['mean']:.2f}\nsd {variance(n, p)['sd'] or 0:.2g}",
         cmap="YlOrRd")
    left.set(title="bias, of the gradient's norm (<: less than this)", xlabel="rollout / train")
    right.set(title="variance between batches, of the reference's", xlabel="rollout / train")
    return fig


def main(argv=None):
    lab = Lab("bias_variance", __doc__, argv)
    lab.present(lambda: make(lab), draw)


if __name__ == "__main__":
    run_main(main)
