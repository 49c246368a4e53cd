"""operators/: the operators of precision.py by other means, held to the plain ones by tests.

    exact.py               rollout and training agree bit for bit
    compiled.py, block.c   a whole block in one call, for a CPU with a C compiler
    fused.py               norm, SwiGLU, rotation and sum as one kernel each, for a GPU
    graph.py               a decoding step as a CUDA graph
    device.py              the device, set up so that nothing is rounded elsewhere

`numerics` is where the rest of the program comes in.
"""
import os
import pathlib

import torch

from operators.code import debugger
from operators.exact import ExactNumerics
from precision import Numerics

# what is made once and kept: compiled code, base models, perfectible sets
CACHE = pathlib.Path(os.environ.get("TENBIT_CACHE")
                     or pathlib.Path(__file__).resolve().parent.parent / ".cache")


def why_plain(device, fast=True):
    """Why the plain operators are used in place of compiled ones; nothing where compiled ones
    are."""
    if not fast:
        return "not asked for"
    if torch.device(device).type == "cpu":
        from operators import compiled
        return compiled.library(CACHE)[1] or compiled.why_plain() or debugger()
    from operators import fused
    return debugger() or fused.why_plain(device)


def numerics(fmt, device="cpu", fast=True, exact=False):
    """Numerics of this format on this device, with compiled operators where there are some. exact:
    rollout and training agree bit for bit."""
    plain = (ExactNumerics if exact else Numerics)(fmt, device)
    gpu = plain.device.type != "cpu"
    if gpu and (exact or not plain.half) or why_plain(device, fast):
        return plain
    from operators import compiled, fused
    if gpu:
        return fused.Fused(fmt, device)
    kind = compiled.CompiledExact if exact else compiled.Compiled
    return kind(fmt, compiled.library(CACHE)[0])
