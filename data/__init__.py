"""Tasks: problems with a checkable answer.

Every task has
    reward(problem, text)          -> 1.0 or 0.0 (or between), from the text of an answer alone
    safe                           True: the reward is a bounded parser of ours and runs where it is called. False: it may hang or
                                   die, and data/guard.py runs it in processes of its own, made anew from `recipe`
One whose model begins from scratch (TASKS) also has, for the noisy demonstrator whose imitation makes the base model,
    prompt_length, answer_length   bounds in tokens, the answer's with its stop token
    problem(rng)                   -> Problem(prompt, answer), drawn from a numpy Generator
    demonstrate(problem, rng)      -> the text of one noisy worked answer
    prompt(question)               -> the problem in words, for a real model (optional)
One for a model that can read (REAL, or a file of yours: data/own.py) has instead
    load(path)                     -> Problems, whose `prompt` is the question as the file has it
    prompt(question)               -> the text that the model is to read
A task of your own that begins from scratch is a class like data/reverse.py and one line in TASKS below.
"""
import importlib
import json
import os
import pathlib
from dataclasses import dataclass

import numpy as np

# what is made once and kept: base models, compiled operators
CACHE = pathlib.Path(os.environ.get("TENBIT_CACHE") or pathlib.Path(__file__).resolve().parent.parent / ".cache")

FETCHED = pathlib.Path(__file__).resolve().parent / "fetched"        # where data/prepare.py puts real data sets

TASKS = {"addition": "data.addition.Addition", "reverse": "data.reverse.Reverse", "countdown": "data.countdown.Countdown"}
REAL = {"gsm8k": "data.gsm8k.GSM8K", "math": "data.math_answers.Math"}


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str


def input_error(message):
    """A precision.InputError, imported only now: precision imports torch, and a process that only grades does well without."""
    from precision import InputError
    return InputError(message)


def make_task(name, digits=0, noise=0.0):
    """A task by its name, or by the file that has it (data/own.py). digits and noise are for those that begin from scratch."""
    if name.endswith(".py"):
        from data.own import load_own
        return load_own(name)
    if name not in {**TASKS, **REAL}:
        from precision import nearest
        raise input_error(f"no task {name!r}{nearest(name, [*TASKS, *REAL])} There are {', '.join([*TASKS, *REAL])}, and a file "
                          "of your own such as data/example_task.py")
    module, _, kind = {**TASKS, **REAL}[name].rpartition(".")
    make = getattr(importlib.import_module(module), kind)
    return make(digits, noise) if name in TASKS else make()


def stream(*key):
    """A numpy random Generator for this key of non-negative integers, such as (seed, purpose, step). Randomness that is a
    function of the step needs no state to be saved: a resumed run draws what the uninterrupted one would have drawn."""
    return np.random.default_rng(np.random.SeedSequence(key))


def draw_problems(task, n, rng, exclude=()):
    """n different problems of the task, none with a prompt in `exclude`."""
    seen, out = set(exclude), []
    for _ in range(100 * n):
        p = task.problem(rng)
        if p.prompt not in seen:
            seen.add(p.prompt)
            out.append(p)
            if len(out) == n:
                return out
    raise input_error(f"the task has too few different problems for {n} of them and {len(exclude)} others: lengthen it with "
                      "--digits, or lower --pool and --heldout")


def load_problems(path, forms=(("prompt", "answer"),), answer=None):
    """Problems from a JSON Lines file: one {"prompt": "...", "answer": "..."} a line. Empty lines are skipped.

    forms: the pairs of names that a line's two texts may have, the first that a line begins to fit holds. answer(key, text):
    what of the second text is the answer; its ValueError says what is the matter with the line."""
    problems = []
    for place, row in read_rows(path):
        question, worked = next((f for f in forms if isinstance(row, dict) and set(f) <= set(row)), None) or next(
            (f for f in forms if isinstance(row, dict) and f[0] in row), forms[0])
        for key in (question, worked):
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                raise input_error(f'{place}: no text under "{key}"; a line is {{"{question}": "...", "{worked}": "..."}}')
        if not row[question].strip():
            raise input_error(f"{place}: the {question} is empty")
        try:
            problems.append(Problem(row[question], answer(worked, row[worked]) if answer else row[worked]))
        except ValueError as e:
            raise input_error(f"{place}: {e}") from None
    if not problems:
        raise input_error(f"{path}: no problems in it")
    return problems


def load_real(task, path, forms, answer):
    """`load_problems` of a real data set; without a path, where data/prepare.py puts it."""
    path = path or FETCHED / f"{task.name}-train.jsonl"
    if not os.path.exists(path):
        raise input_error(f"no problems for --task {task.name}: {path} is not there. With a network, `python -m data.prepare "
                          f"{task.name}` fetches it; else give a file with --data")
    return load_problems(path, forms, answer)


def read_rows(path):
    """The lines of a JSON Lines file -> (where it stands, what it says), without the empty ones."""
    try:
        with open(path, encoding="utf-8") as f:
            for i, line in enumerate(f, 1):
                if line.strip():
                    try:
                        yield f"{path} line {i}", json.loads(line)
                    except json.JSONDecodeError as e:
                        raise input_error(f"{path} line {i}: not JSON ({e.msg} at column {e.colno})") from None
                    except (ValueError, RecursionError):                  # a number of 5,000 digits, a thousand brackets
                        raise input_error(f"{path} line {i}: not JSON that can be read") from None
    except OSError as e:
        raise input_error(f"cannot read {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise input_error(f"{path}: not UTF-8 text (byte {e.start})") from None
