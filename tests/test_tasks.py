"""Tasks for models that read, and what stands between them and whatever a model writes."""
import http.server
import json
import os
import pathlib
import re
import threading
import time
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_rl
from data import FETCHED, Problem, prepare, stream
from data.countdown import Countdown, evaluate, ways
from data.env import Env
from data.gsm8k import final_number, number
from data.guard import Guard
from data.math_answers import last_boxed, tame
from data.own import load_own
from data.tasks import make_task
from data.tokenizer import PAD, STOP, decode, encode
from precision import InputError
from sample import Rollout

HERE = pathlib.Path(__file__).resolve().parent.parent
FIXTURES = HERE / "data" / "fixtures"


def lines(path):
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()]


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
    assert final_number("the answer is 5") is None and final_number("####") is None and final_number("\\boxed{") is None


@pytest.mark.parametrize("path", [FIXTURES / "gsm8k.jsonl", FETCHED / "gsm8k-train.jsonl"],
                         ids=["fixture", "all 7,473"])
def test_every_solution_of_gsm8k_is_right_and_perturbed_ones_are_wrong(path):
    if not path.exists():
        pytest.skip("the whole data set is not at hand")
    task, rows = make_task("gsm8k"), lines(path)
    for problem, row in zip(task.load(str(path)), rows, strict=True):
        value, work = number(problem.answer), row["answer"].rpartition("####")[0]
        assert task.reward(problem, row["answer"]) == 1 == task.reward(problem, rf"\boxed{{{problem.answer}}}")
        for wrong in (f"#### {value + 1}", f"#### {-value or 5}", f"#### {value}0 3", "", f"{value}"):
            assert task.reward(problem, work + wrong) == 0, (problem, wrong)


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


@pytest.mark.parametrize("path", [FIXTURES / "math.jsonl", FETCHED / "math-sanity.jsonl"],
                         ids=["fixture", "all 1,460"])
def test_every_answer_of_math_is_right_in_a_box_and_the_next_one_is_wrong(path, math):
    """The fixture's answers are all different. Of the whole set whole numbers alone are easily told
    apart."""
    if not path.exists():
        pytest.skip("the whole data set is not at hand")
    problems = math.load(str(path))
    assert len(problems) == len(lines(path))
    for p, other in zip(problems, [*problems[1:], problems[0]]):
        assert math.reward(p, rf"So it is $\boxed{{{p.answer}}}$.") == 1, p
        assert math.reward(p, p.answer) == 0                              # without a box it is no answer
        if path.parent == FIXTURES or p.answer.isdecimal() and other.answer.isdecimal():
            right = p.answer == other.answer
            assert math.reward(p, rf"\boxed{{{other.answer}}}") == right, (p, other)


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


# --- a task of your own, and the guard


TASK = '''
import os, time
def load(path):
    return [("a", "1"), ("b", "2")]
def reward(problem, text):
    if text == "hang": time.sleep(1000)
    if text == "spin": return 10 ** 10 ** 9
    if text == "raise": raise RuntimeError("no")
    if text == "die": os._exit(3)
    if text == "exit": raise SystemExit
    if text == "nan": return float("nan")
    if text == "text": return "one"
    if text == "print": print("[1.0]")
    if text == "fork" and os.fork() == 0: time.sleep(1000)
    return text == problem.answer
'''


def test_a_reward_may_hang_raise_die_and_print(tmp_path):
    (tmp_path / "t.py").write_text(TASK)
    task, said = load_own(str(tmp_path / "t.py")), []
    one, _ = task.load()
    texts = ["1", "hang", "2", "raise", "die", "1", "spin", "exit", "nan", "text", "print", "1", "raise", "hang", "1"]
    guard, begin = Guard(task, 1.0, workers=2, say=said.append), time.time()
    got = guard.rewards([(one, t) for t in texts])
    assert got == [float(t == "1") for t in texts] and time.time() - begin < 120
    assert guard.rewards([(one, "1")] * 20) == [1.0] * 20
    words = "\n".join(said)
    assert "TimeoutError: more than 1 s" in words and "RuntimeError: no" in words and "the grader crashed" in words
    assert "'nan'" in words and len(said) <= 7                            # once a kind


@pytest.mark.skipif(not pathlib.Path("/proc").exists(), reason="looks into /proc")
def test_what_a_reward_starts_ends_with_its_child(tmp_path, monkeypatch):
    (tmp_path / "t.py").write_text(TASK.replace('time.sleep(1000)\n    return', (
        "(open('pid', 'w').write(str(os.getpid())), os.rename('pid', 'started'), time.sleep(1000))\n    return")))
    monkeypatch.chdir(tmp_path)
    task, begin = make_task("t.py"), time.time()
    guard = Guard(task, 20.0, workers=1)
    guard.rewards([(task.load()[0], "fork")])
    while not (tmp_path / "started").exists() and time.time() - begin < 60:
        time.sleep(0.05)
    del guard
    state = pathlib.Path("/proc") / (tmp_path / "started").read_text() / "stat"
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":         # a zombie is an end too
        assert time.time() - begin < 90
        time.sleep(0.05)


def test_a_safe_task_runs_where_it_is_called():
    class Broken:
        safe = True

        def reward(self, problem, text):
            return {"x": None, "inf": float("inf")}[text] if text in ("x", "inf") else 1 / len(text)
    said = []
    guard = Guard(Broken(), say=said.append)
    assert guard.rewards([(Problem("", ""), t) for t in ("", "ab", "x", "inf", "")]) == [0.0, 0.5, 0.0, 0.0, 0.0]
    assert len(said) == 2
    assert "ZeroDivisionError" in said[0]


@pytest.mark.parametrize("busy", ["", "hang", "spin"])
def test_a_child_does_not_outlive_its_parent(busy, tmp_path):
    (tmp_path / "t.py").write_text(TASK)
    guard = Guard(load_own(str(tmp_path / "t.py")), 0.5, workers=1)
    process = guard.children.queue[0].process
    if busy:
        process.stdin.write(json.dumps(["a", "1", busy]) + "\n")
    process.stdin.close()                                                 # what the parent's end is to a child
    assert process.wait(timeout=60) == bool(busy)


def test_a_child_that_ended_between_two_answers_is_started_again(tmp_path):
    (tmp_path / "t.py").write_text(TASK)
    guard = Guard(load_own(str(tmp_path / "t.py")), 5.0, workers=1)
    guard.children.queue[0].process.kill()
    guard.children.queue[0].process.wait()
    assert guard.rewards([(Problem("a", "1"), "1")]) == [1.0]


def test_a_file_may_open_others_by_relative_names(tmp_path, monkeypatch):
    """The child works where the parent does. A folder `data` of the user's is not taken for this program's."""
    (tmp_path / "words.txt").write_text("a b")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("1/0")
    (tmp_path / "t.py").write_text("WORDS = open('words.txt').read().split()\n"
                                   "def load(path): return [(w, w) for w in WORDS]\n"
                                   "def reward(problem, text): return text == problem.answer")
    monkeypatch.chdir(tmp_path)
    task = make_task("t.py")
    guard = Guard(task, 5.0, workers=1)
    assert guard.rewards([(p, "a") for p in task.load()]) == [1.0, 0.0]
    child = guard.children.queue[0].process
    assert os.getsid(child.pid) != os.getsid(0)                           # Ctrl-C on the terminal is not for it


REWARD = "def reward(problem, text): return 1\n"
LOAD = "def load(path): return [('q', 'a')]\n"
DRAW = "def problem(rng): return 'q', 'a'\ndef demonstrate(problem, rng): return 'a'\n"


def use(task):
    """All that a run asks of a task before it learns, of whatever it has."""
    if task.loads:
        for p in task.load():
            task.prompt(p.prompt)
    if task.draws:
        task.measure()


