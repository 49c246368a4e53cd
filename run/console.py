"""run/console.py: command lines whose errors are one line."""
import argparse
import atexit
import os
import signal
import sys
from contextlib import suppress

import torch

from data import short
from precision import InputError, nearest

# What ends a program: a cluster that takes its machine back, a terminal that is closed
ENDING = [getattr(signal, n) for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n)]
# What a machine may lack, in the words of torch and Python, and in ours
LACKS = {"DefaultCPUAllocator": "out of memory; lower --micro-batch (training), --rollout-rows or "
         "--prompts (sampling), or the model",
         "can't start new thread": "the system allows no more threads (ulimit -u)"}
LACKS["MemoryError"] = LACKS["DefaultCPUAllocator"]


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the nearest flag for an unknown one."""

    def parse_args(self, args=None, namespace=None):
        ns, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [s for a in self._actions for s in a.option_strings if s.startswith("--")]
            self.error(f"unknown argument {unknown[0][:80]}{nearest(unknown[0].split('=')[0], known)}")
        return ns

    def error(self, message):
        print(f"{self.prog}: {message[:300]} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


def ranged(kind, low, high):
    """For argparse's `type`: a number of this kind between low and high."""
    def number(text):
        try:
            x = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {what}") from None
        if not low <= x <= high:
            raise argparse.ArgumentTypeError(f"{text[:40]} is out of range, {low} to {high}")
        return x
    return number


def run_main(main):
    """Run a command. What the user got wrong, and what the machine lacks, is one line on stderr and
    an exit status, without a stack trace."""
    streams()
    for number in ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:             # under nohup it is ignored
            signal.signal(number, interrupt)
    try:
        status = main()
        sys.stdout.flush()                                     # a closed pipe is seen here, not later
    except KeyboardInterrupt as e:
        leave(128 + (e.args[0] if e.args else signal.SIGINT), "interrupted")
    except InputError as e:
        leave(1, e)
    except torch.OutOfMemoryError as e:
        leave(1, "the GPU is out of memory; lower --micro-batch (training), --rollout-rows or "
              f"--prompts (sampling), or the model. {str(e).splitlines()[0]}")
    except BrokenPipeError:                                                 # `sample.py ... | head`
        leave(1)
    except OSError as e:
        leave(1, f"{e.filename or 'output'}: {e.strerror or e}")
    except (MemoryError, RuntimeError) as e:
        lacks = [words for said, words in LACKS.items() if said in f"{type(e).__name__}: {e}"]
        if not lacks:
            raise
        leave(1, lacks[0])
    leave(status)


def interrupt(number, _):
    raise KeyboardInterrupt(number)


def streams():
    """A stream that was closed takes no text. A character that a stream cannot write, under an old
    locale, is written as its number."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        with suppress(AttributeError):                             # a notebook's
            getattr(sys, name).reconfigure(errors="backslashreplace")


def silence():
    """From now on what goes to stdout is dropped: its reader, or its terminal, is gone."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave(status, line=""):
    """End the program, with a line about why."""
    if line:
        with suppress(OSError):
            path, name = os.path.split(sys.argv[0])
            name = os.path.basename(path) if name == "__main__.py" else name           # python -m
            print(f"{name}: {short(str(line), 1000)}", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:
        silence()
    for n in (signal.SIGINT, *ENDING):                # all is done: a signal while Python clears up
        atexit.register(signal.signal, n, signal.SIG_IGN)           # would only print a stack trace
    sys.exit(status)
