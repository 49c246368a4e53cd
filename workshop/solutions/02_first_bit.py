import numpy as np
import torch

PREDICTION = "qkv product"      # the first product: its sums are in another order for other shapes
FIRST_FP16 = "blocks.0.attention, qkv product"          # what `explain` says may differ on your
FIRST_BF16 = "blocks.0.attention, attention"            # machine


def gap(logp_rollout, logp_train, mask):
    return (logp_rollout - logp_train)[mask].abs().mean()


def kl(logp_rollout, logp_train, mask):
    d = (logp_rollout - logp_train)[mask].double()              # FP32 has no digits left at 1e-6
    return (torch.expm1(-d) + d).mean()


def slope(bits, values):
    return np.polyfit(bits, np.log2(values), 1)[0]


GAP_BY = 2                      # half the spacing, half the error
KL_BY = 4                       # the KL of two close policies grows with the square of their gap
