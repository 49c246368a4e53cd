"""Tasks: problems with a checkable answer. A task is a class with these methods, or a Python file
that has functions of these names (data/own.py; `--task mytask.py`):

    reward(problem, text)          -> 1.0 for a right answer, else 0.0 (or between), from its text alone

A model from scratch learns a task that draws its own problems, by imitating a noisy demonstrator
first:

    problem(rng)                   -> Problem(prompt, answer), drawn from a numpy Generator
    demonstrate(problem, rng)      -> the text of one noisy worked answer

A model that can read (--model) is asked problems of a data set:

    load(path)                     -> a list of Problems; path is --data, or ""
    prompt(question)               -> the text that the model is to read

`class Task` has what a task leaves out. Ours are data/addition.py, the smallest data/reverse.py.
"""
import json
import os
import pathlib
import stat
from dataclasses import dataclass

import numpy as np

FETCHED = pathlib.Path(__file__).resolve().parent / "fetched"  # where data/prepare.py puts data sets


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str


class Task:
    """name: as --task has it. draws: whether `problem` and `demonstrate` are there. loads: whether
    its problems for --model come from `load`. safe: the reward is a bounded parser of ours and runs
    where it is called; else data/guard.py runs it in processes of its own. prompt_length,
    answer_length: tokens at most, the answer's with its stop token (0: not known beforehand)."""
    name, draws, loads, safe = "", False, True, True
    prompt_length = answer_length = 0
    system = ""                                               # a system prompt for models that read

    def problem(self, rng):
        raise NotImplementedError(f"{self.name} draws no problems")

    def demonstrate(self, problem, rng):
        raise NotImplementedError(f"{self.name} has no demonstrator")

    def load(self, path=""):
        return load_problems(path)

    def prompt(self, question):
        return question

    def prepare(self):
        """What takes long is done now, and what is missing is said now."""

    def reward(self, problem, text):
        raise NotImplementedError


def input_error(message):
    """A precision.InputError. Imported late: a process that only grades does well without torch."""
    from precision import InputError
    return InputError(message)


def seed_of(key):
    """A SeedSequence for this key of non-negative integers, such as (seed, purpose, step). It
    ignores zeros at the end of what it gets, so the number of parts comes first, and each part is
    two words."""
    words = [w for k in key for w in (k & 0xFFFFFFFF, k >> 32)]
    return np.random.SeedSequence([len(key), *words])


def stream(*key):
    """A numpy Generator for this key. Randomness that is a function of the step needs no state to
    be saved."""
    return np.random.default_rng(seed_of(key))


def uniforms(key, problems, samples, length):
    """(length, problems x samples) FP64 in [0, 1), 53 bits each: the random numbers of answers, a
    problem's samples next to each other. problems: their numbers.

    Each is a function of (key, problem, sample, position) and of nothing else: not of how many
    others there are. Philox (Salmon et al. 2011) is a function of a key and a counter; an answer
    has a part of the counter to itself."""
    philox = np.random.Philox(key=seed_of(key).generate_state(2, np.uint64))
    fresh, generator = philox.state, np.random.Generator(philox)
    out = np.empty((length, len(problems) * samples))
    for i in range(out.shape[1]):
        fresh["state"]["counter"][:] = 0, 0, i % samples, problems[i // samples]
        philox.state = fresh
        out[:, i] = generator.random(length)
    return out


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
    raise input_error(f"the task has too few different problems for {n} of them and {len(exclude)} "
                      "others: more --digits, or fewer of them (--pool, --heldout, --problems)")


def load_problems(path, forms=(("prompt", "answer"),), answer=None):
    """Problems from a JSON Lines file: one {"prompt": "...", "answer": "..."} a line.

    forms: the pairs of names that a line's two texts may have, the first that fits counts.
    answer(key, text): what of the second text is the answer; its ValueError says what is wrong with
    the line."""
    problems = []
    for place, row in read_rows(path):
        row = row if isinstance(row, dict) else {}
        fits = [f for f in forms if set(f) <= set(row)] or [f for f in forms if f[0] in row] or [forms[0]]
        question, worked = fits[0]
        for key in (question, worked):
            if not isinstance(row.get(key), str):
                raise input_error(f'{place}: no text under "{key}"; a line is '
                                  f'{{"{question}": "...", "{worked}": "..."}}')
        if not row[question].strip():
            raise input_error(f"{place}: the {question} is empty")
        try:
            said = answer(worked, row[worked]) if answer else row[worked]
        except ValueError as e:
            raise input_error(f"{place}: {e}") from None
        problems.append(Problem(row[question], said))
    if not problems:
        raise input_error(f"{path}: no problems in it")
    return problems


def load_real(task, path, forms, answer):
    """`load_problems` of a real data set; without a path, from where data/prepare.py puts it."""
    path = path or FETCHED / f"{task.name}-train.jsonl"
    if not os.path.exists(path):
        raise input_error(f"no problems for --task {task.name}: {path} is not there. With a network, "
                          f"`python -m data.prepare {task.name}` fetches it; else give --data FILE")
    return load_problems(path, forms, answer)


def read_rows(path):
    """The lines of a JSON Lines file -> (where it stands, what it says), without the empty ones."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):               # a pipe would wait for ever
            raise input_error(f"{path} is not a file")
        with open(path, encoding="utf-8-sig") as f:
            for i, line in enumerate(f, 1):
                if line.strip():
                    try:
                        yield f"{path} line {i}", json.loads(line)
                    except json.JSONDecodeError as e:
                        raise input_error(f"{path} line {i}: not JSON ({e.msg} at column {e.colno})") from None
                    except (ValueError, RecursionError):  # a number of 5,000 digits, a thousand brackets
                        raise input_error(f"{path} line {i}: not JSON that can be read") from None
    except OSError as e:
        raise input_error(f"cannot read {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise input_error(f"{path}: not UTF-8 text (byte {e.start})") from None
