"""hf/: models and their tokenizers as Hugging Face folders hold them. Files are read by safetensors
and tokenizers; transformers and peft, which write such folders, are compared with by the tests.

A folder comes from anyone. What is wrong with it is one line, and nothing in it is opened but
regular files.
"""
import importlib
import json
import os
import sys
from contextlib import contextmanager

from data import short
from precision import InputError

LARGEST = 1 << 28                   # bytes of a JSON file: the largest tokenizers have a tenth of it


def package(name):
    """safetensors or tokenizers; models from scratch do without."""
    try:
        importlib.import_module(name)
        return sys.modules[name.partition(".")[0]]
    except ImportError:
        raise InputError(f"a real model's folder needs {name}: pip install -e '.[hf]'") from None


@contextmanager
def reading(path):
    """Whatever is wrong with a file or folder becomes an InputError of one line that begins with
    its path. The libraries raise plain Exceptions, and panics, which are BaseExceptions."""
    try:
        yield path
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        why = f"malformed ({type(e).__name__}: {e})"
        if isinstance(e, (OSError, InputError)):
            why = getattr(e, "strerror", None) or str(e)
        raise InputError(short(why if why.startswith(str(path)) else f"{path}: {why}")) from None


def regular(path):
    """The path, unless it is a pipe, which would wait for ever, a folder or a device."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError("not a regular file")
    return path


def read_json(path):
    """A JSON file -> dict. `reading` is the caller's."""
    with open(regular(path), encoding="utf-8") as file:
        if os.path.getsize(path) > LARGEST:
            raise InputError(f"larger than {LARGEST >> 20} MiB")
        return {**json.load(file)}
