"""Exercise 7: exact mode. An order of summation, bit for bit; one operator turned back; a run."""
import sys

import numpy as np
import torch

from data import draw_problems, stream
from data.tokenizer import encode
from model import GPT
from operators.exact import ExactNumerics
from precision import InputError, Numerics
from run.base import gpt_config, load_task
from sample import Sampler
from train_rl import Batch, parse_config, score
from workshop.ladder import JOB, Wrong, place, require, shown, steps_of, tensor, word

ORDER = dict(a="the number format", b="the shape of the whole call: how many rows there are at once",
             c="the numbers that are added", d="how busy the machine is")
OPERATORS = "product", "logits", "log_softmax", "rms_norm", "swiglu", "attention"


def check(mine):
    yield from three(mine)
    yield from pairs(mine)
    yield from turned_back(mine)
    yield from proof(mine)


def three(mine):
    x = getattr(mine, "NUMBERS", None)
    fits = isinstance(x, (tuple, list)) and len(x) == 3 and all(type(t) in (int, float) for t in x)
    require(fits, "NUMBERS are three numbers.")
    with np.errstate(over="ignore"):
        a, b, c = map(np.float32, x)
    require(np.isfinite([a, b, c]).all(), f"Of NUMBERS, {x}, one is inf in FP32, which ends at 3.4e38.")
    with np.errstate(all="ignore"):
        left, right = (a + b) + c, a + (b + c)
    require(left != right, f"In FP32 ({a} + {b}) + {c} and {a} + ({b} + {c}) are both {left}. Try a "
            "large number, its negative, and a small one.")
    yield f"({a} + {b}) + {c} = {left}, and {a} + ({b} + {c}) = {right}: the order counts"


