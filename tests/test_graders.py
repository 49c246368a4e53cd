"""The graders: what they take for right, for wrong, and what they refuse by design.

The tables are data. An answer that stands without a box or #### is put in a box. Conventions come from the sources named
beside them; a spelling that a source takes and we refuse is in REFUSED, with the reason. To pay for a wrong answer is worse
than to refuse a right one: a model learns the first at once.
"""
import json
import pathlib
import re
import time
from fractions import Fraction

import pytest
from graders import rates
from hypothesis import given, settings
from hypothesis import strategies as st

from data import FETCHED, Problem, stream
from data.addition import Addition
from data.countdown import Countdown, evaluate, ways
from data.gsm8k import final_number, number
from data.math_answers import last_boxed, tame
from data.reverse import Reverse
from data.tasks import make_task
from data.units import NEVER, is_unit
from precision import InputError

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "data" / "fixtures"


def lines(path):
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()]


def boxed(said):
    return said if "####" in said or "boxed" in said or "fbox" in said else rf"So it is \boxed{{{said}}}."


def graded(task, table):
    """(question, answer, said, reward) for every entry of {(question, answer): texts}."""
    return [(q, answer, said, task.reward(Problem(q, answer), boxed(said)))
            for (q, answer), texts in table.items() for said in texts]


# --- GSM8K


@pytest.mark.parametrize("said, value", [
    ("72", 72), ("72 clips", 72), ("$1,000.50", Fraction(2001, 2)), ("0.50", Fraction(1, 2)), (".5", Fraction(1, 2)),
    ("-7", -7),
    ("−7", -7), ("3/4", Fraction(3, 4)), (r"\frac{3}{4}", Fraction(3, 4)), (r"-\dfrac{3}{4}", Fraction(-3, 4)),
    (r"1{,}000", 1000), (r"1\,000", 1000), ("12%", 12), (r"12\%", 12), (r"5 \text{ hours}", 5), ("10 dollars.", 10),
    ("72.", 72),
    ("x = 5", 5), ("2 1/2", Fraction(5, 2)), ("", None), ("none", None), ("3 or 4", None), ("5+3", None), ("1/0", None),
    ("9" * 31, None), ("1,00", None), ("1" * 100_000, None), ("1 2", None), ("x = 5, y = 6", None), (r"5 \text{ or 6}", None),
    ("(" * 5000, None)])
def test_numbers_of_gsm8k(said, value):
    assert number(said) == value


def test_final_numbers():
    assert final_number("5 and 6\n#### 1,234 apples\nmore 7") == 1234 and final_number(r"so \boxed{8}, or 9") == 8
    assert final_number("#### 1\nno: \\boxed{2}") == 2 and final_number("\\boxed{2} no\n#### 1") == 1
    assert number("72" + " " * 100 + "clips") is None
    assert final_number("the answer is 5") is None and final_number("####") is None and final_number("\\boxed{") is None


# Question and answer of each part of the tables
CLIPS = ("Natalia sold clips to 48 of her friends in April, and half as many in May. How many clips did Natalia sell "
         "altogether in April and May? A box of 10 clips costs $5, with 20% off."), "72"
ECHO = CLIPS[0] + r" Put it within \boxed{}."
MONEY = "A coat costs $1,200, a hat 34 dollars. How much do they cost together?", "1,234"
SHARE = "Sarah eats 9 of 18 slices. What percentage of the pizza did she eat?", "50"
HALF = "Sarah eats 9 of 18 slices. How much of the pizza did she eat?", "0.5"
COLD = "It was 4 degrees and fell by 11 degrees. How cold is it?", "-7"
SPEED = "A train needs 2 hours for 120 miles. How fast is it, in miles per hour?", "60"
FLOOR = "A room of 9 by 5 feet is carpeted. What is its area?", "45"
FIVE = "How many apples does Tom have? He has 5 of a million.", "5"
HOURS = "How many hours does Ann work in 2 days?", "5/2"
MANY = "How many people live in the city?", "1000000"

