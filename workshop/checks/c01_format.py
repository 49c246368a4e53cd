"""Exercise 1: round to nearest even. Compared with all numbers of a format, by its definition."""
from fractions import Fraction

import numpy as np
import torch

from precision import Numerics
from workshop.ladder import JOB, call, number, require, tensor

FORMATS = {"fp16": (5, 10), "bf16": (8, 7), "e5m2": (5, 2), "e4m3": (4, 3), "e2m1": (2, 1)}


def numbers(exp, man):
    """All numbers >= 0 of the format in FP64: that of bit pattern i (sign 0) is at i. Last comes
    the place of inf, 2^(bias + 1), which is where rounding takes it to be."""
    bias, pattern = 2 ** (exp - 1) - 1, np.arange(((2 ** exp - 1) << man) + 1)
    e, m = pattern >> man, pattern & ((1 << man) - 1)
    return np.where(e == 0, np.ldexp(m.astype(float), 1 - bias - man),
                    np.ldexp(m + 2.0 ** man, e - bias - man))


def given(mine, x, exp, man):
    """What round_to_format makes of the FP64 numbers x, which FP32 can hold, as FP64."""
    x = torch.tensor(x, dtype=torch.float32)
    return tensor(mine, "round_to_format", x.shape, x, exp, man).double().numpy()


def told(x):
    return repr(float(x)).removesuffix(".0")


def first(wrong, *columns):
    """The columns' numbers at the first place that is wrong."""
    i = int(np.argmax(wrong))
    return [told(c[i]) for c in columns]


def check(mine):
    x = np.array([1.5, 0.3, 1 + 2.0 ** -12]).astype(np.float32).astype(float)
    y = given(mine, x, 5, 10)
    require((y != 0).any(), "round_to_format gave 0 for every number.")
    require((y != x).any(), "Nothing is rounded yet: 0.3 came back as it was, and FP16 has no such "
            "number.")
    v = numbers(5, 10)
    yield from normal(mine, v)
    yield from edges(mine, v)
    for name, (exp, man) in FORMATS.items():
        v = numbers(exp, man)
        middle = (v[:-1] + v[1:]) / 2
        points, truth = around(v, middle)
        y = given(mine, points, exp, man)
        wrong = y != truth
        x, got, want = first(wrong, points, y, truth)
        require(not wrong.any(), f"All is well in FP16, but in {name} {x} became {got} and not "
                f"{want}. Do you use exp and man everywhere, and no number of FP16's own?")
    yield (f"every number of {', '.join(FORMATS)}, every border between two of them and its "
           "neighbors on both sides, with both signs")
    yield from sums(mine)


def around(v, middle):
    """All numbers, all borders, and FP32's numbers just below and above a border -> those and what
    they are rounded to: the nearest, on a border the one whose bit pattern is even."""
    below, above = (np.nextafter(middle.astype(np.float32), np.float32(to)).astype(float)
                    for to in (0, np.inf))
    up = np.where(v[1:] == v[-1], np.inf, v[1:])
    even = np.where(np.arange(len(middle)) % 2, up, v[:-1])
    points = np.concatenate((v[:-1], middle, below, above))
    truth = np.concatenate((v[:-1], even, v[:-1], up))
    return np.concatenate((points, -points)), np.concatenate((truth, -truth))


def normal(mine, v):
    """FP16 from 2^-14 to 65504, without signs."""
    v = v[(v >= 2.0 ** -14) & (v < 65536)]
    y = given(mine, v, 5, 10)
    wrong = y != v
    x, got = first(wrong, v, y)
    require(not wrong.any(), f"{x} is a number of FP16 and must stay what it is; you gave {got}. "
            "Between 1 and 2 the numbers of a format lie 2^-man apart: man counts the bits after "
            "the point.")
    yield "FP16's normal numbers stay what they are"
    low, high = v[:-1], v[1:]
    for share in (0.25, 0.75):
        x = low + share * (high - low)
        y, nearest = given(mine, x, 5, 10), low if share < 0.5 else high
        ours = np.isin(y, v)
        at, got = first(~ours, x, y)
        require(ours.all(), f"{at} became {got}, which is no number of FP16: the spacing is too "
                "fine.")
        at, got, want = first(y != nearest, x, y, nearest)
        down, up = (y == low).all(), (y == high).all()
        require(not (down and share > 0.5), f"{at} became {got}, and {want} is nearer: you cut off "
                "what does not fit. Round to the nearest.")
        require(not (up and share < 0.5), f"{at} became {got}, and {want} is nearer: you always "
                "round up.")
        require((y == nearest).all(), f"{at} became {got}, and {want} is nearer.")
    yield "what lies between two numbers goes to the nearest"
    middle = (low + high) / 2
    y, odd = given(mine, middle, 5, 10), np.arange(len(low)) % 2 == 1         # v begins with an even
    ours = np.isin(y, v)
    at, got = first(~ours, middle, y)
    require(ours.all(), f"{at} lies halfway between two numbers and became {got}, which is no number "
            "of FP16: the spacing is too fine. Between 1 and 2 it is 2^-man.")
    even = np.where(odd, high, low)
    at, got, want = first(y != even, middle, y, even)
    tie = (f"{at} lies halfway between two numbers, and you gave {got}. A tie goes to the number "
           f"whose last bit is 0, here {want}")
    require(not (y == high).all(), tie + ": you send every tie away from zero.")
    require(not (y == low).all(), tie + ": you send every tie towards zero.")
    require(not (y == np.where(odd, low, high)).all(), tie + ": you send it to the odd one.")
    require((y == even).all(), tie + ".")
    yield "ties go to the even number"


