"""Exercise 8: a task, a reward, a metric and an experiment of the participant's own."""
import inspect
import math
import re
import shlex
import zlib

import numpy as np

from data import Problem
from data.own import load_own
from precision import InputError
from run.flags import plain
from workshop.checks import c06_cures
from workshop.ladder import Shown, Wrong, call, close, place, require, steps_of, word

SEEDS = 0, 1, 2
T = 4.303                               # Student's t for 3 pairs, two-sided, 5 %
SIZE = ("--preset cpu --device cpu --n-layers 2 --width 64 --base-steps 400 --base-batch 64 "
        "--base-lr 4e-3 --pool 100 --heldout 20 --prompts 16 --steps 40 --lr 1e-3").split()
SHARED = "lr group prompts steps temperature algo clip precision updates_per_batch".split()


def check(mine):
    own, drawn = task(mine)
    yield from rewards(mine)
    yield from demonstrator(mine, own, drawn)
    yield from metric(mine)
    yield from arms(mine)
    yield from interval(mine)
    yield from experiment(mine)


def task(mine):
    try:
        own = load_own(str(mine.path))
        require(own.draws, "The three functions are problem, demonstrate and reward.")
        drawn = [own.problem(np.random.default_rng(i)) for i in range(300)]
    except InputError as e:
        raise Wrong(str(e)) from None
    require(len({p.prompt for p in drawn}) >= 100, f"Of 300 problems only {len({p.prompt for p in drawn})} "
            "are different: at least 100 are needed, 20 of which are held out.")
    again = own.problem(np.random.default_rng(7))
    require(again == drawn[7], "problem draws another problem from the same rng. Take every random "
            "number from rng, so that a seed says it all.")
    require(any(p.prompt != "what?" for p in drawn), "That is the stub's task. Think of one of your own.")
    longest = max(len(p.prompt) + len(p.answer) for p in drawn)
    require(longest <= 60, f"A prompt and its answer have up to {longest} characters. Keep them below "
            "60, so that a run takes seconds.")
    return own, drawn


def demonstrator(mine, own, drawn):
    right = [float(own.reward(p, own.demonstrate(p, np.random.default_rng(i))))
             for i, p in enumerate(drawn)]
    share = sum(r == 1 for r in right) / len(right)
    require(0.3 <= share <= 0.9, f"The demonstrator is right in {share:.0%} of its answers. RL learns "
            "from problems that are solved sometimes: 30 % to 90 %.")
    lines = sum(len(inspect_lines(mine, name)) for name in ("problem", "demonstrate", "reward"))
    yield (f"a task: {drawn[0].prompt!r} -> {drawn[0].answer!r}, in {lines} lines; its demonstrator is "
           f"right in {share:.0%}")


def inspect_lines(mine, name):
    code, text = getattr(mine, name).__code__, mine.path.read_text(encoding="utf-8").splitlines()
    block = inspect.getblock([line + "\n" for line in text[code.co_firstlineno - 1:]])
    return [line for line in block if line.strip()]


def rewards(mine):
    drawn = [call(mine, "problem", np.random.default_rng(i)) for i in range(100)]
    drawn = [Problem(*p) if isinstance(p, tuple) else p for p in drawn]
    for p, other in zip(drawn, drawn[1:]):
        def of(text, p=p):
            r = call(mine, "reward", p, text)
            require(isinstance(r, (int, float)) and 0 <= r <= 1, f"reward gave {r!r}: it is a number from "
                    "0 to 1.")
            return float(r)
        require(of(p.answer) == 1, f"reward gives {of(p.answer):g} for the right answer {p.answer!r} to "
                f"{p.prompt!r}.")
        require(of("zzz") < 1, "reward gives 1 for the answer 'zzz'.")
        require(of("") < 1, "reward gives 1 for an empty answer.")
        if other.answer != p.answer:
            require(of(other.answer) < 1, f"reward gives 1 for {other.answer!r}, and the answer to "
                    f"{p.prompt!r} is {p.answer!r}.")
            both = f"{other.answer} {p.answer} {other.answer}"
            require(of(both) < 1, f"reward gives 1 for {both!r}, which only holds the right answer among "
                    "others. A policy finds this out, and learns to guess everything at once.")
        for junk in (f"{p.answer}zz", f"{p.answer} {p.answer}"):
            require(of(junk) < 1, f"reward gives 1 for {junk!r}, and the answer is {p.answer!r}: what stands "
                    "beside it would cost nothing.")
    yield "its reward: 1 for right answers, less for others, for an empty one and for several at once"


