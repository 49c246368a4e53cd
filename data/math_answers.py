r"""MATH: competition problems whose answers are LaTeX (Hendrycks et al. 2021, arXiv 2103.03874).

    {"problem": "... Express your answer as a common fraction.", "answer": "\\frac{17}{2}"}

Only the last \boxed{} of a model's text counts. What stands there is right if it is the answer, letter for letter but for spaces
and spelling (\dfrac for \frac); if not, math-verify reads both and compares them as mathematics.

`python -m data.prepare math` fetches them, `math-sanity` the 1,460 that the FP16 paper's sanity test trains on.

What a model wrote is hostile until shown otherwise. Nothing that is read here is evaluated: math-verify's way from LaTeX to sympy
has it in one place, where sympy turns the text of a number into a number, and `reader` below does that itself. And 9^{9^{9}} or
99999! hang inside the multiplication of integers, where no signal reaches: `tame` lets through only commands that answers need,
short numbers and small exponents. The rest is a matter of time, and data/guard.py stops what takes too long.
"""
import functools
import logging
import re

from data import Task, fetched, input_error, load_problems

LONGEST, MOST_DIGITS, DEEPEST, LARGEST_POWER, LARGEST_EXPANSION = 500, 30, 8, 10_000, 30

BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def last_boxed(text):
    r"""What stands in the last \boxed{} or \fbox{} of a text, or after a \boxed without braces up to the end of its formula.
    None if there is none, or if it is never closed."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Letter for letter

SPELLINGS = [(re.compile(a), b) for a, b in (
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"(?<!\\)\\(?:(?:left|right|displaystyle)(?![a-zA-Z])|[!,;: ])|\\?\$|~", ""),
    (r"\{,\}", ","),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\?%", ""),   # 50^\circ and 50, 84\% and 84: the question says which
    (r"\s*[.\n]*$", ""),
    (r"(?<=[^\s,])\s*\\(?:text|mbox|mathrm)\s*\{(?!\s*(?:or|and|[ap]\.?m\.?)\s*\})[^{}]*\}"
     r"(?:\s*\^\s*\{?[23]\}?)?$", ""),                         # its unit
    (r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r" \1 "),
    (r"([_^])\s*\{\s*([0-9a-zA-Z])\s*\}", r"\1\2"),
    (r"\\frac\s*(\{[^{}]*\}|\\[a-z]+|[0-9a-zA-Z])\s*([0-9a-zA-Z](?![a-zA-Z])|\\[a-z]+)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\\[a-z]+|[0-9a-zA-Z])\s*\{", r"\\frac{\1}{"),
    (r"\\frac\{\{([^{}]*)\}\}", r"\\frac{\1}"),
    (r"\\sqrt\s*([0-9a-zA-Z])", r"\\sqrt{\1}"),
    (r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])", lambda m: m[0].replace(",", "")),
    (r"\s+", " "),
    (r"(?<![0-9a-zA-Z]) | (?![0-9a-zA-Z])", ""),
    (r"(?<![0-9])\.(?=[0-9])", "0."),
)]


def plain(answer):
    """One spelling for what is written in many, as far as no mathematics is needed."""
    for pattern, text in SPELLINGS:
        answer = pattern.sub(text, answer.strip())
    return answer.strip()


# ---------------------------------------------------------------------------------------------------------------------
# As mathematics

COMMANDS = set("""frac dfrac tfrac cfrac sqrt pi theta alpha beta gamma phi omega lambda infty cdot times div pm mp cup cap in le
    leq ge geq lt gt ne neq sin cos tan cot sec csc arcsin arccos arctan log ln left right text textbf mbox mathrm mathbf mathbb
    circ degree begin end pmatrix bmatrix vmatrix emptyset varnothing quad ldots dots displaystyle overline lfloor rfloor lceil
    rceil""".split())
POWER = re.compile(r"([a-zA-Z)\]}]?)\s*\^\s*(\{((?:[^{}]|\{[^{}]*\})*)\}|\\[a-zA-Z]+|.)", re.DOTALL)


def tame(latex):
    """Whether reading and comparing this can be expected to end: short, known commands, no towers, no large powers."""
    digits = re.findall(r"[0-9]+", latex)
    if len(latex) > LONGEST or max(map(len, digits), default=0) > MOST_DIGITS or not latex.isascii():
        return False
    if not set(re.findall(r"\\([a-zA-Z]+)", latex)) <= COMMANDS or re.search(r"\\begin\s*\{(?![pbv]matrix\})", latex):
        return False
    depth = deepest = 0
    for c in latex:
        depth += (c in "{[(") - (c in ")]}")
        deepest = max(deepest, abs(depth))
    if deepest > DEEPEST or re.search(r"(?<!\\)!|[0-9]\s*[eE]\s*[-+]?\s*[0-9]|\)\s*_", latex):       # n!, 1E9, (n)_k: all explode
        return False
    power = expansion = 1
    for base, exponent, _ in POWER.findall(latex):
        if "^" in exponent:
            return False
        for n in re.findall(r"[0-9]+", exponent) if not base.isalpha() else []:
            power *= max(1, int(n))
            expansion *= max(1, int(n)) if base else 1                     # (x+y+z)^{99}: sympy multiplies it out
    symbols = re.search(r"(?<![a-zA-Z\\])[a-zA-Z]", latex)
    return (power <= LARGEST_POWER and (expansion <= LARGEST_EXPANSION or not symbols)
            and len(POWER.findall(latex)) == latex.count("^"))


@functools.cache
def reader():
    """-> (LaTeX -> what sympy makes of it, or an exception; math-verify's verify). Imports sympy, which takes a second."""
    try:
        from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
        from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
        from math_verify.grader import should_treat_as_complex, verify
        from math_verify.parser import get_last_eq
        from sympy import Expr, Rational
    except ImportError as e:
        raise missing(e) from None
    for name in ("math_verify.grader", "math_verify.parser"):            # it warns that the time limit is ours, which it is
        logging.getLogger(name).setLevel(logging.ERROR)
    normal = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False)

    class Reader(_Latex2Sympy):
        def parse_number(self, text):
            return Rational(text.replace(",", ""))                       # sympy.Number(text), as it was, goes through eval

    def read(latex):
        latex = normalize_latex(latex, normal)
        for text in (latex, get_last_eq(latex)):
            try:
                return Reader(is_real=not should_treat_as_complex(text)).parse(text)
            except Exception:
                if text == get_last_eq(latex):
                    raise
    return read, verify, Expr