def edges(mine, v):
    """Signs, subnormals, overflow, inf and NaN of FP16."""
    some = v[(v >= 2.0 ** -14) & (v < 65536)] * (1 + 2.0 ** -13)
    got, mirrored = given(mine, some, 5, 10), given(mine, -some, 5, 10)
    require(not (mirrored == got).all(), f"{told(-some[0])} became {told(mirrored[0])}: the sign is "
            "lost.")
    at, wrong = first(mirrored != -got, -some, mirrored)
    require((mirrored == -got).all(), f"{at} became {wrong}: a negative number is rounded as its "
            "mirror image.")
    yield "negative numbers"
    small = v[v < 2.0 ** -14]
    y = given(mine, small, 5, 10)
    require(y[0] == 0, f"0 became {told(y[0])} and must stay 0. Do you take a logarithm of it?")
    require(not (y[1:] == 0).all(), f"{told(small[1])}, FP16's smallest number, became 0. Below "
            "2^-14 come the subnormals: the spacing stays 2^-24 down to 0.")
    at, got = first(y != small, small, y)
    require((y == small).all(), f"{at} is a subnormal number of FP16 and must stay; you gave {got}. "
            "FP16's smallest normal number is 2^-14, that of eXmY 2^(2 - 2^(X-1)).")
    points, truth = around(v[v <= 2.0 ** -14], (small + v[1:len(small) + 1]) / 2)
    y = given(mine, points[np.abs(points) < 2.0 ** -14], 5, 10)
    truth = np.where(np.isinf(truth), np.copysign(2.0 ** -14, truth), truth)
    truth, points = truth[np.abs(points) < 2.0 ** -14], points[np.abs(points) < 2.0 ** -14]
    at, got, want = first(y != truth, points, y, truth)
    at += " (a tie)" * (float(at) % 2.0 ** -24 == 2.0 ** -25)
    finer = given(mine, np.array([2.0 ** -30]), 5, 10)[0] == 0            # else it goes on for ever
    twice = finer and (np.abs(y[y != truth]) % 2.0 ** -25 == 0).all()
    require((y == truth).all() or not twice, f"Near zero {at} became {got} and not {want}: your "
            "smallest number is 2^-25, FP16's is 2^-24. The bias of the exponent is 2^(X-1) - 1, for "
            "FP16 15.")
    require((y == truth).all(), f"Near zero {at} became {got} and not {want}: below 2^-14 the "
            "spacing no longer shrinks, it stays 2^-24.")
    yield "subnormals"
    y = given(mine, np.array([65520.0, 1e6, 1e30]), 5, 10)
    require(not (y == 65504).all(), "1e6 became 65504, FP16's largest number. What is too large "
            "becomes inf: a wrong number would go unnoticed.")
    require(np.isinf(y).all(), f"65520, 1e6 and 1e30 became {', '.join(map(told, y))}. All three "
            "are too large for FP16 and become inf.")
    y = given(mine, np.array([-65520.0, -1e30]), 5, 10)
    require((y == -np.inf).all(), f"65520 becomes inf, as it should, but -65520 became {told(y[0])} and "
            "not -inf.")
    y = given(mine, np.array([65504.0, 65519.0]), 5, 10)
    require((y == 65504).all(), f"65519 became {told(y[1])}. It is nearer to 65504, the largest "
            "number, than to 65536, where inf begins: inf is from 65520 on.")
    yield "overflow"
    y = given(mine, np.array([np.inf, -np.inf, np.nan]), 5, 10)
    require(y[0] == np.inf and y[1] == -np.inf and np.isnan(y[2]),
            f"inf, -inf and nan became {', '.join(map(told, y))}: they stay what they are.")
    yield "inf and nan"


def nearest(x, exp, man):
    """A Fraction -> the nearest number of the format, by its definition."""
    v = [Fraction(t) for t in numbers(exp, man)]
    i = min(range(len(v)), key=lambda i: (abs(v[i] - x), i % 2))
    return v[i]


def sums(mine):
    for name, exp, man in (("SUM_FP16", 5, 10), ("SUM_BF16", 8, 7)):
        a, b = (nearest(Fraction(t), exp, man) for t in (0.1, 0.2))
        truth, fmt = float(nearest(a + b, exp, man)), name[4:]
        x = number(mine, name, f"write down what 0.1 + 0.2 is in {fmt}, with all its digits.")
        steps = (f"In {fmt} 0.1 becomes {told(float(a))} and 0.2 becomes {told(float(b))}. Their sum "
                 f"is {told(float(a + b))}")
        require(x != float(a + b) or x == truth, f"{name}: {steps}, and that is no number of {fmt} "
                "yet: the result is rounded as well.")
        v = [Fraction(t) for t in numbers(exp, man)]
        tie = any(2 * (a + b) == low + high for low, high in zip(v, v[1:]))
        require(x == truth, f"{name} is {told(x)}. {steps}. " + ("That lies exactly halfway between two "
                f"numbers of {fmt}: which of them is even?" if tie else
                f"Which number of {fmt} is nearest?"))
    yield "0.1 + 0.2 is what you said, in FP16 and in BF16"


# --------------------------------------------------------------------------------------------------


def jobs(mine, flags):
    return {"01": [*JOB, "--no-fast", "--precision", "fp16", *flags]}


def install(mine):
    """Every operator rounds with it."""
    def round_(self, x):
        return call(mine, "round_to_format", x.float(), self.fmt.exp, self.fmt.man)
    Numerics.round = round_
