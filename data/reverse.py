"""Reversal of a string of `digits` letters: `stone=` -> `enots`. The smallest task, and the pattern for one of your own."""

from data import Problem, Task


class Reverse(Task):
    draws, loads = True, False
    letters = "abcdefghijklmnopqrstuvwxyz"

    def __init__(self, digits, noise):
        self.digits, self.noise = digits, noise
        self.prompt_length, self.answer_length = digits + 1, digits + 1

    def problem(self, rng):
        word = "".join(self.letters[i] for i in rng.integers(0, 26, self.digits))
        return Problem(word + "=", word[::-1])

    def demonstrate(self, problem, rng):
        return "".join(self.letters[rng.integers(26)] if rng.random() < self.noise else c for c in problem.answer)

    def reward(self, problem, text):
        return float(text == problem.answer)
