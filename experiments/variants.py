"""The paper's further runs (section 5) at toy scale: LoRA and experts, in BF16 and in FP16.

    python -m experiments.variants

In the paper a LoRA run in BF16 collapses after 600 steps, and a MoE of 30 B parameters is less
stable in BF16 than in FP16. Here: all weights trained, LoRA of rank 1 and 32 upon the same base,
and a base of 8 experts, of which a token goes to 2. Each in FP16 and in BF16 on both sides, and
with training in BF16 or e8m2 against FP32 rollouts, the mismatch of two engines; the experts also
with the rollout's routes replayed. "Routes differ": how often training would choose other experts.
"""
from experiments.grid import grid
from experiments.lab import Lab
from run.console import run_main

VARIANTS = {
    "all weights": "",
    "LoRA, rank 1": "--lora-rank 1 --lr 3e-3",
    "LoRA, rank 32": "--lora-rank 32 --lr 3e-4",
    "8 experts": "--n-experts 8",
    "8 experts, replayed": "--n-experts 8 --replay-routing",
}
MODES = "fp16", "bf16", "fp32/bf16", "fp32/e8m2"


def main(argv=None):
    grid(Lab("variants", __doc__, argv), VARIANTS, MODES, "--old-policy recomputed --steps 80",
         compare=[*(("fp16", m) for m in MODES[1:]), ("8 experts, replayed", "8 experts")],
         curves=("accuracy", "kl_k3"))


if __name__ == "__main__":
    run_main(main)
