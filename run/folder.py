"""run/folder.py: the folder of a run. metrics.jsonl, samples.jsonl, checkpoint.pt, curves.png."""
import dataclasses
import json
import math
import os
import pathlib
import platform
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from data import Problem
from operators.code import ROOT
from precision import InputError
from run.checkpoint import load_checkpoint, save_checkpoint
from run.flags import changed
from run.lines import say


@dataclass
class State:
    """How far a run has come."""
    problems: list = field(default_factory=list)
    heldout: list = field(default_factory=list)
    step: int = 0
    updates: int = 0                # optimizer steps
    skipped: int = 0                # updates that the loss scaler skipped
    drawn: int = 0                  # problems so far
    before: float | None = None     # held-out pass@1 of the base
    changed: list = field(default_factory=list)          # settings that differ from the test's


class Run:
    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.metrics, self.samples = self.path / "metrics.jsonl", self.path / "samples.jsonl"
        self.checkpoint = self.path / "checkpoint.pt"

    @classmethod
    def new(cls, out):
        """A fresh folder: `out`, or the next free out/runN. One that already holds a run is
        refused."""
        if out:
            run = cls(out)
            if run.metrics.exists() or run.checkpoint.exists():
                raise InputError(f"{out} already holds a run: go on with --resume {out}, or give --out "
                                 "another name")
            run.path.mkdir(parents=True, exist_ok=True)
            return run
        for n in range(1, 10 ** 6):
            try:
                path = pathlib.Path("out") / f"run{n}"
                path.mkdir(parents=True)
                return cls(path)
            except FileExistsError:
                continue

    def forget_if_empty(self):
        """A run that failed before its first line leaves no folder."""
        try:
            self.path.rmdir()
        except OSError:                                                 # not empty
            pass

    def rewind(self, step):
        """Drop what was written after `step`, and an earlier result: a killed run has lines of
        steps that are about to be done again."""
        for path in (self.metrics, self.samples):
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
                try:
                    row = json.loads(line)
                    if row.get("step", 0) <= step and "result" not in row:
                        kept.append(line + "\n")
                except json.JSONDecodeError:                          # a line cut short by the kill
                    pass
            partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
            partial.write_text("".join(kept), encoding="utf-8")
            os.replace(partial, path)

    def log(self, row, path=None):
        """A line of metrics.jsonl, or of another file. Numbers that are not finite become texts."""
        row = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with open(path or self.metrics, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def history(self):
        if not self.metrics.exists():
            return []
        rows = map(json.loads, self.metrics.read_text(encoding="utf-8").splitlines())
        return [row for row in rows if "step" in row]

    def log_samples(self, step, batch, env):
        """Two answers to each of the step's first three problems, to read."""
        group = batch.rewards.shape[1]
        some = [i * group + j for i in range(min(3, len(batch.problems))) for j in (0, 1)]
        answers = batch.rollout.rows(torch.tensor(some, device=batch.rewards.device))
        for i, text, stopped in zip(some, answers.texts(env.tokenizer), answers.stopped.tolist()):
            problem = batch.problems[i // group]
            self.log(dict(step=step, prompt=problem.prompt, text=text, right_answer=problem.answer,
                          reward=batch.rewards.flatten()[i].item(), stopped=stopped), self.samples)

    def save(self, state, cfg, model, optimizer, scaler, reference, **more):
        """Everything that the next step depends on, in one file."""
        about = vars(state) | {k: [dataclasses.astuple(p) for p in getattr(state, k)]
                               for k in ("problems", "heldout")}
        gpu = model.embedding.is_cuda
        save_checkpoint(
            self.checkpoint, model, only_trained=bool(cfg.model and cfg.lora_rank), **about, **more,
            config=dataclasses.asdict(cfg), reference=reference and reference.state_dict(),
            optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), torch_rng=torch.get_rng_state(),
            cuda_rng=torch.cuda.get_rng_state(model.embedding.device) if gpu else None)

    def resume(self, saved, cfg, given, optimizer, scaler, device):
        """Go on where the checkpoint stands -> State. What was written after it is dropped."""
        state = self.restore(saved, optimizer, scaler, device)
        if state.step > cfg.steps:
            raise InputError(f"{self.path} has done {state.step} steps, more than --steps {cfg.steps}")
        state.changed = sorted({*changed(cfg), *state.changed})  # what a run once changed stays changed
        self.rewind(state.step)
        self.log(dict(resumed_at=state.step, given=given))
        say(f"resumed {self.path} at step {state.step}")
        return state

    def restore(self, saved, optimizer, scaler, device):
        """What `save` wrote, put back -> State."""
        try:
            optimizer.load_state_dict(saved["optimizer"])
            if scaler.is_enabled() and saved["scaler"]:
                scaler.load_state_dict(saved["scaler"])
            torch.set_rng_state(saved["torch_rng"].cpu())  # nothing here draws from it; what you add may
            if device.type == "cuda" and saved["cuda_rng"] is not None:
                torch.cuda.set_rng_state(saved["cuda_rng"].cpu(), device)
            state = State(**{f.name: saved[f.name] for f in dataclasses.fields(State)})
        except (ValueError, KeyError) as e:
            raise InputError(f"{self.checkpoint} does not fit these settings: {e}") from None
        state.problems = [Problem(*p) for p in state.problems]
        state.heldout = [Problem(*p) for p in state.heldout]
        return state


def load_saved(resume, config):
    """The checkpoint of a run to go on with -> (its folder, its dict)."""
    path = pathlib.Path(resume)
    path = path.parent if path.is_file() else path                 # the checkpoint itself was named
    saved = load_checkpoint(path)
    known = {f.name for f in dataclasses.fields(config)}
    if "step" not in saved or not set(saved["config"]) <= known:
        raise InputError(f"{resume} holds a model but no run to go on with")
    saved["config"] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["config"].items()}
    return path, saved


@contextmanager
def interruptible():
    """A first Ctrl-C ends the step, a second one ends at once. Yields a list that is empty until
    then. Afterwards Ctrl-C means what it meant before."""
    stop = []

    def on_interrupt(*_):
        stop.append(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say("\nstopping after this step (Ctrl-C again: at once)")
    try:
        before = signal.signal(signal.SIGINT, on_interrupt)
    except ValueError:                                             # not the main thread: no signals
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def provenance(cfg, device):
    """The first line of metrics.jsonl: enough to run it again."""
    def ask(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True,
                                  cwd=ROOT).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None                                              # not a git checkout, or no git
    gpu = device.type == "cuda"
    return dict(
        config=dataclasses.asdict(cfg),
        command=[pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        git=ask("git", "rev-parse", "HEAD"),
        git_dirty=bool(ask("git", "status", "--porcelain")),
        python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
        system=f"{platform.system()} {platform.machine()}",
        device=torch.cuda.get_device_name(device) if gpu else platform.processor() or platform.machine(),
        threads=torch.get_num_threads())
