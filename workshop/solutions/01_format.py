import torch


def round_to_format(x, exp, man):
    bias = 2 ** (exp - 1) - 1
    x = x.double()                                              # room for what is divided
    exponent = torch.frexp(x).exponent - 1                      # 2^exponent <= |x| < 2^(exponent+1)
    exponent = exponent.clamp(min=1 - bias)                     # subnormals: no finer than here
    spacing = torch.ldexp(torch.ones_like(x), exponent - man)
    y = torch.round(x / spacing) * spacing                      # torch.round: ties to even
    largest = 2.0 ** bias * (2 - 2.0 ** -man)
    y = torch.where(y.abs() > largest, torch.copysign(torch.tensor(torch.inf).double(), x), y)
    return torch.where(x.isfinite(), y, x).float()


SUM_FP16 = 0.2998046875         # 0.0999755859375 + 0.199951171875 lies on a border: to the even one
SUM_BF16 = 0.30078125