def metric(mine):
    texts = ["7", "12", "", "a longer answer", "7"]
    sets = [(texts, np.array([1.0, 0, 0, 0, 1])), (texts[:2], np.array([0.0, 0])),
            (["x" * 40] * 5, np.array([1.0, 1, 1, 1, 1])), (["x"] * 5, np.array([0.0, 0, 0, 0, 0])),
            (["1", "2", "3", "4", "5"], np.array([0.5, 0, 0, 0, 0]))]
    found = []
    for some in sets:
        x = call(mine, "metric", *some)
        require(isinstance(x, (int, float, np.floating)) and math.isfinite(x), f"metric gave {x!r}: it is "
                "one finite number for a step, also if no answer is right or all are the same.")
        found.append(float(x))
    require(len(set(found)) > 1, f"metric gives {found[0]:g} whatever the answers are.")
    yield (f"a metric: {found[0]:.3g} for two right answers of five, {found[2]:.3g} for five long right ones, "
           f"{found[3]:.3g} for five short wrong ones")


def interval(mine):
    """The mean difference and half of its 95 % interval, for three pairs."""
    for a, b in (([0.9, 0.8, 0.95], [0.7, 0.75, 0.7]), ([0.5, 0.1, 0.9], [0.52, 0.15, 0.89]),
                 ([9e-5, 8e-5, 5e-5], [1e-5, 3e-5, 2e-5])):
        d = [x - y for x, y in zip(a, b)]
        mean = sum(d) / 3
        sd = math.sqrt(sum((x - mean) ** 2 for x in d) / 2)
        got = call(mine, "difference", a, b)
        require(isinstance(got, (tuple, list)) and len(got) == 2, "difference gives two numbers: the mean "
                "of a - b, and half of its interval.")
        m, half = map(float, got)
        require(not close(m, -mean, 1e-3), "difference has the wrong sign: it is a - b.")
        require(close(m, mean, 1e-3), f"difference gave a mean of {m:.4g} for {a} and {b}, not {mean:.4g}.")
        spread = [math.sqrt(sum((x - sum(s) / 3) ** 2 for x in s) / 2) for s in (a, b)]
        pooled = math.sqrt((spread[0] ** 2 + spread[1] ** 2) / 3)
        words = f"half of the interval: {half:.4g} for {a} and {b}"
        require(half != 0, f"{words}. Three seeds say more than their mean.")
        for other, why in (
                (T * sd, "you left out the square root of 3: the mean of three is less uncertain than "
                 "one of them."),
                (sd / math.sqrt(3), "that is the standard error. Times 4.303, Student's t for three pairs."),
                (1.96 * sd / math.sqrt(3), "1.96 is for many seeds. For three pairs it is 4.303."),
                (T * sd / math.sqrt(3) * math.sqrt(2 / 3), "you divided by n in the deviation: with the "
                 "mean taken from the same three numbers it is n - 1 (ddof=1)."),
                (T * pooled, "you took the two arms apart. A seed's two runs begin with the same base "
                 "model: take the differences seed by seed, and their deviation.")):
            require(not close(half, other, 1e-3), f"{words}: {why}")
        require(close(half, T * sd / math.sqrt(3), 2e-3), f"{words}, not {T * sd / math.sqrt(3):.4g} = "
                "4.303 sd / sqrt(3), with sd of the three differences.")
    yield "the interval of a mean of three differences"


