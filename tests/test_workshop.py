"""The workshop: each check fails on the stub, passes on the solution, and tells mutants of the solution apart.

    TENBIT_WORKSHOP=all pytest -n 0 tests/test_workshop.py       # the runs of exercises 6 and 8 too: three minutes more
"""
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from precision import InputError
from tests.silent_bugs import BUGS
from workshop import __main__ as command
from workshop import ladder
from workshop.checks import c00_ready, c05_bugs, c08_own
from workshop.ladder import EXERCISES, Wrong, read, steps_of

ROOT = pathlib.Path(__file__).resolve().parent.parent
ALL = os.environ.get("TENBIT_WORKSHOP") == "all"

# exercise: mutants of its solution, (name, old, new, what the check must say). `old` stands in it once.
MUTANTS = {
    1: [("cut off", "torch.round(x / spacing)", "torch.trunc(x / spacing)", "you cut off"),
        ("rounded up", "torch.round(x / spacing)", "torch.ceil(x / spacing)", "always round up"),
        ("ties away from zero", "torch.round(x / spacing)", "torch.sign(x) * torch.floor(x.abs() / spacing + 0.5)",
         "away from zero"),
        ("ties towards zero", "torch.round(x / spacing)", "torch.sign(x) * torch.ceil(x.abs() / spacing - 0.5)",
         "towards zero"),
        ("no subnormals", "torch.where(x.isfinite(), y, x)", "torch.where(x.abs() < 2.0 ** (1 - bias), 0 * x, y)",
         "subnormals"),
        ("one bit too few", "exponent - man)", "exponent - man + 1)", "must stay what it is"),
        ("one bit too many", "exponent - man)", "exponent - man - 1)", "no number of FP16"),
        ("a bias one off", "bias = 2 ** (exp - 1) - 1", "bias = 2 ** (exp - 1)", "bias of the exponent"),
        ("spacing goes on shrinking", ".clamp(min=1 - bias)", "", "it stays 2^-24"),
        ("overflow saturates", "torch.copysign(torch.tensor(torch.inf).double(), x)", "largest * x.sign()", "unnoticed"),
        ("no -inf", "torch.copysign(torch.tensor(torch.inf).double(), x)", "torch.where(x > 0, torch.inf, -largest)", "not -inf"),
        ("inf too early", "y.abs() > largest", "x.abs() > largest", "65519"),
        ("the sign is lost", "x = x.double()  ", "x = x.double().abs()", "sign is lost"),
        ("inf becomes nan", "where(x.isfinite(), y, x)", "where(x.isfinite(), y, 0 * x)", "stay what they are"),
        ("FP16 alone", "exponent - man)", "exponent - 10)", "in bf16"),
        ("zeros", "return torch.where(x.isfinite(), y, x).float()", "return 0 * x.float()", "0 for every number"),
        ("the sum is not rounded", "SUM_FP16 = 0.2998046875", "SUM_FP16 = 0.2999267578125", "rounded as well"),
        ("the sum of decimals", "SUM_BF16 = 0.30078125", "SUM_BF16 = 0.3", "0.2 becomes 0.2001953125")],
    2: [("no prediction", '"qkv product"  ', '""', "before you look"),
        ("signs cancel", "[mask].abs().mean()", "[mask].mean().abs()", "cancel"),
        ("padding counts", "(logp_rollout - logp_train)[mask].abs()", "(logp_rollout - logp_train).abs()", "counts padding"),
        ("divided by all places", "return (logp_rollout - logp_train)[mask].abs().mean()",
         "return ((logp_rollout - logp_train) * mask).abs().mean()", "divides by all"),
        ("a sum", "[mask].abs().mean()", "[mask].abs().sum()", "is a sum"),
        ("the ratio upside down", "(torch.expm1(-d) + d)", "(torch.expm1(d) - d)", "upside down"),
        ("k1", "return (torch.expm1(-d) + d).mean()", "return d.mean()", "estimator k1"),
        ("k2", "return (torch.expm1(-d) + d).mean()", "return (d * d / 2).mean()", "estimator k2"),
        ("digits are lost", "d = (logp_rollout - logp_train)[mask].double()              # FP32 has no digits left at 1e-6\n"
         "    return (torch.expm1(-d) + d).mean()",
         "d = (logp_rollout - logp_train)[mask]\n    return ((-d).exp() - 1 + d).mean()", "noise"),
        ("natural logarithm", "np.log2", "np.log", "natural"),
        ("logarithm to base 10", "np.log2", "np.log10", "base 10"),
        ("axes exchanged", "np.polyfit(bits, np.log2(values), 1)", "np.polyfit(np.log2(values), bits, 1)", "fitted the bits"),
        ("no logarithm", "np.log2(values)", "values", "Their logarithms"),
        ("the first operator", '"blocks.0.attention, qkv product"', '"embedding, embedding"', "Look at the column"),
        ("no block", '"blocks.0.attention, qkv product"', '"qkv product"', "of which block"),
        ("the answers' means", "(logp_rollout - logp_train)[mask].abs().mean()",
         "(((logp_rollout - logp_train).abs() * mask).sum(1) / mask.sum(1)).mean()", "short answer's"),
        ("slope and intercept", "np.polyfit(bits, np.log2(values), 1)[0]", "np.polyfit(bits, np.log2(values), 1)", "take [0]"),
        ("a wrong factor", "KL_BY = 4", "KL_BY = 2", "KL_BY")],
    3: [("zeros", "return rewards - rewards.mean(1, keepdim=True)", "return 0 * rewards", "0 everywhere"),
        ("the advantage's sign", "return rewards - rewards.mean(1, keepdim=True)",
         "return rewards.mean(1, keepdim=True) - rewards", "better answers get less"),
        ("no baseline", " - rewards.mean(1, keepdim=True)", "", "the reward itself"),
        ("the wrong axis", "rewards.mean(1, keepdim=True)", "rewards.mean(0, keepdim=True)", "over the problems"),
        ("the batch's mean", "rewards.mean(1, keepdim=True)", "rewards.mean()", "mean of all rewards"),
        ("GRPO's", "return rewards - rewards.mean(1, keepdim=True)",
         "return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-8)", "deviation"),
        ("RLOO's", "return rewards - rewards.mean(1, keepdim=True)",
         "return (rewards - rewards.mean(1, keepdim=True)) * rewards.shape[1] / (rewards.shape[1] - 1)", "RLOO"),
        ("the loss's sign", "return torch.maximum(-advantage", "return -torch.maximum(-advantage", "worse answers"),
        ("min for max", "torch.maximum", "torch.minimum", "smaller of the two"),
        ("no clip", "return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))",
         "return -advantage * ratio", "does not clip"),
        ("always clipped", "return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))",
         "return -advantage * ratio.clamp(1 - low, 1 + high)", "always clips"),
        ("ends exchanged", "(1 - low, 1 + high)", "(1 - high, 1 + low)", "exchanged"),
        ("the ratio upside down", "(logp - logp_old).exp()", "(logp_old - logp).exp()", "upside down"),
        ("no exp", "(logp - logp_old).exp()", "(logp - logp_old)", "its logarithm"),
        ("log-probs divided", "(logp - logp_old).exp()", "(logp / logp_old)", "divides log-probs"),
        ("ends of its own", "(1 - low, 1 + high)", "(0.8, 1.2)", "Use low and high"),
        ("half", "return torch.maximum", "return 0.5 * torch.maximum", "half"),
        ("no gradient", "(logp - logp_old).exp()", "(logp - logp_old).exp().detach()", "no gradient"),
        ("a gradient that is not the value's", "(logp - logp_old).exp()",
         "(logp - logp_old).exp().detach() * (2 * (logp - logp.detach())).exp()", "finite differences")],
    4: [("zeros that were there", "    some = gradients[gradients != 0]", "    some = gradients", "that were 0 before"),
        ("a share of all", ".float().mean()", ".float().sum() / len(gradients)", "divides by all"),
        ("smaller than the smallest", "((some * scale).half() == 0)", "((some * scale).abs() < 2.0 ** -24)",
         "rounded up to it"),
        ("negative ones are lost", "((some * scale).half() == 0)", "(some * scale <= 2.0 ** -25)", "negative numbers"),
        ("rounded first", "((some * scale).half() == 0)", "(some.half() * scale == 0)", "multiply first"),
        ("one scale for all", "return 2.0 ** math.floor(math.log2(65504 / float(gradients.abs().max())))",
         "return 2.0 ** 16", "becomes inf"),
        ("half of what fits", "return 2.0 ** math", "return 0.5 * 2.0 ** math", "would fit as well"),
        ("signs", "float(gradients.abs().max())", "float(gradients.max())", "whatever the sign"),
        ("no power of two", "return 2.0 ** math.floor(math.log2(65504 / float(gradients.abs().max())))",
         "return 65504 / float(gradients.abs().max())", "a power of two"),
        ("clip before unscale",
         "    scaler.unscale_(optimizer)                                  # first: the clip is for true sizes\n"
         "    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)\n",
         "    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)\n    scaler.unscale_(optimizer)\n", "clipped before"),
        ("unscaled twice", "    norm =", "    scaler.unscale_(optimizer)\n    norm =", "Unscaled twice"),
        ("no clip", "torch.nn.utils.clip_grad_norm_(parameters, max_norm)",
         "torch.nn.utils.clip_grad_norm_(parameters, 1e9)", "not clipped"),
        ("the optimizer steps by itself", "scaler.step(optimizer)", "optimizer.step()", "optimizer.step does not"),
        ("no update of the scale", "    scaler.update()", "    pass", "was not called"),
        ("update before step", "    scaler.step(optimizer) ", "    scaler.update()\n    scaler.step(optimizer) ",
         "before scaler.step"),
        ("emptied before the step", "    scaler.step(optimizer) ", "    optimizer.zero_grad()\n    scaler.step(optimizer) ",
         "gone when the step"),
        ("gradients stay", "    optimizer.zero_grad()", "    pass", "still there"),
        ("the norm after the clip", "    return norm", "    return min(norm, max_norm)", "before the clip"),
        ("no norm", "    return norm", "    return None", "gave nothing")],
    5: [*((f"not {name}", 'BUG = "top-k"', f'BUG = "{name}"', f"It is not '{name}'")
          for name in c05_bugs.NAMES if name != "top-k"),
        ("no name", 'BUG = "top-k"', 'BUG = ""', "which of the eight"),
        ("another name", 'BUG = "top-k"', 'BUG = "the sampler"', "It is one of"),
        ("no evidence", EVIDENCE := '"kl_k1 is above 0 and equal to the gap from the first step on: log mu is always larger"',
           '""', "which metric tells"),
        ("no metric", EVIDENCE, '"it looks odd"', "names no metric"),
        ("no evidence in fact", EVIDENCE, '"length, I think"', "it is no evidence"),
        ("not its case", "CASE = 1003", "CASE = 0", "--again")],
    6: [("zeros", "(logp - logp_rollout).exp().clamp(max=2)", "0 * logp", "0 everywhere"),
        ("upside down", "(logp - logp_rollout)", "(logp_rollout - logp)", "upside down"),
        ("no cap", ".clamp(max=2)", "", "no cap"),
        ("no exp", ".exp()", "", "log of the ratio"),
        ("a lower end", "clamp(max=2)", "clamp(min=2)", "an upper end"),
        ("masked", "return (logp - logp_rollout).exp().clamp(max=2)",
         "r = (logp - logp_rollout).exp()\n    return r * (r <= 2)", "masked"),
        ("another cap", "max=2", "max=3", "it gave 3"),
        ("capped before exp", ".exp().clamp(max=2)", ".clamp(max=2).exp()", "cap after exp"),
        ("a whole answer", "(logp - logp_rollout).exp()", "(0 * logp + (logp - logp_rollout).sum(1, keepdim=True)).exp()",
         "a whole answer"),
        ("formats exchanged", '"mismatch": "--precision e8m2 --rollout-precision fp32',
         '"mismatch": "--precision fp32 --rollout-precision e8m2', "wrong way round"),
        ("no mismatch", '"mismatch": "--precision e8m2 --rollout-precision fp32', '"mismatch": "--precision e8m2',
         "Asked: rollout fp32"),
        ("the ratio to the rollout", '"matched": "--precision e8m2 --old-policy recomputed"', '"matched": "--precision e8m2"',
         "lacks --old-policy"),
        ("no correction", '\n                 "--correction token-tis"', "", "has no correction"),
        ("another correction", "--correction token-tis", "--correction seq-mis", "not token-tis"),
        ("two changes", '"matched": "--precision e8m2', '"matched": "--precision e8m2 --correction token-tis', "Only token-tis"),
        ("another learning rate", '"matched": "--precision e8m2', '"matched": "--lr 3e-3 --precision e8m2', "also sets lr"),
        ("an unknown flag", '"matched": "--precision e8m2', '"matched": "--precision e8m2 --bits 2', "see the line above"),
        ("nothing collapsed", 'COLLAPSED = ["mismatch"]', "COLLAPSED = []", "which runs"),
        ("no list", 'COLLAPSED = ["mismatch"]', 'COLLAPSED = "mismatch"', "is a list"),
        ("the cure collapsed", 'COLLAPSED = ["mismatch"]', 'COLLAPSED = ["mismatch", "token-tis"]', "token-tis did not"),
        ("the wrong one collapsed", 'COLLAPSED = ["mismatch"]', 'COLLAPSED = ["fp32"]', "fp32 did not"),
        ("two bits hold all", 'MATCHED = "c"', 'MATCHED = "A"', "cost something")],
    7: [("no order", "(1e8, -1e8, 1.0)", "(1.0, 2.0, 3.0)", "are both 6.0"),
        ("zeros", "    return x[:, 0]", "    return 0 * x[:, 0]", "0 everywhere"),
        ("torch.sum", "    while x.shape[1] > 1:", "    return x.sum(1)\n    while x.shape[1] > 1:", "picks an order by itself"),
        ("left to right", "    while x.shape[1] > 1:", "    return sum(x.T[1:], x.T[0])\n    while x.shape[1] > 1:",
         "left to right"),
        ("in FP64", "    while x.shape[1] > 1:", "    return x.double().sum(1).float()\n    while x.shape[1] > 1:", "FP64"),
        ("halves", "x[:, 0:n:2] + x[:, 1:n:2]", "x[:, :n // 2] + x[:, n // 2:n]", "adds the halves"),
        ("the odd one is lost", "torch.cat((x[:, 0:n:2] + x[:, 1:n:2], x[:, n:]), 1)", "x[:, 0:n:2] + x[:, 1:n:2]",
         "left out"),
        ("nothing turned back", "    attention = Numerics.attention", "    pass", "turns nothing back"),
        ("two turned back", "    attention = Numerics.attention", "    attention, swiglu = Numerics.attention, Numerics.swiglu",
         "one at a time"),
        ("the format's fault", 'ORDER = "b"', 'ORDER = "a"', "were in BF16"),
        ("the numbers' fault", 'ORDER = "b"', 'ORDER = "c"', "the same numbers"),
        ("too large", "(1e8, -1e8, 1.0)", "(1e300, -1e300, 1.0)", "3.4e38"),
        ("no run", "out/workshop/07-exact", "out/nowhere", "no finished run"),
        ("not exact", "out/workshop/07-exact", "out/workshop/07-mine", "without --exact")],
    8: [("one problem", 'word = "".join(rng.permutation(list("abcdefgh"))[:4])', 'word = "abcd"', "are different"),
        ("random numbers of its own", "rng.permutation", "np.random.default_rng().permutation", "from the same rng"),
        ("always right", "rng.random() < 0.4", "False", "right in 100%"),
        ("never right", "return \"\".join(word)", 'return "wrong"', "right in 0%"),
        ("everything is right", "float(text == problem.answer)", "1.0", "the answer 'zzz'"),
        ("an empty answer is right", "float(text == problem.answer)", "float(text in problem.answer)", "empty answer"),
        ("the answer anywhere", "float(text == problem.answer)", "float(problem.answer in text)", "among others"),
        ("nothing is right", "float(text == problem.answer)", "0.0", "reward gives 0 for the right"),
        ("a constant metric", "sum(list(t) == sorted(t) for t in texts) / len(texts)", "1.0", "whatever the answers"),
        ("a metric that divides by zero", "return sum(list(t) == sorted(t) for t in texts) / len(texts)",
         "return np.float64(len(texts)) / rewards.sum()", "one finite number"),
        ("b - a", "np.subtract(a, b)", "np.subtract(b, a)", "wrong sign"),
        ("the deviation of all numbers", "d.std(ddof=1)", "d.std()", "n - 1"),
        ("no square root", " / np.sqrt(len(d))", "", "square root of 3"),
        ("1.96", "4.303 * d", "1.96 * d", "many seeds"),
        ("the standard error", "4.303 * d", "d", "standard error"),
        ("unpaired", "4.303 * d.std(ddof=1) / np.sqrt(len(d))",
         "4.303 * np.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / 3)", "seed by seed"),
        ("the same arms", '"--lr 2e-5"', '"--lr 1e-3"', "nothing is compared"),
        ("right with more beside it", "float(text == problem.answer)", "float(text.startswith(problem.answer))", "beside it"),
        ("nothing expected", 'EXPECT = "in 40 steps the slow one gets nowhere"', 'EXPECT = ""', "EXPECT"),
        ("a seed of its own", '"--lr 2e-5"', '"--lr 2e-5 --seed 1"', "sets --seed"),
        ("another metric than in the runs", "for t in texts) / len(texts)", "for t in texts) / len(texts) + 1",
         "another task or metric"),
        ("a metric that is not there", 'VALUE = "accuracy"', 'VALUE = "beauty"', "no metric 'beauty'"),
        ("a picture without a legend", "    ax.legend()\n", "", "no legend"),
        ("a sentence without names", 'SENTENCE = "fast is 0.190 above slow (', 'SENTENCE = "0.190 (', "does not name"),
        ("a sentence in percent", "0.190 above slow (0.152 to 0.228)", "19.0 % above slow (15.2 to 22.8)", "not in percent"),
        ("the wrong arm", 'VERDICT = "fast"', 'VERDICT = "slow"', "higher is better"),
        ("not shown", 'VERDICT = "fast"', 'VERDICT = "not shown"', "there is a difference"),
        ("no sentence", "", "", "SENTENCE is still empty")],
}


