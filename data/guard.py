"""Rewards that may be slow, raise an error or crash: they run under a time limit, and end no run.

`Guard.rewards` grades answers. A task marked `safe` is a bounded parser of ours and runs where it
is called. Any other (LaTeX, a file of your own) runs in processes of its own, several at a time.
One that takes too long is killed, which also ends what no signal handler reaches, such as
10 ** 10 ** 10. What went wrong counts 0 and is said once a kind, with the answer that caused it. If
it goes wrong all the time, the grader is at fault and not the answers: then the run ends.

The children are plain `python -m data.guard NAME`: multiprocessing would import the parent's main
module, and with it torch, once more in each. They end when the parent does: their standard input
ends then, and an answer that is being graded has a limit in the child as well.
"""
import faulthandler
import json
import math
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from data import Problem, input_error
from data.tasks import make_task

ROOT = pathlib.Path(__file__).resolve().parent.parent
START = 120             # seconds that a child may take to begin: on a busy machine sympy takes ten
MEMORY = 4 << 30        # bytes of address space that a child may take
FAILURES = 50           # answers without a reward, one after another, that end the run


def grade(task, problem, text):
    """A reward, or a text that says why there is none."""
    try:
        x = task.reward(problem, text)
        if not (hasattr(x, "__float__") and math.isfinite(x)):
            return f"no finite number: it gave {x!r}"[:1000]
        return float(x)
    except (Exception, SystemExit, GeneratorExit) as e:             # a grader does not end its process
        try:
            return f"{type(e).__name__}: {e}"[:1000]
        except Exception:                               # an error that cannot be put into words
            return type(e).__name__


class Guard:
    """task: see data/__init__.py. seconds: what one answer may take. workers: children (0: a core
    each, at most 4)."""

    def __init__(self, task, seconds=5.0, workers=0, say=print):
        self.task, self.say, self.told, self.failures = task, say, set(), 0
        self.workers, self.children = workers or min(4, os.cpu_count() or 1), queue.Queue()
        if not task.safe:
            for _ in range(self.workers):
                self.children.put(Child(task.name, seconds))
            self.children.queue[0].start()              # a missing package is an error here and now
            if (most := allowed()) is not None and most < MEMORY:
                say(f"note: rewards get {most / 2 ** 30:.1f} GiB of address space a process, as this "
                    "system allows no more")

    def rewards(self, pairs):
        """[(problem, text)] -> a reward each, in their order."""
        if self.task.safe:
            found = [grade(self.task, *pair) for pair in pairs]
        else:
            pool = ThreadPoolExecutor(self.workers)
            try:
                found = list(pool.map(self._ask, pairs))
            finally:                                    # after a Ctrl-C the others are not graded
                pool.shutdown(cancel_futures=True)
        return [self._number(x, text) for x, (_, text) in zip(found, pairs)]

    def _ask(self, pair):
        child = self.children.get()
        try:
            found = child.ask(*pair)
        finally:
            self.children.put(child)
        self.failures = 0 if isinstance(found, float) else self.failures + 1
        if self.failures >= FAILURES:
            raise input_error(f"the rewards of --task {self.task.name} failed for {FAILURES} answers "
                              f"one after another, the last time with {found[:200]}")
        return found

    def _number(self, x, text):
        """0 where there is no reward, and a line for the first of its kind."""
        if isinstance(x, float):
            return x
        if (kind := x.split(":")[0]) not in self.told:
            self.told.add(kind)
            self.say(f"note: the reward of the answer {text[:200]!r} counts 0: {x[:200]} "
                     "(said once; so will the like)")
        return 0.0


class Child:
    """A process that grades. It starts when first asked, and again after it was killed or crashed.
    It is killed, with all that it started, when this object or the program ends."""

    def __init__(self, name, seconds):
        self.name, self.seconds, self.process = name, seconds, None

    def start(self):
        if self.process:
            self.kill()                                 # what a crashed one left
        # Where the parent is, since a task's file may open others by relative names. In a session
        # of its own: a Ctrl-C on the terminal is not for it, not even while it begins.
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "data.guard", self.name, str(self.seconds)],
                env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
                encoding="utf-8", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self.kill = weakref.finalize(self, kill, self.process)
            said = self.hear(START)
        except OSError as e:                            # no more processes, no memory
            said = e.strerror
        if said != "ready":
            raise input_error(f"the rewards of --task {self.name} cannot begin: {said}")

    def ask(self, problem, text):
        """A reward, or a text that says why there is none."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        return self.hear(self.seconds, json.dumps([problem.prompt, problem.answer, text]) + "\n")

    def hear(self, seconds, asked=""):
        """What the child says to this, within so many seconds."""
        timer = threading.Timer(seconds, self.kill)
        timer.start()
        try:
            self.process.stdin.write(asked)
            self.process.stdin.flush()
            said = self.process.stdout.readline()
        except OSError:
            said = ""
        timer.cancel()
        timer.join()
        with suppress(ValueError):                      # half a line; or the reward wrote there too
            if isinstance(said := json.loads(said), (float, str)):
                return said
        late = not self.kill.alive
        self.kill()
        return f"TimeoutError: more than {seconds:g} s" if late else "the grader crashed"


def kill(process):
    """End it, with whatever it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, OSError):                       # Windows; or nothing is left
        process.kill()
    process.wait()


def allowed():
    """Bytes of address space that a process may have at most, or None: Windows does not say."""
    with suppress(ImportError):
        import resource
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        return None if most == resource.RLIM_INFINITY else most


def limit_memory():
    # Windows has no such limit, macOS refuses this one
    with suppress(ImportError, ValueError, OSError):
        import resource
        most = allowed()
        limit, most = (MEMORY, resource.RLIM_INFINITY) if most is None else (min(most, MEMORY), most)
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def serve(name, seconds):
    """The child: a problem and an answer a line in, a reward a line out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C is the parent's to answer
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)                                           # what a reward prints is no reward

    def tell(x):
        print(json.dumps(x), file=out, flush=True)
    try:
        task = make_task(name)
        task.prepare()
    except Exception as e:
        return tell(str(e) or type(e).__name__)
    limit_memory()
    tell("ready")
    nowhere = open(os.devnull, "wb")
    for line in sys.stdin.buffer:
        # This clock runs in C and ends the process while it multiplies, should the parent be gone.
        faulthandler.dump_traceback_later(2 * seconds + 1, exit=True, file=nowhere)
        prompt, answer, text = json.loads(line)
        tell(grade(task, Problem(prompt, answer), text))
        faulthandler.cancel_dump_traceback_later()
    os._exit(0)                                             # whatever threads a reward left


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]))
