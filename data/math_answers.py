r"""MATH: competition problems whose answers are LaTeX (Hendrycks et al. 2021, arXiv 2103.03874).

    {"problem": "... Express your answer as a common fraction.", "answer": "\\frac{17}{2}"}

Only the last \boxed{} of a model's text counts. What stands there is right if it is the answer,
letter for letter but for spaces, its unit (data/units.py) and the like; if not, math-verify
compares both as mathematics. To it 7=5 is 5, a set is a point, and two numbers beside each other
are a product: `another_form` refuses these first.

What a model wrote is hostile until shown otherwise. Nothing that is read here is evaluated:
math-verify's way from LaTeX to sympy has it in one place, where sympy turns the text of a number
into a number, and `comparison` replaces that. And 9^{9^{9}} or 99999! hang inside the
multiplication of integers, where no signal reaches: `tame` lets through only commands that answers
need, short numbers and small exponents. data/guard.py stops the rest when its time is over.
"""
import functools
import logging
import math
import re

from data import Task, fetched, input_error, load_problems
from data.units import NEVER, is_unit

LONGEST, DEEPEST = 500, 8                               # characters, brackets in each other
LARGEST_POWER, LARGEST_EXPANSION = 10_000, 30           # of numbers, of sums that hold a letter

BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
BRACE = re.compile(rf"({BOX.pattern})\{{?|\\\\(?!boxed|fbox)|\\[{{}}]|[{{}}]")


def last_boxed(text):
    r"""What stands in the last \boxed{} or \fbox{} of a text, or after a \boxed without braces up
    to the end of its formula. None if there is none, if it is never closed, or if it is inside of
    another box that holds more."""
    opened, closed, last = [], [], None
    for found in BRACE.finditer(text):
        if found[1]:
            last = found.end()
        if found[0] == "{" or found[1] and found[0][-1] == "{":
            opened.append((found.start(), found.end(), bool(found[1])))
        elif found[0] == "}" and opened:
            closed.append((*opened.pop(), found.start()))
    if last is None:
        return None
    if text[last - 1] != "{":
        return re.compile(r"[^\n$]*").match(text, last)[0].strip() or None
    boxes = [(start, end) for _, start, box, end in closed if box]
    end = next((end for start, end in boxes if start == last), None)
    if end is None:
        return None
    first, past = min((b for b in boxes if b[1] >= end), default=(last, end))
    around = text[first:last] + text[end:past]
    return None if BOX.sub("", around).strip("{} \n$") else text[last:end].strip()


# --------------------------------------------------------------------------------------------------
# Letter for letter

def joined(found):
    """1,234 as 1234."""
    return re.sub("[^0-9]", "", found[0])


def mixed(found):
    """3 1/2 as 3\\frac{1}{2}, but 70 4/2 is two numbers."""
    whole, over, under = found.groups()
    return rf"{whole}\frac{{{over}}}{{{under}}}" if int(over) < int(under) else found[0]


TEXT = r"\\(?:text|mbox|mathrm|textbf|mathbf)"
# 1,234: what parts thousands has to be the same everywhere. A list (1,234) has two members
THOUSANDS = (r"(?<![0-9.,])(?<![0-9] )[1-9][0-9]{0,2}(?P<by>%s)[0-9]{3}(?:(?P=by)[0-9]{3})*"
             r"(?![0-9]|(?P=by)[0-9]|%s)")
SPELLINGS = [(re.compile(a), b) for a, b in (
    ("−", "-"),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (THOUSANDS % (r",\\!|\{,\}|\\[, ]|[\u00a0\u2009\u202f]", "(?!)"), joined),
    (r"(?<!\\)\\(?:(?:left|right|displaystyle)(?![a-zA-Z])|!)", ""),
    (r"(?<!\\)\\[,;: ]|(?<=[0-9a-zA-Z}])~(?=[a-zA-Z\\])", " "),
    # dollars, and where a formula begins and ends; not 7$2
    (r"(?<![0-9a-zA-Z}])\\?\$|\\?\$(?![0-9a-zA-Z\\{(-])", ""),
    # 50^\circ and 50: the question says which; not 7^\circ 2
    (r"(?<=[0-9a-zA-Z)}])\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))(?!\s*\.?\s*\w)", ""),
    (r"\s*(?<!\.)\.?\s*$", ""))]
