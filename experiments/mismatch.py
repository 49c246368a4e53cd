"""How far apart are the policy that acts and the policy that learns? Every pair of formats, without any RL.

    python -m experiments.mismatch

The paper's offline test (arXiv 2510.26788, section 3): the same weights answer in one format and are scored in another. On
R1-Distill-1.5B with two engines it finds a sequence KL of 7.64 in BF16 and 0.32 in FP16, 24 times less, and a log-ratio that
falls by 1.01 and 0.07 nats per 1,000 tokens. Here the same forward code does both, in three formats, for two models: the base
of an addition task of 4 digits (41 tokens of working), and one with random weights, deeper and wider, whose every token is
uncertain. FP16 exact stands beside them: the zero. Writes results/mismatch.json and .png.
"""
import dataclasses
import sys

import numpy as np
import torch

from data import draw_problems, stream
from data.tasks import make_task
from data.tokenizer import encode
from experiments.lab import GPU, Lab, spread
from model import GPT, GPTConfig
from operators import numerics
from operators.device import pick_device
from run.base import get_base
from run.console import run_main
from run.meter import mismatch
from sample import Sampler
from train_rl import Batch, parse_config, score

FORMATS = ("fp32", "bf16", "fp16")
TRAINED = "--digits 4 --noise 0.1 --base-steps 500 --base-batch 64".split()
QUICK = "--digits 1 --noise 0.3 --n-layers 2 --width 64 --base-steps 300 --base-batch 64 --base-lr 4e-3".split()


def trained(lab, seed, size, n):
    """A base model -> (model, n prompts, tokens to sample, stop token, settings)."""
    cfg = parse_config([*lab.device(), *size, "--seed", str(seed)])[0]
    device, task = pick_device(cfg.device), make_task(cfg.task, cfg.digits, cfg.noise)
    prompts = [encode(p.prompt) for p in draw_problems(task, n, stream(seed, 20))]
    return get_base(cfg, device), prompts, task.answer_length, 256, cfg


def random(lab, seed):
    """The same of a model with random weights, that never stops."""
    cfg = parse_config([*lab.device(), "--micro-batch", "16"])[0]
    layers, width, new = lab.pick((8, 256, 128), (3, 64, 16), (24, 1024, 1024))
    model = GPT(GPTConfig(vocab_size=258, n_layers=layers, width=width, n_heads=8, n_kv_heads=4, mlp_width=3 * width,
                          context=16 + new), pick_device(cfg.device), seed)
    with torch.no_grad():                                       # less uncertain than at birth
        model.head *= 4
    return model, np.random.default_rng(seed).integers(0, 256, (lab.pick(64, 4, 64), 16)).tolist(), new, -1, cfg


def models(lab, seed):
    size = lab.pick(TRAINED, QUICK, GPU)
    yield "trained on the task", trained(lab, seed, size, lab.pick(256, 16, 256))
    yield "random, deeper and wider", random(lab, seed)