# A: openai/grade-school-math, dataset.py: after "#### " a minus, digits, points and commas; commas are dropped.
# B: lm-evaluation-harness, gsm8k.yaml: "$", "," and a last "." are ignored.
# C: Math-Verify, tests/test_all.py: 1,000.99 and 1 000, units, money on either side, .4, \frac13, the last = of k = 1/3.
# D: Minerva (Lewkowycz et al. 2022), appendix D: \text, dollars, units and bold are taken away.
# E: Hendrycks et al. 2021, is_equiv: \!, \dfrac, \left, \$, \%, ^\circ, a text unit, x = with one letter.
GSM8K_RIGHT = {
    CLIPS: [
        # A
        "#### 72", "####72", "#### 72\nThat is all.", "48/2 = 24\n48+24 = 72\n#### 72", "#### 72.0", "#### 072", "#### 72.",
        # B
        "#### $72", "#### 72 clips", "#### 72 dollars", "**#### 72**", "#### **72**", r"#### \boxed{72}",
        # C
        "72", " 72 ", "72.", "72.00", "+72", "$72", "$72$", r"\$72", "72 clips", "72 Clips.", "72 clips in May", "**72**",
        "72clips", "144/2", "288/4", r"\frac{144}{2}", r"\dfrac{144}{2}", r"\frac{72}{1}", "x = 72", "x=72", "= 72",
        # D
        r"72\text{ clips}", r"72 \text{clips}", r"72\ \mathrm{clips}", r"72 \mbox{ clips}", r"\text{72 clips}",
        r"\mathbf{72}",
        # E
        r"\left72\right", r"72\!", r"\fbox{72}", r"\boxed 72", r"\boxed{\boxed{72}}", r"\boxed{ 72 }",
        "First \\boxed{71}, no, \\boxed{72}", "#### 71\n#### 72", "72 clips sold altogether", "72 total clips",
        "72 more clips"],
    MONEY: ["1234", "1,234", "$1,234", "$1,234.00", r"\$1{,}234", r"1,\!234", r"1\,234", "1 234", "1\u202f234",
        "1,234 dollars", "1234$", "$1234 dollars", "1,234 USD", "#### 1,234", "y = $1,234"],
    SHARE: ["50%", r"50\%", "50 %", "50 percent", "50 percentage", "50 pct", r"50 \text{ percent}"],
    HALF: [".5", "0.50", "1/2", r"\frac12", r"\frac{1}{2}", r"\tfrac{9}{18}", "9/18", r"\cfrac{1}{2}", "0.5 of the pizza"],
    COLD: ["-7", "- 7", "\u22127", "-7.0", r"-7^\circ", "-7°", "-7 degrees", r"-7^{\circ}", "-14/2", "#### -7"],
    SPEED: ["60 miles per hour", "60 mph", "60 miles/hour", "60 mi/hr", "60 MPH"],
    FLOOR: ["45 square feet", "45 sq ft", "45 sq. ft.", "45 ft^2", r"45\text{ ft}^2", "45 ft²", "45 feet^{2}"],
    HOURS: ["2.5", "2 1/2", r"2\frac{1}{2}", r"2 \frac12 \text{ hours}", "2.5 hrs", "5/2 h"],
    MANY: ["1,000,000", "1 000 000", r"1{,}000{,}000", "1000000 people", "1,000,000.00 persons"]}

GSM8K_WRONG = {
    CLIPS: ["73", "71", "-72", "27", "720", "7.2", "72.5", "0.72", "72/10", "172", "", "none", "71 or 72",
        "72 or 73", "72, 73", "72 and 73", "72; 73", "72 73", "either 72", "72/73", "72 to 74", "72-74", "72–74", "72..74",
        "70 < 72", "72 vs 73", r"72 \text{ or } 73", r"72\text{ or 73}", "71=72", "72=73", "#### 72 #### 73",
        "#### 71 #### 72", r"\boxed{72} or \boxed{73}", r"\boxed{73 \boxed{72}}", r"\boxed{72 \boxed{73}}", r"\boxed{72",
        r"\boxed{72} \boxed{", "72 (or 73)", "72 is wrong", "72 is not it", "72 not", "72 wrong", "not 72", "72 isn't",
        "72 false", "72 nope", "72, no", "72\nno", "72\u2028wrong", "72 \u043d\u0435", "72 falsch", "72 zzz", "x != 72",
        r"x \ne 72", r"\neq 72", "x > 72", ">= 72", "<=72", "< 72", "72 million", "72 thousand", "72 hundred", "72 dozen",
        "72 lakh", "72k", "72K", "72M", "72 bn", r"72 \text{ million}", "72 squared", "72 halves", "72 half", "72 times two",
        "72^2", "72²", "7²", "72½", "72!!", "72e1", "7.2e1e1", "72e-1", "72 \u4e07", "72?", "72 or so", "72ish", "about 72",
        "approximately 72", "~72", r"\approx 72", "≈72", "72 at most", "72 roughly", "72...", "72..", "72 + 3", "72+0/1+1",
        "1+1=72", "72/0", "72*2", "72-1", "2**36", "7**2**", "7$2", r"7\,2", r"7^\circ2", r"7\ 2", "7~2", "7 2", "7,2",
        "+-72", "--72", "±72", r"\pm 72", "+ +72", "72-", "72+", "72%", r"72\%", r"72\%\%", "72 cents", "72¢", "€72", "72 kg",
        "72 clips 73", "\u0667\u0661", "\uff17\uff11", "7\u200b2", "\u202e27", "72\u200b3", "\u2460", "72\x00", "70 4/2",
        "71 2/2", "7,2.0", ECHO, "#### ", r"\boxed{}", "#### Step 72 of 73", "72 clips, 73 boxes", "#### 72 or 73"],
    MONEY: ["1.234", "1,23,4", "12,34", "1,234,00", "1,2345", "123,4", "1, 234", "1;234", "1 2 3 4", "1,234 thousand",
        r"1\,2\,34", "$1$234$", "1234 €", "(1,234)", "1,234 + 0", "12 34", "1234 cents", "1,234 or 5", "0,123,4"],
    SHARE: ["0.5", "50%%", "1/2", "50/100", "5000%", "-50%", "50 percent or 60", "0.50%", "50 per mille", "50‰"],
    HALF: ["50", "5", "1/3", "2/1", "1:2", r"\frac{1}{2}\frac{1}{2}", "1/2/1", "1/2 1", "0.5.0", ".5 not"],
    COLD: ["7", "7 below", "7 degrees below zero", "(7)", "--7", "+-7", "±7", "-7 or 7", "- -7", "-−7"],
    FIVE: ["5 million", "5 thousand", "5 Million", "5 apples million", "5M", "5 millions of apples", "5e6", "5 x 10",
        "5 \\times 10^6", "5.5"],
    HOURS: ["25", "2 1 2", "21/2", "2-1/2", "2 .5", "2. 5", r"2\,.5", "2.5 to 3 hours", "2 and 1/2", "2 -1/2", "2 minutes",
        "2.5 minutes", r"\frac{2}{5}", r"5\frac{}{2}"],
    (MANY[0], "1234567"): ["1234,567", "1,234 567", "1 234,567", "12,34,567", r"1234\,567"],
    (MANY[0], "246.8"): ["1 234/5", "1,234,/5", "246,8", "246. 8"],
    MANY: ["1", "1,0000,00", "1,000 000", "100 0000"]}

