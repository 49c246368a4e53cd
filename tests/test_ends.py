"""How a command ends, whatever ends it: a line, a status, nothing lost. tests/faults.py does the same to whole runs."""
import io
import os
import signal
import sys

import pytest

from data import Problem
from data.guard import FAILURES, Guard
from data.own import load_own
from precision import InputError
from run import base, curves
from run.console import ENDING, run_main
from run.folder import Run, interruptible


def ended(capsys, error):
    """A command that ends with this -> exit status, what stderr says."""
    def main():
        raise error
    before = {n: signal.getsignal(n) for n in ENDING}
    try:
        with pytest.raises(SystemExit) as e:
            run_main(main)
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    return e.value.code, capsys.readouterr().err


@pytest.mark.parametrize("error, status, words", [
    (InputError("no such thing"), 1, "no such thing"), (KeyboardInterrupt(), 130, "interrupted"),
    (KeyboardInterrupt(15), 143, "interrupted"), (MemoryError(), 1, "out of memory; lower --micro-batch"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, "out of memory; lower --micro-batch"),
    (RuntimeError("can't start new thread"), 1, "no more threads"),
    (OSError(28, "No space left", "x.pt"), 1, "x.pt: No space left"),
    (OSError("odd"), 1, "output: odd"), (InputError("a" * 10 ** 6 + " is not there"), 1, "a is not there"),
    (InputError("two\nlines"), 1, "two lines"), (InputError("a b " * 10 ** 6), 1, "a b a b")])
def test_an_error_is_one_line_and_a_status(capsys, error, status, words):
    code, said = ended(capsys, error)
    assert code == status and words in said and said.count("\n") == 1 and len(said) < 1200


def test_a_mistake_of_the_program_is_not_hidden():
    with pytest.raises(RuntimeError, match="a mistake"):
        run_main(lambda: (_ for _ in ()).throw(RuntimeError("a mistake")))


def test_a_closed_pipe_ends_quietly(capsys):
    assert ended(capsys, BrokenPipeError(32, "Broken pipe")) == (1, "")


def test_streams_that_are_closed_or_know_few_letters(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as e:
        run_main(lambda: print("größe \ud800 →"))
    assert not e.value.code and narrow.buffer.getvalue() == b"gr\\xf6\\xdfe \\ud800 \\u2192\n"
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as e:
        run_main(lambda: print("nowhere") or 3)
    assert e.value.code == 3


@pytest.mark.parametrize("number", [signal.SIGINT, *ENDING])
def test_a_signal_ends_the_step_and_a_second_one_the_run(number, capsys):
    class Again(Exception):
        pass

    def second(n, _):
        raise Again
    before = signal.signal(number, second)
    try:
        with interruptible() as stop:
            os.kill(os.getpid(), number)
            assert stop == [number] and "stopping after this step" in capsys.readouterr().out
            with pytest.raises(Again):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is second
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("error, silenced", [(RuntimeError("reentrant call"), 0), (OSError(5, "Input/output error"), 1)])
def test_a_signal_in_the_middle_of_a_line(error, silenced, monkeypatch):
    """Python refuses to print then; what the run says afterwards must still be seen. A terminal that is gone is another
    matter."""
    calls = []

    def say(text):
        raise error
    monkeypatch.setattr("run.folder.say", say)
    monkeypatch.setattr("run.folder.silence", lambda: calls.append(1))
    with interruptible() as stop:
        os.kill(os.getpid(), signal.SIGINT)
    assert stop == [signal.SIGINT] and len(calls) == silenced


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP")
def test_a_signal_that_is_ignored_stays_so():
    """As nohup asks."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop == [] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_folder_belongs_to_one_run(tmp_path):
    pytest.importorskip("fcntl")
    first, second = Run.new(str(tmp_path / "a")), Run.new(str(tmp_path / "a"))
    first.occupy()
    with pytest.raises(InputError, match="another run is at work"):
        second.occupy()
    first.leave()
    Run.new(str(tmp_path / "a")).occupy()


def test_a_run_that_ended_before_its_first_checkpoint_is_none(tmp_path):
    """Its name is free again, and its lines are gone."""
    run = Run.new(str(tmp_path / "a"))
    run.log(dict(config={}))
    run = Run.new(str(tmp_path / "a"))
    assert not run.metrics.exists()
    run.log(dict(step=1))
    with pytest.raises(InputError, match="already holds a run"):
        Run.new(str(tmp_path / "a"))


def test_a_cache_that_cannot_be_written_stops_nothing(capsys):
    def write():
        raise OSError(30, "Read-only file system", "base")
    base.keep(write)
    assert "not kept for other runs" in capsys.readouterr().out


def test_curves_of_a_folder_without_a_run(tmp_path):
    with pytest.raises(InputError, match=r"no metrics\.jsonl of a run"):
        curves.main([str(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text('{"config": {"precision": "fp16"}}\n{"step": 1, "accur', encoding="utf-8")
    curves.main([str(tmp_path)])                                          # a line that a kill has cut short


# --- graders


def guard_of(tmp_path, reward, seconds=20.0):
    (tmp_path / "t.py").write_text(f"def load(path): return [('a', '1')]\ndef reward(problem, text):\n{reward}", encoding="utf-8")
    return Guard(load_own(str(tmp_path / "t.py")), seconds, workers=2, say=lambda text: None)


def answers(*texts):
    return [(Problem("a", "1"), t) for t in texts]


@pytest.mark.parametrize("reward", ["    1 / 0", "    import os; os._exit(1)", "    return None", "    raise SystemExit(0)"])
def test_a_grader_that_always_fails_ends_the_run(tmp_path, reward):
    """With zeros the run would go on, and learn nothing."""
    with pytest.raises(InputError, match=f"failed for {FAILURES} answers one after another"):
        guard_of(tmp_path, reward).rewards(answers(*["x"] * (FAILURES + 5)))


def test_one_that_fails_often_does_not(tmp_path):
    guard = guard_of(tmp_path, "    return 1 if text == 'y' else 1 / 0")
    some = [*"x" * (FAILURES // 2), "y"] * 4
    assert guard.rewards(answers(*some)) == [float(t == "y") for t in some]


def test_what_goes_wrong_in_a_grader_is_a_short_text(tmp_path):
    guard = guard_of(tmp_path, """
    if text == "long": raise ValueError("x" * 10 ** 7)
    if text == "odd": raise ValueError("\\ud800")
    if text == "none":
        class Wordless(Exception):
            def __str__(self): raise ValueError
        raise Wordless
    if text == "generator": raise GeneratorExit
    return 1""")
    said = []
    guard.say = said.append
    assert guard.rewards(answers("long", "odd", "none", "generator", "y")) == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert all(len(line) < 500 for line in said)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="looks into /proc")
def test_a_reward_that_writes_into_the_pipe_ends_nothing(tmp_path):
    guard = guard_of(tmp_path, """
    import os
    for fd in map(int, os.listdir("/proc/self/fd")):
        if text == "x" and fd > 2 and "pipe" in os.readlink(f"/proc/self/fd/{fd}"):
            os.write(fd, b"[1, {]\\n")
    return 1""")
    guard.rewards(answers("x", "y"))
    assert guard.rewards(answers("y", "y", "y"))[-1] == 1.0


def test_a_grader_does_not_swallow_the_users_ctrl_c():
    class Safe:
        safe = True

        def reward(self, problem, text):
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        Guard(Safe()).rewards(answers("x"))
