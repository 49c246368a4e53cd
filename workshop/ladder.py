"""What the exercises have in common: their list, the participant's files, what a check says."""
import datetime
import importlib
import math
import pathlib
import subprocess
import sys
import time
import types
from dataclasses import dataclass

import torch

from data.own import patience, told
from operators.code import ROOT
from precision import InputError
from run.folder import read as read_log

HERE = pathlib.Path(__file__).resolve().parent
MINE = HERE / "mine"                    # the participant's files; git leaves them alone
RUNS = ROOT / "out" / "workshop"        # what `run` writes
# A job of five seconds on one core, with which most exercises try what was written: the README's
# taste. A base of one digit, right about two times in three, that 25 steps bring to 0.95 and more.
JOB = ("--preset cpu --device cpu --digits 1 --noise 0.3 --n-layers 2 --width 64 --base-steps 300 "
       "--base-batch 64 --base-lr 4e-3 --pool 70 --heldout 10 --prompts 16 --steps 25 "
       "--lr 1e-3").split()


@dataclass(frozen=True)
class Exercise:
    number: int
    name: str
    title: str
    minutes: int                        # that most people need
    why: str                            # the question that is asked in the end

    path = property(lambda e: MINE / f"{e.name}.py")
    stub = property(lambda e: HERE / "stubs" / f"{e.name}.py")
    solution = property(lambda e: HERE / "solutions" / f"{e.name}.py")
    page = property(lambda e: HERE / "pages" / f"{e.name}.md")
    checks = property(lambda e: importlib.import_module(f"workshop.checks.c{e.name}"))


EXERCISES = {e.number: e for e in (
    Exercise(1, "01_format", "what a number format is", 25,
             "BF16 says that 0.1 + 0.2 is 0.3, and FP16 says that it is not. Why does that not make "
             "BF16 the more exact of the two?"),
    Exercise(2, "02_first_bit", "where the first bit differs", 25,
             "The sums that differ have the same terms. Why is it no cure to compute both passes on "
             "the same machine with the same library?"),
    Exercise(3, "03_gradient", "the policy gradient", 30,
             "Before the first update the loss of a group is near 0, whatever its answers. Why does "
             "the policy learn from it nevertheless?"),
    Exercise(4, "04_loss_scale", "why a loss scale", 25,
             "Clipping before unscaling makes every gradient 65,536 times too small, and with Adam "
             "the run still learns. Why? And what would you have seen with plain SGD?"),
    Exercise(5, "05_bugs", "eight silent bugs", 30,
             "Which of the eight bugs can you find from accuracy alone? Which metric would you look at "
             "first in a run of your own, and why?"),
    Exercise(6, "06_cures", "mismatch and its cures", 30,
             "Token-TIS kept the run alive, and the mismatch was still there. What would you expect "
             "if answers were 300 times as long, as in the paper?"),
    Exercise(7, "07_exact", "exactness", 30,
             "Exact mode makes KL 0 in BF16. Does it make BF16's gradient that of FP32? What is "
             "left that only more bits can mend?"),
    Exercise(8, "08_own", "your own experiment", 90,
             "Your interval has three seeds behind it. What would you have to see in ten seeds to "
             "change your mind?"))}


class Wrong(Exception):
    """What is not right, and why, in plain words."""


class Shown(str):
    """What a check shows along the way: printed as it is."""


def require(condition, words):
    if not condition:
        raise Wrong(words)


def read(path):
    """The participant's file as a namespace. An error in it is one line, with its number."""
    if not path.is_file():
        number = int(path.stem[:2])
        raise InputError(f"{shown(path)} is not there yet: python -m workshop start {number}")
    space = {"__name__": path.stem, "__file__": str(path)}
    with patience(path), told(path):                                  # the participant's own program
        exec(compile(path.read_bytes(), str(path), "exec"), space)
    return types.SimpleNamespace(path=path, **{k: v for k, v in space.items() if k[:2] != "__"})


