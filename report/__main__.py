"""A report of one run, or of several side by side, as one HTML file to open in a browser.

    python -m report out/run1                       # out/run1/report.html, of a broken run as well
    python -m report out/run1 out/run2 --out two.html
"""
import pathlib

from report.page import build, write
from run.console import Parser, run_main


def main(argv=None):
    p = Parser(prog="report", description=__doc__.split("\n\n")[0])
    p.add_argument("folder", nargs="+", help="of a run")
    p.add_argument("--out", help="of several runs: the file to write (default: compare.html)")
    a = p.parse_args(argv)
    if len(a.folder) == 1 and not a.out:
        return print(write(a.folder[0]))
    path = pathlib.Path(a.out or "compare.html")
    path.write_text(build(a.folder), encoding="utf-8", errors="replace")
    print(path)


if __name__ == "__main__":
    run_main(main)
