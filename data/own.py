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
    return f"{file}{f' line {lines[-1]}' if lines else ''}: {type(error).__name__}: {error}"


class Own(Task):
    safe = False

    def __init__(self, file, space):
        self.name, self.file, self.functions = str(file), file, space
        self.draws = callable(space.get("problem")) and callable(space.get("demonstrate"))
        self.loads = callable(space.get("load"))
        self.system = str(space.get("system", ""))

    def call(self, name, *args):
        try:
            return self.functions[name](*args)
        except Exception as e:
            raise input_error(told(e, self.file)) from None

    def pair(self, row, name):
        if isinstance(row, Problem):
            return row
        if not (isinstance(row, (tuple, list)) and len(row) == 2 and all(isinstance(x, str) for x in row)
                and row[0].strip()):
            raise input_error(f"{self.file}: {name} gave {row!r:.200}, not a pair of texts (question, answer)")
        return Problem(str(row[0]), str(row[1]))

    def load(self, path=""):
        if not callable(self.functions.get("load")):
            return super().load(path)
        rows = self.call("load", path)
        try:
            problems = [self.pair(row, "load") for row in rows]
        except TypeError:
            raise input_error(f"{self.file}: load gave {rows!r:.200}, not a list of pairs") from None
        if not problems:
            raise input_error(f"{self.file}: load gave no problems")
        return problems

    def prompt(self, question):
        if not callable(self.functions.get("prompt")):
            return question
        text = self.call("prompt", question)
        if not isinstance(text, str) or not text:
            raise input_error(f"{self.file}: prompt gave {text!r:.200}, not a text")
        return text

    def problem(self, rng):
        return self.pair(self.call("problem", rng), "problem")

    def demonstrate(self, problem, rng):
        text = self.call("demonstrate", problem, rng)
        if not isinstance(text, str):
            raise input_error(f"{self.file}: demonstrate gave {text!r:.200}, not a text")
        return text

    def measure(self):
        """Set prompt_length and answer_length, for a model from scratch: those of some problems and
        demonstrations, and a little more. The file may set them itself."""
        rng, prompts, answers = np.random.default_rng(0), [1], [1]
        for _ in range(MEASURED):
            problem = self.problem(rng)
            prompts.append(len(problem.prompt.encode()))
            answers += [len(self.demonstrate(problem, rng).encode()) + 1, len(problem.answer.encode()) + 1]
        self.prompt_length = int(self.functions.get("prompt_length", SLACK * max(prompts)))
        self.answer_length = int(self.functions.get("answer_length", SLACK * max(answers)))
        return self

    def reward(self, problem, text):
        return self.functions["reward"](problem, text)
