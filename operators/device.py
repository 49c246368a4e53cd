"""operators/device.py: a device set up so that nothing is rounded outside of precision.py."""
import os
from contextlib import contextmanager

import torch

from precision import InputError

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")       # CUDA reads it at its start


def pick_device(name="auto"):
    """`auto`, `cpu`, `cuda` or `cuda:N` -> torch.device, set up so that nothing is rounded
    elsewhere."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name[:40]!r}: use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        why = " (it has no FP64, which the draw of a token takes)" * (device.type == "mps")
        raise InputError(f"device {name!r} is not supported{why}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        n = torch.cuda.device_count()
        if (device.index or 0) >= n:
            raise InputError(f"device {name!r} is not there: torch {torch.__version__} sees "
                             f"{n} CUDA device{'s' * (n != 1)}")
        if device.index is None:                           # set_device refuses one without an index
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)
        # By default cuBLAS may add partial sums in 16 bit. Then the accumulator is no longer FP32.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_tf32 = False             # FP32 means FP32
        # cuDNN's attention is refused inside `reproducible` and preferred outside. A forward pass
        # that is done again there, for --recompute, would be another kernel's.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


@contextmanager
def reproducible(device):
    """Backward passes inside give the same bits every time. On a GPU, fused attention otherwise
    adds up its gradients in whatever order the blocks finish. Only around backward: torch would
    refuse the sampler's cumsum, wrongly for its shapes. The user's own setting comes back
    afterwards."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill
