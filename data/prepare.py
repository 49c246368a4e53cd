"""Fetch a real data set, for those who are online:

    python -m data.prepare gsm8k          # 7,473 training and 1,319 test problems, MIT
    python -m data.prepare math           # 12,000 and 500 problems of MATH, the split of "Let's verify step by step", MIT
    python -m data.prepare math-sanity    # the 1,460 problems of the FP16 paper's sanity test, MIT

They are put into data/fetched/, as JSON Lines, where `--task gsm8k` and `--task math` look for them. A file is checked, every
line, before it takes its place. The addresses were not reachable when this was written: they are those that the sources
document, and if one has moved, the message says what to fetch by hand and where to put it.
"""
import argparse
import json
import os
import pathlib
import sys
import urllib.error
import urllib.request

from data import FETCHED

GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
# github.com/.../raw and not raw.githubusercontent.com, which answers with a pointer of three lines for a file kept in Git LFS
MATH = "https://github.com/openai/prm800k/raw/main/prm800k/math_splits"
SANITY = "https://github.com/sail-sg/Precision-RL/raw/main/oat/data/train/math_1k5/train"
# name: [(file to write, address, number of problems, names of the two texts of a line)]
SETS = {
    "gsm8k": [("gsm8k-train.jsonl", f"{GSM8K}/train.jsonl", 7473, ("question", "answer")),
              ("gsm8k-test.jsonl", f"{GSM8K}/test.jsonl", 1319, ("question", "answer"))],
    "math": [("math-train.jsonl", f"{MATH}/train.jsonl", 12000, ("problem", "answer")),
             ("math-test.jsonl", f"{MATH}/test.jsonl", 500, ("problem", "answer"))],
    "math-sanity": [("math-sanity.jsonl", f"{SANITY}/data-00000-of-00001.arrow", 1460, ("problem", "answer"))],
}


def fetch(address, path):
    """Download to path, with progress."""
    with urllib.request.urlopen(address, timeout=60) as source, open(path, "wb") as target:
        size, done = int(source.headers.get("Content-Length") or 0), 0
        while part := source.read(1 << 16):
            target.write(part)
            done += len(part)
            print(f"\r  {done / 2 ** 20:.1f} MiB" + (f" of {size / 2 ** 20:.1f}" if size else ""), end="", file=sys.stderr)
        print(file=sys.stderr)


def unpack(path, names):
    """An Arrow file, as Hugging Face keeps tables, becomes JSON Lines in its place. -> what is in the way, if anything."""
    try:
        import pyarrow
    except ImportError:
        return "it is an Arrow file, and reading it takes pyarrow: pip install pyarrow, and once more"
    try:
        with pyarrow.OSFile(str(path)) as f:
            rows = pyarrow.ipc.open_stream(f).read_all().to_pylist()
    except pyarrow.ArrowException as e:
        return f"it is no Arrow file ({str(e).splitlines()[0]})"
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps({k: row.get(k) for k in names}, ensure_ascii=False) + "\n" for row in rows)
    return ""


def check(path, count, names):
    """What is wrong with a fetched file, in words, or nothing."""
    n = 0
    with open(path, encoding="utf-8") as f:
        for n, line in enumerate(f, 1):
            try:
                row = json.loads(line)
            except ValueError:
                return f"line {n} is not JSON"
            if not (isinstance(row, dict) and all(isinstance(row.get(k), str) and row[k].strip() for k in names)):
                return f'line {n} has no "{names[0]}" and "{names[1]}"'
    return "" if n == count else f"it has {n:,} problems, {count:,} were expected"


def prepare(name, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for file, address, count, names in SETS[name]:
        path, partial = folder / file, folder / f"{file}.partial"
        if path.exists():
            print(f"{path}: there already")
            continue
        print(f"{path}: from {address}")
        try:
            fetch(address, partial)
            why = (unpack(partial, names) if address.endswith(".arrow") else "") or check(partial, count, names)
        except (OSError, UnicodeDecodeError, urllib.error.URLError) as e:
            why = str(e)
        if why:
            partial.unlink(missing_ok=True)
            print(f"prepare: {address}: {why}. Fetch {count:,} problems by hand, JSON objects with \"{names[0]}\" and "
                  f"\"{names[1]}\" a line, and put them at {path}, or anywhere and give --data", file=sys.stderr)
            return 1
        os.replace(partial, path)
        print(f"  {count:,} problems")
    return 0


def main(argv=None):
    p = argparse.ArgumentParser(prog="data.prepare", description=__doc__.split("\n\n")[0])
    p.add_argument("name", choices=tuple(SETS))
    p.add_argument("--out", type=pathlib.Path, default=FETCHED, help="folder (default: %(default)s)")
    a = p.parse_args(argv)
    return prepare(a.name, a.out)


if __name__ == "__main__":
    sys.exit(main())
