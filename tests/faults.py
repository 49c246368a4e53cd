"""What a machine, a cluster or a user may do to a run, each done to a real process.

    python -m tests.faults                  # all of them, some minutes on two cores: a table
    python -m tests.faults disk signal      # those whose names hold one of these words
    python -m tests.faults --list
    python -m tests.faults --day 2026-11-27 # the tenth of them that is tried on that day

After each fault the following must hold, else the run counts as lost:

- the process has ended by itself, with the status that was expected;
- it has said why in one line on stderr (a signal that stops a run after its step: on stdout), and
  there is no stack trace;
- no process that it started is left;
- its checkpoint, if there is one, is whole;
- `--resume`, or the same command again if there was no checkpoint yet, ends with the bits of a run
  that nothing has happened to: weights, optimizer, metrics.

The processes are forked from one that has imported the program, since to import torch takes longer
than the job. Linux only.
"""
import argparse
import atexit
import builtins
import collections
import contextlib
import datetime
import errno
import importlib
import json
import multiprocessing
import os
import pathlib
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"             # a fork of a process with more threads would hang

import numpy.random  # noqa: F401  once, and not in every fork: they are imported late
import torch
import torch._dynamo

import data.guard
import operators
import run.base
import train_rl
from data.guard import Guard
from precision import InputError
from run.checkpoint import load_checkpoint
from run.console import run_main

LIMIT = 60                                          # seconds until a run is said to hang
A_DAY = 10                                          # parts of the list, one of which is tried a day
SMALL = ("--digits 1 --noise 0.3 --n-layers 1 --width 32 --base-steps 200 --base-batch 32 --base-lr 1e-2 --pool 30 "
         "--heldout 4 --prompts 4 --group 4 --keep 0 1 --lr 1e-3 --device cpu").split()
JOBS = {"addition": SMALL,                          # graded where it is called
        "own": ["--task", "task.py", *SMALL[4:]]}   # graded in processes of its own
STEPS = "--steps 6 --save-every 2".split()
TASK = """
def problem(rng):
    a, b = rng.integers(0, 10, 2)
    return f"{a}+{b}=", str(a + b)

def demonstrate(problem, rng):
    return problem.answer if rng.random() < 0.7 else str(rng.integers(0, 19))

def reward(problem, text):
    import os, pathlib, signal, sys, time
    if os.path.exists("behave.py"):
        exec(pathlib.Path("behave.py").read_text(), {**globals(), **locals()})
    return float(text == problem.answer)
"""
MARK = "TENBIT_FAULT"                               # an environment variable by which its processes are known


@dataclass
class Fault:
    """inside(): in the process, before the program begins. outside(ctx): again and again while it
    runs. after(ctx): before it is resumed. ends: statuses that are right (-9: killed). says: words
    of its last line. resumes: whether it is resumed and compared."""
    name: str
    inside: object = lambda: None
    outside: object = lambda ctx: None
    before: object = lambda ctx: None
    after: object = lambda ctx: None
    ends: tuple = (1,)
    says: str = ""
    job: str = "addition"
    flags: list = field(default_factory=list)
    out: str = "out"
    resumes: bool = True
    fresh: bool = False                             # with an empty cache: the base is made in it


@dataclass
class Context:
    folder: pathlib.Path
    cache: pathlib.Path
    pid: int = 0
    begin: float = 0.0
    said: str = ""                                  # stdout so far
    done: list = field(default_factory=list)        # what `outside` has done

    def once(self, what):
        """Whether this is the first time that it is asked for."""
        if what in self.done:
            return False
        self.done.append(what)
        return True


# --------------------------------------------------------------------------------------------------
# One process


def main_of_child(argv, inside, cache):
    sys.argv = ["train_rl.py", *argv]
    sys.stdout, sys.stderr = (open(fd, "w", encoding="utf-8", closefd=False) for fd in (1, 2))
    operators.CACHE = run.base.CACHE = cache
    Guard.__init__.__defaults__, data.guard.FAILURES = (0.5, 1, print), 8       # within a step of 16
    code = 0
    try:
        inside()
        run_main(lambda: train_rl.main(argv))
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
        code = 70
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
        sys.stdout.flush()
    os._exit(code)