def settings(mine, name):
    flags = mine.ARMS[name]
    cfg = c06_cures.settings(name, flags, [*SIZE, "--task", str(mine.path)])
    own = [flag for flag in ("--seed", "--out", "--task") if flag in shlex.split(flags)]
    require(not own, f"ARMS[{name!r}] sets {', '.join(own)}: the workshop does that for each run.")
    return cfg


def compared(mine):
    """The two arms' settings, and the names of those that differ."""
    require(isinstance(getattr(mine, "ARMS", None), dict) and len(mine.ARMS) == 2, "ARMS has two entries: a "
            "name and the flags of each arm.")
    configs = {name: settings(mine, name) for name in mine.ARMS}
    one, two = configs.values()
    change = [k for k in vars(one) if getattr(one, k) != getattr(two, k)]
    same = ", ".join(f"--{k.replace('_', '-')} {plain(getattr(one, k))}" for k in SHARED)
    require(change, f"The two arms have the same settings: nothing is compared. The small job has {same}.")
    return configs, change


def arms(mine):
    configs, change = compared(mine)
    word(mine, "EXPECT", "what do you expect of the two arms, and why? Before the runs.")
    word(mine, "VALUE", "the metric that the arms are compared by, \"mine\" or one of docs/metrics.md")
    word(mine, "GOOD", "is a higher VALUE better, or a lower one?", ("higher", "lower"))
    yield f"two arms, {' and '.join(map(str, configs))}, that differ in {', '.join(change)}"
    if len(change) > 1 and "algo" not in change:
        yield Shown("           (More than one setting differs: which of them it is, nobody will know.)")
    if "temperature" in change:
        yield Shown("           (accuracy is that of sampled answers: at a higher temperature it is lower, "
                    "whatever was learned.)")


def code(mine):
    """A number for what the runs depend on: the task and the metric as they are written."""
    lines = [line for name in ("problem", "demonstrate", "reward", "metric") for line in inspect_lines(mine, name)]
    return zlib.crc32("".join(lines).encode())


