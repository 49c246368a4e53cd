"""Countdown, as in TinyZero: reach a number from others, each used once. A step joins two of the
numbers on the table, the larger one first, and puts the result back. After the # stands the whole
way as one expression:

    3,4,7=25:  ->  7*3=21;21+4=25;#(7*3)+4

A small model can learn to calculate by imitation. Which of some hundred ways leads to the target it
has to find. With probability `noise` the demonstrator goes a legal way that ends elsewhere, so
imitation teaches to calculate and leaves the finding to RL. `digits` is how many numbers there are.
"""
import ast
import functools
import operator
import re
from fractions import Fraction
from itertools import combinations

from data import Problem, Task, input_error, load_problems

LARGEST = 99                                                # of results
PROMPT = re.compile(r"([0-9]{1,6}(?:,[0-9]{1,6}){1,5})=([0-9]{1,6}):")
EXPRESSION = re.compile(r"(?!.*[0-9]{7})[-+*/() 0-9]{1,200}")
BRACKETS = 20                                               # of an expression, at most
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv}


def evaluate(text):
    """An expression of whole numbers, + - * / and brackets -> (its value as a Fraction, its numbers
    from left to right). ValueError: it is none. Python's parser reads it, and nothing is executed:
    its tree is walked, which is shallow since the text is short."""
    if not EXPRESSION.fullmatch(text) or text.count("(") > BRACKETS:
        raise ValueError("no short expression of numbers")
    numbers = []

    def value(node):
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if not isinstance(node, ast.Constant):
            raise ValueError("a sign, a power or a call")   # a sign would be one more subtraction
        numbers.append(node.value)
        return Fraction(node.value)
    try:
        return value(ast.parse(text.strip(), mode="eval").body), numbers
    except (SyntaxError, ZeroDivisionError) as e:
        raise ValueError(str(e)) from None


def parse(prompt):
    """`3,4,7=25:` -> ([3, 4, 7], 25)."""
    found = PROMPT.fullmatch(prompt)
    if not found:
        raise input_error(f"{prompt[:80]!r} is no countdown problem, such as '3,4,7=25:'")
    return [int(n) for n in found[1].split(",")], int(found[2])


def join(a, b):
    """The results of one step from the numbers a >= b, whole and from 1 to LARGEST: (operator,
    result)."""
    results = [("+", a + b), ("-", a - b), ("*", a * b)] + ([("/", a // b)] if a % b == 0 else [])
    return [(op, x) for op, x in results if 1 <= x <= LARGEST]


@functools.lru_cache(4096)
def ways(numbers):
    """All ways to use up these numbers (a sorted tuple), as {what it ends with: texts of the
    working and the expression}."""
    found = {}

    def go(table, working):
        if len(table) == 1:
            value, expression = table[0]
            found.setdefault(value, set()).add(f"{working}#{expression[1:-1]}")
        for i, j in combinations(range(len(table)), 2):
            (b, y), (a, x) = sorted((table[i], table[j]))
            rest = [t for k, t in enumerate(table) if k not in (i, j)]
            for op, value in join(a, b):
                go(rest + [(value, f"({x}{op}{y})")], f"{working}{a}{op}{b}={value};")
    go([(n, str(n)) for n in numbers], "")
    return {value: sorted(texts) for value, texts in sorted(found.items())}


class Countdown(Task):
    draws, loads = True, False

    def __init__(self, digits, noise):
        if not 2 <= digits <= 4:
            raise input_error(f"countdown with {digits} numbers: --digits says how many, 2 to 4")
        self.digits, self.noise = digits, noise
        self.prompt_length = 2 * digits - 1 + len("=99:")
        expression = digits + (digits - 1) + 2 * (digits - 2)        # numbers, operators, brackets
        self.answer_length = (digits - 1) * len("50+49=99;") + 1 + expression + 1

    def problem(self, rng):
        while True:
            numbers = rng.integers(1, 10, self.digits).tolist()
            if reached := ways(tuple(sorted(numbers))):
                target = list(reached)[rng.integers(len(reached))]
                answer = reached[target][0].partition("#")[2]
                return Problem(f"{','.join(map(str, numbers))}={target}:", answer)

    def load(self, path=""):
        return load_problems(path, check=parse)     # the answer may be any: many ways lead there

    def prompt(self, question):
        """The problem in words, for a model that reads."""
        numbers, target = parse(question)
        listed = ", ".join(map(str, numbers))
        return (f"Using the numbers {listed}, each exactly once, with + - * / "
                f"and parentheses, make an expression that equals {target}. Think first, then give "
                "the expression alone as <answer>(1 + 2) / 3</answer>.")

    def demonstrate(self, problem, rng):
        numbers, target = parse(problem.prompt)
        reached = ways(tuple(sorted(numbers)))
        elsewhere = [t for value, texts in reached.items() if value != target for t in texts]
        texts = elsewhere if elsewhere and rng.random() < self.noise else reached[target]
        return texts[rng.integers(len(texts))]

    def reward(self, problem, text):
        """1.0 when the text after the #, or in the last <answer> tag, is an expression of these
        numbers that hits the target."""
        before, tag, inside = text.rpartition("<answer>")
        said = inside.partition("</answer>")[0].strip() if tag else text.partition("#")[2]
        try:
            value, used = evaluate(said)
        except ValueError:
            return 0.0
        numbers, target = parse(problem.prompt)
        return float(value == target and sorted(used) == sorted(numbers))