def spawn(argv, ctx, inside=lambda: None, outside=lambda ctx: None):
    """The program in a fork -> (status, stdout, stderr); status None: it hung, and was killed."""
    pipes = [os.pipe(), os.pipe()]
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir(ctx.folder)
        os.environ[MARK] = str(ctx.folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for (_, end), fd in zip(pipes, (1, 2)):
            os.dup2(end, fd)
        for pair in pipes:
            for end in pair:
                os.close(end)
        main_of_child(argv, inside, ctx.cache)
    for _, end in pipes:
        os.close(end)
    texts, ends = [b"", b""], [end for end, _ in pipes]
    ctx.pid, ctx.begin, status = pid, time.monotonic(), None
    while status is None:
        for end in select.select(ends, [], [], 0.02)[0]:
            texts[ends.index(end)] += os.read(end, 1 << 20)
        ctx.said = texts[0].decode(errors="replace")
        outside(ctx)
        gone, code = os.waitpid(pid, os.WNOHANG)
        if gone:
            status = os.waitstatus_to_exitcode(code)
        elif time.monotonic() - ctx.begin > LIMIT:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            break
    for i, end in enumerate(ends):                              # what is left in the pipes; a process that
        os.set_blocking(end, False)                             # is left may still hold them
        with contextlib.suppress(BlockingIOError):
            while more := os.read(end, 1 << 20):
                texts[i] += more
        os.close(end)
    return status, *(t.decode(errors="replace") for t in texts)


def left_over(ctx):
    """Processes that a run has started and that are still there after some seconds."""
    end, mark = time.monotonic() + 8, f"{MARK}={ctx.folder}".encode()
    while True:
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.1)


# --------------------------------------------------------------------------------------------------
# A fault, and what must hold after it


