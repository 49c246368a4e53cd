"""Other systems than this one, as far as one can pretend: no `resource`, no `fcntl`, no fork, no process groups, no
/proc, no signals but SIGINT and SIGTERM, files that cannot be replaced while they are open, an old encoding. A
sitecustomize takes these away from every process that a command starts. macOS and Windows themselves: not tried."""
import ast
import ctypes
import os
import pathlib
import re
import subprocess
import sys
import types

import pytest
from test_commands import ROOT, SMALL, rows
from test_compiled import COMPILED, compiled

from data import guard
from operators import code as sources
from operators import compiled as code

# what each lacks, as Python that runs before anything else does
TAKEN = {
    "windows": """
import os, signal, sys
for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in "fork forkpty killpg getpgid getpgrp setsid getsid getuid geteuid getgid mkfifo sysconf".split():
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGPIPE", "SIGXFSZ", "SIGXCPU"):
    delattr(signal, name)
replace = os.replace
def strict(a, b, **kw):
    for fd in os.listdir("/proc/self/fd"):                    # Windows refuses to replace a file that is open
        try:
            if os.path.exists(b) and os.path.samefile(f"/proc/self/fd/{fd}", b):
                raise PermissionError(13, "Access is denied", os.fspath(b))
        except (FileNotFoundError, NotADirectoryError):
            pass
    return replace(a, b, **kw)
os.replace = strict
""",
    "macos": """
import builtins, io, pathlib, resource
def refused(*args):
    raise ValueError("current limit exceeds maximum limit")
resource.setrlimit = refused
real = io.open
def no_proc(file, *args, **kw):
    if str(file).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "No such file or directory", str(file))
    return real(file, *args, **kw)
builtins.open = io.open = no_proc
""",
    "a cluster": """
import resource
def refused(*args):
    raise OSError(1, "Operation not permitted")
resource.setrlimit = refused
"""}


@pytest.fixture(params=TAKEN)
def system(request, tmp_path, cache):
    """run(program, flags...) on a system that lacks this."""
    (tmp_path / "sitecustomize.py").write_text(TAKEN[request.param], encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "TENBIT_CACHE": str(cache), "PYTHONIOENCODING": "cp1252"}
    if request.param == "windows":
        env["TENBIT_FAST"] = "0"                             # there the compiled operators are not used

    def run(program, *flags, status=0):
        p = subprocess.run([sys.executable, str(ROOT / program), *flags], cwd=tmp_path, env=env, timeout=300,
                           capture_output=True, encoding="cp1252")
        assert p.returncode == status, p.stderr
        return p.stdout, p.stderr
    run.folder = tmp_path
    return run


def test_a_run_a_resumed_one_and_an_answer(system):
    system("train_rl.py", *SMALL, "--steps", "2", "--out", "größe")
    system("train_rl.py", "--resume", "größe", "--steps", "4")
    assert [r["step"] for r in rows(system.folder / "größe" / "metrics.jsonl") if "step" in r] == [1, 2, 3, 4]
    said, _ = system("sample.py", "--model", "größe", "--prompt", "1+1=")
    assert said.startswith("1+1=")
    _, wrong = system("train_rl.py", "--resume", "größe", "--precision", "fp17", status=1)
    assert wrong.count("\n") == 1 and "fp17" in wrong
    system("train_rl.py", *SMALL, "--plan")


TASK = """
def problem(rng):
    a = int(rng.integers(0, 10))
    return f"{a}?", str(a)
def demonstrate(problem, rng):
    return problem.answer if rng.random() < 0.6 else str(rng.integers(0, 10))
def reward(problem, text):
    if text == "3": raise ValueError("größe \\u2192")
    return text == problem.answer
"""


