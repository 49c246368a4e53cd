"""A task of your own: a Python file given as `--task mytask.py`, with functions of the names in
data/__init__.py. data/example_task.py is one for a model that reads, data/example_scratch.py one
for a model from scratch.

    reward(problem, text)         a number, 1 for a right answer; problem.prompt, problem.answer are texts
    load(path)                    [(question, answer), ...]; path is what --data says, or ""
    prompt(question)              what the model is to read (optional: the question)
    problem(rng)                  (prompt, answer), drawn from a numpy Generator
    demonstrate(problem, rng)     one noisy worked answer
    system                        a system prompt (optional)

`load` makes it a task for --model, `problem` and `demonstrate` one for a model from scratch. The
file is run as any program that you start. Its reward runs in processes of its own, under a time
limit.
"""
import pathlib
import traceback

import numpy as np

from data import Problem, Task, input_error

METHODS = ("reward", "load", "prompt", "problem", "demonstrate")
MEASURED = 500                          # problems whose lengths are measured
SLACK = 1.25                            # a drawn problem may be longer than those


def load_own(path):
    """The file -> a task. What is wrong with it is one line, with the file's own line where it has
    one."""
    file = pathlib.Path(path).resolve()
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise input_error(f"--task {path} cannot be read: {getattr(e, 'strerror', None) or e}") from None
    space = {"__name__": file.stem, "__file__": str(file)}
    try:
        exec(compile(source, str(file), "exec"), space)  # the user's own program, not a model's text
    except SyntaxError as e:
        raise input_error(f"{path} line {e.lineno}: {e.msg}") from None
    except Exception as e:
        raise input_error(told(e, file)) from None
    if not callable(space.get("reward")):
        raise input_error(f"{path} has no function reward(problem, text)")
    if not callable(space.get("load")) and not (callable(space.get("problem"))
                                                and callable(space.get("demonstrate"))):
        raise input_error(f"{path} has neither load(path), for a model that reads, nor problem(rng) and "
                          "demonstrate(problem, rng), for a model from scratch")
    return Own(file, space)


def told(error, file):
    """An error of the user's file in one line, with the last line of the file that it came
    through."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    where = f"{file} line {lines[-1]}" if lines else file
    return f"{where}: {type(error).__name__}: {one_line(error)}"


def one_line(x):
    return " ".join(f"{x}".split())[:200]


def every(rows):
    """The rows of a list or a generator as a list; what is neither as it is."""
    return list(rows) if hasattr(rows, "__iter__") else rows


class Own(Task):
    safe = False

    def __init__(self, file, space):
        self.name, self.file, self.functions = str(file), file, space
        self.draws = callable(space.get("problem")) and callable(space.get("demonstrate"))
        self.loads = callable(space.get("load"))
        self.system = str(space.get("system", ""))

    def call(self, name, *args, then=lambda x: x):
        try:
            return then(self.functions[name](*args))
        except Exception as e:
            raise input_error(told(e, self.file)) from None

    def pair(self, row, name):
        if isinstance(row, Problem):
            return row
        if not (isinstance(row, (tuple, list)) and len(row) == 2 and all(isinstance(x, str) for x in row)
                and row[0].strip()):
            raise input_error(f"{self.file}: {name} gave {one_line(repr(row))}, not a pair of texts (question, answer)")
        return Problem(str(row[0]), str(row[1]))

    def load(self, path=""):
        if not callable(self.functions.get("load")):
            return super().load(path)
        rows = self.call("load", path, then=every)
        if not isinstance(rows, list):
            raise input_error(f"{self.file}: load gave {one_line(repr(rows))}, not a list of pairs")
        problems = [self.pair(row, "load") for row in rows]
        if not problems:
            raise input_error(f"{self.file}: load gave no problems")
        return problems

    def prompt(self, question):
        if not callable(self.functions.get("prompt")):
            return question
        text = self.call("prompt", question)
        if not isinstance(text, str) or not text:
            raise input_error(f"{self.file}: prompt gave {one_line(repr(text))}, not a text")
        return text

    def problem(self, rng):
        return self.pair(self.call("problem", rng), "problem")

    def demonstrate(self, problem, rng):
        text = self.call("demonstrate", problem, rng)
        if not isinstance(text, str):
            raise input_error(f"{self.file}: demonstrate gave {one_line(repr(text))}, not a text")
        return text

    def measure(self):
        """Set prompt_length and answer_length, for a model from scratch: those of some problems and
        demonstrations, and a little more. The file may set them itself."""
        rng, prompts, answers = np.random.default_rng(0), [1], [1]
        for _ in range(MEASURED):
            problem = self.problem(rng)
            prompts.append(len(problem.prompt.encode()))
            answers += [len(self.demonstrate(problem, rng).encode()) + 1, len(problem.answer.encode()) + 1]
        for name, longest in (("prompt_length", max(prompts)), ("answer_length", max(answers))):
            length = self.functions.get(name, int(SLACK * longest))
            if type(length) is not int or length < 1:
                raise input_error(f"{self.file}: {name} is {one_line(repr(length))}, not a number of tokens")
            setattr(self, name, length)
        return self

    def reward(self, problem, text):
        return self.functions["reward"](problem, text)
