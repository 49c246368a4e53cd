"""Rewards that may be slow, raise an error or crash: asked for under a time limit, and never the end of a run.

`Guard.rewards` grades answers. A task marked `safe` is a bounded parser of this program's own and runs where it is called. Any
other (LaTeX, a file of your own) runs in processes of its own, started anew from the task's name, several at a time. One that
takes too long is killed, which also ends what no signal reaches, such as 10 ** 10 ** 10. What went wrong counts 0 and is said
once a kind, with the answer that caused it.

The children are plain `python -m data.guard NAME`: multiprocessing would import the parent's main module, and with it torch, once
more in each. They end when the parent does: their standard input ends then, and no answer may use more processor time than a few
of its limits.
"""
import json
import math
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from data import Problem, input_error
from data.tasks import make_task

ROOT = pathlib.Path(__file__).resolve().parent.parent
START = 120                                 # seconds that a child may take to begin: on a busy machine sympy takes ten to import
CRASHED = ["the grader crashed"]
NOT_A_NUMBER = ", which is no finite number"
MEMORY = 4 << 30                            # bytes of address space that a child may take


class Guard:
    """task: see data/__init__.py. seconds: what one answer may take. workers: children (0: a core each, at most 4)."""

    def __init__(self, task, seconds=5.0, workers=0, say=print):
        self.task, self.seconds, self.say, self.told = task, seconds, say, set()
        self.children = queue.Queue()
        self.workers = workers or min(4, os.cpu_count() or 1)
        if not task.safe:
            first = Child(task.name, seconds)
            self.children.put(first.start())            # what cannot begin (a missing package, say) is an error here and now
            for _ in range(self.workers - 1):
                self.children.put(Child(task.name, seconds))

    def rewards(self, pairs):
        """[(problem, text)] -> a reward each, in their order."""
        if self.task.safe:
            out = [self._inline(problem, text) for problem, text in pairs]
        else:
            with ThreadPoolExecutor(self.workers) as pool:
                out = list(pool.map(self._child, pairs))
        return [self._number(x, text) for x, (_, text) in zip(out, pairs)]

    def _inline(self, problem, text):
        try:
            return self.task.reward(problem, text)
        except Exception as e:
            return f"{type(e).__name__}: {e}"

    def _child(self, pair):
        child = self.children.get()
        try:
            return child.ask(*pair)
        finally:
            self.children.put(child)

    def _number(self, x, text):
        """What a reward function gave, as a number: 0 for what is none, and a line for the first of its kind."""
        if isinstance(x, (int, float)) and math.isfinite(x):
            return float(x)
        why = x if isinstance(x, str) else f"it gave {x!r}{NOT_A_NUMBER}"
        kind = NOT_A_NUMBER if why.endswith(NOT_A_NUMBER) else why.split(":")[0]
        if kind not in self.told:
            self.told.add(kind)
            self.say(f"note: the reward of the answer {text[:200]!r} counts 0: {why[:200]} (said once; so will the like)")
        return 0.0

    def close(self):
        while not self.children.empty():
            self.children.get().stop()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Child:
    """One process that grades. Started when first asked, and again after it was killed or crashed."""

    def __init__(self, name, seconds):
        self.name, self.seconds, self.process = name, seconds, None

    def start(self):
        # where the parent is, since a task's file may open others by relative names, and in a session of its own: a Ctrl-C on
        # the terminal is not for it, not even while it begins
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen([sys.executable, "-P", "-m", "data.guard", self.name, str(self.seconds)],
                                        env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        self.said = queue.Queue()
        threading.Thread(target=self._listen, args=(self.process, self.said), daemon=True).start()
        try:
            ready = self.said.get(timeout=START)
        except queue.Empty:
            ready = f"the grader of {self.name} did not begin within {START} s"
        if ready != "ready":
            self.stop()
            raise input_error(ready or f"the grader of {self.name} ended as it began")
        return self

    @staticmethod
    def _listen(process, said):
        for line in process.stdout:
            said.put(json.loads(line))
        said.put(None)                                               # it has ended

    def ask(self, problem, text):
        """A reward, or a text that says why there is none."""
        if self.process is None:
            self.start()
        try:
            self.process.stdin.write(json.dumps([problem.prompt, problem.answer, text]) + "\n")
            self.process.stdin.flush()
            found = self.said.get(timeout=self.seconds) or CRASHED
        except queue.Empty:
            found = [f"TimeoutError: more than {self.seconds:g} s"]
        except OSError:                                              # it crashed between two answers
            found = ["the grader had crashed before"]
        else:
            if found != CRASHED:
                return found[0]
        self.stop()
        return found[0]

    def stop(self):
        if self.process is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)          # with whatever it started
            except (AttributeError, OSError):                        # Windows; or there is nothing left
                self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process = None

    def __del__(self):
        try:
            self.stop()
        except (OSError, AttributeError, TypeError, ValueError):     # at the interpreter's end anything may be gone
            pass


def limit(seconds):
    """Bounds of this process that hold in C code too, where no Python signal handler runs."""
    try:
        import resource
    except ImportError:                                              # Windows
        return lambda: None
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    def more():
        used = resource.getrusage(resource.RUSAGE_SELF)
        most = math.ceil(used.ru_utime + used.ru_stime + 2 * seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
    return more


def serve(name, seconds):
    """The child: a problem and an answer a line in, a reward a line out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)                     # Ctrl-C is the parent's to answer
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)                                                    # what a reward function prints is no reward
    lines = queue.Queue()

    def tell(x):
        out.write(json.dumps(x) + "\n")
        out.flush()

    def read():
        for line in sys.stdin.buffer:
            lines.put(json.loads(line))
        os._exit(0)                                                  # the parent is gone
    try:
        task = make_task(name)
        task.prepare()
    except Exception as e:
        return tell(str(e) or type(e).__name__)
    more = limit(seconds)
    threading.Thread(target=read, daemon=True).start()
    tell("ready")
    while True:
        prompt, answer, text = lines.get()
        more()
        try:
            x = task.reward(Problem(prompt, answer), text)
            x = float(x) if isinstance(x, (bool, int, float)) or hasattr(x, "__float__") else repr(x)
            tell([x if isinstance(x, float) and math.isfinite(x) else f"it gave {x}{NOT_A_NUMBER}"])
        except BaseException as e:                                   # SystemExit as well: a grader does not end its process
            tell([f"{type(e).__name__}: {e}"])


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]))
