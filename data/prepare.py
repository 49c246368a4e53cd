"""Fetch a real data set, for those who are online:

    python -m data.prepare gsm8k          # 7,473 training and 1,319 test problems
    python -m data.prepare math           # 12,000 and 500 problems, "Let's verify step by step"
    python -m data.prepare math-sanity    # the 1,460 problems of the FP16 paper's sanity test

All are under the MIT licence. They go to data/fetched/, as JSON Lines, where `--task gsm8k` and
`--task math` look for them. A file is read as its task reads it before it takes its place. The
addresses were not reachable when this was written: they are those that the sources document. If one
has moved, the message says what to fetch by hand and where to put it.
"""
import argparse
import http.client
import json
import os
import pathlib
import sys
import urllib.request

from data import FETCHED
from data.tasks import make_task

GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
# github.com/.../raw and not raw.githubusercontent.com, which answers with a pointer of three lines
# for a file kept in Git LFS
MATH = "https://github.com/openai/prm800k/raw/main/prm800k/math_splits"
SANITY = "https://github.com/sail-sg/Precision-RL/raw/main/oat/data/train/math_1k5/train"
# name: [(file to write, address, number of problems)]
SETS = {
    "gsm8k": [("gsm8k-train.jsonl", f"{GSM8K}/train.jsonl", 7473),
              ("gsm8k-test.jsonl", f"{GSM8K}/test.jsonl", 1319)],
    "math": [("math-train.jsonl", f"{MATH}/train.jsonl", 12000),
             ("math-test.jsonl", f"{MATH}/test.jsonl", 500)],
    "math-sanity": [("math-sanity.jsonl", f"{SANITY}/data-00000-of-00001.arrow", 1460)],
}


def fetch(address):
    """-> a JSON Lines file's bytes. An Arrow file, as Hugging Face keeps tables, becomes one."""
    with urllib.request.urlopen(address, timeout=60) as source:
        content = source.read()
    if not address.endswith(".arrow"):
        return content
    try:
        import pyarrow
    except ImportError:
        raise ValueError("reading an Arrow file takes pyarrow: pip install pyarrow") from None
    try:
        table = pyarrow.ipc.open_stream(content).read_all()
        rows = table.select(["problem", "answer"]).to_pylist()
    except pyarrow.ArrowException as e:
        raise ValueError(f"it is no Arrow file of problems ({e})") from None
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def prepare(name, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for file, address, count in SETS[name]:
        path, partial = folder / file, folder / f"{file}.partial"
        if path.exists():
            print(f"{path}: there already")
            continue
        print(f"{path}: from {address}", flush=True)
        try:
            partial.write_bytes(fetch(address))
            n = len(make_task(name.partition("-")[0]).load(str(partial)))
            if n != count:
                raise ValueError(f"it has {n:,} problems, {count:,} were expected")
        except (OSError, ValueError, http.client.HTTPException) as e:
            partial.unlink(missing_ok=True)
            print(f"prepare: {address}: {' '.join(str(e).split())}. Fetch {count:,} problems by "
                  "hand, a JSON object with a problem and its answer a line, and put them at "
                  f"{path}, or anywhere and give --data", file=sys.stderr)
            return 1
        os.replace(partial, path)
        print(f"  {count:,} problems")
    return 0


def main(argv=None):
    p = argparse.ArgumentParser(prog="data.prepare", description=__doc__.split("\n\n")[0])
    p.add_argument("name", choices=tuple(SETS))
    p.add_argument("--out", type=pathlib.Path, default=FETCHED, help="folder")
    a = p.parse_args(argv)
    return prepare(a.name, a.out)


if __name__ == "__main__":
    sys.exit(main())