def experiment(mine):
    configs, change = compared(mine)
    names = [*configs]
    steps = {(n, s): steps_of(place(folder(n, s))) for n in names for s in SEEDS}
    missing = [f"{n} seed {s}" for (n, s), found in steps.items() if not found]
    require(not missing, f"No finished run of {', '.join(missing)}: python -m workshop run 8")
    for (n, s), (config, rows) in steps.items():
        now = vars(configs[n])
        other = [k for k in change if config[k] != (list(now[k]) if isinstance(now[k], tuple) else now[k])]
        require(not other, f"{n} seed {s} ran with other flags ({', '.join(other)}): python -m workshop run 8")
        require(all(m.get("mine_code") == code(mine) for m in rows), f"{n} seed {s} ran with another task or "
                "metric than your file has now: python -m workshop run 8")
    value, good = word(mine, "VALUE", "a metric"), word(mine, "GOOD", "higher or lower", ("higher", "lower"))
    known = sorted({k for m in steps[names[0], 0][1] for k in m} - {"step", "mine_code"})
    require(value in known, f"VALUE: no metric {value!r}. There are {', '.join(known)}.")
    ends = [[last(steps[n, s][1], value) for s in SEEDS] for n in names]
    mean, half = (0.0 if abs(x) < 1e-12 else float(x) for x in call(mine, "difference", *ends))
    low, high = mean - half, mean + half
    yield (f"{value}, last ten steps, seeds 0 to 2: {names[0]} {text(ends[0])}, {names[1]} {text(ends[1])}; "
           f"difference {mean:.3g}, interval {low:.3g} to {high:.3g}")
    try:
        import matplotlib
    except ImportError:
        yield "(matplotlib is missing, so there is no picture: pip install matplotlib)"
    else:
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        curves = {n: [[float(m[value]) for m in steps[n, s][1]] for s in SEEDS] for n in names}
        figure = call(mine, "picture", plt, curves)
        require(hasattr(figure, "savefig") and figure.axes, "picture gives a matplotlib figure with axes.")
        ax = figure.axes[0]
        require(len(ax.lines) + len(ax.collections) + len(ax.containers) >= 2, "The picture shows less "
                "than two arms.")
        require(ax.get_legend() or figure.legends, "The picture has no legend: which line is which arm?")
        require(ax.get_xlabel() and ax.get_ylabel(), "The picture's axes have no labels: of what, in which "
                "unit?")
        figure.savefig(place("08.png"), dpi=100)
        plt.close(figure)
        yield "a picture: out/workshop/08.png"
    sentence = word(mine, "SENTENCE", "what was compared, by how much do they differ, how sure is it? With "
                    "the names of the arms, the mean difference and both ends of its interval.")
    unnamed = [str(n) for n in names if str(n) not in sentence]
    require(not unnamed, f"SENTENCE does not name {' and '.join(unnamed)}.")
    rest = sentence
    for n in names:                                              # a digit in a name is no result
        rest = rest.replace(str(n), " ")
    said = [float(x) for x in re.findall(r"(?<![\w.])-?\d+\.?\d*(?:e-?\d+)?", rest.replace("−", "-"))]
    for what, x in (("the mean difference", mean), ("the interval's low end", low),
                    ("the interval's high end", high)):
        off = max(0.006, 0.06 * abs(x)) if abs(x) >= 0.05 else 0.06 * abs(x) + 5e-4
        require(any(abs(t - x) <= off for t in said), f"SENTENCE lacks {what}, {x:.3g}. Write numbers with a "
                f"point and not in percent, all three: {mean:.3g} ({low:.3g} to {high:.3g}).")
    verdict = word(mine, "VERDICT", f"which arm is better? {' or '.join(map(str, names))}, or \"not shown\".",
                   (*map(str, names), "not shown"))
    if low <= 0 <= high:
        require(verdict == "not shown", f"VERDICT: the interval, {low:.3g} to {high:.3g}, holds 0: three "
                "seeds do not show a difference. That is a result as well.")
    else:
        require(verdict != "not shown", f"VERDICT: the interval, {low:.3g} to {high:.3g}, does not hold 0: "
                "there is a difference.")
        better = str(names[(mean > 0) != (good == "higher")])
        require(verdict == better, f"VERDICT: the mean of {names[0]} - {names[1]} is {mean:.3g}, and {good} is "
                "better.")
    yield f"{verdict}: {sentence}"
    yield Shown("           (The check reads numbers and names. Your neighbor reads whether the sentence is true.)")


def text(values):
    return ", ".join(f"{v:.3g}" for v in values)


def last(rows, value):
    rows = rows[-10:]
    return sum(float(m[value]) for m in rows) / len(rows)


def folder(name, seed):
    return f"08-{re.sub(r'[^a-zA-Z0-9]+', '-', str(name))}-{seed}"


# --------------------------------------------------------------------------------------------------


def jobs(mine, flags):
    """Two arms, three seeds each; with flags one run."""
    if flags:
        return {"08": [*SIZE, "--task", str(mine.path), *flags]}
    list(arms(mine))
    return {folder(n, s): [*SIZE, "--task", str(mine.path), "--seed", str(s), *shlex.split(f)]
            for s in SEEDS for n, f in mine.ARMS.items()}


def install(mine):
    """The metric is in metrics.jsonl, as `mine`."""
    from data.tokenizer import Bytes
    from run.meter import Meter
    row = Meter.row

    def with_mine(self, *args):
        texts = self.batch.rollout.texts(Bytes)
        x = float(call(mine, "metric", texts, self.batch.rewards.flatten().cpu().numpy()))
        return row(self, *args) | dict(mine=x, mine_code=code(mine))
    Meter.row = with_mine
