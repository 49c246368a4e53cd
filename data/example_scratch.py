"""A task of your own for a model from scratch: --task data/example_scratch.py

The larger of two numbers, `17?42=` -> `42`. The demonstrator guesses one time in three.
"""


def problem(rng):
    a, b = rng.integers(0, 100, 2)
    return f"{a}?{b}=", str(max(a, b))


def demonstrate(problem, rng):
    numbers = problem.prompt[:-1].split("?")
    return numbers[rng.integers(2)] if rng.random() < 1 / 3 else problem.answer


def reward(problem, text):
    return float(text == problem.answer)