# Right to a reader, and refused by design. The reason stands before them.
GSM8K_REFUSED = {
    CLIPS: [
        # an answer is written in ASCII's decimal digits: a power of ten, words and other digits read as something else too easily
        "7.2e1", "72e0", "0x48", "1001000b", "seventy-two", "LXXII", "72 seventy-two", "\u0667\u0662", "\uff17\uff12",
        # what is not seen may hide something
        "72\u200b", "\u202d72",
        # the last step is a part of the task, and an equation may be false
        "48+24=72", "71+1", "72*1", "72^1",
        # in a ledger (72) is -72; 72! is a factorial
        "(72)", "{72}", "[72]", "72!", "72;",
        # words before a number are not read: "not 72", "below 72"
        "the answer is 72", "is 72", "Total = 72", "exactly 72", "72 = x",
        # no word of the question
        "72 items", "72 in June",
        # "and" and number words are in no unit
        "72 clips (sold in April and May)", "6 dozen"],
    # other countries' thousands: 1.234 is one and a bit
    MONEY: ["1.234,00", "1'234", "1234,-", "1234,00", "1_234", "12 hundred 34"],
    # the question does not ask for percent; a comma parts thousands; digits are ASCII's
    HALF: ["50%", r"50\%", "0,5", "½", "one half", "half"],
    SHARE: ["50 of 100", "one half"],
    # one number
    HOURS: ["2 h 30 min", "2:30", "two and a half"],
    # number words, and signs of other countries
    MANY: ["1 million people", "1m", "10^6", "1.000.000"]}


def test_the_tables_are_large_enough():
    for tables in ((GSM8K_RIGHT, GSM8K_WRONG, GSM8K_REFUSED), (MATH_RIGHT, MATH_WRONG, MATH_REFUSED)):
        right, wrong, refused = ({(*problem, said) for problem, texts in t.items() for said in texts} for t in tables)
        assert len(right) >= 60 <= len(wrong) and not right & wrong and not (right | wrong) & refused


def test_gsm8k_takes_right_answers_in_many_spellings():
    assert not [g for g in graded(make_task("gsm8k"), GSM8K_RIGHT) if g[-1] != 1]


@pytest.mark.parametrize("table", [GSM8K_WRONG, GSM8K_REFUSED], ids=["wrong", "refused by design"])
def test_gsm8k_takes_no_other(table):
    assert not [g for g in graded(make_task("gsm8k"), table) if g[-1] != 0]


@pytest.mark.parametrize("path, every", [(FIXTURES / "gsm8k.jsonl", 1), (FETCHED / "gsm8k-train.jsonl", 10)],
                         ids=["fixture", "748 of 7,473"])
