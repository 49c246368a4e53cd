"""What the commands reach: no network, no file outside of the run's folder and the cache, no pickle; and what a model
writes is never run. An audit hook of Python's own watches the real commands."""
import json
import os
import pathlib
import subprocess
import sys

import pytest
from test_commands import SMALL

from data import Problem
from data.guard import Guard
from data.tasks import make_task

ROOT = pathlib.Path(__file__).resolve().parent.parent
# sitecustomize is imported by every Python process that has its folder on PYTHONPATH, graders included.
HOOK = """
import json, os, sys
NETWORK = "socket.connect socket.bind socket.getaddrinfo socket.gethostbyname socket.sendto urllib.Request".split()
CHANGES = ("os.mkdir os.rename os.remove os.rmdir os.truncate os.link os.symlink os.chmod shutil.rmtree shutil.move "
           "shutil.copyfile tempfile.mkstemp tempfile.mkdtemp").split()
RUNS = "subprocess.Popen os.system os.exec os.posix_spawn pickle.find_class".split()

def hook(event, args):
    if event == "open":
        path, mode, flags = args
        if isinstance(path, int) or not (set(str(mode or "")) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
    elif event == "compile":
        if b"TEXT OF THE MODEL" not in (args[0] if isinstance(args[0], bytes) else str(args[0]).encode(errors="replace")):
            return
    elif event not in KNOWN:
        return
    first = args[0] if isinstance(args[0], int) else str(args[0])
    if isinstance(args[0], bytes) or hasattr(args[0], "__fspath__"):
        first = os.fsdecode(args[0])
    os.write(log, (json.dumps([event, first, repr(args)[:2000]]) + "\\n").encode())

KNOWN = {*NETWORK, *CHANGES, *RUNS}
log = os.open(os.environ["TENBIT_AUDIT"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
sys.addaudithook(hook)
"""
# What a model might write to be run by a careless grader
HOSTILE = "__import__('os').system('TEXT OF THE MODEL')"


