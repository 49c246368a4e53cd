"""operators/code.py: what code is this? For compiled code that stands for other code, and for
caches."""
import ast
import functools
import hashlib
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def debugger():
    """Why compiled code is not used while a debugger is at work, in words; or nothing."""
    monitored = getattr(sys, "monitoring", None)               # a debugger in Python 3.12 and later
    if sys.gettrace() or monitored and monitored.get_tool(monitored.DEBUGGER_ID):
        return "a debugger is at work, and a breakpoint in an operator shall stop there"
    return ""


@functools.cache
def has_tools():
    """Whether cc and git may be called. On a Mac without Apple's developer tools each is a stub
    that opens a dialog."""
    if sys.platform != "darwin":
        return True
    try:
        asked = subprocess.run(["xcode-select", "-p"], capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return False
    return asked.returncode == 0


@functools.cache
def fingerprint(file):
    """A hash of a Python file's syntax tree, of any other file's bytes. Comments, docstrings and
    line breaks do not count. file: a path, relative ones from the repository's root."""
    def tree(node):
        if isinstance(node, list):
            return [t for t in map(tree, node) if t]
        if not isinstance(node, ast.AST):
            return repr(node)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return None                                         # a docstring
        fields = [(k, tree(v)) for k, v in ast.iter_fields(node) if k not in ("ctx", "type_params")]
        return type(node).__name__, *(f for f in fields if f[1])
    content = (ROOT / file).read_bytes()
    if str(file).endswith(".py"):
        content = repr(tree(ast.parse(content))).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def fingerprints(*patterns):
    """One hash of all the files that these patterns name."""
    files = sorted({str(f.relative_to(ROOT)) for p in patterns for f in ROOT.glob(p)})
    return hashlib.sha256("".join(map(fingerprint, files)).encode()).hexdigest()[:16]