@pytest.fixture
def room(tmp_path, monkeypatch, cache):
    """Folders of its own for files, runs and base models."""
    monkeypatch.setattr(ladder, "MINE", tmp_path / "mine")
    monkeypatch.setattr(ladder, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(c00_ready, "MINE", tmp_path / "mine")
    monkeypatch.setattr(c00_ready, "RUNS", tmp_path / "runs")
    monkeypatch.setattr("run.base.CACHE", cache)
    monkeypatch.setenv("TENBIT_CACHE", str(cache))
    monkeypatch.setattr("sys.argv", ["workshop"])
    return tmp_path


def solution(number):
    return EXERCISES[number].solution.read_text(encoding="utf-8")


def checked(room, number, text):
    """What the check says of this text -> the lines that are right, and what is not."""
    path, right = room / f"{EXERCISES[number].name}.py", []
    path.write_text(text, encoding="utf-8")
    try:
        for line in EXERCISES[number].checks.check(read(path)):
            right.append(line)
    except (Wrong, InputError) as e:
        return right, str(e)
    return right, ""


def a_run(folder, accuracy, kl=1e-9, code=0, **config):
    """What a run leaves, as far as checks look at it. Only for what they say of a run: that real runs are like this is
    tried with TENBIT_WORKSHOP=all."""
    folder.mkdir(parents=True)
    rows = [dict(step=i, accuracy=a, kl_k3=kl, kl_k1=kl, exact_share=1.0, tokens=10, mine=a, logp_gap_mean=kl,
                 length=12 + i % 2, mine_code=code) for i, a in enumerate(accuracy, 1)]
    rows = [dict(config=config), *rows, dict(result={})]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


@pytest.fixture
def runs(room):
    """Runs such as exercises 5, 6, 7 and 8 leave."""
    from workshop.checks import c06_cures
    place = ladder.RUNS
    for name, kl in zip(c05_bugs.runs(1003), (1e-9, 1e-3)):
        a_run(place / name, [0.5] * 25, kl)
    space = read(EXERCISES[6].solution)
    for name, end, kl in (("fp32", 0.98, 1e-14), ("mismatch", 0.01, 0.5), ("token-tis", 0.93, 0.03), ("matched", 0.86, 0.0)):
        a_run(place / f"06-{name}", [0.6] * 20 + [end] * 20, kl, **vars(c06_cures.settings(name, space.ARMS[name])))
    for name, exact in (("07-exact", True), ("07-mine", False)):
        a_run(place / name, [0.9] * 5, 0.0, precision="bf16", rollout_precision="", exact=exact)
    own = room / "08_own.py"
    own.write_text(solution(8), encoding="utf-8")
    space = read(own)
    for arm, ends in (("fast", (0.95, 0.97, 0.96)), ("slow", (0.75, 0.80, 0.76))):
        for seed, end in enumerate(ends):
            a_run(place / c08_own.folder(arm, seed), [0.6] * 20 + [end] * 10, code=c08_own.code(space),
                  **vars(c08_own.settings(space, arm)))
    return place


def here(text, number, runs):
    """The solution as its writer would have it on this machine: what differs from processor to processor is filled in."""
    if number == 7:
        return text.replace("out/workshop/", f"{runs}/".replace("\\", "/"))
    if number == 8:                                              # 0.96 - 0.77, sd of the differences 0.01528
        return text.replace('SENTENCE = ""', 'SENTENCE = "fast is 0.190 above slow (0.152 to 0.228)"').replace(
            'VERDICT = ""', 'VERDICT = "fast"')
    if number == 2:
        from experiments.explain import study, watched
        from experiments.mismatch import passes
        case, _ = study()
        tokens = next(passes(case, ["fp32"], 3))[1].tokens
        for name, fmt, old in (("FIRST_FP16", "fp16", "qkv product"), ("FIRST_BF16", "bf16", "attention")):
            op = next(op for op in watched(case, tokens, fmt) if op.differ)
            text = text.replace(f'{name} = "blocks.0.attention, {old}"', f'{name} = "{op.where}, {op.name}"')
    return text


@pytest.mark.parametrize("number", EXERCISES)
def test_a_stub_does_not_pass(number, room):
    right, wrong = checked(room, number, EXERCISES[number].stub.read_text(encoding="utf-8"))
    assert wrong and len(right) < 2


@pytest.mark.parametrize("number", EXERCISES)
def test_the_solution_passes(number, room, runs):
    right, wrong = checked(room, number, here(solution(number), number, runs))
    assert not wrong and len(right) >= 3, wrong


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("number", EXERCISES)
def test_each_mutant_has_a_message_of_its_own(number, room, runs):
    """A loss of zeros that passes is no joke: it has passed elsewhere, where the tolerance was larger than the numbers."""
    text, said, off = here(solution(number), number, runs), {}, []
    for name, old, new, words in MUTANTS[number]:
        if name == "no sentence":
            mutant = solution(number)
        else:
            if number == 7:
                old = old.replace("out/workshop/", f"{runs}/".replace("\\", "/"))
                new = new.replace("out/workshop/", f"{runs}/".replace("\\", "/"))
            if name in ("the first operator", "no block"):
                old = re.search(r"FIRST_FP16 = (.*?\")  ", text)[1]
                new = new if name == "the first operator" else '"' + old.partition(", ")[2]         # without its block
                mutant = text.replace(f"FIRST_FP16 = {old}", f"FIRST_FP16 = {new}")
            else:
                assert text.count(old) == 1, (name, text.count(old))
                mutant = text.replace(old, new)
        right, said[name] = checked(room, number, mutant)
        if words not in said[name] or len(said[name]) > 420:
            off.append(f"{name}: {said[name] or right}")
    assert not off, "\n".join(off)
    assert len(set(said.values())) == len(said) >= 5


def test_what_is_wrong_with_a_file_is_one_line(room):
    for text, words in (("def round_to_format(x, exp, man)\n    return x", "01_format.py line 1: expected ':'"),
                        ("import nothing_such", "line 1: ModuleNotFoundError"),
                        ("def round_to_format(x, exp, man):\n    y = 1\n    return x[y, y, y]", "line 3: IndexError"),
                        ("def round_to_format(x):\n    return x", "line 1: TypeError"),
                        ("def other(x):\n    return x", "no function round_to_format"),
                        ("def round_to_format(x, exp, man):\n    return 3", "gave int")):
        _, wrong = checked(room, 1, text)
        assert words in wrong and "\n" not in wrong, wrong
    with pytest.raises(InputError, match="start 4"):
        read(room / "04_loss_scale.py")


def test_a_run_with_a_wrong_weight_is_not_begun(room):
    """The check would take it for a run with the right one."""
    with pytest.raises(Wrong, match="nothing is weighed"):
        EXERCISES[6].checks.jobs(read(EXERCISES[6].stub), [])


def test_the_command(room, capsys, monkeypatch):
    """start, check, status; a file that is there is not lost; progress is a text file."""
    def run(*argv):
        status = command.main(list(argv))
        return status, capsys.readouterr().out
    assert run("status")[1].count("\n") == 9 and run()[1] == run("status")[1]
    assert "pages/03_gradient.md" in run("start", "3")[1]
    mine = ladder.MINE / "03_gradient.py"
    assert mine.read_text(encoding="utf-8") == EXERCISES[3].stub.read_text(encoding="utf-8")
    status, said = run("check", "3")
    assert status == 1 and "not yet" in said and not ladder.passed()
    with pytest.raises(InputError, match="is not touched"):
        command.main(["start", "3"])
    mine.write_text("kept = 1", encoding="utf-8")
    run("start", "3", "--again")
    assert [f.read_text(encoding="utf-8") for f in (ladder.MINE / "old").iterdir()] == ["kept = 1"]
    mine.write_text(solution(3), encoding="utf-8")
    status, said = run("check", "3")
    assert status == 0 and "passed" in said and EXERCISES[3].why[:30] in said and "torch.maximum" in said
    lines = (ladder.MINE / "progress.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 and lines[0].startswith("3 passed 20") and "3  the policy gradient" in run("status")[1]
    assert "next: python -m workshop start 1" in run("status")[1]
    for argv in (["check"], ["start", "0"], ["run"]):
        with pytest.raises(InputError, match="which exercise"):
            command.main(argv)


def test_an_edit_of_the_program_is_shown(room, capsys, monkeypatch, tmp_path):
    if not shutil.which("git"):
        pytest.skip("no git")
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "precision.py").write_text("x = 1\n", encoding="utf-8")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for line in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *line], cwd=copy, check=True)
    monkeypatch.setattr(command, "ROOT", copy)
    command.core_changed()
    assert not capsys.readouterr().out
    (copy / "precision.py").write_text("x = 2\n", encoding="utf-8")
    command.core_changed()
    assert "+x = 2" in (said := capsys.readouterr().out) and "git checkout" in said


