"""A task of your own: a Python file given as `--task mytask.py`, with functions of the names in
data/__init__.py. data/example_task.py is one for a model that reads, data/example_scratch.py one
for a model from scratch.

    reward(problem, text)      a number, 1 for a right answer; problem.prompt and .answer are texts
    load(path)                 [(question, answer), ...]; path is what --data says, or ""
    prompt(question)           what the model is to read (optional: the question)
    problem(rng)               (prompt, answer), drawn from a numpy Generator
    demonstrate(problem, rng)  one noisy worked answer
    system                     a system prompt (optional)

`load` makes it a task for --model, `problem` and `demonstrate` one for a model from scratch. The
file is run as any program that you start. Its reward runs in processes of its own, under a time
limit.
"""
import os
import pathlib
import reprlib
import sys
import threading
import traceback
from contextlib import contextmanager
from itertools import islice

import numpy as np

from data import Problem, Task, input_error

MOST = 10 ** 6                          # problems that a file may give, and tokens of each
LONG = 10                               # seconds after which a line says what takes so long
MEASURED = 500                          # problems whose lengths are measured
SLACK = 1.25                            # a drawn problem may be longer than those


def load_own(path):
    """The file -> a task. What is wrong with it is one line, with the number of the file's own."""
    file = pathlib.Path(os.path.realpath(path))
    if not os.path.isfile(file):                                          # a pipe would wait for ever
        raise input_error(f"--task {path} cannot be read: No such file")
    space = {"__name__": file.stem, "__file__": str(file)}
    with patience(file), told(file):                        # the user's program, no model's text
        exec(compile(file.read_bytes(), str(file), "exec"), space)
    return Own(file, space)


@contextmanager
def told(file, function=None):
    """An error of the user's file becomes one line, with the last of the file's lines that it came
    through. Also one that would end this program as if all were well, such as sys.exit(0)."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == str(file)]
        try:
            said = f"{type(e).__name__}: {e}"
        except BaseException:                                       # its own __str__ raises as well
            said = type(e).__name__
        if isinstance(e, SyntaxError) and e.filename == str(file):
            lines, said = [e.lineno], e.msg
        elif not lines and hasattr(function, "__code__"):
            lines = [function.__code__.co_firstlineno]
        where = f"{file} line {lines[-1]}" if lines else file
        raise input_error(f"{where}: {said}") from None


@contextmanager
def patience(file):
    """A line when the user's file takes long. A limit would end what is slow and right."""
    said = f"note: {file} has been at work for {LONG} s; Ctrl-C ends it"
    note = threading.Timer(LONG, print, [said], dict(file=sys.stderr, flush=True))
    note.daemon = True
    note.start()
    try:
        yield
    finally:
        note.cancel()


def fit(is_it, name, x, wanted):
    if not is_it:
        raise TypeError(f"{name} gave {reprlib.repr(x)}, not {wanted}")
    return x


def text(name, x):
    """A plain str: one of a class of its own could not be saved. A lone surrogate raises."""
    x = str.__str__(fit(isinstance(x, str) and (x or name != "prompt"), name, x, "a text"))
    x.encode()
    return x


def pair(name, x):
    x = (x.prompt, x.answer) if isinstance(x, Problem) else x
    texts = isinstance(x, (tuple, list)) and all(isinstance(t, str) for t in x)
    fit(texts and len(x) == 2 and x[0].strip(), name, x, "a pair of texts (question, answer)")
    return Problem(*(text(name, t) for t in x))


def pairs(name, x):
    rows = fit(hasattr(x, "__iter__"), name, x, "a list of pairs")
    rows = [pair(name, row) for row in islice(rows, MOST + 1)]
    if not 1 <= len(rows) <= MOST:
        raise ValueError(f"{name} gave {'more than a million' if rows else 'no'} problems")
    return rows


class Own(Task):
    safe = False

    def __init__(self, file, functions):
        has = {name for name, f in functions.items() if callable(f)}
        self.name, self.file, self.functions, self.has = str(file), file, functions, has
        self.loads, self.draws = "load" in has, {"problem", "demonstrate"} <= has
        with told(file):
            self.system = text("system", functions.get("system", ""))
        if "reward" not in has:
            raise input_error(f"{file} has no function reward(problem, text)")
        if not (self.loads or self.draws):
            raise input_error(f"{file} has neither load(path), for a model that reads, nor problem"
                              "(rng) and demonstrate(problem, rng), for a model from scratch")

    def call(self, name, read, *args):
        """What the file's function gives. What is wrong with it is one line."""
        with told(self.file, self.functions[name]):
            return read(name, self.functions[name](*args))

    def load(self, path=""):
        with patience(self.file):
            return self.call("load", pairs, path) if self.loads else super().load(path)

    def prompt(self, question):
        return self.call("prompt", text, question) if "prompt" in self.has else question

    def problem(self, rng):
        return self.call("problem", pair, rng)

    def demonstrate(self, problem, rng):
        return self.call("demonstrate", text, problem, rng)

    def reward(self, problem, text):
        return self.functions["reward"](problem, text)

    def measure(self):
        """Set prompt_length and answer_length, for a model from scratch: those of some problems and
        demonstrations, and a little more. The file may set them itself."""
        rng, prompts, answers = np.random.default_rng(0), [1], [1]
        with patience(self.file):
            for _ in range(MEASURED):
                problem = self.problem(rng)
                prompts.append(len(problem.prompt.encode()))
                for answer in (self.demonstrate(problem, rng), problem.answer):
                    answers.append(len(answer.encode()) + 1)
        for name, longest in (("prompt_length", max(prompts)), ("answer_length", max(answers))):
            length = self.functions.get(name, int(SLACK * longest))
            with told(self.file):
                fit(type(length) is int and 0 < length <= MOST, name, length, "a number of tokens")
            setattr(self, name, length)
        return self
