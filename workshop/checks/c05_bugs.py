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
from workshop.ladder import JOB, place, require, steps_of, word

# What a participant calls it: the bug's name, and which of the curves it leaves as they were or not
NAMES = {
    "stop token never trained": (
        "the stop token counts as padding", "kept_share",
        "The stop token is one of an answer's tokens: without it a share of them of 1 / len would be "
        "left out of the loss. Look at kept_share."),
    "top-k": (
        "a filter that training does not know", "kl_k1",
        "Sampling from the k likeliest makes each of them more probable than the full softmax says, "
        "so log mu - log pi would be above 0 for every token, from the first step on: kl_k1 would be "
        "as large as the gap."),
    "gradients never added": (
        "gradients are never added", "grad_norm",
        "If the parts of a batch were not added, |g| would be a fraction of the sound run's in the "
        "first step, where both have the same weights and answers."),
    "rollout keeps old weights": (
        "the rollout keeps its first weights", "logp_gap_mean",
        "If the rollout kept its first weights, the gap would be sound in the first step and grow "
        "from the second on, as training goes away from it."),
    "weights never updated": (
        "neither side sees an update", "entropy",
        "If both sides computed with the first weights, nothing would change but by chance: neither "
        "accuracy nor entropy. The gap would stay small, |g| as in the first step."),
    "one noise per group": (
        "a group shares its noise", "frac_zero_std",
        "If all answers of a group were drawn with the same random numbers, they would be the same: "
        "every group would agree (frac_zero_std 1), and |g| would be 0."),
    "clip before unscale": (
        "clipping before unscaling", "grad_norm",
        "A clip before unscale sees a gradient that is 2^16 times too large: |g| would be in the "
        "thousands."),
    "advantages of other answers": (
        "advantages of other answers", "accuracy",
        "If answers got the advantages of others, the policy would be pushed at random: |g| would be "
        "as large as ever, and accuracy would fall instead of rising."),
}
# Two formats with the same ten bits: the rollout has rounded weights of its own. Parts of 16 answers
FLAGS = [*JOB, "--micro-batch", "16", "--precision", "fp16", "--rollout-precision", "tf32"]


def bug_of(case):
    """Which bug a case has. It follows from its number, and cannot be seen in it."""
    digest = hashlib.sha256(f"tenbit workshop {case}".encode()).digest()
    return [*NAMES][digest[0] % len(NAMES)]


def begin(text):
    """The stub with a case, drawn by chance."""
    return text.replace("CASE = 0", f"CASE = {random.SystemRandom().randrange(1000, 10000)}")


def case_of(mine):
    case = getattr(mine, "CASE", 0)
    require(type(case) is int and case > 0, "CASE is not what `start 5` wrote into your file: "
            "python -m workshop start 5 --again")
    return case


def check(mine):
    case = case_of(mine)
    sound, sick = (steps_of(place(name)) for name in runs(case))
    require(sound and sick, "The two runs are not there yet: python -m workshop run 5")
    yield f"the sound trainer and trainer {case} have run, {len(sound[1])} and {len(sick[1])} steps"
    said = word(mine, "BUG", "which of the eight is it?", NAMES)
    evidence = word(mine, "EVIDENCE", "which metric tells, and what does it do?")
    known = {k for m in sick[1] for k in m} - {"step"}
    short = {"acc": "accuracy", "len": "length", "ent": "entropy", "gap": "logp_gap_mean",
             "kl": "kl_k3", "|g|": "grad_norm", "scale": "loss_scale", "loss": "loss"}
    named = known & set(re.findall(r"\w+", evidence)) | {
        v for k, v in short.items() if k in re.findall(r"[\w|]+", evidence)}
    require(named, "EVIDENCE names no metric. Name one as metrics.jsonl or the step line has it, such "
            "as kl_k1 or |g|, and say what it does.")
    truth = bug_of(case)
    require(said == truth, f"It is not {said!r}. {NAMES[said][2]} Here it is otherwise.")
    yield f"it is {said!r}. You looked at {', '.join(sorted(named))}; most people look at " \
          f"{NAMES[truth][1]}"
    yield f"in words: {NAMES[truth][2]}"
    yield "another trainer: python -m workshop start 5 --again"


def runs(case):
    return f"05-{case}-sound", f"05-{case}"


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