AFTER_UNIT = [(re.compile(a), b) for a, b in (
    (rf"\s*,?(?:\s*{TEXT}\s*\{{\s*(?:or|and)\s*\}}|\s(?:or|and)\s)\s*", ","),
    (rf"{TEXT}\s*\{{([^{{}}]*)\}}", r" \1 "),
    (r"\\frac\s*(\\[a-z]+|[0-9a-zA-Z])", r"\\frac{\1}"),
    (r"(\\frac\s*\{[^{}]*\})\s*(\\[a-z]+|[0-9a-zA-Z])", r"\1{\2}"),
    (r"\s+", " "),
    (r"(?<![0-9.,/])([0-9]{1,9}) ([0-9]{1,9})/([0-9]{1,9})(?![0-9/])", mixed),
    (r"(?<![0-9a-zA-Z.]) | (?![0-9a-zA-Z.])", ""))]
LOOSE = re.compile(THOUSANDS % ("[ ,]", r",|\s*/| [0-9]"))
LIST = re.compile(r"[(\[]|\\\{")
UNIT = re.compile(r"(?<=[^\s,%\\])\s*(?:\\(?:text|mbox|mathrm)\s*\{([^{}0-9]*)\}"
                  r"(\s*\^\s*\{?[23]\}?)?|\\?(%))$")


def plain(answer, question=""):
    """One spelling for what is written in many, as far as no mathematics is needed, and without
    what is_unit takes for a unit."""
    for pattern, text in SPELLINGS:
        answer = pattern.sub(text, answer.strip())
    if not LIST.search(answer):
        answer = LOOSE.sub(joined, answer)
    found = UNIT.search(answer)
    if found and is_unit("".join(part.strip() for part in found.groups() if part), question):
        answer = answer[:found.start()]
    for pattern, text in AFTER_UNIT:
        answer = pattern.sub(text, answer.strip())
    return answer.strip()


# --------------------------------------------------------------------------------------------------
# As mathematics

COMMANDS = set("""frac dfrac tfrac cfrac sqrt pi theta alpha beta gamma phi omega lambda infty cdot
    times div pm mp cup cap in le leq ge geq lt gt ne neq sin cos tan cot sec csc arcsin arccos
    arctan log ln left right text textbf mbox mathrm mathbf mathbb circ degree begin end pmatrix
    bmatrix vmatrix emptyset varnothing quad displaystyle overline lfloor rfloor lceil
    rceil""".split())
# numbers of more than 30 digits, n!, 1E9, (n)_k: all of them explode
WILD = re.compile(r"[0-9]{31}|(?<!\\)!|[0-9]\s*[eE]\s*[-+]?\s*[0-9]|\)\s*_"
                  r"|\\begin\s*\{(?![pbv]matrix\})")
POWER = re.compile(r"([a-zA-Z)\]}]?)\s*\^\s*(\{(?:[^{}^]|\{[^{}^]*\})*\}|\\[a-zA-Z]+|[^{^])")


def tame(latex):
    """Whether reading and comparing this can be expected to end: short, known commands, no towers,
    no large powers."""
    if len(latex) > LONGEST or not latex.isascii() or WILD.search(latex):
        return False
    depth = deepest = 0
    for c in latex:
        depth += (c in "{[(") - (c in ")]}")
        deepest = max(deepest, abs(depth))
    powers = POWER.findall(latex)
    exponents = [(base, int(n)) for base, exponent in powers if not base.isalpha()
                 for n in re.findall(r"[1-9][0-9]*", exponent)]
    letters = re.search(r"(?<![a-zA-Z\\])[a-zA-Z]", latex)    # (x+y)^{99}: sympy multiplies it out
    return (deepest <= DEEPEST and set(re.findall(r"\\([a-zA-Z]+)", latex)) <= COMMANDS
            and len(powers) == latex.count("^")
            and math.prod(n for _, n in exponents) <= LARGEST_POWER
            and not (letters and math.prod(n for base, n in exponents if base) > LARGEST_EXPANSION))


@functools.cache
def comparison():
    """-> a function: whether two LaTeX texts are the same mathematics. Imports sympy, which takes a
    second."""
    try:
        from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
        from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
        from math_verify.grader import verify
        from math_verify.parser import parse_latex_cached
        from sympy import Expr, Rational
    except ImportError as e:
        raise input_error("--task math compares answers with math-verify, which is not here or "
                          f"not complete ({e}): pip install -e '.[math]'") from None
    logging.getLogger("math_verify").setLevel(logging.ERROR)     # its time limit is off: ours is on
    # sympy.Number(text), as it was, goes through eval
    _Latex2Sympy.parse_number = lambda self, text: Rational(text.replace(",", ""))
    normal = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True,
                                 boxed="none", equations=False)

    def compare(*latex):
        both = [parse_latex_cached(normalize_latex(text, normal)) for text in latex]
        a, b = (x.doit() if isinstance(x, Expr) else x for x in both)
        if getattr(a, "is_Rational", False) and getattr(b, "is_Rational", False):
            return a == b                                       # verify takes 2^{-98} for 0
        return bool(verify(*both, timeout_seconds=None))
    return compare