@pytest.mark.parametrize("source, words", [
    ("def load(:", "line 1: invalid syntax"),
    ("1/0", "line 1: ZeroDivisionError"),
    ("x = 1", r"has no function reward\(problem, text\)"),
    (LOAD, r"has no function reward\(problem, text\)"),
    (LOAD + "reward = 1", r"has no function reward\(problem, text\)"),
    (REWARD, r"has neither load\(path\), for a model that reads, nor problem\(rng\) and demonstrate\(problem, rng\)"),
    (REWARD + "def problem(rng): return 'q', 'a'", "has neither load"),
    (REWARD + "def load(path): return []", "load gave no problems"),
    (REWARD + "def load(path): return [1]", "load gave 1, not a pair of texts"),
    (REWARD + "def load(path): return 7", "load gave 7, not a list of pairs"),
    (REWARD + "def load(path): return None", "load gave None, not a list of pairs"),
    (REWARD + "def load(path): return 'text'", "load gave 't', not a pair of texts"),
    (REWARD + "def load(path): return [('q', 2)]", r"load gave \('q', 2\), not a pair of texts"),
    (REWARD + "def load(path): return [('', 'a')]", r"load gave \('', 'a'\), not a pair of texts"),
    (REWARD + "def load(path):\n    return 1/0", "line 3: ZeroDivisionError"),
    (REWARD + "def load(path):\n    yield 'q', 'a'\n    yield 1/0", "line 4: ZeroDivisionError"),
    (REWARD + "def load(path):\n    raise ValueError('two\\nlines')", "line 3: ValueError: two"),
    (REWARD + "def load(): return []", "TypeError: load.. takes 0 positional arguments"),
    (REWARD + "def load(path): return open('nowhere')", "line 2: FileNotFoundError"),
    (REWARD + LOAD + "def prompt(question): return 7", "prompt gave 7, not a text"),
    (REWARD + LOAD + "def prompt(question): return ''", "prompt gave '', not a text"),
    (REWARD + LOAD + "def prompt(question): return question.x", "line 3: AttributeError"),
    (REWARD + DRAW.replace("return 'q', 'a'", "return 1/0"), "line 2: ZeroDivisionError"),
    (REWARD + DRAW.replace("return 'q', 'a'", "return 'q'"), "problem gave 'q', not a pair of texts"),
    (REWARD + DRAW.replace("return 'q', 'a'", "return rng.integers(9, size=(2, 2))"), "problem gave array"),
    (REWARD + DRAW.replace("return 'a'", "return 1/0"), "line 3: ZeroDivisionError"),
    (REWARD + DRAW.replace("return 'a'", "return 7"), "demonstrate gave 7, not a text"),
    (REWARD + DRAW + "prompt_length = None", "prompt_length"),
    # these would end the program as if all were well, or with a traceback
    ("import sys\nsys.exit(0)", "line 2: SystemExit: 0"),
    (REWARD + "import sys\ndef load(path): sys.exit(0)", "line 3: SystemExit: 0"),
    (REWARD + LOAD + "def prompt(question): raise SystemExit", "line 3: SystemExit"),
    (REWARD + "def load(path): raise GeneratorExit", "line 2: GeneratorExit"),
    (REWARD + "def load(path): raise BaseException('no')", "line 2: BaseException: no"),
    (REWARD + LOAD + "def prompt(question): pass", "line 3: TypeError: prompt gave None, not a text"),
    (REWARD + LOAD + "def prompt(): return ''", "line 3: TypeError: prompt.. takes 0 positional"),
    (REWARD + LOAD + "system = None", "system gave None, not a text"),
    (REWARD + "def load(path): return [('\\ud800', 'a')]", "line 2: UnicodeEncodeError"),
    (REWARD + "def load(path):\n    while True: yield 'q', 'a'", "line 2: ValueError: load gave more than a million problems"),
])
def test_what_is_wrong_with_a_task_is_one_line(source, words, tmp_path):
    """It names the file, and the file's own line where it raised."""
    (tmp_path / "t.py").write_text(source)
    with pytest.raises(InputError, match=words) as e:
        use(make_task(str(tmp_path / "t.py")))
    assert "\n" not in str(e.value) and "t.py" in str(e.value)


def test_texts_of_a_class_of_their_own_become_plain_ones(tmp_path):
    """Else they could not be saved with the run."""
    (tmp_path / "t.py").write_text(REWARD + "class S(str): pass\ndef load(path): return [(S('q'), S('a'))]\n"
                                   "def prompt(question): return S('p')\nsystem = S('s')")
    task = make_task(str(tmp_path / "t.py"))
    (p,) = task.load()
    assert (p, task.prompt("q"), task.system) == (Problem("q", "a"), "p", "s")
    assert {type(t) for t in (p.prompt, p.answer, task.prompt("q"), task.system)} == {str}


