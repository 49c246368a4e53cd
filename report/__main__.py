"""A report of one run, or of several side by side, as one HTML file to open in a browser.

    python -m report out/run1                       # out/run1/report.html, of a broken run as well
    python -m report out/run1 out/run2 --out two.html
"""
from report.page import write
from run.console import Parser, run_main


def main(argv=None):
    p = Parser(prog="report", description=__doc__.split("\n\n")[0])
    p.add_argument("folder", nargs="+", help="of a run")
    p.add_argument("--out", help="of several runs: the file to write (default: compare.html)")
    a = p.parse_args(argv)
    print(write(a.folder, a.out or "compare.html" * (len(a.folder) > 1)))


if __name__ == "__main__":
    run_main(main)
