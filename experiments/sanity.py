"""The paper's sanity test, algorithm by algorithm: which of them survive which mismatch?

    python -m experiments.sanity
    python -m experiments.sanity --modes fp32/e8m2 e8m2      # training in e8m2

Every problem of the set can be solved and none is trivial, so a sound algorithm comes near 100 %
(arXiv 2510.26788, section 4.2). In the paper BF16 collapses with GRPO and token-TIS, is slow with
sequence-level corrections, and FP16 is stable with all. Its two engines disagree in BF16 by a KL of
about 1e-3 nats a token, in FP16 by 1e-5. Here one forward code does both and models are small, so
BF16 disagrees with itself by far less. So two more pairs: e8m5/fp32 and e8m2/fp32, three mantissa
bits apart like FP16 and BF16, with KLs a token below and far above the paper's BF16.
"""
from experiments.grid import grid, other_modes
from experiments.lab import Lab
from run.console import run_main

# as the paper names them. GRPO is the paper's own baseline: the ratio forgets the sampler.
ALGORITHMS = {
    "GRPO": "--algo dr-grpo --old-policy recomputed",
    "GRPO-Token-TIS": "--algo grpo-token-tis",
    "GRPO-Seq-MIS": "--algo grpo-seq-mis",
    "GSPO": "--algo gspo --old-policy recomputed",
    "PG-Seq-IS": "--algo pg-seq-is",
    "GRPO, ratio to the rollout": "--algo dr-grpo",
}


def main(argv=None):
    lab = Lab("sanity", __doc__, argv, seeds=5, add=other_modes)
    modes = lab.args.modes or ("fp16", "bf16", "e8m5/fp32", "e8m2/fp32")
    others = [(algorithm, "GRPO") for algorithm in ALGORITHMS if algorithm != "GRPO"]
    grid(lab, ALGORITHMS, modes, compare=[*zip(modes[::2], modes[1::2]), *others])


if __name__ == "__main__":
    run_main(main)
