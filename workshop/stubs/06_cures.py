"""Exercise 6: mismatch and its cures. The page is workshop/pages/06_cures.md"""
import torch


def weight(logp, logp_rollout):
    """log pi and log mu of sampled tokens, FP32 (R, T) -> what each token's loss is multiplied by, in
    the run "token-tis": pi / mu, but at most 2."""
    return torch.ones_like(logp)                                # your code in place of this line


# Flags of train_rl.py for four runs. The first is given; each of the others changes one thing.
ARMS = {
    # FP32 on both sides. --old-policy recomputed: the ratio is pi / pi_old, and mu is forgotten
    "fp32": "--precision fp32 --old-policy recomputed",
    # training in e8m2, two bits after the point; the rollout stays in FP32
    "mismatch": "--precision fp32 --old-policy recomputed",
    # as mismatch, and each token is weighed: --correction
    "token-tis": "--precision fp32 --old-policy recomputed",
    # e8m2 on both sides
    "matched": "--precision fp32 --old-policy recomputed",
}

# After python -m workshop run 6: which of them collapsed? Rule: the accuracy of the last ten steps
# is 0.2 or more below that of the best ten.
COLLAPSED = []

# Why do matched formats help? A letter.
#   a  two mantissa bits are enough to hold every gradient
#   b  the rollout's noise makes the policy explore
#   c  the policy that acts is the policy that learns: the gradient is that of what was sampled
#   d  FP32 on the rollout's side was too slow to keep up
MATCHED = ""
