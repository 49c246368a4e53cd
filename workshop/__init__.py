"""Eight exercises that check themselves: README.md is where to begin."""
import importlib.util
import os
import sys

# Models of these sizes gain nothing from a second thread, and two that wait for each other on a busy
# laptop make seconds into minutes. Before torch is imported; "-m" stands there while `python -m
# workshop` begins, and not where a test imports this.
if sys.argv[:1] == ["-m"]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if missing := [name for name in ("torch", "numpy", "tiktoken") if not importlib.util.find_spec(name)]:
    sys.exit(f"{', '.join(missing)}: not installed in this Python ({sys.executable}). In the folder of "
             "the clone: . .venv/bin/activate (Windows: .venv\\Scripts\\activate); the first line of "
             "workshop/README.md makes this environment")
