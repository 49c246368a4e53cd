"""Eight exercises that check themselves: README.md is where to begin."""
import importlib.util
import sys

if missing := [name for name in ("torch", "numpy", "tiktoken") if not importlib.util.find_spec(name)]:
    sys.exit(f"{', '.join(missing)}: not installed in this Python ({sys.executable}). In the folder of "
             "the clone: . .venv/bin/activate (Windows: .venv\\Scripts\\activate); the first line of "
             "workshop/README.md makes this environment")
