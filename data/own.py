"""A task of your own, for a model that can read: a Python file given as `--task mytask.py`. data/example_task.py is one.

    problems()                        -> [(question, answer), ...]; or problems(path), which is given --data
    reward(question, answer, text)    -> a number, 1 for a right answer
    prompt(question)                  -> what the model is to read (optional: the question)

The file is run as any program that you start. Its reward is asked for in processes of its own, under a time limit.
"""
import inspect
import pathlib
import traceback

from data import Problem, input_error


def load_own(path):
    """The file -> a task. What is wrong with it is one line, with the file's own line where there is one."""
    file = pathlib.Path(path).resolve()
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise input_error(f"--task {path} cannot be read: {getattr(e, 'strerror', None) or e}") from None
    space = {"__name__": file.stem, "__file__": str(file)}
    try:
        exec(compile(source, str(file), "exec"), space)     # the user's own program, not a model's text
    except SyntaxError as e:
        raise input_error(f"{path} line {e.lineno}: {e.msg}") from None
    except Exception as e:
        raise input_error(f"{where(e, file)}: {type(e).__name__}: {e}") from None
    for name in ("problems", "reward"):
        if not callable(space.get(name)):
            raise input_error(f"{path} has no function {name}: a task has problems() and reward(question, answer, text)")
    return Own(file, space)


def where(error, file):
    """The last line of the user's file that an error came through."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    return f"{file} line {lines[-1]}" if lines else str(file)


class Own:
    safe = False

    def __init__(self, file, space):
        self.name, self.file, self.space = str(file), file, space
        self._prompt = space.get("prompt") or (lambda question: question)

    def load(self, path=""):
        make = self.space["problems"]
        try:
            rows = list(make(path) if inspect.signature(make).parameters else make())
        except Exception as e:
            raise input_error(f"{where(e, self.file)}: {type(e).__name__}: {e}") from None
        for row in rows:
            if not (isinstance(row, (tuple, list)) and len(row) == 2 and all(isinstance(x, str) for x in row) and row[0].strip()):
                raise input_error(f"{self.file}: problems() gave {row!r}; it gives pairs of texts, (question, answer)")
        if not rows:
            raise input_error(f"{self.file}: problems() gave no problems")
        return [Problem(*row) for row in rows]

    def prompt(self, question):
        return self._prompt(question)

    def reward(self, problem, text):
        return self.space["reward"](problem.prompt, problem.answer, text)
