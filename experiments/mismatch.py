"""How far apart are the policy that acts and the policy that learns? Pairs of formats, without RL.

    python -m experiments.mismatch

The paper's offline test (arXiv 2510.26788, section 3): the same weights answer in one format and
are scored in another. On R1-Distill-1.5B with two engines it finds a sequence KL of 7.64 in BF16
and 0.32 in FP16, 24 times less. Here the same forward code does both, for two models: the base of
an addition task of 4 digits (41 tokens of working), and a deeper and wider one with random weights,
whose every token is uncertain.
"""
import dataclasses
import math
from functools import lru_cache

import numpy as np
import torch

from data import draw_problems, stream
from data.tokenizer import STOP, encode
from experiments.command import band, heat, show
from experiments.lab import Lab, over_seeds, parts
from model import GPT, GPTConfig
from operators import numerics
from operators.device import pick_device
from run.console import run_main
from run.meter import mismatch
from sample import Sampler
from train_rl import Batch, parse_config, score

FORMATS = "fp32", "bf16", "fp16"
MODES = *(f"{a}/{b}" for a in FORMATS for b in FORMATS), "fp16/fp16 exact"
RATIOS = ("bf16/bf16", "fp16/fp16"), ("bf16/fp32", "fp16/fp32"), ("bf16/fp16", "fp16/fp16")
TRAINED = "--digits 4 --noise 0.1 --base-steps 500 --base-batch 64".split()
KEYS = "logp_gap_mean", "prob_gap_mean", "kl_k3", "seq_kl_k3", "exact_share"
SHAPES = (8, 256, 128), (3, 64, 16), (24, 1024, 1024)   # layers, width, new tokens: as lab.pick has
COLORS = {"bf16/bf16": "C3", "fp16/fp16": "C0", "bf16/fp32": "C1", "fp16/fp32": "C2"}


def trained(base, seed, n, group):
    """lab.base's answer -> (model, n prompts, answers to each, tokens to sample, stop token,
    settings)."""
    cfg, env, model = base
    prompts = [encode(p.prompt) for p in draw_problems(env.task, n, stream(seed, 20))]
    return model, prompts, group, env.answer_length, STOP, cfg


def random(device, seed, n, group, layers, width, new):
    """The same of a model with random weights, that never stops. device: flags."""
    cfg = parse_config([*device, "--micro-batch", "16"])[0]
    shape = GPTConfig(vocab_size=258, n_layers=layers, width=width, n_heads=8, n_kv_heads=4,
                      mlp_width=3 * width, context=16 + new)
    model = GPT(shape, pick_device(cfg.device), seed)
    with torch.no_grad():                                       # less uncertain than at birth
        model.head *= 4
    prompts = np.random.default_rng(seed).integers(0, 256, (n, 16)).tolist()
    return model, prompts, group, new, -1, cfg


def passes(case, modes, key):
    """For each mode: (mode, answers sampled in its first format, their log-probs in its second)."""
    model, prompts, group, new, stop, cfg = case

    @lru_cache(4)
    def use(fmt, exact):
        return numerics(fmt, model.embedding.device, cfg.fast, exact).hold(model.parameters())

    @lru_cache(1)
    def answers(fmt, exact):
        sampler = Sampler(model.use(use(fmt, exact)), stop=stop, fast=cfg.fast)
        return sampler.generate(prompts, group, new, seed=key)
    for mode in modes:
        first, second, exact = parts(mode)
        rollout = answers(first, exact)
        yield mode, rollout, score(model.use(use(second, exact)), Batch(rollout), cfg)


def distance(rollout, logp):
    """What run.meter.mismatch says of it."""
    where = rollout.is_answer
    return mismatch(rollout.logp[where], logp[where], rollout.length - rollout.prompt_length)


def measure(rollout, logp, scatter):
    """distance, |log pi - log mu| of an answer up to each of its tokens, some tokens to draw."""
    where, m = rollout.is_answer, distance(rollout, logp)
    ratio, at = ((logp - rollout.logp).double() * where).cumsum(1), where.cumsum(1) * where
    there = [at == t for t in range(1, int(at.max()) + 1)]
    there = [w for w in there if w.sum() >= len(where) // 4]    # in a quarter of the answers
    m["so_far"] = [float(ratio[w].abs().mean()) for w in there]
    # of whole answers, less noisy than the mean of log mu(y) - log pi(y), which is m["seq_kl"]
    m["seq_kl_k3"] = float((torch.expm1(ratio[:, -1]) - ratio[:, -1]).mean())
    if scatter:
        some = torch.randperm(int(where.sum()), generator=torch.Generator().manual_seed(0))[:700]
        mu, pi = (p.double().exp()[where][some.to(p.device)] for p in (rollout.logp, logp))
        m["scatter"] = [mu.tolist(), (pi - mu).tolist()]
    return m


def make(lab):
    n, group, runs = lab.pick(256, 16, 256), lab.pick(8, 4, 8), []
    for seed in range(lab.seeds):
        base = lab.base(seed, lab.pick(TRAINED, None, None))
        cases = dict(trained=trained(base, seed, n, group),
                     random=random(lab.device(), seed, n // 4, group, *lab.pick(*SHAPES)))
        for name, case in cases.items():
            of = {mode: measure(*out, seed == 0 and mode in COLORS)
                  for mode, *out in passes(case, MODES, (seed, 21))}
            for a, b in RATIOS:
                of[f"{a} over {b}"] = {k: of[a][k] / (of[b][k] or math.nan) for k in KEYS[:4]}
            about = dict(seed=seed, config=dataclasses.asdict(case[-1]))
            runs += [dict(name=f"{name} {mode}", **about, **m) for mode, m in of.items()]
            print(f"seed {seed}, {name} model: done", flush=True)
    table = over_seeds(runs, KEYS)
    show({name: {k: s and s["mean"] for k, s in found.items()} | {"sd of KL": found["kl_k3"]["sd"]}
          for name, found in table.items()})
    return dict(table=table), runs


def draw(plt, result, runs):
    fig, axes = plt.subplots(2, 3, figsize=(13, 7.6))
    for row, name in zip(axes, ("trained", "random")):
        draw_model(row, name, result["table"], runs)
    return fig


def draw_model(axes, name, table, runs):
    left, middle, right = axes
    for p, color in COLORS.items():
        rs = [r for r in runs if r["name"] == f"{name} {p}"]
        left.plot(*rs[0]["scatter"], ".", ms=2, color=color, label=p, zorder=-len(left.lines))
        band(middle, [r["so_far"] for r in rs], color, p)

    def kl(rollout, train):
        return table[f"{name} {rollout}/{train}"]["kl_k3"]
    heat(right, FORMATS, FORMATS, lambda a, b: np.log10(kl(a, b)["mean"] + 1e-17),
         lambda a, b: "{mean:.1e}\n{min:.0e} to {max:.0e}".format(**kl(a, b)), cmap="YlOrRd")
    left.set(title=f"{name} model: tokens", xlabel="mu, as sampled", ylabel="pi - mu")
    left.set_yscale("symlog", linthresh=1e-5)
    middle.set(title="|log pi(y) / mu(y)| up to a token", xlabel="tokens of the answer",
               ylabel="nats, mean over answers", yscale="log")
    right.set(title="KL(mu || pi) a token, mean and range", xlabel="train", ylabel="rollout")
    left.legend(title="rollout / train", markerscale=2)
    middle.legend(title="rollout / train")


def main(argv=None):
    lab = Lab("mismatch", __doc__, argv)
    lab.present(lambda: make(lab), draw)


if __name__ == "__main__":
    run_main(main)
