"""Exercise 0: is this machine ready? Everything that the others need, tried for real."""
import importlib.util
import platform
import sys

from operators import why_plain
from workshop.ladder import MINE, RUNS, Wrong, live, require, shown

OTHERS = "exercise 8's picture and curves.png"


def check(_):
    require(sys.version_info >= (3, 11), f"This is Python {platform.python_version()}; 3.11 is the oldest "
            "that will do. Make the environment anew with a newer one.")
    yield f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    import numpy
    import tiktoken
    import torch
    yield (f"torch {torch.__version__}, numpy {numpy.__version__}, tiktoken {tiktoken.__version__}, "
           f"{torch.get_num_threads()} threads")
    for folder in (MINE, RUNS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "try").write_text("", encoding="utf-8")
            (folder / "try").unlink()
        except OSError as e:
            raise Wrong(f"{shown(folder)} cannot be written to ({e.strerror}). Clone into a folder "
                        "of your own.") from None
    yield f"your files go to {shown(MINE)}, runs to {shown(RUNS)}"
    steps, seconds = live("ready")
    last = sum(m["accuracy"] for m in steps[-5:]) / 5
    require(last >= 0.8, f"The smallest job ended at an accuracy of {last:.2f} and not near 0.95. "
            "Something is not as it should be: show this to the instructor.")
    yield (f"the smallest job ran in {seconds:.0f} seconds, its base model included: accuracy "
           f"{steps[0]['accuracy']:.2f} to {last:.2f}")
    plain = why_plain("cpu")
    yield (f"no compiled operators ({plain}): all exercises work, their runs take up to two and a "
           "half times as long" if plain else "compiled operators: runs are faster with them")
    if importlib.util.find_spec("matplotlib") is None:
        yield f"matplotlib is missing: pip install matplotlib, for {OTHERS}; nothing else needs it"
    yield "ready: python -m workshop start 1"
