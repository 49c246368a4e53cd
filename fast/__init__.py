"""fast/: what makes the program quick and nothing else. The four files at the top are complete without it.

    cpu.c, cpu.py    the operators of precision.py for a CPU, compiled here with the C compiler at hand
    graph.py         one decoding step as a CUDA graph

`numerics` is where the rest of the program comes in. Left out: kernels for a GPU. There, torch's own are used.
"""
import functools
import os

import torch

from data import CACHE
from precision import ExactNumerics, Numerics


@functools.cache
def library():
    """(the compiled cpu.c, "") or (None, why there is none). Compiled on first use, kept in .cache/."""
    if os.environ.get("TENBIT_FAST") == "0":
        return None, "switched off by TENBIT_FAST=0"
    from fast.cpu import build, keep_memory
    lib, why = build(CACHE)
    if lib:
        keep_memory()
    return lib, why


def numerics(fmt, device="cpu", fast=True, exact=False):
    """Numerics of this format on this device, with compiled operators where there are some. exact: rollout and training agree
    bit for bit."""
    if fast and torch.device(device).type == "cpu" and library()[0]:
        from fast.cpu import CPUNumerics
        return CPUNumerics(fmt, library()[0], exact)
    return (ExactNumerics if exact else Numerics)(fmt, device)