class Watched:
    """The command line in a folder of its own, with an empty home and an empty folder for temporary files."""

    def __init__(self, folder):
        self.folder, self.log = folder, folder / "audit.jsonl"
        for name in ("hook", "home", "tmp", "work"):
            (folder / name).mkdir()
        (folder / "hook" / "sitecustomize.py").write_text(HOOK, encoding="utf-8")
        others = {k: v for k, v in os.environ.items() if not k.startswith("TORCHINDUCTOR")}      # of tests before
        self.env = {**others, "PYTHONPATH": str(folder / "hook"), "TENBIT_AUDIT": str(self.log),
                    "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "TENBIT_CACHE": str(folder / "cache"),
                    "PYTHONDONTWRITEBYTECODE": "1", "MPLCONFIGDIR": str(folder / "cache" / "matplotlib")}

    def run(self, *command):
        """-> the events of this command: [event, its first argument, all of them]."""
        self.log.unlink(missing_ok=True)
        p = subprocess.run([sys.executable, *command], cwd=self.folder / "work", env=self.env, timeout=300,
                           capture_output=True, encoding="utf-8")
        assert p.returncode == 0, p.stderr
        return [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    return Watched(tmp_path_factory.mktemp("reach").resolve())


def outside(watched, events):
    """Of paths that were changed, those that are neither in the run's folder nor in the cache."""
    changed = [(e, path) for e, path, _ in events if e == "open" or e.split(".")[0] in ("os", "shutil", "tempfile")
               and e not in ("os.system", "os.exec", "os.posix_spawn")]
    good = [str(watched.folder / "cache"), str(watched.folder / "work" / "out"), str(watched.folder / "tmp"), os.devnull]
    at = [(e, os.path.join(watched.folder / "work", path)) for e, path in changed if not isinstance(path, int)]
    return [(e, path) for e, path in at if not any(path == g or path.startswith(g + os.sep) for g in good)]


COMMANDS = {
    "train": ["train_rl.py", *SMALL, "--steps", "2", "--out", "out/a"],
    "train, own task": ["train_rl.py", "--task", str(ROOT / "data" / "example_scratch.py"), *SMALL[4:], "--steps", "1",
                        "--keep", "0", "1", "--out", "out/b"],
    "resume": ["train_rl.py", "--resume", "out/a", "--steps", "11"],
    "plan": ["train_rl.py", *SMALL, "--plan"],
    "ask": ["sample.py", "--model", "out/a", "--prompt", "1+1=", "--n", "2"],
    "evaluate": ["sample.py", "--model", "out/a", "--eval", "--problems", "4", "--n", "2"],
    "save": ["sample.py", "--model", "out/a", "--save", "out/hf"],
    "train a checkpoint": ["train_rl.py", "--model", "out/hf", "--task", "addition", "--digits", "1", "--steps", "1",
                           "--pool", "20", "--heldout", "2", "--prompts", "2", "--out", "out/c", "--device", "cpu"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_reaches_no_further_than_it_says(watched, name):
    """In this order: a later one needs what an earlier one has made."""
    program, *flags = COMMANDS[name]
    before = sorted(p for p in ROOT.glob("*") if p.name not in (".pytest_cache", ".hypothesis", ".ruff_cache"))
    events = watched.run(str(ROOT / program), *flags)
    assert not [e for e in events if e[0].startswith(("socket.", "urllib."))]
    assert not [e for e in events if e[0] in ("pickle.find_class", "os.system")]
    assert not outside(watched, events)
    started = {os.path.basename(path) for e, path, _ in events if e == "subprocess.Popen"}
    python = {os.path.basename(sys.executable)}
    assert started <= {"cc", "gcc", "clang", "git", "uname", "fc-list", *python}            # matplotlib looks for fonts
    assert sorted(p for p in ROOT.glob("*") if p.name not in (".pytest_cache", ".hypothesis", ".ruff_cache")) == before
    assert not list((watched.folder / "home").iterdir())
    left = [p for p in (watched.folder / "tmp").rglob("*") if not (p.is_dir() and p.name.startswith("torchinductor_"))]
    assert not left                                                       # torch makes that folder, empty, when it is imported


def test_the_hook_would_see_it(watched):
    """All that the test above looks for, done on purpose."""
    script = watched.folder / "naughty.py"
    script.write_text("import os, pickle, socket, subprocess\n"
                      "open('elsewhere', 'w').close()\nos.mkdir('folder')\n"
                      "pickle.loads(pickle.dumps(os.path.join))\nos.system('true')\nsubprocess.run(['true'])\n"
                      "try: socket.create_connection(('127.0.0.1', 9), 1)\nexcept OSError: pass\n"
                      f"try: eval({HOSTILE!r}[:0] + '1 # TEXT OF THE MODEL')\nexcept Exception: pass\n", encoding="utf-8")
    events = watched.run(str(script))
    seen = {e for e, *_ in events}
    assert {"pickle.find_class", "os.system", "subprocess.Popen", "compile", "open", "os.mkdir"} <= seen
    assert any(e.startswith("socket.") for e in seen)
    assert {os.path.basename(p) for _, p in outside(watched, events)} == {"elsewhere", "folder"}


GRADE = """
import sys
from data import Problem
from data.guard import Guard
from data.tasks import make_task
guard = Guard(make_task(sys.argv[1], 3, 0.0), 5.0, workers=1)
H = "__import__('os').system('TEXT OF THE MODEL')"
texts = [H, "#" + H, "#### " + H, "\\\\boxed{" + H + "}", "#1+" + H, "<<1=1>>" + H,
         "1+1=2;#" + H, "\\\\boxed{\\\\frac{" + H + "}{2}}",
         "%s{0}" + H, "${" + H + "}", "`" + H + "`", "{{" + H + "}}"]
print(guard.rewards([(Problem(p, a), t) for t in texts for p, a in PAIRS[sys.argv[1]]]))
"""
PAIRS = {"addition": [("1+1=", "2")], "reverse": [("12=", "21")], "gsm8k": [("q", "2")], "math": [("q", "\\frac{1}{2}")],
         "countdown": [("1,2,3=6:", "1+2+3")]}


@pytest.mark.parametrize("task", PAIRS)
def test_what_a_model_writes_is_not_run(watched, task):
    if task == "math":
        pytest.importorskip("math_verify")
    script = watched.folder / "grade.py"
    script.write_text(f"PAIRS = {PAIRS!r}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n{GRADE}", encoding="utf-8")
    events = watched.run(str(script), task)
    assert not [e for e in events if e[0] in ("compile", "os.system") or "TEXT OF THE MODEL" in e[2]]


def test_and_such_a_text_is_wrong():
    for task in ("addition", "reverse", "gsm8k", "countdown"):
        guard = Guard(make_task(task, 3, 0.0))
        for prompt, answer in PAIRS[task]:
            assert guard.rewards([(Problem(prompt, answer), f"#{HOSTILE}"), (Problem(prompt, answer), HOSTILE)]) == [0.0, 0.0]