def bits(path):
    """What a finished run has come to: tensors of model and optimizer, metrics of its steps."""
    state = load_checkpoint(path)
    moments = [v for s in state["optimizer"]["state"].values() for v in s.values()]
    rows = [json.loads(x) for x in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [{k: v for k, v in r.items() if k not in ("t_rollout", "t_train", "tokens_per_s")} for r in rows if "step" in r]
    return [*state["model"].values(), *moments], rows


def same(a, b):
    return a[1] == b[1] and len(a[0]) == len(b[0]) and all(torch.equal(x, y) for x, y in zip(a[0], b[0]))


def command(fault, out=None):
    return [*JOBS[fault.job], *STEPS, "--out", out or fault.out, *fault.flags]


def try_one(fault, home):
    """Do it -> what does not hold, in words; "" if all does."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=home))
    (folder / "task.py").write_text(TASK)
    cache = folder / "cache"
    ctx = Context(folder, cache)
    shutil.copytree(home / "cache", cache, ignore=(lambda *_: ["base-addition", *names(home)]) if fault.fresh else None)
    try:
        fault.before(ctx)
        return judge(fault, home, ctx)
    except OSError as e:                            # such as a mount that is not allowed here
        return f"not tried: {e}"
    finally:
        subprocess.run(["umount", "-l", str(folder / "disk")], stderr=subprocess.DEVNULL)
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)


def names(home):
    return [f.name for f in (home / "cache").glob("[bs][ao][sl]*-*")]


def judge(fault, home, ctx):
    status, out, err = spawn(command(fault), ctx, fault.inside, fault.outside)
    lines = [x for x in err.splitlines() if x.strip()]
    seen = f"status {status}, stdout ...{out[-300:]!r}, stderr {err[-1500:]!r}"
    if status is None:
        return f"it hangs: {seen}"
    if status not in fault.ends:
        return f"status {status}, not one of {fault.ends}: {seen}"
    if "Traceback" in out + err or "Exception ignored" in err:
        return f"a stack trace: {seen}"
    if status > 0 and status != 128 + signal.SIGKILL and len(lines) > 1:
        return f"{len(lines)} lines on stderr: {seen}"
    if status > 0 and not lines and "stopped at step" not in out and fault.says is not None:
        return f"no word of why: {seen}"
    if fault.says and fault.says not in (err if lines else out):
        return f"not a word of {fault.says!r}: {seen}"
    if left := left_over(ctx):
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return f"{len(left)} processes are left: {seen}"
    fault.after(ctx)
    path = ctx.folder / fault.out
    if os.path.exists(path / "checkpoint.pt"):
        load_checkpoint(path)
    return recover(fault, home, ctx, path) if fault.resumes else ""


def recover(fault, home, ctx, path):
    (ctx.folder / "behave.py").unlink(missing_ok=True)
    if (path / "checkpoint.pt").exists():
        argv = ["--resume", fault.out]
    else:
        argv = [*JOBS[fault.job], *STEPS, "--out", fault.out]
    status, out, err = spawn(argv, ctx)
    if status != 0:
        return f"{' '.join(argv[:2])} afterwards: status {status}, {out[-200:]!r} {err[-600:]!r}"
    return "" if same(bits(path), bits(home / fault.job)) else "other bits than without the fault"


# --------------------------------------------------------------------------------------------------
# Moments: the n-th call of a function, in the process

MOMENTS = {
    "imitation": ("run.base", "demonstrations", 9), "the base's checkpoint": ("run.base", "save_checkpoint", 1),
    "held-out": ("run.start", "solve", 1), "first metrics line": ("train_rl", "provenance", 1),
    "rollout": ("train_rl", "collect", 2), "late rollout": ("train_rl", "collect", 5),
    "forward": ("model.GPT", "token_logprobs", 3), "learning": ("train_rl", "learn", 4),
    "update": ("train_rl", "update", 3), "step line": ("run.diary", "step_line", 4),
    "samples": ("run.diary", "rows", 3), "checkpoint": ("run.folder", "save_checkpoint", 3),
    "half a checkpoint": ("run.checkpoint", "half", 2), "the end of a file": ("os", "fsync", 3),
    "rename": ("os", "replace", 3), "the end": ("run.start", "finish", 1), "last answers": ("run.start", "solve", 2)}
FRESH = "imitation", "the base's checkpoint"


def at(moment, do):
    """inside: do() when this moment has come."""
    def inside():
        where, name, n = MOMENTS[moment]
        if name == "half":
            return half_a_checkpoint(n, do)
        module, _, cls = where.rpartition(".")
        if module and cls[0].isupper():
            owner = getattr(importlib.import_module(module), cls)
        else:
            owner = importlib.import_module(where)
        real, calls = getattr(owner, name), [0]

        def hooked(*args, **kw):
            calls[0] += 1
            if calls[0] == n:
                do()
            return real(*args, **kw)
        setattr(owner, name, hooked)
    return inside


def half_a_checkpoint(n, do):
    real, calls = torch.save, [0]

    def save(state, f):
        calls[0] += 1
        if calls[0] == n:
            f.write(b"half of it" * 1000)
            f.flush()
            do()                                    # a signal may only ask to stop after the step
            f.seek(0)
            f.truncate()
        return real(state, f)
    torch.save = save


def send(*signals):
    def do():
        for s in signals:
            os.kill(os.getpid(), s)
    return do


def fail(kind):
    def do():
        raise OSError(kind, os.strerror(kind))
    return do


def when(words, do):
    """outside: do(ctx), once, as soon as stdout has these words."""
    def outside(ctx):
        if words in ctx.said and ctx.once(words):
            do(ctx)
    return outside


def later(seconds, do):
    def outside(ctx):
        if time.monotonic() - ctx.begin > seconds and ctx.once(seconds):
            do(ctx)
    return outside


def both(*some):
    def do(*args):
        for f in some:
            f(*args)
    return do


# --------------------------------------------------------------------------------------------------
# The list


def signals():
    stopping = {signal.SIGKILL: (-9,), signal.SIGTERM: (143,), signal.SIGINT: (130,), signal.SIGHUP: (129,)}
    for s, ends in stopping.items():
        for moment in MOMENTS:
            name = f"signal: {s.name} at {moment}"
            yield Fault(name, at(moment, send(s)), ends=ends, fresh=moment in FRESH)
    for moment in ("rollout", "learning", "checkpoint", "half a checkpoint"):
        yield Fault(f"signal: Ctrl-C twice at {moment}", at(moment, send(signal.SIGINT, signal.SIGINT)), ends=(130,))
    yield Fault("signal: TERM, then KILL", at("learning", send(signal.SIGTERM, signal.SIGKILL)), ends=(-9,))
    yield Fault("signal: HUP is ignored under nohup", both(partial(signal.signal, signal.SIGHUP, signal.SIG_IGN),
                                                           at("learning", send(signal.SIGHUP))), ends=(0,))
    yield Fault("signal: PIPE", at("learning", send(signal.SIGPIPE)), ends=(0,))
    for s in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        yield Fault(f"signal: {s.name} while an answer is graded", at("rollout", send(s)), ends=stopping[s], job="own")
        yield Fault(f"signal: {s.name} at an own task's end", at("last answers", send(s)), ends=stopping[s], job="own")
    for i in range(24):
        s, seconds = [*stopping][i % 4], random.Random(i).uniform(0.05, 1.2)
        yield Fault(f"signal: {s.name} after {seconds:.2f} s", ends=(*stopping[s], 0), fresh=i % 3 == 0,
                    outside=later(seconds, lambda ctx, s=s: os.kill(ctx.pid, s)), job=("addition", "own")[i % 2])


def size_of_files(n):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))


def disk(size):
    """before: a disk of this size at disk/."""
    def before(ctx):
        (ctx.folder / "disk").mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(ctx.folder / "disk")],
                              capture_output=True, text=True)
        if done.returncode:
            raise OSError(done.stderr.strip())
    return before


def remount(options):
    def do(ctx):
        command = ["mount", "-o", f"remount,{options}", str(ctx.folder / "disk")]
        for _ in range(100):                                    # while a file is open, the system refuses
            if subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0:
                return
            time.sleep(0.01)
        raise OSError("the disk cannot be remounted")
    return do


def cache_on_disk(ctx):
    shutil.copytree(ctx.cache, ctx.folder / "disk" / "cache", ignore=lambda *_: names(ctx.cache.parent.parent))
    ctx.cache = ctx.folder / "disk" / "cache"


def opening(path, kind, n=1):
    """inside: the n-th time that this file is opened for writing, there is this error."""
    def inside():
        real, calls = builtins.open, [0]

        def hooked(file, mode="r", *args, **kw):
            if not isinstance(file, int) and set(mode) & set("wa") and path in str(file):
                calls[0] += 1
                if calls[0] == n:
                    raise OSError(kind, os.strerror(kind), str(file))
            return real(file, mode, *args, **kw)
        builtins.open = hooked
    return inside


def disks():
    for size in (0, 200, 1000, 3000, 8000, 30_000, 100_000):
        for fresh in (False, True):
            yield Fault(f"disk: files of {size} bytes at most, {'fresh' if fresh else 'cached'} base", size_of_files(size),
                        fresh=fresh, ends=(1,))
    for kib in (4, 12, 40, 100, 200, 300):
        yield Fault(f"disk: the run's has {kib} KiB", before=disk(f"{kib}k"), out="disk/out", after=remount("size=64m"),
                    ends=(0, 1))
    for kib in (8, 40, 80):
        yield Fault(f"disk: the cache's has {kib} KiB", before=both(disk(f"{kib + 400}k"), cache_on_disk), fresh=True,
                    after=remount("size=64m"), ends=(0,))
    yield Fault("disk: becomes read-only", before=disk("64m"), out="disk/out", after=remount("rw"),
                inside=at("update", partial(time.sleep, 0.3)), outside=when("step 2/6", remount("ro")))
    kinds = errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES, errno.EDQUOT
    for kind in kinds:
        name = errno.errorcode[kind]
        for path, n in (("metrics.jsonl", 1), ("metrics.jsonl", 4), ("samples.jsonl", 2), ("checkpoint.pt", 1),
                        ("checkpoint.pt", 3)):
            yield Fault(f"disk: {name}, {path}, time {n}", opening(f"out/{path}", kind, n))
        yield Fault(f"disk: {name} as the base is kept", opening("base-addition", kind), fresh=True, ends=(0,))
        for moment in ("the end of a file", "rename", "half a checkpoint"):
            yield Fault(f"disk: {name} at {moment}", at(moment, fail(kind)))


def folders():
    def gone(ctx):
        while (ctx.folder / "out").exists():                    # the run may just be writing into it
            shutil.rmtree(ctx.folder / "out", ignore_errors=True)

    def other(ctx):
        gone(ctx)
        (ctx.folder / "out").write_text("a file")

    def free(ctx):
        if (ctx.folder / "out").is_file():
            (ctx.folder / "out").unlink()
    for moment in ("step 1/6", "step 3/6", "training on"):
        yield Fault(f"folder: deleted at '{moment}'", outside=when(moment, gone), ends=(1,), resumes=False,
                    inside=at("update", partial(time.sleep, 0.3)))
        yield Fault(f"folder: a file in its place at '{moment}'", outside=when(moment, other), after=free, ends=(1,),
                    resumes=False, inside=at("update", partial(time.sleep, 0.3)))
    yield Fault("folder: the cache is deleted", outside=when("training on", lambda ctx: shutil.rmtree(ctx.cache)), ends=(0,))
    yield Fault("folder: the cache is a file", before=lambda ctx: (shutil.rmtree(ctx.cache), ctx.cache.write_text("")),
                ends=(0,), resumes=False)
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = pathlib.Path("out") / name
        yield Fault(f"folder: {name} is a folder", before=lambda ctx, path=path: (ctx.folder / path).mkdir(parents=True),
                    after=lambda ctx, path=path: (ctx.folder / path).rmdir())
    yield Fault("folder: the one that it runs in is deleted", inside=lambda: shutil.rmtree(os.getcwd()), resumes=False,
                before=lambda ctx: setattr(ctx, "cache", ctx.cache.rename(ctx.folder.parent / f"{ctx.folder.name}-cache")))

    def second(ctx):
        status, _, err = spawn(command(Fault("")), Context(ctx.folder, ctx.cache))
        (ctx.folder / "second").write_text(f"{status} {err}")

    def was_refused(ctx):
        said = (ctx.folder / "second").read_text()
        if not said.startswith("1 ") or not ("another run is at work" in said or "already holds a run" in said):
            raise InputError(f"a second run was not refused: {said}")
    def beside(ctx):
        status, _, err = spawn(command(Fault(""), "other"), Context(ctx.folder, ctx.cache))
        (ctx.folder / "second").write_text(f"{status} {err}")

    def has_ended_well(ctx):
        if (said := (ctx.folder / "second").read_text()) != "0 ":
            raise InputError(f"the other run: {said}")
    for moment in ("imitation", "the base's checkpoint", "rename"):
        yield Fault(f"folder: another run makes the same base at {moment}", inside=at(moment, partial(time.sleep, 1.5)),
                    outside=when("learn to imitate", beside), after=has_ended_well, ends=(0,), fresh=True)
    for words, moment in (("preset", "held-out"), ("training on", "rollout"), ("step 3/6", "late rollout")):
        yield Fault(f"folder: a second run at '{words}'", inside=at(moment, partial(time.sleep, 1.0)),
                    outside=when(words, second), after=was_refused, ends=(0,))


def streams():
    def closed(fd):
        def inside():
            setattr(sys, {1: "stdout", 2: "stderr"}[fd], None)
            os.close(fd)
        return inside

    def onto(path, fd=1):
        return lambda: os.dup2(os.open(path, os.O_WRONLY), fd)

    def pipe(ctx_or_none=None):
        """stdout is a pipe that nobody reads any more."""
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
    yield Fault("stream: stdout is closed", closed(1), ends=(0,))
    yield Fault("stream: stderr is closed", closed(2), ends=(0,))
    yield Fault("stream: both are closed", both(closed(1), closed(2)), ends=(0,))
    yield Fault("stream: stderr is closed, and there is an error", both(closed(2), opening("out/metrics.jsonl", errno.EIO)),
                says=None)
    yield Fault("stream: stdout is full", onto("/dev/full"))
    yield Fault("stream: stderr is full", onto("/dev/full", 2), ends=(0,))
    yield Fault("stream: both are full", both(onto("/dev/full"), onto("/dev/full", 2)), says=None)
    yield Fault("stream: nobody reads from the beginning", pipe)
    for moment in ("held-out", "rollout", "late rollout", "update", "the end", "last answers"):
        yield Fault(f"stream: nobody reads from {moment} on", at(moment, pipe))
    for encoding in ("ascii", "cp1252", "utf-16"):
        yield Fault(f"stream: {encoding}", lambda encoding=encoding: sys.stdout.reconfigure(encoding=encoding), ends=(0,),
                    out="größe-数")


def environments():
    def without(*names, **others):
        def inside():
            for name in names:
                os.environ.pop(name, None)
            os.environ.update(others)
        return inside

    def clock(by, n):
        def inside():
            real, calls = time.time, [0]

            def now():
                calls[0] += 1
                return real() + by * (calls[0] > n)
            time.time = now
        return inside
    yield Fault("environment: no HOME", without("HOME"), ends=(0,))
    yield Fault("environment: HOME is nowhere", without(HOME="/nowhere"), ends=(0,))
    # without a compiler plain operators run, and they give other bits
    yield Fault("environment: no PATH", without("PATH"), ends=(0,), resumes=False)
    yield Fault("environment: TMPDIR is nowhere", without(TMPDIR="/nowhere"), ends=(0,))
    yield Fault("environment: locale C", without("LANG", "LC_ALL", LC_ALL="C", PYTHONUTF8="0"), ends=(0,), job="own")
    yield Fault("environment: none at all", lambda: [os.environ.pop(k) for k in [*os.environ] if k != MARK], ends=(0,), job="own",
                resumes=False)
    for by in (-3600, -10 ** 9, 10 ** 9):
        yield Fault(f"environment: the clock is set by {by} s", clock(by, 3), ends=(0,))
    yield Fault("environment: 12 open files at most",
                lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12)), ends=(0, 1), job="own")
    yield Fault("environment: 60 open files at most",
                lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60)), ends=(0,), job="own")
    yield Fault("environment: no core, no stack", lambda: resource.setrlimit(resource.RLIMIT_STACK, (1 << 18, 1 << 18)),
                ends=(0, 1, -11), job="own")

    def nobody(n):
        def inside():
            os.setgid(65534)
            os.setuid(65534)
            resource.setrlimit(resource.RLIMIT_NPROC, (n, n))
        return inside

    def let_all(ctx):
        if os.getuid():
            raise OSError("takes root")
        for path in (ctx.folder.parent, ctx.folder, *ctx.folder.rglob("*")):
            path.chmod(0o777)
    for n in (1, 2):
        yield Fault(f"environment: {n} processes at most", nobody(n), before=let_all, ends=(0, 1), job="own",
                    resumes=False)

    def denied(path):
        def before(ctx):
            let_all(ctx)
            (ctx.folder / path).mkdir(exist_ok=True)
            (ctx.folder / path).chmod(0o500)
        return before
    for path in ("out", "cache"):
        yield Fault(f"environment: no permission for {path}", nobody(100), before=denied(path), resumes=False,
                    ends=(1,) if path == "out" else (0,))
    for gib in (1, 2, 3):
        yield Fault(f"environment: {gib} GiB of address space", resumes=False, ends=(0, 1), job="own",
                    inside=lambda gib=gib: resource.setrlimit(resource.RLIMIT_AS, (gib << 30, gib << 30)))
    for seconds in (1, 2):
        yield Fault(f"environment: {seconds} s of processor time", ends=(-24, -9, 0), job="own",
                    inside=lambda s=seconds: resource.setrlimit(resource.RLIMIT_CPU, (s, s + 1)))


def paths():
    good = ("a name with spaces", "größe-数-😀", "-dash", "quote'\"$HOME`", "a\nline", "x" * 200, "deep/" * 20 + "x", "trailing ",
            "b\udcff", "%s{0}\\n")
    for name in good:
        yield Fault(f"path: --out {name[:24]!r}", out=f"./{name}", ends=(0,))
    bad = ("x" * 300, "x/" * 3000, "/proc/nothing/here", "/dev/null/x", "task.py/x", "\ud800"[:0] + "/sys/x")
    for name in bad:
        yield Fault(f"path: --out {name[:24]!r}", out=name, resumes=False)
    wrong = ("x" * 300, "x/" * 3000, "nowhere", "/dev/null", "/dev/zero", "/proc/self/mem", ".", "task.py", "fifo",
             "b\udcff", "loop")

    def strange(ctx):
        os.mkfifo(ctx.folder / "fifo")
        (ctx.folder / "loop").symlink_to("loop")
    for flag in ("--resume", "--data", "--heldout", "--model", "--task"):
        for name in wrong:
            if flag == "--task" and name in ("task.py", "nowhere"):
                continue
            name = name + ".py" if flag == "--task" and not name.startswith("/") else name
            flags = ["--resume", name] if flag == "--resume" else [flag, name]
            yield Fault(f"path: {flag} {name[:24]!r}", before=strange, resumes=False, ends=(1, 2),
                        inside=lambda f=flags: sys.argv.__setitem__(slice(1, None), f), flags=flags)


GRADERS = {
    "hangs now and then": ("if text == '11': time.sleep(1000)", (0,)),
    "spins now and then": ("while text == '11': pass", (0,)),
    "forks": ("if os.fork() == 0: time.sleep(1000)", (0,)),
    "leaves a child in a session of its own":
        ("if text == '11' and os.fork() == 0: os.setsid(); time.sleep(3); os._exit(0)", (0,)),
    "fills memory": ("if text == '11': x = [0] * 10 ** 10", (0,)),
    "crashes now and then": ("if text == '11': os._exit(3)", (0,)),
    "segfaults": ("if text == '11': os.kill(os.getpid(), signal.SIGSEGV)", (0,)),
    "kills its parent": ("os.kill(os.getppid(), signal.SIGKILL)", (-9,)),
    "kills its parent's group": ("os.killpg(os.getpgid(os.getppid()), signal.SIGKILL)", (-9,)),
    "ends its parent": ("os.kill(os.getppid(), signal.SIGTERM); time.sleep(0.2)", (143,)),
    "kills its own group": ("os.killpg(0, signal.SIGKILL)", (1,)),
    "always hangs": ("time.sleep(1000)", (1,)),
    "always raises": ("1 / 0", (1,)),
    "always gives NaN": ("return float('nan')", (1,)),
    "always exits": ("sys.exit(0)", (1,)),
    "raises what has no words": ("class E(Exception):\n        __str__ = lambda e: 1 / 0\n    raise E", (1,)),
    "raises megabytes": ("raise ValueError('x' * 10 ** 7)", (1,)),
    "raises surrogates": ("if text == '11': raise ValueError('\\ud800')", (0,)),
    "prints megabytes": ("if text == '11': print('x' * 10 ** 5)", (0,)),
    "closes all": ("os.closerange(0, 100)", (1,)),
    "writes to every descriptor": ("[os.write(f, b'1.0\\n') for f in map(int, os.listdir('/proc/self/fd')) if f > 2 and "
                                   "'pipe' in os.readlink(f'/proc/self/fd/{f}')]", (0, 1)),
    "reads its input": ("if text == '11': sys.stdin.readline()", (0,)),
    "ignores signals": ("[signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; time.sleep(1000 * (text == '11'))", (0,)),
    "changes its folder": ("os.makedirs('elsewhere', exist_ok=True); os.chdir('elsewhere')", (0,)),
    "starts threads": ("import threading; threading.Thread(target=time.sleep, args=(1000,)).start()", (0,)),
    "recurses": ("f = lambda x: f(x) + 1; f(0) if text == '11' else 0", (0,)),
}


def graders():
    for name, (code, ends) in GRADERS.items():
        ended = ends != (0,)
        # for the first time in the second step: what was learned before must stay
        yield Fault(f"grader: {name}", inside=at("rollout", partial(write_behaviour, code)), job="own", ends=ends,
                    resumes=ended and 0 not in ends, says=None if name == "prints megabytes" else "")


def write_behaviour(code):
    pathlib.Path("behave.py").write_text(code.replace("return float('nan')", "raise ArithmeticError('nan')"))


FAULTS = [*signals(), *disks(), *folders(), *streams(), *environments(), *paths(), *graders()]


# --------------------------------------------------------------------------------------------------
# All of them


def prepare(home):
    """The cache, and a run of each job that nothing happens to."""
    (home / "task.py").write_text(TASK)
    for job in JOBS:
        status, out, err = spawn(command(Fault("", job=job), job), Context(home, home / "cache"))
        if status or err:
            raise SystemExit(f"without any fault: status {status}, {out}{err}")
        if sum(row["grad_norm"] > 0 for row in bits(home / job)[1]) < 4:
            raise SystemExit(f"the job {job} does not learn: it could not tell a run from a resumed one")
    home.chmod(0o755)


def of_day(date):
    """The faults of a day: every tenth."""
    return FAULTS[datetime.date.fromisoformat(date).toordinal() % A_DAY::A_DAY]


def main(argv=None):
    p = argparse.ArgumentParser(prog="tests.faults", description=__doc__.split("\n\n")[0])
    p.add_argument("name", nargs="*", help="faults whose names hold one of these texts (default: all)")
    p.add_argument("--list", action="store_true")
    p.add_argument("--day", help="those that are tried on this day")
    a = p.parse_args(argv)
    faults = of_day(a.day) if a.day else FAULTS
    faults = [f for f in faults if not a.name or any(n in f.name for n in a.name)]
    if a.list:
        return print("\n".join(f.name for f in faults))
    begin, table = time.monotonic(), collections.defaultdict(collections.Counter)
    home = pathlib.Path(tempfile.mkdtemp()).resolve()
    try:
        prepare(home)
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
            results = pool.map(partial(attempt, home), range(len(FAULTS)) if len(faults) == len(FAULTS) else
                               [i for i, f in enumerate(FAULTS) if f in faults])
            for fault, wrong in zip(faults, results):
                kind = "not tried" if wrong.startswith("not tried") else "lost" if wrong else "survived"
                table[fault.name.split(":")[0]][kind] += 1
                if wrong:
                    print(f"{kind}: {fault.name}\n    {wrong}", flush=True)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    total = sum(table.values(), collections.Counter())
    print(f"{'':14}{'tried':>8}{'survived':>10}{'lost':>6}{'not tried':>11}")
    for name, c in [*table.items(), ("all", total)]:
        print(f"{name:14}{c['survived'] + c['lost']:8}{c['survived']:10}{c['lost']:6}{c['not tried']:11}")
    print(f"{time.monotonic() - begin:.0f} s")
    return 1 if total["lost"] else 0


def attempt(home, i):
    try:
        return try_one(FAULTS[i], home)
    except (Exception, SystemExit) as e:
        return f"{type(e).__name__}: {e}"


if __name__ == "__main__":
    sys.exit(main())
