"""Every pair of formats: what the rollout rounds to, and what training rounds to.

    python -m experiments.precision_grid

In the paper (arXiv 2510.26788, section 4.4) BF16 on both sides collapses, BF16 training with FP32
rollouts is stable but three times slower, FP16 on both sides is best. Here GRPO with a ratio that
forgets the sampler (the paper's baseline) runs with each of four formats on either side; e8m2 is so
coarse that something happens within 100 steps. Times are of emulated formats on a CPU, where FP32
is no slower than FP16.
"""
from experiments.grid import grid
from experiments.lab import Lab
from run.console import run_main

FORMATS = "fp32", "fp16", "bf16", "e8m2"
PAIRS = [f"{rollout}/{train}" for rollout in FORMATS for train in FORMATS]


def main(argv=None):
    grid(Lab("precision_grid", __doc__, argv), modes=PAIRS, flags="--old-policy recomputed",
         compare=[(p, "fp16/fp16") for p in PAIRS if p != "fp16/fp16"],
         panels={f"rollout {p.replace('/', ', train ')}": [p] for p in PAIRS})


if __name__ == "__main__":
    run_main(main)
