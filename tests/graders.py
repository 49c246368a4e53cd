r"""How often is a right answer refused, and a wrong one taken?

    python -m tests.graders           # minutes: math-verify reads some 20,000 answers of MATH

All worked answers of a data set are graded as they stand: those refused are false negatives. Then
each is changed in one place, and graded again: those still taken are false positives, and listed.
The files are those of `python -m data.prepare gsm8k` and `math-sanity`, or of --gsm8k and --math.
Where a file has answers without their working, they are put in a box.
"""
import argparse
import json
import pathlib
import re
import sys
from collections import Counter

from data import FETCHED, texts
from data.tasks import make_task
from run.console import run_main

FILES = {"gsm8k": "gsm8k-train.jsonl", "math": "math-sanity.jsonl"}
# None of these is a change of value that is none, as 1^2 for 1 would be
SPOILED = (" million", r" \text{ thousand}", " is wrong", " not", r" \text{ or } 1", ", 1", "-1",
           "+7/7", " to 99", "e3", "!", "^2+1", "#### 1", r"\,1", "?", r"\%\%", "²", "٠")


def numbers_changed(answer):
    """Each whole number in turn: a digit raised, a digit less, one more, two swapped."""
    for found in re.finditer("[0-9]+", answer):
        n = found[0]
        for kind, new in (("the first digit raised", str(int(n[0]) % 9 + 1) + n[1:]),
                          ("the last digit raised", n[:-1] + str((int(n[-1]) + 1) % 10)),
                          ("a digit lost", n[1:] if n[0] != "0" else ""),
                          ("a digit too many", n + "7"),
                          ("two digits swapped", n[1::-1] + n[2:])):
            if new:
                yield kind, answer[:found.start()] + new + answer[found.end():]


def terms_changed(answer):
    """Each sign in turn is the other one, or gone with what follows."""
    if answer[:1] not in "-+0" and not re.search("[a-zA-Z]{3,}", re.sub(r"\\[a-z]+", "", answer)):
        yield "a sign put before", "-" + answer
    for found in re.finditer(r"[-+]", answer):
        other = answer[:found.start()] + "+-"[found[0] == "+"] + answer[found.end():]
        yield "a sign", other
    for found in re.finditer(r"(?<=[0-9a-zA-Z}]) ?[-+] ?[0-9a-zA-Z\\{}^]+", answer):
        yield "a term lost", answer[:found.start()] + answer[found.end():]


def wrong(answer):
    """-> (what was changed, the answer with it), once each."""
    seen = {answer}
    spoiled = [("spoiled", answer + more) for more in SPOILED]
    for kind, text in [*numbers_changed(answer), *terms_changed(answer), *spoiled]:
        if text not in seen:
            seen.add(text)
            yield kind, text


def rates(name, path, every=1):
    """-> (right answers refused, wrong ones taken, how many were right, how many wrong)."""
    task = make_task(name)
    task.prepare()
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    refused, taken, counts = [], [], Counter()
    for problem, row in list(zip(task.load(str(path)), rows, strict=True))[::every]:
        work, hashes, _ = list(texts(row))[1][1].rpartition("####")
        ways = [work + "#### {}"] * bool(hashes) + ["So it is $\\boxed{{}}$."]
        for way in ways:
            counts["right"] += 1
            if task.reward(problem, way.replace("{}", problem.answer)) != 1:
                refused.append(problem.answer)
            for kind, changed in wrong(problem.answer):
                counts["wrong"] += 1
                if task.reward(problem, way.replace("{}", changed)):
                    taken.append(f"{kind}: {changed!r} for {problem.answer!r}")
    return refused, taken, counts["right"], counts["wrong"]


def main(argv=None):
    p = argparse.ArgumentParser(prog="tests.graders", description=__doc__.split("\n\n")[0])
    for name, file in FILES.items():
        p.add_argument(f"--{name}", type=pathlib.Path, default=FETCHED / file, help="its file")
    p.add_argument("--every", type=int, default=1, help="of the problems, one in so many")
    a = p.parse_args(argv)
    for name in FILES:
        refused, taken, right, wrongs = rates(name, getattr(a, name), max(1, a.every))
        print(f"{name}: {len(refused)} of {right:,} right answers refused, {len(taken)} of "
              f"{wrongs:,} wrong ones taken ({len(taken) / wrongs:.2%})")
        for line in [*(f"  refused {text!r}" for text in refused), *(f"  {t}" for t in taken)]:
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
