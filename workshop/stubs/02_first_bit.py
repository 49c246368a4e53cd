"""Exercise 2: where the first bit differs. The page is workshop/pages/02_first_bit.md"""
import torch  # noqa: F401

# Before you look: which operator is the first whose results differ between rollout and training?
# One of: embedding, norm, qkv product, rope, attention, out product, residual sum, gate product,
# swiglu, down product
PREDICTION = ""

# After python -m experiments.explain: the first operator whose column "rounded" is not 0, written
# as "blocks.1.mlp, swiglu"
FIRST_FP16 = ""
FIRST_BF16 = ""


def gap(logp_rollout, logp_train, mask):
    """Both FP32 (R, T), mask bool (R, T), True where a token was sampled. -> the mean of
    |log mu - log pi| over the sampled tokens, nats."""
    return 0.0                                                  # your code in place of this line


def kl(logp_rollout, logp_train, mask):
    """-> KL[mu || pi] per token, nats, by the estimator k3: the mean of exp(-d) - 1 + d over the
    sampled tokens, with d = log mu - log pi. d can be 1e-6: how many digits has exp(-d) - 1 then?"""
    return 0.0                                                  # your code in place of this line


def slope(bits, values):
    """Two lists of numbers -> the slope of the least-squares line through log2(value) against
    bits."""
    return 0.0                                                  # your code in place of this line


# Then: one bit more divides the gap by what, and the KL by what? Whole numbers.
GAP_BY = None
KL_BY = None