def missing(e=None):
    return input_error(f"--task math compares answers with math-verify, which is {f'not complete ({e})' if e else 'not here'}: "
                       "pip install -e '.[math]'")


SUBSCRIPT = re.compile(r"(?<=[0-9])_\{?([0-9]+)")
WORDS = re.compile(r"(?<![a-zA-Z\\{])[a-zA-Z]{3,}")
UNIT = re.compile(r"(?<=[0-9}]) ?(?:(?:cm|mm|km|ft|in|kg|lb|sq\.?|[a-zA-Z]{3,})(?: |$|(?=\^)))+(?:\^[23])?$")


@functools.lru_cache(4096)                                               # a group's answers repeat each other
def same(answer, said):
    """Whether `said` (a model's, LaTeX) is the same as `answer`."""
    if len(said) > LONGEST:                                             # before the first pattern looks at it
        return said == answer
    answer, said = plain(answer), plain(said)
    if not re.search(r"(?<!\\)\b[a-zA-Z]", answer):
        said = UNIT.sub("", said)
    if answer.lower() == said.lower() if WORDS.search(answer) else answer == said:
        return True
    bases = [SUBSCRIPT.findall(t) for t in (answer, said)]              # 101_2 is read as 101: the base must be compared here
    if bases[1] and bases[0] != bases[1] or ":" in answer or WORDS.search(answer) or not (tame(answer) and tame(said)):
        return False
    read, verify, Expr = reader()
    try:
        answer, said = read(answer), read(said)
        values = [x.doit() if isinstance(x, Expr) else x for x in (answer, said)]
        if all(getattr(x, "is_Rational", False) for x in values):
            return values[0] == values[1]                               # verify takes 2^{-98} for 0
        return bool(verify(answer, said, timeout_seconds=None))
    except Exception:                                                   # neither a sentence nor gibberish can be compared
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
        """Problems of a JSON Lines file with a problem and its answer, or its solution with the answer in a box."""
        return load_problems(path or fetched(self.name), in_box)

    def prompt(self, question):
        return f"{question}\n\nReason step by step, and put your final answer within \\boxed{{}}."

    def prepare(self):
        """Import the grader now, and complain now if it is missing."""
        reader()
        return self

    def reward(self, problem, text):
        """1.0 when the text's last box says what the problem's answer says."""
        said = last_boxed(text)
        return float(said is not None and same(problem.answer, said))
