"""Exercise 7: exactness. The page is workshop/pages/07_exact.md"""
import torch  # noqa: F401

from operators.exact import ExactNumerics
from precision import Numerics  # noqa: F401

# Three numbers a, b, c for which (a + b) + c is not a + (b + c) in FP32
NUMBERS = (0.0, 0.0, 0.0)


def pair_sum(x):
    """x FP32 (R, N) -> the sums of the rows (R,), FP32, in one fixed order whatever R is: neighbors
    are added (0 and 1, 2 and 3, ...), then the neighbors of what came out, until one number is left.
    An odd one at the end goes on as it is. Only elementwise additions; no torch.sum."""
    return x[:, 0]                                              # your code in place of this line


class Mine(ExactNumerics):
    """Exact mode with one operator turned back, such as: swiglu = Numerics.swiglu. There are product,
    logits, log_softmax, rms_norm, swiglu, attention."""


# On what does the order of a plain operator's sums depend? A letter.
#   a  the number format
#   b  the shape of the whole call: how many rows there are at once
#   c  the numbers that are added
#   d  how busy the machine is
ORDER = ""

# The folder of a run with --exact --precision bf16, such as python -m workshop run 7 makes
RUN = ""
