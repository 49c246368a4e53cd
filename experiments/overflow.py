"""FP16 ends at 65,504. What happens to runs that are driven over that edge?

    python -m experiments.overflow

Overflow of gradients is ordinary: a loss scale of 2^32 makes gradients inf, the scaler skips the
update and halves the scale until they fit. Overflow of the forward pass has no such cure. It is
brought about without changing what the model says: norms make a model blind to the size of its
residual stream, so all that is added to the stream is multiplied by 2^k. (12,712 is reported of
Qwen2.5 as it is.) A format of three exponent bits, and a learning rate that blows up the weights,
do it in other ways. The program must not go on silently: it stops and names the layer.
"""
import dataclasses

import torch

from data import draw_problems, stream
from data.tokenizer import encode
from experiments.grid import grid
from experiments.lab import Lab
from operators import numerics
from precision import parse_format
from run.base import find_base
from run.checkpoint import save_checkpoint
from run.console import run_main

CASES = {
    "fp16": "--precision fp16",
    "fp16, first scale 2^32": f"--precision fp16 --init-scale {2 ** 32}",
    "fp16, residual stream x 2^8": "--precision fp16",
    "bf16, residual stream x 2^16": "--precision bf16",
    "fp16, training in e3m10": "--precision e3m10 --rollout-precision fp16",
    "fp16, learning rate 0.3": "--precision fp16 --lr 0.3",
    "fp16, residual stream x 2^16": "--precision fp16",
}


def grown(lab, seed, k):
    """A cache of its own with the same base model, its residual stream 2^k times as large -> its
    path, the largest activation."""
    (cfg, env, model), cache = lab.base(seed), lab.folder / f"x{k}-seed{seed}"
    device = model.embedding.device
    path = find_base(cfg, device, env)[1]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == "embedding" or name.endswith((".proj", ".down")):
                p *= 2.0 ** k
    save_checkpoint(cache / path.parent.name / path.name, model,
                    config=dataclasses.asdict(model.cfg))
    num, largest = numerics("fp32", device), []
    num.spy = lambda kind, where, x, raw: largest.append(float(x.abs().max()))
    prompt = encode(draw_problems(env.task, 1, stream(0))[0].prompt)
    with torch.no_grad():
        model.use(num.hold(model.parameters()))(torch.tensor([prompt], device=device))
    return cache, max(largest)


def main(argv=None):
    lab, largest = Lab("overflow", __doc__, argv), {}

    def grow(job):
        if "stream x" not in job.name:
            return job
        k = int(job.name.rpartition("^")[2])
        cache, largest[k] = grown(lab, job.seed, k)
        return dataclasses.replace(job, env=(("TENBIT_CACHE", str(cache)),))

    def told(records, summary):
        messages = {r["name"]: r["failed"] for r in records if "failed" in r}
        for name, text in messages.items():
            print(f"{name}: {text}")
        for k, x in largest.items():
            print(f"residual stream x 2^{k}: largest activation of a prompt {x:.3g}, of "
                  f"{parse_format('fp16').max:.0f}")
        return dict(largest_activation=largest, messages=messages)
    grid(lab, CASES, flags="--steps 60", change=grow, also=told, curves=("loss_scale", "accuracy"))


if __name__ == "__main__":
    run_main(main)
