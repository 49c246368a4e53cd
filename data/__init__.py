"""Tasks: problems with a checkable answer. A task is a class with these methods, or a Python file
that has functions of these names (data/own.py; `--task mytask.py`):

    reward(problem, text)          -> 1.0 for a right answer, else 0.0 (or between)

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
from dataclasses import dataclass

import numpy as np

FETCHED = pathlib.Path(__file__).resolve().parent / "fetched"
LARGEST = 1 << 30                                                     # bytes of a file of problems
NAMES = ("question", "problem", "prompt"), ("answer", "solution")     # of the two texts of a line


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

    def load(self, path=""):
        return load_problems(path)

    def prompt(self, question):
        return question

    def prepare(self):
        """What takes long is done now, and what is missing is said now."""


def short(text, most=290):
    """In one line, without its middle where it is long: a hostile name may have a megabyte."""
    text = text if len(text) <= most else f"{text[:most - 115]} ... {text[-110:]}"
    return " ".join(text.split())


def input_error(message):
    """A short precision.InputError. Imported late: a process that only grades does well without
    torch."""
    from precision import InputError
    return InputError(short(message))


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


def draw_problems(task, n, rng, exclude=(), others="others"):
    """n different problems of the task, none with a prompt in `exclude`. others: what these are."""
    found = {}
    for _ in range(100 * n):
        p = task.problem(rng)
        if p.prompt not in exclude:
            found.setdefault(p.prompt, p)
            if len(found) == n:
                return list(found.values())
    raise input_error(f"the task has too few different problems for {n} of them and {len(exclude)} "
                      f"{others}: more --digits, or fewer of them (--pool, --heldout, --problems)")


def load_problems(path, answer=lambda key, text: text, check=lambda prompt: None):
    """Problems from a JSON Lines file: {"prompt": "...", "answer": "..."} a line, or with other
    NAMES. answer(key, text): what of the second text is the answer. Its ValueError, or that of
    check(first text), says what is wrong with the line."""
    if not os.path.isfile(path):                                  # a pipe would wait for ever
        raise input_error(f"cannot read {path}: there is no such file")
    if os.path.getsize(path) > LARGEST:
        raise input_error(f"{path}: larger than {LARGEST >> 30} GiB")
    problems, i = [], 0
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as lines:
            for line in lines:
                i += 1
                if line.strip():
                    (key, question), (name, worked) = texts(json.loads(line))
                    if not question.strip():
                        raise ValueError(f"the {key} is empty")
                    check(question)
                    problems.append(Problem(question, answer(name, worked)))
    except OSError as e:
        raise input_error(f"cannot read {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise input_error(f"{path}: not UTF-8 text after line {i}: {e.reason}") from None
    except (ValueError, RecursionError) as e:    # a thousand brackets, a number of 5,000 digits
        why = f"not JSON ({e.msg})" if isinstance(e, json.JSONDecodeError) else e
        raise input_error(f"{path} line {i}: {why}") from None
    if not problems:
        raise input_error(f"{path}: no problems in it")
    return problems


def texts(row):
    """The two texts of a line -> (name, text) of each."""
    for names in NAMES:
        name = next((n for n in names if isinstance(row, dict) and isinstance(row.get(n), str)), "")
        if not name:
            raise ValueError(f'no text under "{names[0]}" (or {", ".join(names[1:])})')
        row[name].encode()                            # a lone surrogate has no bytes: ValueError
        yield name, row[name]


def fetched(name):
    """The file where data/prepare.py puts the problems of a real data set."""
    path = FETCHED / f"{name}-train.jsonl"
    if not path.exists():
        raise input_error(f"no problems for --task {name}: {path} is not there. With a network, "
                          f"`python -m data.prepare {name}` fetches it; else give --data FILE")
    return path