def test_a_grader_of_your_own(system):
    (system.folder / "mine.py").write_text(TASK, encoding="utf-8")
    said, _ = system("train_rl.py", "--task", "mine.py", *SMALL[4:], "--pool", "8", "--heldout", "2", "--keep", "0", "1",
                     "--steps", "1", "--prompts", "2", "--out", "mine")
    assert "ValueError: gr" in said
    done = rows(system.folder / "mine" / "metrics.jsonl")[1]
    assert 0 < done["accuracy"] < 1


def test_math_is_graded(system):
    pytest.importorskip("math_verify")
    (system.folder / "grade.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom data import Problem\nfrom data.guard import Guard\n"
        "from data.tasks import make_task\nguard = Guard(make_task('math'), 60.0, workers=1)\n"
        "print(guard.rewards([(Problem('', r'\\frac12'), x) for x in (r'\\boxed{0.5}', r'\\boxed{0.6}')]))", encoding="utf-8")
    assert system(system.folder / "grade.py")[0] == "[1.0, 0.0]\n"


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_a_system_that_refuses_a_limit(error, monkeypatch):
    resource = pytest.importorskip("resource")
    calls = []

    def refuse(*args):
        calls.append(args)
        raise error("current limit exceeds maximum limit")
    monkeypatch.setattr(resource, "setrlimit", refuse)
    guard.limit_memory()
    assert calls


@pytest.mark.parametrize("most", [2 << 30, 64 << 30, None])
def test_memory_of_a_grader_is_what_the_system_allows(most, monkeypatch):
    resource = pytest.importorskip("resource")
    hard, set_to = resource.RLIM_INFINITY if most is None else most, []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (hard, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: set_to.append(limits))
    guard.limit_memory()
    assert guard.allowed() == most and set_to == [(min(guard.MEMORY, most or guard.MEMORY), hard)]


# --- macOS: stubs in place of cc and git, another OpenMP


@pytest.fixture
def mac(monkeypatch):
    """A Mac whose xcode-select answers with this status. -> what was called."""
    called = []

    def pretend(status):
        def answer(command, **kw):
            called.append(command)
            return types.SimpleNamespace(returncode=status, stdout="", stderr="")
        monkeypatch.setattr(sources, "sys", types.SimpleNamespace(platform="darwin"))
        monkeypatch.setattr(subprocess, "run", answer)
        sources.has_tools.cache_clear()
        return called
    yield pretend
    monkeypatch.undo()
    sources.has_tools.cache_clear()


def test_a_mac_without_developer_tools_opens_no_dialog(mac, tmp_path, monkeypatch):
    """Neither cc nor git is called: each would open a window, at every run. The question is asked once."""
    from run.folder import provenance
    from train_rl import Config
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("TENBIT_FAST", raising=False)
    monkeypatch.setattr(code.shutil, "which", lambda name: f"/usr/bin/{name}")
    called = mac(2)
    assert code.library.__wrapped__(tmp_path) == (None, "no C compiler found")
    import torch
    assert provenance(Config(), torch.device("cpu"))["git"] is None
    assert called == [["xcode-select", "-p"]]


def test_a_mac_with_them_compiles(mac):
    assert mac(0) == [] and sources.has_tools() and sources.has_tools()


