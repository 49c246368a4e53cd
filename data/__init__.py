"""Tasks: problems with a checkable answer, and for each the noisy demonstrator whose imitation makes the base model.

A task is an object with
    prompt_length, answer_length   bounds in tokens, the answer's with its stop token
    problem(rng)                   -> Problem(prompt, answer), drawn from a numpy Generator
    demonstrate(problem, rng)      -> the text of one noisy worked answer
    reward(problem, text)          -> 1.0 or 0.0, from the text of an answer alone
A task of your own is a class like data/reverse.py and one line in TASKS below.
"""
import json
import os
import pathlib
from dataclasses import dataclass

import numpy as np

from precision import InputError

# what is made once and kept: base models, compiled operators
CACHE = pathlib.Path(os.environ.get("TENBIT_CACHE") or pathlib.Path(__file__).resolve().parent.parent / ".cache")


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str


def make_task(name, digits, noise):
    from data.addition import Addition
    from data.reverse import Reverse
    return {"addition": Addition, "reverse": Reverse}[name](digits, noise)


TASKS = ("addition", "reverse")


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
    raise InputError(f"the task has too few different problems for {n} of them and {len(exclude)} others: lengthen it with "
                     "--digits, or lower --pool and --heldout")


def load_problems(path):
    """Problems from a JSON Lines file: one {"prompt": "...", "answer": "..."} a line. Empty lines are skipped."""
    problems = []
    try:
        with open(path, encoding="utf-8") as f:
            for i, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as e:
                    raise InputError(f"{path} line {i}: not JSON ({e.msg} at column {e.colno})") from None
                for key in ("prompt", "answer"):
                    if not isinstance(row, dict) or not isinstance(row.get(key), str):
                        raise InputError(
                            f'{path} line {i}: no text under "{key}"; a line is {{"prompt": "...", "answer": "..."}}'
                        )
                if not row["prompt"]:
                    raise InputError(f"{path} line {i}: the prompt is empty")
                problems.append(Problem(row["prompt"], row["answer"]))
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text (byte {e.start})") from None
    if not problems:
        raise InputError(f"{path}: no problems in it")
    return problems
