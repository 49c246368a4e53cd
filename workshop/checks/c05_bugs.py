"""Exercise 5: a trainer with one of eight bugs, to be named from its metrics alone. The bugs are
those of tests/silent_bugs.py, put into the program as it is read and not into its files."""
import hashlib
import importlib.machinery
import importlib.util
import random
import re
import sys

from operators.code import ROOT
from tests.silent_bugs import BUGS, mutated
from workshop import ladder
from workshop.ladder import JOB, place, require, steps_of, word

# What a participant calls it: the bug's name, the metric that tells most clearly, and what one sees
NAMES = {
    "stop token never trained": (
        "the stop token counts as padding", "kept_share",
        "the stop token is one of an answer's tokens. Left out of the loss, one token in len is missing: "
        "kept_share is 1 - 1/len. Nothing else shows it"),
    "top-k": (
        "a filter that training does not know", "kl_k1",
        "each of the k likeliest tokens is more probable than the full softmax says. So log mu - log pi "
        "is above 0 for every token, from the first step on: the gap is 1e-3, kl_k1 is as large, and "
        "exact_share 0"),
    "gradients never added": (
        "gradients are never added", "grad_norm",
        "the last part of a batch counts alone. In the first step, where both have the same weights and "
        "answers, |g| is less than a third of the sound run's. Accuracy rises, more slowly"),
    "rollout keeps old weights": (
        "the rollout keeps its first weights", "logp_gap_mean",
        "the gap is sound in the first step, and grows from the second on, as training goes away from "
        "the rollout. Accuracy is level"),
    "weights never updated": (
        "neither side sees an update", "entropy",
        "nothing changes but by chance: neither accuracy nor entropy. The gap stays small, and |g| is as "
        "in the first step"),
    "one noise per group": (
        "a group shares its noise", "frac_zero_std",
        "the answers of a group are all the same, so every group agrees: frac_zero_std is 1, |g| is 0, "
        "and nothing is learned"),
    "clip before unscale": (
        "clipping before unscaling", "grad_norm",
        "the clip sees a gradient that is 2^16 times too large: |g| is in the thousands. Adam hides the "
        "rest"),
    "advantages of other answers": (
        "advantages of other answers", "accuracy",
        "good answers are pushed down as often as up: accuracy falls, entropy rises, and |g| is about "
        "half of the sound run's in the first step, since pushes cancel"),
}
# Two formats with the same ten bits: the rollout has rounded weights of its own. Parts of 16 answers
FLAGS = [*JOB, "--micro-batch", "16", "--precision", "fp16", "--rollout-precision", "tf32"]
SHOWN = ("accuracy length entropy logp_gap_mean kl_k1 exact_share loss grad_norm kept_share "
         "clipped_share frac_zero_std truncated loss_scale skipped_steps lr").split()
SPOILS = True                           # the solution names another of the eight: it is not shown
SHORT = {"acc": "accuracy", "len": "length", "ent": "entropy", "gap": "logp_gap_mean", "kl": "kl_k3",
         "|g|": "grad_norm", "scale": "loss_scale", "skipped": "skipped_steps"}


def bug_of(case):
    """Which bug a case has. It follows from its number, and cannot be seen in it."""
    digest = hashlib.sha256(f"tenbit workshop {case}".encode()).digest()
    return [*NAMES][digest[0] % len(NAMES)]


def solved():
    """The bugs that were named already: a text file beside the progress."""
    path = ladder.MINE / "05_solved.txt"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def begin(text):
    """The stub with a case, drawn by chance among the bugs that were not named yet."""
    left = [name for name in NAMES if name not in solved()] or [*NAMES]
    cases = [case for case in range(1000, 10000) if bug_of(case) in left]
    return text.replace("CASE = 0", f"CASE = {random.SystemRandom().choice(cases)}")


def case_of(mine):
    case = getattr(mine, "CASE", 0)
    require(type(case) is int and case > 0, "CASE is not what `start 5` wrote into your file: "
            "python -m workshop start 5 --again")
    return case