def test_every_solution_of_gsm8k_is_right_and_changed_ones_are_wrong(path, every):
    """One number, sign or word of the final answer is changed, in the worked answer and in a box. All of them:
    `python -m tests.graders`."""
    if not path.exists():
        pytest.skip("the whole data set is not at hand")
    refused, taken, right, wrong = rates("gsm8k", path, every)
    assert not refused and not taken and wrong > 15 * right >= 30 * (len(lines(path)) // every)


# --- units


def test_a_unit_is_of_the_questions_words_and_changes_nothing():
    question = "How many boxes of berries, at 3 dollars a box, does Ann's shop sell in a million years? Not in months."
    for text in ("", "box", "boxes", "berry", "Berries", "dollars", "years", "yrs", "sell", "boxes of berries", "in total"):
        assert is_unit(text, question), text
    for text in ("million", "not", "Not in months", "crates", "boxes or months", "zzz", "a2", "box 2", "²", "^2", "K", "box K",
                 "%", "years + 1", "bo\u0445", "is", "isn't", "boxes, years", "tens", "cans", "box\u200b", "..", "()"):
        assert not is_unit(text, question), text
    signs = "How many m of cloth for T shirts does B sell at 5 p.m. in a box?"
    assert not [text for text in ("M", "B", "T", "p.m.", "- box", "/box", "-box") if is_unit(text, signs)] and is_unit("m", signs)
    assert is_unit("cans", "How many cans?") and not is_unit("km", "How many hours?")
    assert is_unit("clips", "") and not any(is_unit(word, "") or is_unit(f"clips {word}", "") for word in NEVER)
    assert is_unit("percent", "What percent?") and is_unit("%", "What percent?") and not is_unit("%", "20% off")


def test_long_and_hostile_texts_take_no_time():
    """Each is 100,000 characters long, or deep: quadratic would be minutes, and exponential for ever."""
    tasks = make_task("gsm8k"), Countdown(3, 0.0), Addition(2, 0.0), Reverse(4, 0.0)
    parts = ("\\boxed{", "\\boxed{{", "{", "}", "#", "####", "#### 7\n", "\\boxed{7}", "\\boxed ", "\\\\boxed{",
             "\\boxed{7\\", "9", "9 ", "9,", "9/", " ", "\n", "a", "a-", "\\text{", "<answer>", "(", "1+",
             "\\frac", "**", "$", "\u202e", "=", ".")
    texts = [begin + part * (100_000 // len(part)) + end for part in parts
             for begin, end in (("", ""), ("\\boxed{7", "}"), ("#### 7", ""), ("#", ""), ("<answer>", ""))]
    begin = time.time()
    for task in tasks:
        for text in texts:
            assert task.reward(Problem("3,5,7=38:", "72"), text) == 0, text[:40]
    assert time.time() - begin < 60


@settings(max_examples=500, deadline=None)
@given(st.text("7 2a-/^\u00b2%.,\\{}$~=*", max_size=101) | st.text(max_size=101))
def test_gsm8k_reads_or_refuses_whatever_is_said(said):
    assert isinstance(number(said, "What percent?"), Fraction | None) and last_boxed(rf"\boxed{{{said}") is None or "}" in said


# --- MATH


def test_boxes():
    assert last_boxed(r"\boxed{1} and \boxed{\frac{a}{b}}.") == r"\frac{a}{b}" and last_boxed(r"\fbox{x}") == "x"
    assert last_boxed(r"$\boxed 5$") == "5" and last_boxed(r"\boxed{\{1\}}") == r"\{1\}"
    assert last_boxed("none") is None and last_boxed(r"\boxed{1") is None and last_boxed(r"\boxed{1} \boxed{2") is None
    begin = time.time()
    assert last_boxed(r"\boxed{" * 50_000) is None and last_boxed(r"\boxed{" + "{" * 10 ** 6) is None
    assert time.time() - begin < 30                                       # quadratic would be hours


@pytest.fixture(scope="module")
def math():
    pytest.importorskip("math_verify")
    return make_task("math").prepare()


# Besides those of A to E above, F: what math-verify takes for equal as mathematics.
Q = "What is the answer?"
LENGTH = "A square has an area of 144 square cm, a third of a million. How long is its side, in cm?"
PERCENT = "What percent of the numbers from 1 to 10 is even?"
MATH_RIGHT = {
    # C, E
    (Q, r"\frac{1}{2}"): [
        "0.5", "1/2", ".5", "0.50", r"\dfrac{1}{2}", r"\tfrac12", r"\frac12", r"\frac{2}{4}", r"x = \frac{1}{2}", "$1/2$",
        r"\frac 1 2", r"\left(\frac{1}{2}\right)", r"2^{-1}", r"\frac{1}{2}.", r"\cfrac{1}{2}", "1:2", r"\frac1{2}",
        r"f(x) = .5"],
    # F
    (Q, r"6\sqrt{2}"): [r"\sqrt{72}", r"\sqrt2\cdot 6", r"6 \sqrt 2", r"\sqrt{2} \times 6", r"3\sqrt{8}", r"6\,\sqrt{2}",
        r"\frac{12}{\sqrt{2}}"],
    (Q, "5"): ["5.0", "+5", "(5)", "x=5", "x = 5.", r"\boxed{5}", r"\text{5}", r"\mathbf{5}", "$5$", r"\sqrt{25}", "10/2",
        "y_1=5", "2+3", "05", r"\theta = 5", "5^\\circ", r"\boxed{\boxed{5}}", r"\fbox{5}", r"\boxed 5",
        "\\boxed{6}, no: \\boxed{5}", "{5}", r"5\!", r"\$5"],
    (Q, "-7"): ["\u22127", "- 7", "-7.0", "-14/2", "x=-7", r"\left(-7\right)", "-(7)"],
    # A, C, E
    (Q, r"1,\!234"): ["1234", "1,234", "1{,}234", r"1\,234", "1 234", "1,234.0", r"\$1,234"],
    # C
    (Q, "12,13"): [r"12\text{ and }13", "12 and 13", "12, 13", "13,12", r"12 \text{ or } 13", "12, and 13", r"\{12,13\}",
        "x=12, x=13"],
    # F
    (Q, "(1,2)"): ["(1, 2)", r"\left(1,2\right)", r"(1,\frac{4}{2})", "(1.0,2)"],
    (Q, "(1,234)"): ["(1, 234)", r"\left( 1, 234 \right)"],
    (Q, r"\log_2 3"): [r"\log_2(3)", r"\log_{2}{3}", r"\frac{\ln 3}{\ln 2}"],
    (Q, "x^2+4x+4"): ["(x+2)^2", "4+4x+x^2", "x^{2} + 4x + 4", r"x \cdot x + 4(x+1)", "(x+2)(x+2)"],
    (Q, "y=2x-3"): ["y = 2x - 3", "2x-y=3", "y=-3+2x", "2x-3"],
    (Q, r"\text{(A)}"): ["(A)", "A", r"\textbf{(A)}", r"\text{A}"],
    (Q, r"\text{Evelyn}"): ["Evelyn", "evelyn", r"\textbf{Evelyn}", r"\text{Evelyn}.", r"\mathrm{Evelyn}"],
    # C, D, E
    (LENGTH, r"12\text{ cm}"): ["12", "12 cm", r"12\text{ cm}", r"12\ \mathrm{cm}", r"12 \mbox{cm}", "12cm", "12 centimeters",
        "12.0 cm"],
    (PERCENT, r"50\%"): ["50", "50%", r"50\%", "50 percent", r"50 \text{ percent}", "50.0"],
    (Q, r"50\%"): ["50%", "50 percent"],
    (Q, r"20\text{ cm}"): ["20 cm", r"20\,\mathrm{cm}", "20 centimeters"],
    (PERCENT, "50"): ["50%", r"50\%", "50 pct"],
    # E
    (Q, r"60^\circ"): ["60", r"60^{\circ}", "60 degrees", r"60 \text{ degrees}"],
    (Q, r"\pm\sqrt{3}"): [r"\pm \sqrt 3", r"\pm\sqrt{3}"],
    (Q, "1100_2"): ["1100_{2}", "1100"],
    (Q, "2:30"): [r"2\!:\!30", "2:30."]}

MATH_WRONG = {
    (LENGTH, "5"): ["5 million", "5 thousand", r"5 \text{ million}", r"5\text{thousand}", "5 hundred", "5 dozen",
        r"5 \mathrm{k}", "5k", "5M", "5 not", "7 not", "5 is wrong", r"5 \text{ not}", r"\text{not }5", "not 5", "5 no",
        "5 zzz", "5 apples", r"5\text{ is wrong}", "5 or so", "5 squared", "about 5", "~5", r"\approx 5", r"\sim 5", "5?",
        "5!", "5...", r"5\ldots", r"5\dots", "5'", '5"', "5;", "5 or 6", r"5 \text{ or } 6", r"5 \text{ and } 6", "5,6",
        "{5,6}", "5;6", "5 6", r"5\,6", r"5\ 6", r"5~6", r"5 \quad 6", "5$6", "5-6", "5..6", "5 to 6", r"5\text{ or 6}",
        r"\{5,6\}", "[5]", "[5,5]", "(5,5)", r"5\cup6", "5 & 6", r"5 \\ 6", "7=5", "5=7", "1+1=5", "x^2+y^2=5", "x=y=5",
        "5==5", r"x \ne 5", r"x \neq 5", "x != 5", r"\neq 5", "x > 5", r"x \ge 5", "<5", r"\boxed{6 \boxed{5}}",
        r"\boxed{5 \boxed{6}}", r"\boxed{5} \boxed{6}", r"\boxed{5", r"\boxed{5}\boxed{", "#### 5", r"\pm 5", "-5", "+-5",
        "5i", "5x", "5 x", "5e", "5^2", "5_2", "5.0000001", "4.9999999", r"\frac{5}{2}", r"\frac{5}", "55", r"5\%", "5%",
        r"5\%\%", "5 percent", r"\overline{5}", "²5", "5²", "5\u202e6", "\u2464", "5,000", "5.000,00", r"\frac{5}{1}6",
        r"5\cdot", r"5\times", "5+", "5-", "", " ", ECHO, r"\text{}"],
    (Q, "1234"): ["1, 234", "12,34", "(1,234)", "1,23,4", "1;234", "1,2345", "123,4", "1,234,", "0,1234", r"1\,2\,34"],
    (Q, "(1,234)"): ["(1234)", "1234", "1,234", "[1,234]", "(1,235)", "(1,234]", "(1.234)", r"\{1,234\}", "(12,34)",
        "(1,2,34)"],
    (Q, "(1,2)"): ["(2,1)", "2,1", r"\{2,1\}", "(1%,2)", "[1,2]", "(1,2]", "(1,3)", "1", "12", "(12)", "x=2,y=1", "(1,2,3)",
        "1<x<2", "(-1,2)", "1.2"],
    (Q, "12,13"): ["12", "13", "12,14", "12,13,14", "1213", "12.13", "12-13", "[12,13]", "between 12 and 13"],
    (Q, r"\frac{1}{2}"): [r"\frac{2}{1}", "0.51", r"-\frac{1}{2}", r"\frac{1}{2}x", "0.5000001", "0,5", r"\frac{1}{2}1",
        r"\frac{1}{2}\frac{1}{1}1", "2:1", "50", r"\frac{1}{2}\text{ million}", r"\frac{1}{2} \text{ or } 1", "1/2/1/2",
        r"\frac{1}{2} = 1", r"\frac12 3"],
    (Q, r"\sqrt{2}"): ["1.41421356", "1.4142135623730951", r"\pm\sqrt{2}", "2", r"\sqrt{3}", r"\sqrt[3]{2}",
        r"\sqrt{\infty2}", r"\sqrt{2}1", "1.41"],
    (Q, r"\pi"): ["3.14", "3.141592653589793", "22/7", "180", r"\pi 1", r"\pi^2", r"2\pi"],
    (Q, "1000"): ["1", "100", "10", "1000 thousand", "1000k", "1,0000", "1,00,0"],
    (LENGTH, r"12\text{ cm}"): ["12 mm", "12 km", "12 m", "12 million cm", "1.2 cm", "12 cm or 13 cm", "12, 13 cm",
        r"12\text{ kg}", r"12\text{ third cm}"],
    (Q, r"20\text{ cm}"): ["20 cm^2", r"20\text{ cm}^3", "20 mm", "20 inches"],
    (Q, "x^2+y^2=9"): ["9", "x^2+y^2=10", "x^2+y^2", "9=9", "x^2-y^2=9", "x^2+y^2=9=10", "0=0"],
    (Q, "n = 9"): ["10", "5=9", "m \\ne 9", "9,10", "n=9,10"],
    (Q, r"\text{(A)}"): ["(B)", "(A),(B)", "(A) or (B)", r"\text{A or B}", "AB", r"\text{not A}", "(A)(B)"],
    (Q, r"\text{Evelyn}"): ["Evelyn or Bob", "not Evelyn", "Bob", "Evelyn?", "Evelyn, Bob", r"\text{Evelyn} \text{ or Bob}",
        "Evelin"],
    (Q, r"\text{A,B}"): ["A", "A,B,C", "AB", "A or C", "A,C"],
    (Q, "7.5"): ["7 .5", "7. 5", r"7\,.5", r"7^\circ.5", "7,5", "75"],
    (Q, "0"): ["0 lies", "0 to 99", "0 no", "0 million", "0 1", "0 is", "1-0", "none", "0=1", "0,0"],
    (Q, "0.1234"): ["0.1,234", r"0.1\,234", ".1 234", "0,1234"],
    (Q, "1234567"): ["1234,567", "1,234 567", "1 234,567", "12,34,567", "1,234,5670", r"1234\,567"],
    (Q, "246.8"): ["1 234/5", "1,234,/5", "246,8", "246. 8"],
    (Q, "72"): ["70 4/2", "71 2/2", r"7^\circ2", r"7^{\circ} 2", r"7\%2", "7%2", r"7\$2", r"7\ 2", r"7\text{ }2", r"7\!\,2"],
    (Q, "1100_2"): ["110*10_2", "11*100_2", "1100_2+0", "1100_2%", r"1100_2\%", "1100_", "1100_3", "1101_2", "1100_{20}",
        "12_2"],
    (Q, "x^2+4x+4"): ["x^2+4x", "(x+3)^2", "x^2-4x+4", "x^2+4x+4=0", "x^3+4x+4", "x^2+4x+4+1", "(x+2)^2 or 1", "x^2+4x+4 1"],
    (PERCENT, r"50\%"): [r"50\%\%", "5%", "50 per mille", "50 million percent"],
    (Q, "(-\\infty,3]"): [r"(-\infty,3)", r"[3,-\infty)", r"\infty", "3", r"(-\infty,4]", r"(\infty,3]"],
    (Q, "2:30"): ["2:31", "230", "2.5", r"\frac{2}{30}", "2:30 or 3"]}

# Right to a reader, and refused by design. The reason stands before them.
MATH_REFUSED = {
    (Q, "5"): [
        # digits are ASCII's, and all that is written is seen
        "five", "V", "\uff15", "\u0665", "5\u200b",
        # no word of the question
        "5 apples", r"5 \text{ apples}",
        # words before a number are not read, a name has one letter, an equation may be false
        "the answer is 5", r"\text{Answer} = 5", "2+3=5",
        # what may explode
        "5!/4!", "0.5e1", "5e0"],
    # a line above is a conjugate, a segment or a number's digits too
    (Q, r"\frac13"): [r"0.\overline{3}"],
    # a comma is a list's; a point is a decimal's
    (Q, "3.5"): ["3,5"],
    (Q, "1000"): ["1.000", "1.000,00", "1 thousand", "1k", "1e3", "1'000"],
    # the question asks for percent
    (PERCENT, r"50\%"): ["0.5", "1/2"],
    # a point has brackets and an order, a list has neither and says each once
    (Q, "(1,2)"): ["1,2", "x=1,y=2", "(1;2)"],
    (Q, "12,13"): ["(12,13)", "12;13", "12,13,12"],
    # two numbers beside each other; two members for one; no word of the question
    (Q, r"\log_2 3"): [r"\log_{2}3"],
    (Q, r"3 \pm 2\sqrt{5}"): [r"3+2\sqrt{5}, 3-2\sqrt{5}"],
    (Q, r"2\pi"): [r"2\pi \text{ radians}"],
    # commands, not signs
    (Q, r"\sqrt{2}"): ["√2"],
    (Q, r"\frac{1}{2}"): ["½", r"50\%"],
    # a word is that word alone
    (Q, r"\text{Evelyn}"): ["Evelyn is the fastest"],
    # an interval is written as one
    (Q, "(-\\infty,3]"): [r"x \le 3", r"(-\infty;3]"]}


def test_math_takes_right_answers_in_many_spellings(math):
    assert not [g for g in graded(math, MATH_RIGHT) if g[-1] != 1]


@pytest.mark.parametrize("table", [MATH_WRONG, MATH_REFUSED], ids=["wrong", "refused by design"])
def test_math_takes_no_other(table, math):
    assert not [g for g in graded(math, table) if g[-1] != 0]


@pytest.mark.parametrize("path, every", [(FIXTURES / "math.jsonl", 1), (FETCHED / "math-sanity.jsonl", 20)],
                         ids=["fixture", "73 of 1,460"])
def test_every_answer_of_math_is_right_and_changed_ones_are_wrong(path, every, math):
    """One number, sign, term or word is changed. `python -m tests.graders` does it with all of them."""
    if not path.exists():
        pytest.skip("the whole data set is not at hand")
    refused, taken, right, wrong = rates("math", path, every)
    assert not refused and not taken and wrong > 15 * right > 0
    assert all(math.reward(p, p.answer) == 0 for p in math.load(str(path)))                  # without a box it is no answer


@pytest.mark.parametrize("answer, same, other", [
    (r"\frac{1}{2}", ["0.5", "1/2", r"\dfrac{1}{2}", r"\frac12", r"\frac{2}{4}", ".5", r"x = \frac{1}{2}", "0.50"],
     [r"\frac{2}{1}", "0.51", r"-\frac{1}{2}", r"\frac{1}{2}x", "0.5000001"]),
    (r"6\sqrt{2}", [r"\sqrt{72}", r"\sqrt{2} \cdot 6", r"6 \sqrt 2"], [r"6\sqrt{3}", r"\sqrt{2}", "8.485", "62"]),
    ("(1,2)", ["(1, 2)", r"\left(1,2\right)"], ["(2,1)", "(1,3)", "1", "[1,2]"]),
    ("x^2+4x+4", ["(x+2)^2", "4+4x+x^2"], ["x^2+4x", "(x+3)^2"]),
    ("1100_2", ["1100_{2}", "1100"], ["1100_3"]), (r"60^\circ", ["60", r"60^{\circ}"], ["61", r"60 \text{ or 61}"]),
    (r"\frac{1}{2^{98}}", [r"2^{-98}"], ["0", r"\frac{2}{2^{98}}", r"\frac{1}{2^{97}}"]),
    (r"\text{(A)}", ["(A)", r"\textbf{(A)}"], ["(B)"]),
    (r"1,\!000,\!000", ["1,000,000", "1000000", "10^6"], ["1,000", "1,000,001"]),
    (r"\begin{pmatrix} 2 & 0 \\ 0 & 2 \end{pmatrix}", [r"\begin{bmatrix}2&0\\0&2\end{bmatrix}"],
     [r"\begin{pmatrix} 2 & 0 \\ 2 & 0 \end{pmatrix}"])])
def test_the_same_mathematics(answer, same, other, math):
    for said in same:
        assert math.reward(Problem("", answer), rf"\boxed{{{said}}}") == 1, said
    for said in other:
        assert math.reward(Problem("", answer), rf"\boxed{{{said}}}") == 0, said


HOSTILE = ["9^{9^{9^{9}}}", "(x+1)^{9999}", "(x+y+z)^{99}", "(1+i)^{9999}",
           "10^{10^{10}}", "99999!", "(3!)!!!!!!", "2^{99999999}", "((2^{99})^{99})^{99}", "1E999999999",
           "9" * 400, "__import__('os').system('true')", "().__class__", r"\text{__import__('os')}", "lambda: 0",
           "x" * 400, "{" * 200, "(" * 300, r"\sum_{n=1}^{99999999} n", r"\int_0^1 x^x dx", r"\binom{99999}{5000}",
           r"\sqrt[99999]{2}", "\x00", "é²", "\\", "^", "1/0", r"\frac{1}{0}", r"\log_{0}{0}", "()", "=", "=5=", ",",
           "nan", "oo", r"\infty - \infty"]


def test_hostile_answers_end_and_never_reach_eval(math, monkeypatch):
    """Whatever is asked of the grader, Python's eval sees nothing of it; nothing hangs, nothing is right."""
    import builtins
    seen, real = [], builtins.eval
    monkeypatch.setattr(builtins, "eval", lambda code, *rest: seen.append(code) or real(code, *rest))
    begin = time.time()
    for answer in ("5", r"\frac{1}{2}", "x^2+1"):
        for said in HOSTILE:
            assert math.reward(Problem("", answer), rf"\boxed{{{said}}}") == 0, said
    assert math.reward(Problem("", "0.25"), r"\boxed{\frac{1}{4}}") == 1   # numbers do not need it either
    assert not [c for c in seen if isinstance(c, str)], seen
    assert time.time() - begin < 60 and not tame("9^{9^{9}}") and tame(r"\frac{x^2}{3}")


# --- countdown


def by_python(text):
    """The value as Python calculates it. For these tests' own texts alone: `evaluate` executes nothing."""
    return eval(re.sub(r"0*([0-9]+)", r"Fraction(\1)", text))


EXPRESSIONS = st.recursive(st.integers(0, 99).map(str), lambda inner: st.builds(
    lambda a, op, b, bare: f"{a}{op}{b}" if bare else f"({a} {op} {b})",
    inner, st.sampled_from("+-*/"), inner, st.booleans()), max_leaves=8)


@settings(max_examples=400, deadline=None)
@given(EXPRESSIONS)
def test_expressions_against_python_itself(text):
    try:
        want = by_python(text)
    except ZeroDivisionError:
        want = None
    if want is None or len(text) > 200:
        with pytest.raises(ValueError):
            evaluate(text)
    else:
        value, used = evaluate(text)
        assert value == want and used == [int(n) for n in re.findall("[0-9]+", text)]


SIGNS = "0123456789+-*/() .^_e[]"
DAMAGED = st.builds(lambda text, at, drop, more: text[:at] + more + text[at + drop:],
                    EXPRESSIONS, st.integers(0, 20), st.integers(0, 2), st.text(SIGNS, max_size=2))


@settings(max_examples=600, deadline=None)
@given(st.text(SIGNS, max_size=40) | DAMAGED)
def test_what_is_no_expression_is_refused(text):
    """Either it is read as Python reads it, or it is refused."""
    try:
        value, _ = evaluate(text)
    except ValueError:
        value = None
    assert value is None or value == by_python(text)


@pytest.mark.parametrize("text", [
    "", " ", "2**3", "2^3", "-5", "+5", "3--2", "1/0", "1/(2-2)", "(1", "1)", "1 2", "1.5", "1e3", "a", "()", "1+",
    "*1", "٣", "1_0", "9999999", "(" * 21 + "1" + ")" * 21, "1+" * 200 + "1", "(" * 10 ** 6])
def test_hostile_expressions(text):
    with pytest.raises(ValueError):
        evaluate(text)


PROBLEM = Problem("3,5,7=38:", "(5*7)+3")
COUNTDOWN_RIGHT = [
    "#(5*7)+3", "#5*7+3", "#3+7*5", "#3+(5*7)", "#((5*7)+3)", "# 5 * 7 + 3", "5*7=35;35+3=38;#(5*7)+3", "5*7=1;#(5*7)+3",
    "<answer>3+5*7</answer>", "<answer> (7 * 5) + 3 </answer>", "I think.\n<answer>3+5*7</answer>", "<answer>3+5*7",
    "<answer>1</answer> no, <answer>3+5*7</answer>"]
COUNTDOWN_WRONG = [
    "", "#", "38", "#38", "(5*7)+3", "#35+3", "#5*7+3=38", "#38=5*7+3", "#5*7+4", "#5*7-3", "#5+7*3", "#(5*7)+3+0", "#5*7+3+7-7",
    "#5*7+3*1", "#5*7*3/3+3", "#5*7", "#5*7+", "#+5*7+3", "#-3+41", "#5*7--3", "#5*7+3 or 1", "#5*7+3 and", "#5*7+3#", "##5*7+3",
    "#5*7+3;", "#5*7+3.", "#5*7+3.0", "#5.0*7+3", "#5×7+3", "#5·7+3", "#\uff15*7+3", "#\u0665*7+3", "#5*7+3\u200b", "#5**7+3",
    "#5*7//1+3", "#5*7+3**1", "#5*7^1+3", "#05*7+3", "#5_*7+3", "#0x5*7+3", "#5e0*7+3", "#5*7+3if 1else 0", "#int(5)*7+3",
    "#(5)(7)+3", "#5(7)+3",
    "#[5*7+3]", "#{5*7+3}", "#5*7+3,5", "#5*7+3 38", "#5 7*+3", "#57-19", "#35+3", "#3+5*7/0", "#3/0", "3,5,7=38:#38",
    "#3,5,7=38", "<answer>38</answer>", "<answer>3+5*7=38</answer>", "<answer>3+5*7</answer><answer>1</answer>",
    "<answer>3+5*7 or 2</answer>", "#5*7+3<answer>1</answer>", "<answer></answer>#5*7+3", "<answer>#5*7+3</answer>"]
SUM, WORD = Problem("187+737=", "924"), Problem("stone=", "enots")
SCRATCH_RIGHT = [(SUM, "#924"), (SUM, "7+7+0=14;8+3+1=12;1+7+1=9;#924"), (SUM, "924#924"), (SUM, "wrong#924"), (WORD, "enots")]
SCRATCH_WRONG = [(SUM, said) for said in (
    "", "#", "924", "#925", "#-924", "#+924", "#0924", "# 924", "#924 ", "#924\n", "#924#", "##924", "#925#924",
    "#924#925", "#924.0",
    "#9 24", "#924 or 925", "#187+737", "#9,24", "#\uff19\uff12\uff14", "#924\u200b", "187+737=924", "#924=", "#92", "#429")] + [
    (WORD, said) for said in ("", "stone", "stone=enots", "enots ", " enots", "Enots", "enot", "enotss", "enots\n", "#enots",
                          "en0ts", "\u0435nots")]


def test_answers_to_countdown():
    task = Countdown(3, 0.0)
    assert not [t for t in COUNTDOWN_RIGHT if task.reward(PROBLEM, t) != 1] and len(set(COUNTDOWN_WRONG)) >= 60
    assert not [t for t in COUNTDOWN_WRONG if task.reward(PROBLEM, t) != 0]


def test_answers_of_models_from_scratch():
    """What they learn is to write one form: another is not looked for."""
    tasks = {SUM: Addition(3, 0.0), WORD: Reverse(5, 0.0)}
    assert not [(p, t) for p, t in SCRATCH_RIGHT if tasks[p].reward(p, t) != 1]
    assert not [(p, t) for p, t in SCRATCH_WRONG if tasks[p].reward(p, t) != 0]


def test_countdown():
    task, wrong, rng = Countdown(3, 0.0), Countdown(3, 1.0), stream(0)
    right = 0
    for _ in range(100):
        p = task.problem(rng)
        good, bad = task.demonstrate(p, rng), wrong.demonstrate(p, rng)
        assert task.reward(p, good) == 1 and task.reward(p, f"#{p.answer}") == 1
        right += task.reward(p, bad)
        assert len(p.prompt) <= task.prompt_length and len(good) < task.answer_length > len(bad)
    assert right < 10                                                     # a few have no other way to go
    p = Problem("3,5,7=38:", "(5*7)+3")
    for text, reward in (("#(5*7)+3", 1), ("<answer>3 + 5*7</answer>", 1), ("5*7=35;#3+7*5", 1), ("#38", 0),
                         ("#5*7+3+0", 0), ("#5*7+3+7-7", 0), ("#5*7+3 and", 0), ("(5*7)+3", 0), ("#35+3", 0), ("#5*7+", 0),
                         ("<answer>1</answer><answer>3+5*7</answer>", 1)):
        assert task.reward(p, text) == reward, text
    assert "3, 5, 7" in task.prompt(p.prompt) and "38" in task.prompt(p.prompt)
    assert all(evaluate(t.partition("#")[2])[0] == v for v, ts in ways((1, 4, 6)).items() for t in ts)
    with pytest.raises(InputError, match="--digits says how many"):
        Countdown(9, 0.1)


