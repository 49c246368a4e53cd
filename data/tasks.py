"""data/tasks.py: the tasks by their names."""
from data import input_error
from data.addition import Addition
from data.countdown import Countdown
from data.gsm8k import GSM8K
from data.math_answers import Math
from data.own import load_own
from data.reverse import Reverse

SCRATCH = dict(addition=Addition, reverse=Reverse, countdown=Countdown)     # these draw their problems
REAL = dict(gsm8k=GSM8K, math=Math)                                         # for models that read


def make_task(name, digits=0, noise=0.0):
    """A task by its name, or by its file. digits and noise are for those that draw their problems."""
    if name.endswith(".py"):
        return load_own(name)
    if name not in {**SCRATCH, **REAL}:
        from precision import nearest
        known = ", ".join([*SCRATCH, *REAL])
        raise input_error(f"no task {name[:80]!r}{nearest(name, {**SCRATCH, **REAL})} (there are {known}, "
                          "and a file of your own such as data/example_task.py)")
    task = SCRATCH[name](digits, noise) if name in SCRATCH else REAL[name]()
    task.name = name
    return task