SUBSCRIPT = re.compile(r"(?<=[0-9])_(?:\{([0-9]+)\}|([0-9]))")
WORDS = re.compile(r"(?<![a-zA-Z\\{])[a-zA-Z]{3,}")
LOWER = re.compile(r"(?<![a-zA-Z\\])[a-z]{2,}")
BARE = re.compile(r"(?<=[0-9}]) ?((?:(?:cm|mm|km|ft|in|kg|lb|sq\.?|[a-zA-Z]{3,})(?: |$|(?=\^)))+"
                  r"(?:\^[23])?)$")                             # a unit without \text
IN_TEXT = re.compile(rf"{TEXT}\s*\{{([^{{}}]*)\}}")
NAMED = re.compile(r"(^|,)(?:[a-zA-Z]|\\[a-z]+)(?:_[0-9a-z])?(?:\([a-z]\))?=(?!=)")  # x=5, f(x)=5
# signs of another meaning, and two numbers beside each other, which math-verify multiplies
DOUBTFUL = re.compile(r"circ|[$~%'\"?]|\.\.|[0-9] \.?[0-9]|\. |\\(?:pi|infty|theta) ?[0-9]"
                      r"|(?<!\\begin\{[pbv]matrix)[})] ?[0-9]|(?<![a-zA-Z\\])[a-zA-Z]{1,2} ?[0-9]")


def brackets(answer):
    """The outer brackets of a point, an interval or their union; a set in braces has none."""
    first = answer[:1]
    return first + answer[-1:] if first == "[" or first == "(" and "," in answer else ""


def another_form(answer, said):
    """Whether these differ before any mathematics: in what math-verify overlooks."""
    return bool(DOUBTFUL.search(said) or WORDS.search(said)
                or NEVER & set(LOWER.findall(said)) or "=" in said and "=" not in answer
                or answer.count(",") != said.count(",") or brackets(answer) != brackets(said))


@functools.lru_cache(4096)                                      # a group's answers repeat
def same(answer, said, question=""):
    """Whether `said` (a model's, LaTeX) is the same as `answer`."""
    if len(said) > LONGEST:                                     # before the first pattern sees it
        return said == answer
    named = "percent" * ("%" in answer) + " degree" * ("circ" in answer)
    asked = " ".join([question, named, *IN_TEXT.findall(answer)])
    answer, said = plain(answer), plain(said, asked)
    unit = BARE.search(said)
    if unit and not re.search(r"(?<!\\)\b[a-zA-Z]", answer) and is_unit(unit[1], asked):
        said = said[:unit.start()]
    words = WORDS.search(answer)
    if answer == said or words and answer.lower() == said.lower():
        return True
    if "=" not in answer:
        said = NAMED.sub(r"\1", said)
    if SUBSCRIPT.search(answer) or SUBSCRIPT.search(said):      # math-verify reads 101_2 as 101
        answer, said = (SUBSCRIPT.sub(r"_\1\2", text) for text in (answer, said))
        return said in (answer, answer.partition("_")[0])
    if ":" in answer or words or another_form(answer, said):
        return False
    try:
        return tame(answer) and tame(said) and comparison()(answer, said)
    except Exception:                           # neither a sentence nor gibberish can be compared
        return False


def in_box(key, text):
    """What of a file's text is the answer: all of an "answer", of a "solution" its last box."""
    answer = last_boxed(text) if key == "solution" or "\\boxed" in text else text
    if not answer:
        raise ValueError(f"no \\boxed{{}} in its {key}: {text[-60:]!r}")
    return answer


class Math(Task):
    name, safe = "math", False

    def load(self, path=""):
        """Of a JSON Lines file with answers, or with solutions that have theirs in a box."""
        return load_problems(path or fetched(self.name), in_box)

    def prompt(self, question):
        return f"{question}\n\nReason step by step, and put your final answer within \\boxed{{}}."

    def prepare(self):
        """Import the grader now, and complain now if it is missing."""
        comparison()
        return self

    def reward(self, problem, text):
        """1.0 when the text's last box says what the problem's answer says."""
        said = last_boxed(text)
        return float(said is not None and same(problem.answer, said, problem.prompt))
