"""The workshop's command.

    python -m workshop check 0       # is this machine ready?
    python -m workshop start 1       # makes your file, workshop/mine/01_format.py
    python -m workshop check 1       # what is right in it, what is not, and why
    python -m workshop run 3         # the program with what you wrote; for 5, 6 and 8 several runs
    python -m workshop run 3 --lr 2e-3 --steps 40      # flags of train_rl.py
    python -m workshop status        # how far you are
"""
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from operators.code import ROOT, has_tools
from precision import InputError
from run.console import Parser, run_main
from run.lines import say, wrapped
from workshop import ladder
from workshop.ladder import EXERCISES, Shown, Wrong, fresh, keep, passed, place, read, shown, steps_of

CORE = "precision.py", "model.py", "sample.py", "algorithms.py", "train_rl.py", "operators", "run"


def start(number, again):
    """The participant's file, from the stub. again: once more; the old one is kept."""
    e = EXERCISES[number]
    if e.path.exists() and not again:
        raise InputError(f"{shown(e.path)} is there already, and is not touched (--again: begin "
                         "anew; the old one is kept)")
    e.path.parent.mkdir(exist_ok=True)
    if e.path.exists():
        old = e.path.parent / "old"
        old.mkdir(exist_ok=True)
        e.path.replace(old / f"{e.name}-{time.strftime('%Y%m%d-%H%M%S')}.py")
    text = e.stub.read_text(encoding="utf-8")
    e.path.write_text(getattr(e.checks, "begin", str)(text), encoding="utf-8")
    say(f"the page: {shown(e.page)}\nyour file: {shown(e.path)}\n"
        f"then: python -m workshop check {number}")


def check(number):
    """Say what is right and what is not. -> exit status."""
    if number == 0:
        from workshop.checks import c00_ready as checks
    else:
        e, checks = EXERCISES[number], EXERCISES[number].checks
    begin = time.time()
    core_changed()
    try:
        for line in checks.check(read(e.path) if number else None):
            say(line if isinstance(line, Shown) else wrapped(line, "  right    ", " " * 11))
    except Wrong as wrong:
        say(wrapped(str(wrong), "  not yet  ", " " * 11))
        return 1
    if number == 0:
        return 0
    again = number in passed()
    keep(number)
    say(f"\nExercise {number}, {e.title}: passed, in {time.time() - begin:.1f} s.")
    if not again and not hasattr(e.checks, "SPOILS"):
        say(f"\nOne way to write it, {shown(e.solution)}:\n")
        say("\n".join("    " + line for line in e.solution.read_text(encoding="utf-8").splitlines()))
    say("\n" + wrapped(f"Think about it: {e.why} (Answers: workshop/INSTRUCTOR.md, at its end.)"))
    after = sorted((n for n in EXERCISES if n not in passed()), key=lambda n: (n < number, n))
    say(f"\nNext: python -m workshop start {after[0]}" if after else "\nThat was the last one.")
    return 0


def core_changed():
    """No exercise asks for an edit of the program. Who made one sees it: it may be the cause."""
    if not (ROOT / ".git").exists() or not has_tools():
        return
    command = ["git", "diff", "HEAD", "--", *CORE]
    try:
        diff = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
                              errors="replace", timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return
    if diff:
        lines = diff.splitlines()
        say("note: the program itself was edited. If that was not meant: git checkout -- FILE")
        say("\n".join(f"    {line}" for line in lines[:30]))
        if len(lines) > 30:
            say(f"    ... and {len(lines) - 30} lines more: git diff")


def run(number, flags):
    """The program with what the participant wrote. Some exercises have several runs: then as many
    at a time as there are cores, each with one thread."""
    e = EXERCISES[number]
    mine = read(e.path)
    if hasattr(e.checks, "run"):
        return e.checks.run(mine, flags)
    try:
        jobs = e.checks.jobs(mine, flags)                           # name -> flags
    except Wrong as wrong:
        raise InputError(str(wrong)) from None
    say(f"with {shown(e.path)}" + ", whose check is not passed yet" * (number not in passed()))
    command = [sys.executable, "-m", "workshop.trainer", str(number), str(e.path)]
    if len(jobs) == 1:
        (name, one), = jobs.items()
        name = "-".join([name, *re.findall(r"\w[\w.-]*", " ".join(flags))])      # a folder for these flags
        out = ["--out", str(fresh(place(name)))] if "--out" not in one else []
        return subprocess.run([*command, *one, *out], cwd=ROOT).returncode
    done = {name for name in jobs if name.endswith("-sound") and not flags and steps_of(place(name))}
    todo = {name: [*command, *one, "--out", str(fresh(place(name)))] for name, one in jobs.items()
            if name not in done}
    say(f"{len(todo)} runs, into {shown(ladder.RUNS)}")

    def once(item):
        name, line = item
        begin = time.time()
        ran = subprocess.run(line, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace")
        last = (ran.stdout.strip().splitlines() or [""])[-1]
        said = (ran.stderr.strip().splitlines() or [last])[-1]
        return name, ran.returncode, said, time.time() - begin
    failed = 0
    first, *others = todo.items()            # alone: it makes the base model that all begin with
    for some in ([first], others):
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for name, status, said, seconds in pool.map(once, some):
                ended = f"{seconds:.0f} s" if status == 0 else f"ended early: {said}"
                say(f"  {name:28} {ended}")
                failed += status != 0
    if (place(next(iter(jobs))) / "metrics.jsonl").exists():
        from report import page
        folders = [place(name) for name in jobs if (place(name) / "metrics.jsonl").exists()]
        if hasattr(e.checks, "beside"):
            say(e.checks.beside(mine))
        say(f"side by side, to open in a browser: "
            f"{shown(page.write(folders, place(f'{number:02}-report') / 'report.html'))}")
    return 1 if failed == len(jobs) else 0


def status():
    done = passed()
    for n, e in EXERCISES.items():
        state = f"passed {done[n]}" if n in done else "begun" if e.path.exists() else ""
        say(f"  {n}  {e.title:30} {e.minutes:3} min  {state}")
    left = [n for n in EXERCISES if n not in done]
    if left:
        begun = EXERCISES[left[0]].path.exists()
        say(f"next: python -m workshop {'check' if begun else 'start'} {left[0]}")
    return 0


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    p = Parser(prog="workshop", description="Eight exercises that check themselves.",
               usage="python -m workshop start|check|run N, or status", allow_abbrev=False)
    p.add_argument("what", nargs="?", default="status", choices=("start", "check", "run", "status"))
    p.add_argument("number", nargs="?", type=int, choices=range(len(EXERCISES) + 1))
    p.add_argument("--again", action="store_true", help="with start: begin anew")
    own, flags = (argv[:2], argv[2:]) if argv[:1] == ["run"] else (argv, [])
    a = p.parse_args(own)
    if a.what == "status":
        return status()
    if a.number is None or a.number == 0 and a.what != "check":
        raise InputError(f"which exercise? python -m workshop {a.what} N, with N from 1 to 8")
    if a.what == "start":
        return start(a.number, a.again)
    return check(a.number) if a.what == "check" else run(a.number, flags)


if __name__ == "__main__":
    run_main(main)