def check(mine):
    case = case_of(mine)
    both = [steps_of(place(name)) for name in runs(case)]
    require(all(both), "The two runs are not there yet: python -m workshop run 5")
    sound, sick = (steps for _, steps in both)
    yield f"the sound trainer and trainer {case} have run, {len(sound)} and {len(sick)} steps"
    said = word(mine, "BUG", "which of the eight is it?", NAMES)
    evidence = word(mine, "EVIDENCE", "which metric tells, and what does it do?")
    words = re.findall(r"[\w|]+", evidence)
    named = {SHORT.get(w, w) for w in words} & {k for m in sick for k in m} - {"step"}
    require(named, "EVIDENCE names no metric. Name one as metrics.jsonl or the step line has it, such "
            "as kl_k1 or |g|, and say what it does.")
    truth = bug_of(case)
    require(said == truth, f"It is not {said!r}. There {NAMES[said][2]}. Here it is otherwise.")
    tells = [k for k in named if differs(sound, sick, k)]
    require(tells, f"The name is right. But {', '.join(sorted(named))}: over the first ten steps it "
            "differs by less than a fifth (the mismatch: by less than ten times), as it may by chance. "
            "So it is no evidence. Which metric differs clearly?")
    if said not in solved():
        ladder.MINE.mkdir(exist_ok=True)
        (ladder.MINE / "05_solved.txt").write_text("\n".join([*solved(), said]) + "\n", encoding="utf-8")
    yield f"it is {said!r}. Your evidence: {', '.join(sorted(tells))}. The clearest: {NAMES[truth][1]}"
    yield f"in words: {NAMES[truth][2]}"
    left = len(NAMES) - len(solved())
    yield f"{left} of the eight are left: python -m workshop start 5 --again" if left else "all eight"


def differs(sound, sick, key):
    """Whether a metric is clearly another one, in the first step or in the mean of the first ten: by a
    fifth, the mismatch by a factor of ten, and by anything where the sound run's never moves."""
    a, b = ([float(m[key]) for m in steps[:10]] for steps in (sound, sick))
    for one, two in ((a[0], b[0]), (sum(a) / len(a), sum(b) / len(b))):
        if min(a) == max(a):
            far = one != two
        elif "gap" in key or "kl" in key:
            far = max(abs(one), abs(two)) > 1e-5 and not 0.1 < abs(two) / max(abs(one), 1e-12) < 10
        else:
            far = abs(one - two) > 0.2 * abs(one)
        if far:
            return True
    return False


def beside(mine):
    """Metrics of both runs in some steps, as a table."""
    both = [steps_of(place(name))[1] for name in runs(case_of(mine))]
    at = [i for i in (0, 1, 4, 24) if i < min(map(len, both))]
    head = "".join(f"{f'step {i + 1}':>10}" for i in at)
    lines = [f"{'':16}{'sound':^{10 * len(at)}}  {'trainer ' + str(case_of(mine)):^{10 * len(at)}}",
             f"{'':16}{head}  {head}"]
    for key in SHOWN:
        cells = ["".join(f"{float(steps[i][key]):10.3g}" for i in at) for steps in both]
        lines.append(f"{key:16}{cells[0]}  {cells[1]}")
    folder = ladder.shown(place(runs(case_of(mine))[1]))
    return "\n".join([*lines, f"all steps: {folder}/metrics.jsonl. Gaps of 1e-6 and less, and an exact_share "
                      "near 1, are sound here"])


def runs(case):
    return "05-sound", f"05-{case}"


def jobs(mine, flags):
    sound, sick = runs(case_of(mine))
    return {sound: ["--seed", "0", *FLAGS, *flags, "--sound"], sick: ["--seed", "0", *FLAGS, *flags]}


def install(mine):
    """Before the program is read: the bug, unless --sound is asked for."""
    if "--sound" in sys.argv:
        sys.argv.remove("--sound")
        return
    name = NAMES[bug_of(case_of(mine))][0]
    put_in(next(b for b in BUGS if b.name == name))


def put_in(bug):
    """From now on this module is read with the bug in it. The file stays as it is."""
    module = bug.file.removesuffix(".py").replace("/", ".")
    assert module not in sys.modules, module

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == module:
                file = str(ROOT / bug.file)
                return importlib.util.spec_from_file_location(name, file, loader=Loader(name, file))

    class Loader(importlib.machinery.SourceFileLoader):
        def get_code(self, name):
            return compile(mutated(bug), self.path, "exec")
    sys.meta_path.insert(0, Finder)
