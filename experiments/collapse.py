"""The open question: what is the smallest setting in which BF16 collapses and FP16 does not?

    python -m experiments.collapse
    python -m experiments.collapse --modes fp32/e8m5 fp32/e8m4 fp32/e8m3     # with fewer bits

In the paper BF16 collapses after 150 to 1,200 steps with answers of thousands of tokens. Here what
should bring it about at a small size is turned up, one thing at a time, with BF16 and FP16 on both
sides, and with training in either against FP32 rollouts (training is where a coarse format does
harm: experiments.precision_grid). The rule, in LOG.md before the runs: a setting is a candidate
when BF16 collapses in more seeds than its FP16 twin. With `--seeds 5` it is the answer if at least
4 of 5 BF16 runs collapse and no FP16 run does.
"""
from experiments.grid import grid, other_modes, title
from experiments.lab import Lab
from run.console import run_main

SETTINGS = {
    "learning rate x 3": "--steps 60 --lr 3e-4",
    "learning rate x 10": "--steps 60 --lr 1e-3",
    "16 updates a batch": "--steps 40 --updates-per-batch 16",
    "250 steps, lr x 3": "--steps 250 --lr 3e-4",
    "standardised, lr x 3": "--algo grpo --lr 3e-4",         # largest where nearly all is solved
    "4 digits, 41 tokens": "--digits 4 --noise 0.1 --base-steps 1200 --steps 60",
    "6 digits, 60 tokens": "--digits 6 --noise 0.06 --base-steps 2000 --steps 60",
    "12 layers": "--n-layers 12 --base-lr 2e-3 --steps 60",
    "hard problems (5 to 40 %)": "--noise 0.5 --pool 512 --keep 0.05 0.4 --lr 3e-4",
    "temperature 1.5": "--temperature 1.5",
}
MODES = "fp16", "bf16", "fp32/fp16", "fp32/bf16"


def candidates(records, summary):
    found = []
    for s in SETTINGS:
        for fp16, bf16 in (MODES[:2], MODES[2:]):
            fine, coarse = (summary.get(title(s, m), {}).get("collapsed") for m in (fp16, bf16))
            if None not in (fine, coarse) and coarse > fine:
                found.append(f"{s}: {bf16} collapsed {coarse} times, {fp16} {fine} times")
    print("candidates: " + ("; ".join(found) or "none"))
    return dict(candidates=found)


def main(argv=None):
    lab = Lab("collapse", __doc__, argv, add=other_modes)
    grid(lab, SETTINGS, lab.args.modes or MODES, "--old-policy recomputed", also=candidates)


if __name__ == "__main__":
    run_main(main)
