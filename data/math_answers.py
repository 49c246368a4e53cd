r"""MATH: competition problems whose answers are LaTeX (Hendrycks et al. 2021, arXiv 2103.03874).

    {"problem": "... Express your answer as a common fraction.", "answer": "\\frac{17}{2}"}

Only the last \boxed{} of a model's text counts. What stands there is right if it is the answer,
letter for letter but for spaces, units and the like; if not, math-verify compares both as
mathematics.

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

LONGEST, DEEPEST = 500, 8                               # characters, brackets in each other
LARGEST_POWER, LARGEST_EXPANSION = 10_000, 30           # of numbers, of sums that hold a letter

BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def last_boxed(text):
    r"""What stands in the last \boxed{} or \fbox{} of a text, or after a \boxed without braces up
    to the end of its formula. None if there is none, or if it is never closed."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    box = BOX.match(text, start) if start >= 0 else None
    if not box:
        return None
    if text[box.end():box.end() + 1] != "{":
        return re.compile(r"[^\n$]*").match(text, box.end())[0].strip() or None
    depth = 0
    for found in BRACE.finditer(text, box.end()):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return text[box.end() + 1:found.start()].strip()
    return None


# --------------------------------------------------------------------------------------------------
# Letter for letter

SPELLINGS = [(re.compile(a), b) for a, b in (
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"(?<!\\)\\(?:(?:left|right|displaystyle)(?![a-zA-Z])|[!,;: ])|\\?\$|~", ""),
    (r"\{,\}", ","),
    # 50^\circ and 50, 84\% and 84: the question says which
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\?%", ""),
    (r"\s*[.\n]*$", ""),
    # a unit, but not "or", "and", "a.m.", nor a second answer
    (r"(?<=[^\s,])\s*\\(?:text|mbox|mathrm)\s*\{(?!\s*(?:or|and|[ap]\.?m\.?)\s*\})[^{}0-9]*\}"
     r"(?:\s*\^\s*\{?[23]\}?)?$", ""),
    (r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\frac\s*(\\[a-z]+|[0-9a-zA-Z])", r"\\frac{\1}"),
    (r"(\\frac\s*\{[^{}]*\})\s*(\\[a-z]+|[0-9a-zA-Z])", r"\1{\2}"),
    (r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])", lambda m: m[0].replace(",", "")),
    (r"\s+", " "),
    (r"(?<![0-9a-zA-Z]) | (?![0-9a-zA-Z])", ""),
)]


def plain(answer):
    """One spelling for what is written in many, as far as no mathematics is needed."""
    for pattern, text in SPELLINGS:
        answer = pattern.sub(text, answer.strip())
    return answer.strip()


# --------------------------------------------------------------------------------------------------
# As mathematics

COMMANDS = set("""frac dfrac tfrac cfrac sqrt pi theta alpha beta gamma phi omega lambda infty cdot
    times div pm mp cup cap in le leq ge geq lt gt ne neq sin cos tan cot sec csc arcsin arccos
    arctan log ln left right text textbf mbox mathrm mathbf mathbb circ degree begin end pmatrix
    bmatrix vmatrix emptyset varnothing quad ldots dots displaystyle overline lfloor rfloor lceil
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


SUBSCRIPT = re.compile(r"(?<=[0-9])_\{?([0-9]+)")
WORDS = re.compile(r"(?<![a-zA-Z\\{])[a-zA-Z]{3,}")
UNIT = re.compile(r"(?<=[0-9}]) ?(?:(?:cm|mm|km|ft|in|kg|lb|sq\.?|[a-zA-Z]{3,})(?: |$|(?=\^)))+"
                  r"(?:\^[23])?$")


@functools.lru_cache(4096)                                      # a group's answers repeat
def same(answer, said):
    """Whether `said` (a model's, LaTeX) is the same as `answer`."""
    if len(said) > LONGEST:                                     # before the first pattern sees it
        return said == answer
    answer, said = plain(answer), plain(said)
    if not re.search(r"(?<!\\)\b[a-zA-Z]", answer):
        said = UNIT.sub("", said)
    words = WORDS.search(answer)
    if answer == said or words and answer.lower() == said.lower():
        return True
    bases = [SUBSCRIPT.findall(t) for t in (answer, said)]      # 101_2 is read as 101
    if bases[1] and bases[0] != bases[1] or ":" in answer or words:
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
        return float(said is not None and same(problem.answer, said))
