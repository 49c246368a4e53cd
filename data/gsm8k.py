r"""GSM8K: grade-school word problems whose answer is a number (Cobbe et al. 2021).

    {"question": "... How many did she sell?", "answer": "48/2 = 24 in May. 48+24 = 72.\n#### 72"}

The reward compares numbers as exact fractions: 0.50, .5 and \frac{1}{2} are one answer, and so are
$1,000.00 and 1000 dollars. It is strict where a loose one would be learned: a number counts only
where the final answer belongs, in \boxed{} or after ####, and only if it stands there alone but for
its unit, which the question names (data/units.py). "3 or 4", 5+3, "5 million" and a "#### Step 4"
are no answers.
"""
import re
from fractions import Fraction

from data import Task, fetched, load_problems
from data.math_answers import last_boxed, plain
from data.units import is_unit

LONGEST = 100                                                   # characters of an answer
NUMBER = r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
ANSWER = re.compile(
    r"(?!.*[0-9]{31})(?:[a-zA-Z]?\s*=\s*)?(?P<sign>[-+]?)\s*(?P<money>[€£]?)\s*"
    rf"(?:(?P<whole>[0-9]+)\s+(?=[0-9]+\s*/))?(?P<over>{NUMBER})(?:\s*/\s*(?P<under>{NUMBER}))?"
    r"(?P<unit>\D.*)?")
FRACTION = re.compile(r"\\frac\{([^{}]+)\}\{([^{}]+)\}")
BOLD = re.compile(r"(?<!\S)\*\*([^*]+)\*\*(?!\S)|\*\*$")        # not 2**3


def number(said, question=""):
    """The number that an answer says, as a Fraction, or None: `72 clips`, `$1,000.50`,
    `-\\frac{3}{4}`, `2 1/2`, `x = 5`."""
    if len(said) > LONGEST:
        return None
    said = plain(BOLD.sub(r"\1", said.strip()), question)
    found = ANSWER.fullmatch(FRACTION.sub(r" \1/\2 ", said).strip())
    if not found:
        return None
    whole, over = Fraction(found["whole"] or 0), Fraction(found["over"])
    under = Fraction(found["under"] or 1)
    unit = found["money"] + (found["unit"] or "")
    if not under or found["whole"] and over >= under or not is_unit(unit, question):
        return None
    return (whole + over / under) * (-1 if found["sign"] == "-" else 1)


def final_number(text, question=""):
    r"""The number that a solution ends with, in its last \boxed{} or after its last ####, whichever
    comes later. None if there is neither, or something else than one number."""
    hashes = text.rfind("####")
    if hashes > max(text.rfind("\\boxed"), text.rfind("\\fbox")):
        begin = text.rfind("\n", 0, hashes) + 1
        said = text[hashes + 4:].lstrip(" ").partition("\n")[0]
        if "####" in text[begin:hashes]:                        # two answers on one line
            return None
    else:
        said = last_boxed(text)
    return None if said is None else number(said, question)


def behind_hashes(key, text):
    said = text.rpartition("####")[2].strip()
    if number(said) is None:
        raise ValueError(f"the {key} ends with no number after ####: {text[-60:]!r}")
    return said


class GSM8K(Task):
    name = "gsm8k"

    def load(self, path=""):
        """Of a JSON Lines file as OpenAI publishes it, or with the number alone as an answer."""
        return load_problems(path or fetched(self.name), behind_hashes)

    def prompt(self, question):
        return (f"{question}\n\nReason step by step, and put your final answer, a number, within "
                "\\boxed{}.")

    def reward(self, problem, text):
        said = final_number(text, problem.prompt)
        return float(said is not None and said == number(problem.answer))
