"""What every command here has: flags, a folder, tables, a JSON file and a picture. It needs no
tokenizer, as experiments.gpu has to run where there is none.

    python -m experiments.NAME              # the README's sizes, 30 minutes at most on two cores
    python -m experiments.NAME --quick      # 2 minutes or less: does the command work?
    python -m experiments.NAME --redraw     # nothing is run: the picture, from the JSON file
"""
import datetime
import json
import math
import os
import pathlib
import platform
import re
import sys
import time

import numpy as np

from operators.code import ROOT, fingerprints
from operators.device import pick_device
from precision import InputError
from run.checkpoint import replacing
from run.console import Parser
from run.folder import State, provenance


class Command:
    """name: experiments.NAME; text: its module's docstring; add(parser): flags of its own."""

    def __init__(self, name, text, argv, add=lambda parser: None):
        p = Parser(prog=f"experiments.{name}", description=text.split("\n\n")[0],
                   allow_abbrev=False)
        p.add_argument("--quick", action="store_true",
                       help="2 minutes or less, to see that it works; its numbers mean nothing")
        p.add_argument("--out", default="", help="folder for JSON, PNG and runs (default: results; "
                       "with --quick out/lab/NAME-quick)")
        p.add_argument("--redraw", action="store_true", help="the picture, from the JSON file")
        add(p)
        a = p.parse_args(argv)
        self.name, self.args, self.quick, self.begin = name, a, a.quick, time.time()
        runs = ROOT / "out" / "lab" / (f"{name}-quick" if a.quick else name)
        self.out = pathlib.Path(a.out) if a.out else runs if a.quick else ROOT / "results"
        self.folder = self.out.resolve() / "runs" if a.out else runs
        self.said = [f"python -m experiments.{name}", *(sys.argv[1:] if argv is None else argv)]

    def file(self, name=""):
        return self.out / f"{slug(name or self.name)}.json"

    def present(self, make, draw=None, name=""):
        """make() -> (result, runs), kept in NAME.json; draw(plt, result, runs) -> a figure, kept in
        NAME.png. It is given what the file says, so that --redraw draws the same."""
        path = self.file(name)
        if not self.args.redraw:
            self.save(path, *make())
            print(path)
        elif not path.exists():
            raise InputError(f"{path} is not there: run the command without --redraw first")
        saved = json.loads(path.read_text(encoding="utf-8"))
        if draw:
            picture(path.with_suffix(".png"), draw, saved["result"], saved["runs"])
        return saved["result"]

    def save(self, path, result, runs=(), **about):
        """The result, a line a run, and what is needed to get them again."""
        about = dict(command=" ".join(self.said), **machine(), **about,
                     seconds=round(time.time() - self.begin))      # without what was run before
        about, result, *runs = (json.dumps(tidy(x), allow_nan=False)
                                for x in (about, result, *runs))
        runs = ",\n".join(runs)
        with replacing(path) as f:
            f.write(f'{about[:-1]},\n"result": {result},\n"runs": [\n{runs}]}}\n'.encode())


def slug(text):
    return "-".join(re.findall(r"\w+", text))


def tidy(x):
    """The same with five digits, and None for NaN and infinities, which JSON does not know."""
    if isinstance(x, dict):
        return {k: tidy(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [tidy(v) for v in x]
    if isinstance(x, float):
        return float(f"{x:.5g}") if math.isfinite(x) else None
    return x


def show(table, title=""):
    """{row: {column: text or number}}, printed; None is what no run came far enough to have."""
    first = max(map(len, (title, *table))) + 3
    columns = dict.fromkeys(c for cells in table.values() for c in cells)
    print(f"\n{title:{first}}" + "  ".join(f"{c:>10}" for c in columns))
    for row, cells in table.items():
        texts = (f"{short(cells.get(c, '')):>{max(10, len(c))}}" for c in columns)
        print(f"{row:{first}}" + "  ".join(texts))


def short(x):
    return "-" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x)


def sources():
    """A hash of all code that a run's numbers come from."""
    return fingerprints("*.py", "data/*.py", "run/*.py", "operators/*.py", "operators/*.c",
                        "hf/*.py")


def machine():
    """Versions and hardware, for the files in results/. (No run's settings: State has none.)"""
    about, cpu = provenance(State(), pick_device()), pathlib.Path("/proc/cpuinfo")
    text = cpu.read_text(encoding="utf-8") if cpu.exists() else ""
    names = re.findall(r"model name\s*: (.*)", text)
    versions = {k: about[k] for k in ("torch", "numpy", "python", "git", "git_dirty", "device")}
    return dict(date=datetime.date.today().isoformat(), sources=sources(), **versions,
                machine=f"{os.cpu_count()} cores, {[*names, platform.machine()][0]}")


def picture(path, draw, *what):
    """draw(plt, *what) -> a figure, kept as PNG with a palette: a third of the size."""
    try:
        import matplotlib
        from PIL import Image  # comes with matplotlib
    except ImportError:
        return print("no picture: matplotlib is not installed (pip install -e '.[plot]')")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"figure.constrained_layout.use": True, "legend.fontsize": 7})
    draw(plt, *what).savefig(path, dpi=100)
    few = Image.open(path).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    few.save(path, optimize=True)
    print(path)


def band(ax, curves, color, label, first=1):
    """Mean and range of curves, one of which may end before the others; returns them, (N, longest),
    masked after their ends. first: where the first point lies."""
    y = np.full((len(curves), max(1, *map(len, curves))), np.nan)
    for row, curve in zip(y, curves):
        row[:len(curve)] = curve
    x, y = range(first, first + y.shape[1]), np.ma.masked_invalid(y)
    ax.plot(x, y.mean(0), color=color, label=label)
    ax.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.12, lw=0)
    return y


def heat(ax, rows, columns, value, text, **style):
    """A map: value(row, column) as color, text(row, column) on it."""
    ax.imshow([[value(r, c) for c in columns] for r in rows], aspect="auto", alpha=0.6, **style)
    for i, r in enumerate(rows):
        for j, c in enumerate(columns):
            ax.text(j, i, text(r, c), ha="center", va="center", fontsize=8)
    ax.set_xticks(range(len(columns)), columns, fontsize=8, rotation=20)
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