@compiled
def test_threads_that_do_not_run_are_not_claimed(tmp_path, monkeypatch):
    """torch's OpenMP is libomp on a Mac, and Apple's clang wants another flag. Where none is found, one thread runs,
    and the banner says so."""
    from operators import numerics
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    (tmp_path / "torch" / "lib" / "libtorch_companion.so").write_text("")
    monkeypatch.setattr(code.torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    lib, why = code.library.__wrapped__(tmp_path / "cache")
    assert lib and not why and lib.parallel() == 0
    assert code.Compiled("fp16", lib).operators == "compiled, one-threaded" and numerics("fp16").operators == "compiled"
    (tmp_path / "torch" / "lib" / "libomp.dylib").write_text("")
    commands = []

    def refuse(command, **kw):
        commands.append(command)
        return types.SimpleNamespace(returncode=1, stdout="", stderr="no")
    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(OSError, match="failed: no"):
        code.compile_c(["cc"], tmp_path / "x.so", tmp_path / "x.sha256")
    assert any("libomp.dylib" in " ".join(c) and c[c.index("-fopenmp") - 1] == "-Xclang" for c in commands if "-fopenmp" in c)


@pytest.mark.skipif(os.name != "posix", reason="modes and owners of a file")
def test_a_library_that_others_can_write_to_is_not_loaded(tmp_path):
    """It would be their code that runs."""
    folder = code.private(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
    changes = [lambda: folder.chmod(0o777), lambda: folder.chmod(0o720)]
    if os.getuid() == 0:
        changes.append(lambda: os.chown(folder, 65534, 65534))
    for change in changes:
        change()
        with pytest.raises(OSError, match="can be written to by others"):
            code.private(tmp_path)
        folder.chmod(0o700)
    if COMPILED:
        folder.chmod(0o777)
        lib, why = code.library.__wrapped__(tmp_path)
        assert lib is None and "can be written to by others" in why


# --- Windows: other widths, another encoding


def test_the_c_code_has_no_type_of_another_width_on_windows():
    """There `long` has 32 bits. A size or an address that is passed as one is cut short."""
    text = re.sub(r"/\*.*?\*/", "", code.SOURCE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.findall(r"\b(?:long|unsigned long|size_t|ssize_t|ptrdiff_t)\b", text)
    assert "c_long" not in pathlib.Path(code.__file__).read_text(encoding="utf-8").replace("c_longlong", "")


def test_structures_have_the_size_that_the_c_code_asserts():
    """So that no compiler, on no system, lays them out otherwise in silence."""
    asserted = dict(re.findall(r"_Static_assert\(sizeof\((\w+)\) == (\d+)", code.SOURCE.read_text(encoding="utf-8")))
    assert asserted == {c.__name__.lower(): str(ctypes.sizeof(c)) for c in (code.Format, code.Shape, code.Layer, code.Kept)}


@compiled
def test_sizes_are_passed_with_64_bits():
    from operators import CACHE
    lib = code.library(CACHE)[0]
    functions = [getattr(lib, name) for name in ("linear", "pack", "block", "block_back", "draw", "token_logprobs")]
    kinds = {k for f in functions for k in f.argtypes}
    assert kinds <= {ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, code.Format} and ctypes.sizeof(ctypes.c_int64) == 8


def unnamed(tree):
    """Calls that read or write text in whatever encoding the system has."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        f, words = node.func, {k.arg: k.value for k in node.keywords}
        name = f.id if isinstance(f, ast.Name) else f.attr if isinstance(f, ast.Attribute) else ""
        positional = [a.value for a in node.args if isinstance(a, ast.Constant)]
        binary = any(isinstance(p, str) and "b" in p and len(p) < 4 for p in positional)
        if name == "open" and isinstance(f, ast.Name) and not binary and "encoding" not in words:
            yield node.lineno
        if name in ("read_text", "write_text") and "encoding" not in words and not (
                name == "read_text" and len(positional) == 1):
            yield node.lineno
        if name in ("run", "Popen") and ("text" in words or "universal_newlines" in words) and "encoding" not in words:
            yield node.lineno


def test_text_is_read_and_written_in_a_named_encoding():
    """Windows' own is cp1252, which has no arrow and no emoji."""
    found = {}
    for path in ROOT.rglob("*.py"):
        if not {".venv", "tests", "out", ".cache"} & set(path.relative_to(ROOT).parts):
            lines = [*unnamed(ast.parse(path.read_text(encoding="utf-8")))]
            found |= {str(path.relative_to(ROOT)): lines} if lines else {}
    assert not found
    assert [*unnamed(ast.parse("open('x')\nopen('x', 'rb')\nPath('x').read_text()\nrun(c, text=True)"))] == [1, 3, 4]
