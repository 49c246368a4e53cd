"""run/checkpoint.py: a model's checkpoint is one file, a dict of tensors and plain values. No pickle
is ever loaded."""
import dataclasses
import os
import pathlib
import time
import zipfile
from contextlib import contextmanager

import torch

from model import GPT, GPTConfig
from precision import InputError, Numerics

FORMAT_VERSION = 2
STALE = 600                             # seconds after which a half-written file belongs to no run


@contextmanager
def replacing(path):
    """A file to write to. It takes the place of `path` when all is written: `path` is at every
    moment either the complete old file or the complete new one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")         # two runs, two names
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_checkpoint(path, model, only_trained=False, **rest):
    """Write model (only_trained: without its frozen weights) and `rest` (tensors, dicts, lists,
    numbers, strings)."""
    path = pathlib.Path(path)
    weights = {n: p.detach() for n, p in model.state_dict(keep_vars=True).items()
               if p.requires_grad or not only_trained}
    try:
        with replacing(path) as f:
            torch.save(dict(tenbit=FORMAT_VERSION, gpt=dataclasses.asdict(model.cfg),
                            lora=model.lora, model=weights, **rest), f)
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__    # torch has words of its own for it
        if not isinstance(cause, OSError):
            raise
        raise InputError(f"cannot write {path}: {cause.strerror}; what was there before is "
                         "untouched") from e
    for other in path.parent.glob(path.name + ".*.partial"):     # of a run that was killed long ago
        if time.time() - other.stat().st_mtime > STALE:
            other.unlink(missing_ok=True)


def load_checkpoint(path, device="cpu"):
    """The dict that save_checkpoint wrote; `path` is the file or the folder that holds it as
    checkpoint.pt."""
    path = pathlib.Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as z:       # a truncated file has lost its directory, at the end
            if z.testzip():
                raise zipfile.BadZipFile
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:         # whatever is wrong with a foreign file, the user hears the same
        raise InputError(f"{path} is not a complete checkpoint ({type(e).__name__}): truncated, "
                         "damaged, or another program's file") from e
    if not isinstance(state, dict) or "tenbit" not in state:
        raise InputError(f"{path} is not a checkpoint of this program")
    if state["tenbit"] != FORMAT_VERSION:
        raise InputError(f"{path} has checkpoint version {state['tenbit']}, this program reads "
                         f"version {FORMAT_VERSION}")
    return state


def load_model(state, device="cpu", expect=None, base=None):
    """GPT from a loaded checkpoint. expect: the GPTConfig that the run's settings ask for; a
    differing shape is refused. base: the GPT with the weights that the checkpoint leaves out."""
    try:
        cfg = GPTConfig(**state["gpt"])
    except (KeyError, TypeError) as e:
        raise InputError(f"the checkpoint's model cannot be read by this version: {e}") from None
    if expect is not None and expect != cfg:
        a, b = dataclasses.asdict(cfg), dataclasses.asdict(expect)
        raise InputError("the checkpoint's model has another shape: " +
                         ", ".join(f"{k} {a[k]} there, {b[k]} asked for" for k in a if a[k] != b[k]))
    model = base or GPT(cfg, device, seed=None)
    if state.get("lora"):
        model.adapt(**state["lora"])
    try:
        missing, wrong = model.load_state_dict(state["model"], strict=False)
        wrong += [n for n in missing if not base or model.get_parameter(n).requires_grad]
    except (KeyError, RuntimeError) as e:
        wrong = [str(e).splitlines()[-1].strip()]
    if wrong:
        raise InputError(f"the checkpoint's weights do not fit its own description: {wrong[0]}")
    return model.use(Numerics("fp32", device).hold(model.parameters()))
