"""Where do the numbers of one training step lie, and which formats reach them?

    python -m experiments.anatomy

One RL step of the default job, rollout and all, in FP32; every weight, activation and gradient that a half-precision run
would round is looked at through Numerics.spy, and sorted by how each format would treat it.
"""
import dataclasses

import torch

from algorithms import centred
from data import draw_problems, stream
from model import GPT
from precision import Numerics, make_scaler, parse_format
from run.base import find_base, gpt_config, load_task
from sample import Sampler
from train_rl import Batch, Config, collect, learn

SHOWN = ("fp32", "tf32", "bf16", "fp16", "e5m2", "e4m3")
LANDED = SHOWN[2:]                      # fp32 and tf32 have the range of bf16


def bits_and_range():
    print("Formats: 1 sign bit, the exponent sets the range, the mantissa the resolution\n")
    print(
        f"{'name':6} {'exp':>4} {'man':>4} {'largest':>10} {'spacing at 1':>13} {'smallest normal':>16} "
        f"{'smallest subnormal':>19}  loss scale"
    )
    for name in SHOWN:
        f = parse_format(name)
        largest = f"{f.max:.5g}" if f.max > 1e5 else f"{f.max:g}"
        print(
            f"{name:6} {f.exp:4} {f.man:4} {largest:>10} {f.eps:13.3g} {f.tiny:16.3g} {f.smallest:19.3g}  "
            f"{'yes' if f.needs_loss_scaling else 'no'}"
        )


def collect_step(scale):
    """Every number of one step, magnitudes in FP32 vectors under "weights", "activations" and "gradients" (of loss * scale)."""
    cfg = Config(preset="cpu", prompts=4)
    env = load_task(cfg)
    model = find_base(cfg, torch.device("cpu"))[0]
    trained = model is not None
    model = model or GPT(gpt_config(cfg, env))
    model.use(Numerics("fp32").hold(model.parameters()))
    rollout, rewards = collect(Sampler(model), env, draw_problems(env.task, cfg.prompts, stream(0)), cfg, (0, 0))
    if rewards.std() == 0:                                              # an untrained model is never right: pretend
        rewards = (torch.arange(rewards.numel()) % 2).float().view_as(rewards)
    seen = {"forward": [], "backward": []}
    model.num.spy = lambda kind, where, x, raw: seen[kind].append(x.abs().flatten().clone())
    scaler = make_scaler(Numerics("fp16"), scale)
    batch = Batch(rollout, advantage=centred(rewards).flatten())
    learn(model, batch, dataclasses.replace(cfg, micro_batch=64), scaler, env.answer_length)
    return {
        "weights": torch.cat([p.detach().abs().flatten() for p in model.parameters()]),
        "activations": torch.cat(seen["forward"]),
        "gradients": torch.cat(seen["backward"]),
    }, trained


def where_they_lie():
    plain, trained = collect_step(1.0)
    scaled, _ = collect_step(2.0 ** 16)
    kinds = {"weights": plain["weights"], "activations": plain["activations"], "gradients": plain["gradients"],
             "gradients * 2^16": scaled["gradients"]}
    print(
        f"\nOne RL step of the default job, {'cached base model' if trained else 'random weights (no base in the cache yet)'}. "
        "Zeros are left out.\n"
        "lost: rounds to 0 | coarse: subnormal, fewer bits than the format promises | fine | inf: beyond the largest\n"
    )
    columns = " " + " ".join(f"{word:>6}" for word in ("lost", "coarse", "fine", "inf")) + " "
    print(f"{'':18} {'smallest':>9} {'median':>9} {'largest':>9}   " + "".join(f"{name:^{len(columns)}}" for name in LANDED))
    print(f"{'':18} {'':9} {'':9} {'':9}   " + columns * len(LANDED))
    for kind, x in kinds.items():
        x = x[x > 0]
        row = f"{kind:18} {x.min():9.1e} {x.median():9.1e} {x.max():9.1e}   "
        for name in LANDED:
            f = parse_format(name)
            lost, coarse, inf = (x <= f.smallest / 2), (x < f.tiny), x > f.max
            share = [float(s.float().mean()) for s in (lost, coarse & ~lost, ~coarse & ~inf, inf)]
            row += " " + " ".join(f"{s:6.1%}" for s in share) + " "
        print(row)
    fp16 = parse_format("fp16")

    def reached(kind):
        x = kinds[kind][kinds[kind] > 0]
        return float(((x > fp16.smallest / 2) & (x <= fp16.max)).float().mean())
    w, a, g, scaled = (f"{reached(k):.1%}" for k in kinds)
    print(
        f"\nFP16 represents {w} of the weights and {a} of the activations: what BF16's three more exponent bits could add\n"
        "there is the rest, and the three mantissa bits that it lacks are missed in every product. Of the gradients FP16\n"
        f"reaches {g}, and {scaled} once the loss is multiplied by 2^16: that is all that loss scaling is."
    )


def main():
    bits_and_range()
    where_they_lie()


if __name__ == "__main__":
    main()