def test_a_file_that_takes_long_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data.own.LONG", 0.05)
    (tmp_path / "t.py").write_text("import time\n" + REWARD + "def load(path):\n    time.sleep(1)\n    return [('q', 'a')]")
    assert len(make_task(str(tmp_path / "t.py")).load()) == 1
    assert f"note: {tmp_path / 't.py'} has been at work for 0.05 s" in capsys.readouterr().err


def test_a_task_that_is_not_there():
    with pytest.raises(InputError, match="--task .*none.py cannot be read: No such file"):
        make_task(str(HERE / "none.py"))
    with pytest.raises(InputError, match="no task 'adition', did you mean addition"):
        make_task("adition")


def test_the_example_is_a_task():
    task = make_task(str(HERE / "data" / "example_task.py"))
    problems = task.load()
    assert task.loads and not task.draws and not task.safe
    assert len(problems) > 40 and all(p.answer.isdigit() for p in problems) and len(set(problems)) == len(problems)
    assert task.reward(problems[0], f" {problems[0].answer}\n") == 1 and task.prompt("q") == "q"
    lines_of_code = [x for x in (HERE / "data" / "example_task.py").read_text().splitlines() if x.strip()]
    assert len(lines_of_code) <= 15


def test_the_example_from_scratch_is_a_task():
    """Its demonstrator is right about as often as it says, and its lengths are measured, with a little more."""
    task, rng = make_task(str(HERE / "data" / "example_scratch.py")).measure(), stream(0)
    assert task.draws and not task.loads and not task.safe
    problems = [task.problem(rng) for _ in range(500)]
    right = [task.reward(p, task.demonstrate(p, rng)) for p in problems]
    assert 0.75 < sum(right) / len(right) < 0.9                   # a third guesses, half of the guesses are right
    assert 6 <= task.prompt_length <= 8 and 3 <= task.answer_length <= 4  # 17?42= and 42 with its stop token
    assert all(len(p.prompt) <= task.prompt_length and len(p.answer) < task.answer_length for p in problems)


@pytest.mark.parametrize("where", ["ours", "in the user's own folder"])
def test_a_task_of_ones_own_trains_from_scratch(where, tmp_path, monkeypatch, capsys):
    """A base of its own by imitation, and then RL, with rewards in processes of their own."""
    source = HERE / "data" / "example_scratch.py"
    (tmp_path / "larger.py").write_text(source.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("run.base.CACHE", tmp_path / "cache")
    job = ("--n-layers 2 --width 64 --base-steps 60 --base-batch 32 --pool 40 --keep 0 1 --heldout 8 --prompts 4 "
           "--steps 2 --device cpu --out run")
    task = str(source) if where == "ours" else "larger.py"
    assert train_rl.main(["--task", task, *job.split()]) == 0
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in rows if "step" in r] == [1, 2] and rows[-1]["result"]["kept"] == 40
    assert list((tmp_path / "cache").glob("base-*/checkpoint.pt")) and "no verdict" in capsys.readouterr().out
    assert all("?" in r["prompt"] for r in lines(tmp_path / "run" / "samples.jsonl"))


def test_a_line_that_is_wrong_is_named(tmp_path):
    task, path = make_task("gsm8k"), tmp_path / "p.jsonl"
    for line, words in (('{"question": "q"}', 'line 2: no text under "answer"'), ("{", "line 2: not JSON"),
                        ("[" * 9000, "line 2"),
                        ('{"question": "q", "answer": "words"}', "line 2: the answer ends with no number"),
                        ('{"question": " ", "answer": "#### 1"}', "line 2: the question is empty")):
        path.write_text('{"question": "q", "answer": "#### 1"}\n' + line + "\n")
        with pytest.raises(InputError, match=words):
            task.load(str(path))
    if not (FETCHED / "gsm8k-train.jsonl").exists():
        with pytest.raises(InputError, match="python -m data.prepare gsm8k.* fetches it"):
            task.load("")