def call(mine, name, *args):
    """mine.NAME(*args). An error in it is one line, with the number of the file's line."""
    function = getattr(mine, name, None)
    require(callable(function), f"There is no function {name} in {shown(mine.path)} any more. "
            f"{shown(mine.path.parent / 'old')} keeps what `start --again` replaces.")
    with told(mine.path, function):
        return function(*args)


def tensor(mine, name, shape, *args):
    """The same for a function that gives a tensor of this shape."""
    y = call(mine, name, *args)
    require(isinstance(y, torch.Tensor) and y.shape == shape, f"{name} gave {type(y).__name__} "
            f"{tuple(getattr(y, 'shape', ()))}, not a tensor of shape {tuple(shape)}.")
    return y


def one_number(mine, name, *args):
    """The same for a function that gives one number -> a float."""
    x = call(mine, name, *args)
    require(getattr(x, "size", 1) == 1 if not hasattr(x, "numel") else x.numel() == 1, f"{name} gave "
            f"{x!r:.60}: several numbers, and one is asked." + " polyfit gives slope and intercept: take "
            "[0]." * (name == "slope"))
    try:
        return float(x)
    except (TypeError, ValueError):
        raise Wrong(f"{name} gave {x!r:.60}, and a number is asked.") from None


def number(mine, name, what):
    """mine.NAME, a number that the participant fills in."""
    x = getattr(mine, name, None)
    require(x is not None, f"{name} is still None: {what}")
    require(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x),
            f"{name} is {x!r} and not a number.")
    return x


def word(mine, name, what, known=()):
    """mine.NAME, a text that the participant fills in, one of `known` if there are such."""
    x = getattr(mine, name, "")
    require(isinstance(x, str) and x.strip(), f"{name} is still empty: {what}")
    x = x.strip()
    same = [k for k in known if k.lower() == x.lower()]
    require(not known or same, f"{name} is {x!r}. It is one of: {', '.join(known)}.")
    return same[0] if same else x


def close(x, truth, relative=1e-4):
    """Whether x is the true number, on the scale of that number: 0 is right for 0 alone."""
    x, truth = float(x), float(truth)
    return math.isfinite(x) and abs(x - truth) <= relative * abs(truth)


def steps_of(folder):
    """-> a finished run's settings, and its steps' metrics; None for a run that is not there."""
    rows = [*read_log(pathlib.Path(folder) / "metrics.jsonl")]
    if not rows or "result" not in rows[-1]:
        return None
    return rows[0]["config"], [r for r in rows if "step" in r]


def live(name, mine=None, *flags):
    """JOB with what the participant wrote, or the program as it is -> its steps' metrics, seconds."""
    out, begin = fresh(place(name)), time.time()
    program = ["train_rl.py"] if mine is None else ["-m", "workshop.trainer", mine.path.stem[:2],
                                                    str(mine.path)]
    done = subprocess.run([sys.executable, *program, *JOB, *flags, "--out", str(out)], cwd=ROOT,
                          capture_output=True, encoding="utf-8", errors="replace")
    said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["it said nothing"]
    ended = done.returncode == 0 and steps_of(out)
    require(ended, f"A run with it ended early: {said[-1]}")
    return ended[1], time.time() - begin


def place(name):
    """The folder of one of the workshop's runs."""
    return RUNS / name


def fresh(folder):
    """A folder for a run, without an earlier one's files."""
    for file in folder.glob("*") if folder.is_dir() else ():
        file.unlink()
    return folder


def shown(path):
    """A path as one types it, from the repository's root where it lies there."""
    path = pathlib.Path(path)
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


# --------------------------------------------------------------------------------------------------
# Progress: a text file, a line for each exercise that was passed


def passed():
    """number -> the date when it was passed."""
    path = MINE / "progress.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    words = (line.split() for line in lines)
    return {int(w[0]): w[2] for w in words if len(w) == 3 and w[0].isdigit() and w[1] == "passed"}


def keep(number):
    done = {number: datetime.date.today().isoformat()} | passed()         # the first date stays
    MINE.mkdir(exist_ok=True)
    text = "".join(f"{n} passed {date}\n" for n, date in sorted(done.items()))
    (MINE / "progress.txt").write_text(text, encoding="utf-8")
