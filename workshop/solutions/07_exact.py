import torch

from operators.exact import ExactNumerics
from precision import Numerics

NUMBERS = (1e8, -1e8, 1.0)      # 1 is lost beside 1e8, whose neighbor is 8 away


def pair_sum(x):
    while x.shape[1] > 1:
        n = x.shape[1] // 2 * 2
        x = torch.cat((x[:, 0:n:2] + x[:, 1:n:2], x[:, n:]), 1)
    return x[:, 0]


class Mine(ExactNumerics):
    attention = Numerics.attention


ORDER = "b"
RUN = "out/workshop/07-exact"