def test_this_machine_is_ready(room):
    lines = [*c00_ready.check(None)]
    assert lines[-1].startswith("ready") and "accuracy" in lines[3]


def test_runs_take_what_was_written(room):
    """`run N` with a file of one's own: the program rounds, averages and counts with it."""

    def trained(number, text, *flags, out):
        path = room / f"{EXERCISES[number].name}.py"
        path.write_text(text, encoding="utf-8")
        job = next(iter(EXERCISES[number].checks.jobs(read(EXERCISES[number].solution), ["--steps", "1", *flags]).values()))
        command_ = [sys.executable, "-m", "workshop.trainer", str(number), str(path), *job, "--out", str(room / out)]
        done = subprocess.run(command_, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return steps_of(room / out)[1][-1]
    fine, coarse = (trained(1, solution(1).replace("exponent - man)", f"exponent - {man})"), "--base-steps", "20", "--keep",
                            "0", "1", out=f"01-{man}") for man in ("man", "3"))
    assert abs(coarse["entropy"] / fine["entropy"] - 1) > 1e-3
    m = trained(6, solution(6).replace("2)", "2) * 0"), *LIKE_TIS, out="06")
    assert m["weight_mean"] == 0                                        # the flags are those of the last arm but one
    m = trained(8, solution(8), "--base-steps", "20", "--keep", "0", "1", out="08")
    assert 0 <= m["mine"] <= 1


LIKE_TIS = ("--precision e8m2 --rollout-precision fp32 --correction token-tis --base-steps 20 --keep 0 1").split()

# What tells each bug of exercise 5 from the sound run and from the others: metrics of the first steps of both
TELLS = {
    "stop token never trained": lambda a, b: b[0]["kept_share"] < 0.95,
    "top-k": lambda a, b: b[0]["kl_k1"] == pytest.approx(b[0]["logp_gap_mean"], rel=1e-3) and b[0]["logp_gap_mean"] > 1e-4,
    "gradients never added": lambda a, b: b[0]["grad_norm"] < 0.35 * a[0]["grad_norm"] and b[0]["grad_norm"] > 0,
    "rollout keeps old weights": lambda a, b: b[0]["logp_gap_mean"] < 1e-4 < 1e-3 < b[7]["logp_gap_mean"],
    "weights never updated": lambda a, b: abs(b[7]["entropy"] - b[0]["entropy"]) < 0.4 * (a[0]["entropy"] - a[7]["entropy"])
    and b[7]["logp_gap_mean"] < 1e-4 and 0 < b[7]["grad_norm"] < 10,
    "one noise per group": lambda a, b: b[0]["frac_zero_std"] == 1 and b[0]["grad_norm"] == 0,
    "clip before unscale": lambda a, b: b[0]["grad_norm"] > 1000,
    "advantages of other answers": lambda a, b: b[7]["entropy"] > 1.2 * a[7]["entropy"] and b[0]["kept_share"] == 1
    and 0.8 * a[0]["grad_norm"] > b[0]["grad_norm"] > 0.05 and b[7]["logp_gap_mean"] < 1e-4,
}


def test_every_bug_can_be_told_by_its_metrics(room, monkeypatch):
    """The eight trainers and the sound one run for eight steps: what the exercise says of each is there to see."""
    cases = {c05_bugs.bug_of(case): case for case in range(1040, 1000, -1)}
    assert set(cases) == set(c05_bugs.NAMES) == set(TELLS)
    assert {n[0] for n in c05_bugs.NAMES.values()} <= {b.name for b in BUGS}
    path = room / "05_bugs.py"

    def trained(case, *flags):
        path.write_text(f"CASE = {case}", encoding="utf-8")
        line = [sys.executable, "-m", "workshop.trainer", "5", str(path), *c05_bugs.FLAGS, "--steps", "8", *flags, "--out",
                str(room / f"{case}{''.join(flags)}")]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return steps_of(line[-1])[1]
    sound = trained(1, "--sound")
    assert not any(told(sound, sound) for told in TELLS.values())
    for name, case in cases.items():
        steps = trained(case)
        told = {other for other, test in TELLS.items() if test(sound, steps)}
        assert name in told and not told - {name, "weights never updated"}, (name, told)


@pytest.mark.skipif(not ALL, reason="TENBIT_WORKSHOP=all runs it: three minutes")
@pytest.mark.parametrize("number", (5, 6, 7, 8))
def test_the_real_runs(number, room, capsys):
    e = EXERCISES[number]
    e.path.parent.mkdir(exist_ok=True)
    e.path.write_text(solution(number).replace("out/workshop/", f"{ladder.RUNS}/"), encoding="utf-8")
    assert command.main(["run", str(number)]) == 0
    if number == 8:
        with pytest.raises(Wrong, match="SENTENCE"):
            list(e.checks.check(read(e.path)))
        found = {s: steps_of(ladder.place(c08_own.folder(n, s))) for n in ("fast", "slow") for s in c08_own.SEEDS}
        assert all(found.values())
    else:
        assert command.main(["check", str(number)]) == 0, capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# The pages


def test_pages_are_short_and_name_what_they_need():
    for n, e in EXERCISES.items():
        text = e.page.read_text(encoding="utf-8")
        assert len(text.split()) <= 300, (e.page, len(text.split()))
        for part in (f"# {n}. ", f"python -m workshop start {n}", "**What you will see.**", "**What to do.**", "A hint",
                     "**Think about it.**", f"check {n}"):
            assert part in text, (e.page, part)
        assert f"pages/{e.name}.md" in e.stub.read_text(encoding="utf-8")


def test_the_glossary_is_short_and_has_the_step_lines_words():
    text = (ROOT / "workshop" / "glossary.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    assert len(lines) <= 60 and all(len(line) <= 120 for line in lines)
    for name in ("acc", "len", "ent", "gap", "kl", "|g|", "scale"):
        assert f"- **{name}**" in text
    assert "workshop/glossary.md" in (ROOT / "README.md").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# The notebook

NOTEBOOK = ROOT / "workshop" / "colab.ipynb"


def cells(kind="code"):
    return [c for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def test_the_notebook_has_the_stubs_as_they_are():
    written = ["".join(c["source"]) for c in cells() if c["source"][0].startswith("%%writefile")]
    assert len(written) == 3 and not any(c["outputs"] for c in cells())
    for text in written:
        first, _, rest = text.partition("\n")
        name = pathlib.Path(first.split()[1]).name
        assert rest.strip() == (ROOT / "workshop" / "stubs" / name).read_text(encoding="utf-8").strip()


def test_the_notebook_runs_end_to_end(tmp_path, monkeypatch, cache):
    """In a clone, first with the stubs, then with the solutions. Exercise 6 has fewer steps here."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("clones the repository")
    clone = tmp_path / "tenbit"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    for name in subprocess.run(["git", "ls-files", "-mo", "--exclude-standard"], cwd=ROOT, capture_output=True,
                               text=True, check=True).stdout.split():
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    monkeypatch.setenv("TENBIT_CACHE", str(cache))
    monkeypatch.setenv("PATH", f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    def executed(solved):
        book = nbformat.read(NOTEBOOK, 4)
        for c in book.cells:
            if c.cell_type == "code":
                c.source = c.source.replace("%pip install", "#").replace("run 6 ", "run 6 --steps 3 " if not ALL else "run 6 ")
                if solved and c.source.startswith("%%writefile"):
                    first = c.source.partition("\n")[0]
                    number = int(pathlib.Path(first.split()[1]).name[:2])
                    c.source = f"{first}\n{here(solution(number), number, None)}"
        nbclient.NotebookClient(book, timeout=300, kernel_name="python3",
                                resources=dict(metadata=dict(path=str(tmp_path)))).execute()
        return ["".join(o.get("text", "") for o in c.outputs) for c in book.cells if c.cell_type == "code"]
    said = "\n".join(executed(False))
    assert said.count("not yet") == 3 and "ready" in said and "Traceback" not in said
    said = "\n".join(executed(True))
    assert "Exercise 1, what a number format is: passed" in said and "Exercise 2, where the first bit" in said
    assert "06-mismatch" in said and "Traceback" not in said and ("Exercise 6" in said) >= ALL
