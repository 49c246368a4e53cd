"""Exercise 3: the policy gradient. The page is workshop/pages/03_gradient.md"""
import torch


def advantage(rewards):
    """rewards FP32 (P, G): a row is a group, the answers to one problem. -> (P, G), how much better
    each answer is than its group: its reward minus the mean of its group (Dr.GRPO)."""
    return torch.zeros_like(rewards)                            # your code in place of this line


def loss(logp, logp_old, advantage, low, high):
    """What each token adds to the loss (PPO: Schulman et al. 2017, equation 7). With the ratio
    r = pi / pi_old it is the larger of -A r and -A clip(r, 1 - low, 1 + high).

    logp (R, T): log pi of the sampled tokens, with a gradient. logp_old (R, T): log pi_old.
    advantage (R, 1): A of each answer. -> (R, T)"""
    return torch.zeros_like(logp)                               # your code in place of this line