def measure(model, prompts, new, stop, cfg, seed, group):
    """(rollout, train) -> metrics of precision.mismatch, the cumulated log-ratio against position, and its slope."""
    device, out = model.embedding.device, {}
    pairs = [(a, b, False) for a in FORMATS for b in FORMATS] + [("fp16", "fp16", True)]
    for rollout_format in dict.fromkeys((a, e) for a, _, e in pairs):
        fmt, exact = rollout_format
        num = numerics(fmt, device, cfg.fast, exact).hold(model.parameters())
        rollout = Sampler(model.use(num), stop=stop, fast=cfg.fast).generate(prompts, group, new, seed=(seed, 21))
        for b in [b for a, b, e in pairs if (a, e) == rollout_format]:
            train = num if b == fmt else numerics(b, device, cfg.fast, exact).hold(model.parameters())
            logp = score(model.use(train), Batch(rollout), cfg)
            where, lengths = rollout.is_answer, rollout.length - rollout.prompt_length
            m = mismatch(rollout.logp[where], logp[where], lengths)
            ratio = ((logp - rollout.logp).double() * where).cumsum(1)                       # log pi - log mu, so far
            at = torch.arange(where.shape[1], device=device) - rollout.prompt_length[:, None] + 1
            there = [where & (at == t) for t in range(1, int(lengths.max()) + 1)]
            there = [w for w in there if w.sum() >= len(where) // 4]
            line, size = ([float(x[w].mean()) for w in there] for x in (ratio, ratio.abs()))
            x = np.arange(1, len(line) + 1)
            total = (rollout.logp - logp).double().mul(where).sum(1)                          # log mu(y) - log pi(y)
            m["seq_kl_k3"] = float((torch.expm1(-total) + total).mean())                      # less noisy than its mean, seq_kl
            m |= dict(tokens=int(where.sum()), cumulated=line, cumulated_size=size,
                      per_1000=1000 * float(np.sum(x * line) / np.sum(x * x)))          # least squares through the origin
            if seed == 0:
                pick = torch.randperm(int(where.sum()), generator=torch.Generator().manual_seed(0))[:1500].to(device)
                m["scatter"] = [[float(f"{v:.7g}") for v in x[where][pick].exp().tolist()]
                                for x in (rollout.logp, logp)]
            out[f"{fmt}/{b}" + (" exact" if exact else "")] = m
    return out


def main(argv=None):
    lab = Lab("mismatch", __doc__, argv)
    group, result = lab.pick(8, 4, 8), {}
    for seed in range(lab.seeds):
        for name, case in models(lab, seed):
            for pair, m in measure(*case, seed, group).items():
                result.setdefault(name, {}).setdefault(pair, []).append(m)
            print(f"seed {seed}, {name}: {result[name]['fp16/fp16'][-1]['tokens']} tokens a pair", flush=True)
    keys = ("logp_gap_mean", "prob_gap_mean", "kl_k3", "seq_kl_k3", "per_1000", "exact_share")
    table = {name: {p: {k: spread_e([m[k] for m in ms]) for k in keys} for p, ms in pairs.items()}
             for name, pairs in result.items()}
    ratios = {}
    for name, pairs in table.items():
        print(f"\n{name}; mean over {lab.seeds} seeds\n"
              "rollout/train     mean gap  prob gap  KL a token  sequence KL  nats/1,000 tokens   exact")
        for p, s in pairs.items():
            print(f"{p:16} " + " ".join(f"{s[k]['mean']:{w}.1e}" for k, w in zip(keys, (9, 9, 11, 12, 18))) +
                  f" {s['exact_share']['mean']:7.1%}")
        of = {k: {p: np.array([m[k] for m in ms]) for p, ms in result[name].items()} for k in keys}
        pairs = ("bf16/bf16", "fp16/fp16"), ("bf16/fp32", "fp16/fp32"), ("bf16/fp16", "fp16/fp16")
        ratios[name] = {f"{a} over {b}": {k: spread(of[k][a] / of[k][b]) for k in ("logp_gap_mean", "kl_k3", "seq_kl_k3")}
                        for a, b in pairs}
        for k, r in ratios[name].items():
            print(f"{k}: " + ", ".join(f"{what} {r[x]['mean']:.1f} times (sd {r[x]['sd'] or 0:.1f})" for what, x in (
                ("sequence KL", "seq_kl_k3"), ("KL a token", "kl_k3"), ("mean gap", "logp_gap_mean"))))
    cfg = trained(lab, 0, lab.pick(TRAINED, QUICK, GPU), 1)[-1]
    lab.save(dict(table=table, ratios=ratios, seeds=result), config=dataclasses.asdict(cfg))
    draw(lab, result)


def spread_e(x):
    """Mean and standard deviation, without rounding small numbers away."""
    return dict(mean=float(np.mean(x)), sd=float(np.std(x, ddof=1)) if len(x) > 1 else None)


def draw(lab, result):
    plot = lab.figure(2, 3, (13, 7.6))
    if not plot:
        return
    fig, axes = plot
    colors = {"bf16/bf16": "C3", "fp16/fp16": "C0", "bf16/fp32": "C1", "fp16/fp32": "C2"}
    for row, (name, pairs) in zip(axes, result.items()):
        for p, c in list(colors.items())[::-1]:
            mu, pi = pairs[p][0]["scatter"]
            row[0].plot(mu, np.subtract(pi, mu), ".", ms=2, color=c, label=p)
        row[0].set(title=f"{name}: token probabilities", xlabel="mu, the rollout's", ylabel="pi - mu", yscale="symlog")
        row[0].set_yscale("symlog", linthresh=1e-5)
        for p, c in colors.items():
            n = min(len(m["cumulated_size"]) for m in pairs[p])
            y = np.maximum([m["cumulated_size"][:n] for m in pairs[p]], 1e-9)
            row[1].plot(range(1, n + 1), y.mean(0), color=c, label=p)
            row[1].fill_between(range(1, n + 1), y.min(0), y.max(0), color=c, alpha=0.12, lw=0)
        row[1].set(title="|log pi(y) / mu(y)| up to a token", xlabel="tokens of the answer", ylabel="nats, mean over answers",
                   yscale="log")
        names = [p for p in pairs if "exact" not in p and p != "fp32/fp32"]
        value = [np.mean([m["kl_k3"] for m in pairs[p]]) for p in names]
        low = [min(m["kl_k3"] for m in pairs[p]) for p in names]
        high = [max(m["kl_k3"] for m in pairs[p]) for p in names]
        row[2].errorbar(value, range(len(names)), xerr=[np.subtract(value, low), np.subtract(high, value)], fmt="o", capsize=3)
        row[2].set(title="KL(mu || pi) per token", xlabel="nats (mean and range over seeds)", xscale="log",
                   yticks=range(len(names)), yticklabels=names)
        for ax in row[:2]:
            ax.legend(fontsize=8, title="rollout / train", title_fontsize=8, markerscale=4)
    lab.draw(fig)


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
