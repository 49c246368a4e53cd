"""run/folder.py: the folder of a run. metrics.jsonl, samples.jsonl, checkpoint.pt, curves.png."""
import dataclasses
import itertools
import json
import math
import os
import pathlib
import platform
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch

from data import Problem
from operators.code import ROOT, has_tools
from precision import InputError
from run.checkpoint import load_checkpoint, replacing, save_checkpoint
from run.console import ENDING, silence
from run.lines import say


@dataclass
class State:
    """What a run began with, and how far it has come."""
    problems: list = ()
    heldout: list = ()
    prompt_length: int = 0          # tokens of a prompt, at most
    base: str | None = None         # what --model's folder is, to know it again
    before: float | None = None     # held-out pass@1 of the base
    changed: list = ()              # settings that differ from the test's
    step: int = 0
    updates: int = 0                # optimizer steps
    skipped: int = 0                # updates that the loss scaler skipped
    drawn: int = 0                  # problems so far


class Run:
    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.metrics, self.samples = self.path / "metrics.jsonl", self.path / "samples.jsonl"
        self.checkpoint, self.lock = self.path / "checkpoint.pt", None

    @classmethod
    def new(cls, out):
        """A fresh folder: `out`, or the next free out/runN. One that already holds a run is
        refused."""
        if out:
            run = cls(out)
            if run.checkpoint.exists() or run.history():
                raise InputError(f"{out} already holds a run: go on with --resume {out}, or give "
                                 "--out another name")
            run.path.mkdir(parents=True, exist_ok=True)
            run.metrics.unlink(missing_ok=True)        # of a run that ended before its first checkpoint
            return run
        for n in itertools.count(1):
            with suppress(FileExistsError):
                run = cls(f"out/run{n}")
                run.path.mkdir(parents=True)
                return run

    def occupy(self):
        """Keep the folder to this process: two runs would mix their lines. However the process
        ends, the lock ends with it. Windows, and some network drives, have none."""
        try:
            import fcntl
        except ImportError:
            return
        self.lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is at work in {self.path}") from None
        except OSError:
            pass

    def leave(self):
        """Let others have the folder. A run that failed before its first line leaves none."""
        if self.lock is not None:
            os.close(self.lock)
        with suppress(OSError):                                                 # not empty
            self.path.rmdir()

    def rewind(self, step):
        """Drop what was written after `step`, and an earlier result: a killed run has lines of
        steps that are about to be done again."""
        for path in (self.metrics, self.samples):
            kept = [row for row in read(path) if row.get("step", 0) <= step and "result" not in row]
            with replacing(path) as f:
                f.writelines(json.dumps(row).encode() + b"\n" for row in kept)

    def log(self, row, path=None):
        """A line of metrics.jsonl, or of another file. Numbers that are not finite become texts."""
        row = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
               for k, v in row.items()}
        with open(path or self.metrics, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def history(self):
        return [row for row in read(self.metrics) if "step" in row]

    def save(self, state, cfg, model, optimizer, scaler, reference):
        """Everything that the next step depends on, in one file."""
        about = vars(state) | {k: [dataclasses.astuple(p) for p in getattr(state, k)]
                               for k in ("problems", "heldout")}
        save_checkpoint(
            self.checkpoint, model, only_trained=bool(cfg.model and cfg.lora_rank), **about,
            config=dataclasses.asdict(cfg), reference=reference and reference.state_dict(),
            optimizer=optimizer.state_dict(), scaler=scaler.state_dict())

    def resume(self, saved, step, given, optimizer, scaler):
        """Go on after `step`, where the checkpoint stands. What was written after it is dropped."""
        optimizer.load_state_dict(saved["optimizer"])
        if scaler.is_enabled() and saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
        self.rewind(step)
        self.log(dict(resumed_at=step, given=given))
        say(f"resumed {self.path} at step {step}")


def read(path):
    """What the lines of a log say, without one that a kill has cut short."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            yield json.loads(line)


def load_saved(resume, config):
    """The checkpoint of a run to go on with -> (its folder, its dict)."""
    path = pathlib.Path(resume)
    path = path.parent if path.is_file() else path                 # the checkpoint itself was named
    saved = load_checkpoint(path)
    known, needed = ({f.name for f in dataclasses.fields(kind)} for kind in (config, State))
    if not needed <= set(saved) or not set(saved["config"]) <= known:
        raise InputError(f"{resume} holds a model but no run to go on with")
    return path, saved


def restored(saved):
    """The State that `Run.save` wrote."""
    state = State(**{f.name: saved[f.name] for f in dataclasses.fields(State)})
    state.problems = [Problem(*p) for p in state.problems]
    state.heldout = [Problem(*p) for p in state.heldout]
    return state


@contextmanager
def interruptible():
    """A first Ctrl-C, SIGTERM or SIGHUP ends the step, a second one ends at once. Yields a list
    that is empty until then, and has the signal's number afterwards. At the end signals mean what
    they meant before."""
    stop, before = [], {}

    def on_signal(number, _):
        stop.append(number)
        for n, handler in before.items():
            signal.signal(n, handler)
        try:
            say("\nstopping after this step (Ctrl-C again: at once)")
        except RuntimeError:                # a line was just being written: this one is left out
            pass
        except OSError:                     # the terminal is gone
            silence()
    with suppress(ValueError):                            # only a main thread can handle signals
        for n in (signal.SIGINT, *ENDING):
            if signal.getsignal(n) is not signal.SIG_IGN:          # as nohup and `&` ask
                before[n] = signal.signal(n, on_signal)
    try:
        yield stop
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def provenance(cfg, device):
    """The first line of metrics.jsonl: enough to run it again."""
    def ask(*command):
        if not has_tools():
            return None
        try:
            return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10,
                                  check=True, cwd=ROOT).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None                                              # not a git checkout, or no git
    return dict(
        config=dataclasses.asdict(cfg),
        command=[pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        git=ask("git", "rev-parse", "HEAD"),
        git_dirty=bool(ask("git", "status", "--porcelain")),
        python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
        system=f"{platform.system()} {platform.machine()}",
        device=(torch.cuda.get_device_name(device) if device.type == "cuda" else
                platform.processor() or platform.machine()),
        threads=torch.get_num_threads())