def test_words_for_models_that_read_and_signs_for_those_from_scratch():
    class Chat:
        form = "chatml"

        def prompt(self, text, system=""):
            return [system, text]

    class Plain(Chat):
        form = "plain"
    task = Countdown(3, 0.1)
    p = Problem("3,5,7=38:", "")
    assert decode(Env(task).tokens(p)) == p.prompt == Env(task, Plain()).tokens(p)[1]
    assert Env(task, Chat()).tokens(p)[1].startswith("Using the numbers")
    task.system = "Be brief."
    assert Env(task, Chat()).tokens(p)[0] == "Be brief."


def test_each_answer_is_graded_by_its_own_problem_and_cut_off_ones_are_wrong():
    """Two answers to each of three problems, all of which say the right thing; some without their stop token."""
    task, stopped = make_task("addition", 1, 0.0), [True, True, True, False, False, True]
    problems = [Problem("1+1=", "2"), Problem("2+3=", "5"), Problem("4+5=", "9")]
    rows = [encode(p.prompt + "#" + p.answer) + [STOP] * s for p, s in zip([p for p in problems for _ in "ab"], stopped)]
    tokens = torch.tensor([r + [PAD] * (8 - len(r)) for r in rows])
    rollout = Rollout(tokens, torch.zeros(6, 8), torch.full((6,), 4), torch.tensor([len(r) for r in rows]),
                      torch.tensor(stopped))
    assert rollout.texts() == ["#2", "#2", "#5", "#5", "#9", "#9"]
    assert Env(task).rewards(problems, rollout) == [float(s) for s in stopped]
    assert Env(task).rewards(problems[::-1], rollout) == [0, 0, 1, 0, 0, 0]


# --- prepare


def test_prepare_checks_what_it_fetches(tmp_path, monkeypatch, capsys):
    served = tmp_path / "www"
    served.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(served))

        def log_message(self, *_):
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/a.jsonl"
        monkeypatch.setitem(prepare.SETS, "gsm8k", [("gsm8k-train.jsonl", address, 2)])
        good = '{"question": "q", "answer": "#### 1"}\n'
        for content, words in ((None, "404"), (good, "1 problems, 2 were expected"),
                               (good + "{\n", "line 2: not JSON"),
                               (good + '{"question": "q"}\n', 'line 2: no text under "answer"')):
            if content is not None:
                (served / "a.jsonl").write_text(content)
            assert prepare.main(["gsm8k", "--out", str(tmp_path / "out")]) == 1
            assert words in capsys.readouterr().err and not list((tmp_path / "out").iterdir())
        (served / "a.jsonl").write_text(good * 2)
        assert prepare.main(["gsm8k", "--out", str(tmp_path / "out")]) == 0
        assert len(make_task("gsm8k").load(str(tmp_path / "out" / "gsm8k-train.jsonl"))) == 2
        assert prepare.main(["gsm8k", "--out", str(tmp_path / "out")]) == 0
        assert "there already" in capsys.readouterr().out

        pyarrow = pytest.importorskip("pyarrow")                           # math-sanity is published as an Arrow file
        address = address.replace("a.jsonl", "b.arrow")
        monkeypatch.setitem(prepare.SETS, "math-sanity", [("math-sanity.jsonl", address, 2)])
        (served / "b.arrow").write_text("version https://git-lfs.github.com/spec/v1\n")
        assert prepare.main(["math-sanity", "--out", str(tmp_path / "out")]) == 1
        assert "no Arrow file" in capsys.readouterr().err
        table = pyarrow.table(dict(problem=["p", "é"], answer=["1", r"\frac{1}{2}"], level=[1, 2]))
        with pyarrow.OSFile(str(served / "b.arrow"), "wb") as f, pyarrow.ipc.new_stream(f, table.schema) as writer:
            writer.write_table(table)
        assert prepare.main(["math-sanity", "--out", str(tmp_path / "out")]) == 0
        assert lines(tmp_path / "out" / "math-sanity.jsonl") == [{"problem": "p", "answer": "1"},
                                                                 {"problem": "é", "answer": r"\frac{1}{2}"}]
        server.shutdown()
