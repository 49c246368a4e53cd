"""The list of silent bugs fits the program, and the tests notice them: ten on every day, all of them within two weeks.

    TENBIT_BUGS_DATE=2026-11-25 pytest -n 0 tests/test_silent_bugs.py        # the ten of that day again
    python -m tests.silent_bugs                                              # all of them
"""
import ast
import datetime
import os
import shutil
import subprocess
import sys

import pytest
from silent_bugs import BUGS, ROOT, copy_of_the_tree, mutated, outcome, sound

A_DAY = 10


def of(date):
    """The ten bugs of a day: a round over the whole list."""
    first = datetime.date.fromisoformat(date).toordinal() * A_DAY
    return [BUGS[(first + i) % len(BUGS)] for i in range(A_DAY)]


@pytest.fixture(scope="module")
def today():
    return os.environ.get("TENBIT_BUGS_DATE") or datetime.date.today().isoformat()


@pytest.fixture(scope="module")
def copy(today, tmp_path_factory):
    """A copy of the program, in which the tests of the day's bugs pass."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("copies the files that git knows")
    folder = tmp_path_factory.mktemp("copy")
    copy_of_the_tree(folder)
    said = sound(folder, of(today))
    assert not said, f"without a bug these tests must pass:\n{said}"
    return folder


@pytest.mark.parametrize("bug", BUGS, ids=lambda b: b.name)
def test_it_fits_the_program(bug):
    """An edit of the program may ask for an edit of the list: `old` is the place as it reads now."""
    text = mutated(bug)
    ast.parse(text)
    assert bug.new != bug.old and text != (ROOT / bug.file).read_text(encoding="utf-8")
    assert bug.seen.endswith(".") and len(bug.seen) < 120 and bug.tests


def test_names_are_apart_and_every_test_is_there():
    assert len(BUGS) >= 40 and len({b.name for b in BUGS}) == len(BUGS)
    tests = sorted({t for b in BUGS for t in b.tests})
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--collect-only", "-p", "no:cacheprovider",
               "-p", "no:xdist", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_come_up_within_two_weeks():
    days = [f"2027-01-{d:02}" for d in range(1, 15)]
    assert {b.name for day in days for b in of(day)} == {b.name for b in BUGS}


@pytest.mark.parametrize("place", range(A_DAY))
def test_a_bug_of_today_is_caught(place, copy, today):
    bug = of(today)[place]
    caught, _, said = outcome(copy, bug)
    assert caught, f"{bug.name!r} in {bug.file} went unnoticed (again: TENBIT_BUGS_DATE={today})\n{said}"