def tree(row):
    """Neighbors added, until one number is left; an odd one at the end goes on as it is."""
    row = [np.float32(t) for t in row]
    while len(row) > 1:
        row = [a + b for a, b in zip(row[::2], row[1::2])] + row[len(row) // 2 * 2:]
    return row[0]


def halves(row):
    row = [np.float32(t) for t in row]
    while len(row) > 1:
        n = len(row) // 2
        new = [a + b for a, b in zip(row[:n], row[n:2 * n])]
        row = new + row[2 * n:]
    return row[0]


def pairs(mine):
    rows, sums = {}, {}
    for n in (1, 2, 3, 8, 13, 100):
        rng = np.random.default_rng(n)
        x = (rng.normal(size=(40, n)) * 10.0 ** rng.integers(-4, 5, (40, n))).astype(np.float32)
        try:
            y = tensor(mine, "pair_sum", (40,), torch.tensor(x))
        except InputError as e:
            raise Wrong(f"{e}. (This was a row of {n} numbers: an odd one at the end goes on as it is.)") from None
        require(y.dtype == torch.float32, f"pair_sum gave {y.dtype} and not FP32.")
        rows[n], sums[n] = x, y.numpy()
        require(sums[n].any(), "pair_sum is 0 everywhere.")

    def like(order):
        return all((sums[n] == np.array([order(row) for row in x], np.float32)).all() for n, x in rows.items())
    if not like(tree):
        short = np.abs(sums[3] - rows[3][:, :2].sum(1, dtype=float)) <= 1e-4 * np.abs(rows[3]).sum(1)
        require(not short.all(), "Of a row of 3 numbers the last one is left out: with an odd number of "
                "them it has no neighbor, and goes on as it is.")
        require(not like(line), "pair_sum adds from left to right. That order is fixed as well, but "
                "another one is asked: neighbors first.")
        require(not like(lambda row: row.sum(dtype=float)), "pair_sum adds in FP64 and rounds once. Good "
                "sums, but not in the order that is asked, and slow on most GPUs.")
        require(not like(halves), "pair_sum adds the halves of a row. Asked are neighbors: the numbers 0 "
                "and 1, 2 and 3, and so on.")
        n, row = next((n, i) for n, x in rows.items() for i in range(40) if sums[n][i] != tree(x[i]))
        got, truth = sums[n][row], tree(rows[n][row])
        near = abs(got - truth) <= 1e-4 * np.abs(rows[n][row]).sum()
        require(not near, f"The sums are near, but their last bits are others, such as {got} and not "
                f"{truth} for a row of {n}. torch.sum picks an order by itself. Add neighbors, "
                "x[:, 0::2] + x[:, 1::2], until one number is left.")
        require(False, f"A row of {n} numbers has another sum: {got} in place of {truth}.")
    yield "pair_sum: rows of 1 to 100 numbers, each bit as the order says"


def line(row):
    return sum(row[1:], row[0])


def shares(numerics):
    """The default job's model with random weights answers 1, 3, 5 and 21 times at once -> of each,
    how many tokens have the same log-prob on both sides, bit for bit, and how many there are."""
    cfg, found = parse_config(["--preset", "cpu", "--device", "cpu"])[0], {}
    env = load_task(cfg)
    model = GPT(gpt_config(cfg, env))
    with torch.no_grad():
        model.head *= 10                                     # as sure of itself as a trained one
    model.use(numerics.hold(model.parameters()))
    for problems, answers in ((1, 1), (3, 1), (5, 1), (7, 3)):
        prompts = [encode(p.prompt) for p in draw_problems(env.task, problems, stream(0, 63))]
        rollout = Sampler(model, -1, fast=False).generate(prompts, answers, env.answer_length, seed=5)
        logp, where = score(model, Batch(rollout), cfg), rollout.is_answer
        found[len(where)] = int((rollout.logp == logp)[where].sum()), int(where.sum())
    return found


def over_all(found):
    same, tokens = map(sum, zip(*found.values()))
    return same / tokens


def back(operator):
    return type("Back", (ExactNumerics,), {operator: getattr(Numerics, operator)})


def turned_back(mine):
    kind = getattr(mine, "Mine", None)
    require(isinstance(kind, type) and issubclass(kind, ExactNumerics), "Mine is a class that is made "
            "from ExactNumerics.")
    exact = over_all(shares(ExactNumerics("bf16")))
    require(exact == 1, f"Exact mode itself has an exact_share of {exact:.4f} on this machine. Show "
            "this to the instructor.")
    plain = [n for n in OPERATORS if getattr(kind, n) is getattr(Numerics, n)]
    require(plain, f"Mine turns nothing back. In the class: product = Numerics.product, or another of "
            f"{', '.join(OPERATORS)}.")
    require(len(plain) == 1, f"Mine turns back {', '.join(plain)}: one at a time, to see which does "
            "it.")
    by_rows = shares(kind("bf16"))
    told = ", ".join(f"{rows} at once {a / b:.2f}" for rows, (a, b) in by_rows.items())
    if over_all(by_rows) == 1:
        do = [n for n in OPERATORS if over_all(shares(back(n)("bf16"))) < 1]
        require(not do, f"With the plain {plain[0]} exact_share is still 1 here: at these sizes this "
                "machine computes it in one way. Turn back another one. A difference here make: "
                f"{', '.join(do)}.")
        yield "on this machine no operator makes a difference: at these sizes it computes in one way"
    else:
        yield f"with the plain {plain[0]}, in BF16, exact_share is no longer 1. Answers: {told}"
    letter = word(mine, "ORDER", "which letter is it?", ORDER)
    why = dict(a="all of these calls were in BF16, and their shares differ.",
               c="both passes add the same numbers.", d="the same call gives the same bits every time.")
    require(letter == "b", f"ORDER: not {letter!r}, \"{ORDER[letter]}\": {why.get(letter)}")
    yield f"the order depends on {ORDER[letter]}"


def proof(mine):
    folder = word(mine, "RUN", "the folder of a run with --exact --precision bf16; python -m workshop "
                  "run 7 makes out/workshop/07-exact")
    found = steps_of(folder)
    require(found, f"RUN: there is no finished run in {folder}.")
    cfg, steps = found
    require(cfg["precision"] == "bf16" and cfg["rollout_precision"] in ("", "bf16"), f"RUN: {folder} is "
            f"a run in {cfg['precision']}, and BF16 is asked.")
    require(cfg["exact"], f"RUN: {folder} ran without --exact. (Its largest KL of a step was "
            f"{max(m['kl_k3'] for m in steps):.1e}.)")
    worst = max(steps, key=lambda m: m["kl_k3"])
    require(all(m["exact_share"] == 1 and m["kl_k3"] == 0 for m in steps), f"RUN: in step "
            f"{worst['step']} the KL is {worst['kl_k3']}. Show this to the instructor.")
    tokens = sum(m["tokens"] for m in steps)
    yield f"{shown(folder)}: {tokens:,} tokens of {len(steps)} steps in BF16, each with the same bits " \
          "on both sides. KL 0"


# --------------------------------------------------------------------------------------------------


def jobs(mine, flags):
    return {"07-mine": [*JOB, "--precision", "bf16", *flags],
            "07-exact": [*JOB, "--precision", "bf16", "--exact", *flags]}


def beside(mine):
    """How exact both runs were."""
    lines = []
    for name in ("07-mine", "07-exact"):
        steps = steps_of(place(name))[1]
        lines.append(f"  {name:10} exact_share {min(m['exact_share'] for m in steps):.4f} at least, KL "
                     f"{max(m['kl_k3'] for m in steps):.1e} at most")
    alike = all(m["exact_share"] == 1 for m in steps_of(place("07-mine"))[1])
    return "\n".join(lines + ["  (Mine makes no difference in this run, with 128 answers at once and a "
                              "narrow model; try attention)"] * alike)


def install(mine):
    """Both sides compute with Mine; not in the run with --exact."""
    if "--exact" not in sys.argv:
        from run import start
        start.numerics = lambda fmt, device="cpu", fast=True, exact=False: mine.Mine(fmt, device)
