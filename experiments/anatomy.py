"""Where do the numbers of one training step lie, and which formats reach them?

    python -m experiments.anatomy

One RL step of the default job in FP32; every weight, activation and gradient that a half-precision
run would round is looked at through Numerics.spy, and sorted by how each format would treat it.
"""
import numpy as np
import torch

from algorithms import centred
from data import draw_problems, stream
from experiments.command import show
from model import GPT
from precision import Numerics, make_scaler, parse_format
from run.base import find_base, gpt_config, load_task
from run.console import run_main
from sample import Sampler
from train_rl import Batch, Config, collect, learn

SHOWN = "fp32", "tf32", "bf16", "fp16", "e5m2", "e4m3"
LANDED = SHOWN[2:]                      # fp32 and tf32 have the range of bf16


def one_step(model, env, cfg, seed=0, scale=1.0):
    """The numbers of one update in FP32: magnitudes of "forward" activations, and of "backward"
    gradients of the loss times `scale`."""
    device, seen = model.embedding.device, dict(forward=[], backward=[])
    num = Numerics("fp32", device).hold(model.parameters())
    problems = draw_problems(env.task, cfg.prompts, stream(seed, 40))
    rollout, rewards = collect(Sampler(model.use(num)), env, problems, cfg, (seed, 41))
    if rewards.std() == 0:                          # an untrained model is never right: pretend
        rewards = (torch.arange(rewards.numel(), device=device) % 2).float().view_as(rewards)
    num.spy = lambda kind, where, x, raw: seen[kind].append(x.abs().flatten().clone())
    rows = torch.arange(len(rollout.length), device=device).chunk(cfg.updates_per_batch)[0]
    learn(model, Batch(rollout, advantage=centred(rewards).flatten()), cfg,
          make_scaler(Numerics("fp16", device), scale), env.answer_length, rows=rows)
    return {kind: torch.cat(x) for kind, x in seen.items()}


def bits_and_range():
    print("Formats: 1 sign bit, the exponent sets the range, the mantissa the resolution")
    formats = {name: parse_format(name) for name in SHOWN}
    show({name: {"exponent": f.exp, "mantissa": f.man, "largest": f"{f.max:.5g}",
                 "spacing at 1": f.eps, "normal from": f.tiny, "smallest": f.smallest,
                 "loss scale": "yes" if f.needs_loss_scaling else "no"}
          for name, f in formats.items()})


def landing(x, f):
    """What format f makes of numbers x > 0: shares lost, coarse, fine, inf."""
    counts = [x <= f.smallest / 2, x < f.tiny, x <= f.max, x > 0]
    reached = [float(c.float().mean()) for c in counts]
    return dict(zip(("lost", "coarse", "fine", "inf"), np.diff([0, *reached])))


def where_they_lie():
    cfg = Config(preset="cpu", prompts=4, micro_batch=64)
    env, found = load_task(cfg), find_base(cfg, torch.device("cpu"))[0]
    model = found or GPT(gpt_config(cfg, env))
    plain = one_step(model, env, cfg)
    scaled = one_step(model, env, cfg, scale=2.0 ** 16)
    kinds = {"weights": torch.cat([p.detach().abs().flatten() for p in model.parameters()]),
             "activations": plain["forward"], "gradients": plain["backward"],
             "gradients * 2^16": scaled["backward"]}
    kinds = {kind: x[x > 0] for kind, x in kinds.items()}
    print("\nOne RL step of the default job, "
          f"{'cached base model' if found else 'random weights (no base in the cache yet)'}. Zeros "
          "are left out.\nlost: rounds to 0 | coarse: subnormal, fewer bits than promised | fine | "
          "inf: beyond the largest")
    show({kind: dict(smallest=float(x.min()), median=float(x.median()), largest=float(x.max()))
          for kind, x in kinds.items()})
    for name in LANDED:
        show({kind: {word: f"{share:.1%}" for word, share in landing(x, parse_format(name)).items()}
              for kind, x in kinds.items()}, name)
    shares = [landing(x, parse_format("fp16")) for x in kinds.values()]
    w, a, g, s = (f"{share['coarse'] + share['fine']:.1%}" for share in shares)
    print(f"""
FP16 represents {w} of the weights and {a} of the activations: what BF16's three more
exponent bits could add there is the rest, and the three mantissa bits that it lacks are missed in
every product. Of the gradients FP16 reaches {g}, and {s} once the loss is multiplied by 2^16:
that is all that loss scaling is.""")


def main():
    bits_and_range()
    where_they_lie()


if __name__ == "__main__":
    run_main(main)
