"""run/: what surrounds the loop of train_rl.py.

    flags.py     a dataclass of settings as command-line flags
    folder.py    the folder of a run: its log, its checkpoint, Ctrl-C and resume
    base.py      the policy that RL begins with: from scratch, or a checkpoint of the hub
    problems.py  the problems: pool, held-out, perfectible set, the order in which they come
    memory.py    --plan, and the rehearsal of the largest batch
    checks.py    exact mode's self-test, where the first bit differs, where the first NaN is
    start.py     before the first step, and after the last: the verdict
    meter.py     the metrics of a step
    lines.py     what is printed: banner, step line, notes
    curves.py    curves.png
"""
