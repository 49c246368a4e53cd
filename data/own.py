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
import pathlib
import traceback

import numpy as np

from data import Problem, Task, input_error

MEASURED = 500                          # problems whose lengths are measured
SLACK = 1.25                            # a drawn problem may be longer than those


def load_own(path):
    """The file -> a task. What is wrong with it is one line, with the file's own line where it has
    one."""
    file = pathlib.Path(path).resolve()
    space = {"__name__": file.stem, "__file__": str(file)}
    try:
        source = file.read_bytes()
    except OSError as e:
        raise input_error(f"--task {path} cannot be read: {e.strerror}") from None
    try:
        exec(compile(source, str(file), "exec"), space)     # the user's program, not a model's text
    except SyntaxError as e:
        raise input_error(f"{path} line {e.lineno}: {e.msg}") from None
    except Exception as e:
        raise input_error(told(e, file)) from None
    return Own(file, space)


def told(error, file):
    """An error of the user's file in one line, with the last of the file's lines that it came
    through."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    where = f"{file} line {lines[-1]}" if lines else file
    return f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def fit(is_it, name, x, wanted):
    if not is_it:
        raise TypeError(f"{name} gave {repr(x)[:99]}, not {wanted}")
    return x


def text(name, x):
    return fit(isinstance(x, str) and (x or name != "prompt"), name, x, "a text")


def pair(name, x):
    if isinstance(x, Problem):
        return x
    texts = isinstance(x, (tuple, list)) and all(isinstance(t, str) for t in x)
    fit(texts and len(x) == 2 and x[0].strip(), name, x, "a pair of texts (question, answer)")
    return Problem(*map(str, x))


def pairs(name, x):
    rows = [pair(name, row) for row in fit(hasattr(x, "__iter__"), name, x, "a list of pairs")]
    if not rows:
        raise ValueError(f"{name} gave no problems")
    return rows


class Own(Task):
    safe = False

    def __init__(self, file, functions):
        has = {name for name, f in functions.items() if callable(f)}
        self.name, self.file, self.functions, self.has = str(file), file, functions, has
        self.loads, self.draws = "load" in has, {"problem", "demonstrate"} <= has
        self.system = str(functions.get("system", ""))
        if "reward" not in has:
            raise input_error(f"{file} has no function reward(problem, text)")
        if not (self.loads or self.draws):
            raise input_error(f"{file} has neither load(path), for a model that reads, nor problem"
                              "(rng) and demonstrate(problem, rng), for a model from scratch")

    def call(self, name, read, *args):
        """What the file's function gives. What is wrong with it is one line."""
        try:
            return read(name, self.functions[name](*args))
        except Exception as e:
            raise input_error(told(e, self.file)) from None

    def load(self, path=""):
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
        for _ in range(MEASURED):
            problem = self.problem(rng)
            prompts.append(len(problem.prompt.encode()))
            for answer in (self.demonstrate(problem, rng), problem.answer):
                answers.append(len(answer.encode()) + 1)
        for name, longest in (("prompt_length", max(prompts)), ("answer_length", max(answers))):
            length = self.functions.get(name, int(SLACK * longest))
            if type(length) is not int or length < 1:
                raise input_error(f"{self.file}: {name} is {length!r}, not a number of tokens")
            setattr(self, name, length)
        return self
