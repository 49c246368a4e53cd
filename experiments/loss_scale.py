"""Why FP16 needs a loss scale, and BF16 does not: where gradients lie, and what is lost.

    python -m experiments.loss_scale

Left: exponents of all gradients of activations in one update, FP32, as they are; what FP16 cannot
hold it turns to zero. Middle: the share lost for any loss scale. Gradients shrink as 1 / (tokens of
the batch), so a job with long answers has smaller ones: the scale's axis answers "what if" too.
Right: learning in FP16 from first scales of 1 to 2^16; in tf32, which has FP16's mantissa, FP32's
exponents and no scale; and in e4m10, whose smallest number is 256 times FP16's: what FP16 would do
with batches of 256 times as many tokens.
"""
import numpy as np
import torch

from experiments.anatomy import landing, one_step
from experiments.grid import grid, panel
from experiments.lab import Lab, spread
from precision import parse_format
from run.console import run_main

LOW, HIGH = -80, 20                                             # exponents of 2 that are told apart
TF32 = "tf32, no scale"
SCALED = {f"{fmt}, scale 2^{k}": f"--precision {fmt} --init-scale {2 ** k}"
          for fmt, scales in (("fp16", (0, 4, 8, 16)), ("e4m10", (0, 10))) for k in scales}


def exponents(x):
    """How many of x are 0, then how many there are of each floor(log2 x) from LOW on."""
    e = x[x > 0].log2().floor().clamp(LOW, HIGH - 1).long() - LOW
    return [int((x == 0).sum()), *torch.bincount(e, minlength=HIGH - LOW).tolist()]


def draw(plt, result, records):
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2))
    counts, share = np.sum(result["exponents"], 0)[1:], result["lost_by_scale"]
    left.bar(np.arange(LOW, HIGH), counts / counts.sum(), 1.0, color="gray")
    middle.plot([int(k) for k in share], [s["mean"] for s in share.values()], "o-", ms=3)
    for k, color in ((0, "C3"), (16, "C1")):                    # none, and the first scale of a run
        edge = int(np.log2(parse_format("fp16").smallest)) - 1 - k
        left.axvline(edge, color=color, label=f"scale 2^{k}: left of this FP16 has zeros")
        middle.axvline(k, color=color, ls=":", label=f"scale 2^{k}")
    left.set(title="gradients of activations, FP32", xlabel="exponent of 2", ylabel="share",
             xlim=(-60, 5))
    middle.set(title="share that FP16 turns to zero", xlabel="log2 of the loss scale",
               ylabel="share of nonzero gradients")
    left.legend()
    middle.legend()
    panel(right, result["summary"], records, list(result["summary"]), "accuracy")
    return fig


def main(argv=None):
    lab = Lab("loss_scale", __doc__, argv)

    def told(records, summary):
        bases = [lab.base(seed) for seed in range(lab.seeds)]
        seen = [one_step(model, env, cfg, cfg.seed)["backward"] for cfg, env, model in bases]
        counts, nonzero = [exponents(x) for x in seen], [x[x > 0] for x in seen]
        share = {f: {k: spread([landing(x * 2.0 ** k, parse_format(f))["lost"] for x in nonzero])
                     for k in range(-24, 33, 4)} for f in ("fp16", "bf16")}
        zeros = np.sum(counts, 0)[0] / np.sum(counts)
        print(f"\n{np.sum(counts)} gradients of activations, {zeros:.1%} of them zero in FP32")
        for k in (0, 16):
            print(f"scale 2^{k}: FP16 turns {share['fp16'][k]['mean']:.2%} of the others to zero, "
                  f"BF16 {share['bf16'][k]['mean']:.2%}")
        return dict(lost_by_scale=share["fp16"], exponents=counts, lowest=LOW)
    grid(lab, {**SCALED, TF32: "--precision tf32"}, also=told, draw=draw,
         compare=[*((row, TF32) for row in SCALED), ("e4m10, scale 2^0", "e4m10, scale 2^10")])


if __name__ == "__main__":
    run_main(main)
