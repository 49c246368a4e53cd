"""Arithmetic that a model wrote, evaluated without `eval`: a parser of thirty lines with bounds of its own.

    sum     = product, then any number of  + product  or  - product
    product = factor, then any number of  * factor  or  / factor
    factor  = digits, or  ( sum )

Whatever is not in this grammar is refused: no sign in front of a number (it would smuggle in a second subtraction), no powers, no
names, no decimal points. The bounds make the work linear in the text and the recursion shallow, whatever is thrown at it.
"""
import re
from fractions import Fraction

LONGEST, MOST_DIGITS, DEEPEST = 200, 6, 20
TOKEN = re.compile(r"[0-9]+|[-+*/()]| +")


def evaluate(text):
    """An expression's text -> (its value as a Fraction, the integers in it from left to right). ValueError says what is wrong."""
    if len(text) > LONGEST:
        raise ValueError(f"longer than {LONGEST} characters")
    found = TOKEN.findall(text)
    if "".join(found) != text:
        raise ValueError("something other than digits, + - * / ( ) and spaces")
    tokens, used = ["the end", *(t for t in reversed(found) if t[0] != " ")], []          # a stack: the next token is the last
    value = _sum(tokens, used, 0)
    if len(tokens) > 1:
        raise ValueError(f"{tokens[-1]} is out of place")
    return value, used


def _sum(tokens, used, depth):
    value = _product(tokens, used, depth)
    while tokens[-1] in ("+", "-"):
        plus = tokens.pop() == "+"
        value += _product(tokens, used, depth) * (1 if plus else -1)
    return value


def _product(tokens, used, depth):
    value = _factor(tokens, used, depth)
    while tokens[-1] in ("*", "/"):
        if tokens.pop() == "*":
            value *= _factor(tokens, used, depth)
        else:
            by = _factor(tokens, used, depth)
            if by == 0:
                raise ValueError("a division by zero")
            value /= by
    return value


def _factor(tokens, used, depth):
    if tokens[-1].isdecimal():
        if len(tokens[-1]) > MOST_DIGITS:
            raise ValueError(f"a number of more than {MOST_DIGITS} digits")
        used.append(int(tokens.pop()))
        return Fraction(used[-1])
    if tokens[-1] != "(":
        raise ValueError(f"{tokens[-1]} is out of place")
    if depth == DEEPEST:
        raise ValueError(f"more than {DEEPEST} brackets in each other")
    tokens.pop()
    value = _sum(tokens, used, depth + 1)
    if tokens.pop() != ")":
        raise ValueError("an open bracket")
    return value
