r"""GSM8K: grade-school word problems whose answer is a number (Cobbe et al. 2021, arXiv 2110.14168).

    {"question": "... How many clips did she sell?", "answer": "48/2 = 24 in May. 48+24 = 72 altogether.\n#### 72"}

The reward compares numbers as exact fractions: 0.50, .5 and \frac{1}{2} are one answer, and so are $1,000.00 and 1000 dollars.
It is strict where a loose one would be learned: a number counts only where the final answer belongs, in \boxed{} or after ####,
and only if it stands there alone but for its unit. "3 or 4", 5+3 and a "#### Step 4" are no answers.
"""
import re
from fractions import Fraction

from data import Task, fetched, load_problems
from data.math_answers import last_boxed

LONGEST, MOST_DIGITS = 100, 30                                  # characters of an answer, digits in a row

NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
ANSWER = re.compile(
    r"[$€£¢]?\s*(?P<sign>[-+]?)\s*[$€£¢]?\s*"
    rf"(?:(?P<whole>[0-9]+)\s+(?=[0-9]+\s*/))?(?P<over>{NUMBER})(?:\s*/\s*(?P<under>{NUMBER}))?"      # 7, 3/4, or 2 1/2
    r"\s*[%€£$¢°]?\s*"                                            # its unit
    r"(?:[(]?[^\W\d_](?:[^\W\d_]|[\s.,;:!'’()&%]|(?<=[^\W\d_])[-/](?=[^\W\d_])|\^[23](?![0-9]))*)?[.!]?\s*")
REPLACE = [(re.compile(a), b) for a, b in (
    ("−", "-"),                                                 # the minus sign of typographers
    (r"\\[!,;:]|\*\*", ""),                                      # thin spaces, as in 1\,000; bold type
    (r"\{,\}", ","),
    (r"\\([$%&#])", r"\1"),
    (r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))", r" \1\2/\3\4 "),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})(?![a-zA-Z])", " "),
    (r"\\(?:left|right|displaystyle|text[a-z]{0,2}|math[a-z]{2}|mbox|quad|[ ])(?![a-zA-Z])", " "),
    (r"\^\s*\{?\s*([23])\s*\}?", r"^\1"),
    (r"[{}~]", " "),
    (r"(?<=[^\W\d_])\s+(?=\^)", ""),
)]


def number(said):
    """The number that an answer says, as a Fraction, or None: `72 clips`, `$1,000.50`, `-\\frac{3}{4}`, `2 1/2`, `x = 5`."""
    if len(said) > LONGEST:
        return None
    for pattern, text in REPLACE:
        said = pattern.sub(text, said)
    worked, _, said = said.rpartition("=")
    found = ANSWER.fullmatch(said.strip(" \t\n$"))
    if not found or "," in worked or re.search(rf"[0-9]{{{MOST_DIGITS + 1}}}", said):         # with a comma: x = 5, y = 6
        return None
    whole, over, under = (Fraction((found[k] or "0").replace(",", "")) for k in ("whole", "over", "under"))
    if found["under"] and under == 0:
        return None
    return (whole + over / (under if found["under"] else 1)) * (-1 if found["sign"] == "-" else 1)


def final_number(text):
    r"""The number that a solution ends with, in its last \boxed{} or after its last ####, whichever comes later. None if there
    is neither, or something else than one number."""
    hashes = text.rfind("####")
    if hashes > max(text.rfind("\\boxed"), text.rfind("\\fbox")):
        said = text[hashes + 4:].lstrip(" ").partition("\n")[0]
    else:
        said = last_boxed(text)
    return None if said is None else number(said)


def behind_hashes(key, text):
    said = text.rpartition("####")[2].strip()
    if number(said) is None:
        raise ValueError(f"the {key} ends with no number after ####: {text[-60:]!r}")
    return said


class GSM8K(Task):
    name = "gsm8k"

    def load(self, path=""):
        """Problems of a JSON Lines file, as OpenAI publishes it or in this program's own form; each answer a number."""
        return load_problems(path or fetched(self.name), behind_hashes)

    def prompt(self, question):
        return f"{question}\n\nReason step by step, and put your final answer, a number, within \\boxed{{}}."

    def reward(self, problem, text):
        said = final_number(text)
        return float(said is not None and said == number(problem.answer))
