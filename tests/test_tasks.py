"""Tasks for models that read, and the guard around their rewards. What the graders say: test_graders.py."""
import http.server
import json
import os
import pathlib
import threading
import time

import pytest
import torch

import train_rl
from data import FETCHED, Problem, prepare, stream
from data.countdown import Countdown
from data.env import Env
from data.guard import Guard
from data.own import load_own
from data.tasks import make_task
from data.tokenizer import PAD, STOP, decode, encode
from precision import InputError
from sample import Rollout

HERE = pathlib.Path(__file__).resolve().parent.parent


def lines(path):
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()]


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
    groups = [r for r in lines(tmp_path / "run" / "samples.jsonl") if "answers" in r]
    assert groups and all("?" in g["prompt"] for g in groups)


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
