"""Where does the first bit differ between rollout and training, and how does it grow?

    python -m experiments.explain

The same tokens go through the same model twice: token by token after a cache, as a rollout does,
and all at once, as training does. Every operator's numbers are compared bit by bit, before and
after they are rounded to the format, in ordinary and in exact mode. The plain operators are
watched: compiled ones add up products in one order already, and differ by attention alone.
"""
import dataclasses

import torch

from data import draw_problems, stream
from data.tokenizer import encode
from experiments.command import show
from experiments.lab import parts
from experiments.mismatch import distance, passes
from model import GPT
from operators import numerics
from operators.device import pick_device
from run.base import find_base, gpt_config, load_task
from run.checks import compare
from run.console import Parser, run_main
from train_rl import Config

FORMATS = "fp32", "bf16", "fp16"
GAPS = {"gap": ("logp_gap_mean", ".1e"), "max": ("logp_gap_max", ".1e"), "KL": ("kl_k3", ".1e"),
        "same": ("exact_share", ".1%")}
ABOUT = """{} answers of {} tokens after prompts of {}, {}, {}, {} threads.
Pass 1, as in a rollout: the prompts, then a token at a time after a cache.
Pass 2, as in training: all at once.

differ   share of the operator's numbers whose bits differ, in FP32, before rounding to the format
rounded  the same after rounding: what the next operator gets
size     of the differences after rounding (root mean square, relative to the numbers')

ORDINARY"""
WHY = """
Why: a library picks its product, and with it an order of summation, by the shape of the call, and
addition of rounded numbers is not associative. In FP32 most numbers then differ a little. Rounding
to a format hides most of that, and now and then, where a sum lies close to a border between two of
the format's numbers, makes a jump of it: rare and wide with 7 mantissa bits, more often and 8 times
smaller with 10. From the first jump on, whatever depends on that number differs too. Exact mode
gives every product one shape, every sum one order, and every key its place."""


def bits(x):
    return f"{float(x):+.9f} (0x{torch.tensor(float(x)).view(torch.int32).item() & 0xFFFFFFFF:08x})"


def percent(x):
    return "" if x is None else "0" if x == 0 else f"{100 * x:.2f}%" if x >= 5e-5 else "<.01%"


def table(runs):
    """runs: {format: [Operator]} -> printed: all operators of the first block, then the sum that
    leaves each later one."""
    print(f"{'':34}" + "".join(f"{f:^27}" for f in runs))
    print(f"{'operator':34}" + f"{'differ':>8} {'rounded':>8} {'size':>8}  " * len(runs))
    rows = {}
    for ops in zip(*runs.values()):
        where, block = ops[0].where, ops[0].where.rpartition(".")[0]
        name = (f"{where:19} {ops[0].name}" if block == "blocks.0" else
                f"{'':19} last norm" if where == "head" else f"{block or where:19} all of it")
        rows[name] = ops                                               # of a later block the last
    for name, ops in rows.items():
        cells = ((percent(op.differ_raw), percent(op.differ), f"{op.size:.1e}" if op.size else "0")
                 for op in ops)
        print(f"{name:34}" + "".join("{:>8} {:>8} {:>8}  ".format(*cell) for cell in cells))


def story(fmt, operators):
    """The first differing number, and the first that survives rounding, told with their bits."""
    raw = next((op for op in operators if op.differ_raw or op.differ), None)
    if raw is None:
        return print(f"{fmt}: no bit differs in these passes")
    known = raw.full_raw is not None                 # not where the hardware rounds as it writes
    one, two = (raw.cached_raw, raw.full_raw) if known else (raw.cached, raw.full)
    at = tuple((one != two).nonzero()[0])
    print(f"{fmt}: the first differing bit is in {raw.where}, {raw.name}. One of its numbers is\n"
          f"      {bits(one[at])} in the rollout,\n      {bits(two[at])} in training", end="")
    op = next((op for op in operators if op.differ), None)
    if fmt == "fp32" or not known:
        return print(".")
    if op is None:
        return print(f". Rounding to {fmt} hides this one, and all others.")
    at = tuple((op.full != op.cached).nonzero()[0])
    cached_raw, cached, full_raw, full = (
        float(x[at]) for x in (op.cached_raw, op.cached, op.full_raw, op.full))
    times = (full - cached) / (full_raw - cached_raw) if full_raw != cached_raw else None
    print(f".\n      Of all that reaches {fmt}, the first is in {op.where}, {op.name}:\n"
          f"      {bits(cached_raw)} becomes {cached:+.7f} in the rollout,\n"
          f"      {bits(full_raw)} becomes {full:+.7f} in training"
          + (f", {times:.0f} times as far apart." if times else "."))


def study():
    """The default job's base model if it is in the cache, else one with random weights, and three
    problems -> (model, prompts, answers to each, tokens, stop token, settings), what it is."""
    device, cfg = pick_device("auto"), Config(preset="cpu")
    env, base = load_task(cfg), find_base(cfg, device)[0]
    model = base or GPT(gpt_config(cfg, env), device)
    prompts = [encode(p.prompt) for p in draw_problems(env.task, 3, stream(0, 11))]
    case = model, prompts, 1, 28, -1, dataclasses.replace(cfg, fast=False)
    return case, "the default base model" if base else "random weights"


def watched(case, tokens, fmt, exact=False):
    """What each operator gives, a token at a time and all at once -> [Operator]."""
    model, prompts, *_ = case
    num = numerics(fmt, model.embedding.device, fast=False, exact=exact)
    return compare(model.use(num.hold(model.parameters())), tokens, len(prompts[0]))


def main(argv=None):
    Parser(prog="experiments.explain", description=__doc__.split("\n\n")[0]).parse_args(argv)
    case, weights = study()
    modes, start = [f + end for end in ("", " exact") for f in FORMATS], len(case[1][0])
    answers = {mode: out for mode, *out in passes(case, modes, 3)}
    tokens, gaps = answers["fp32"][0].tokens, {m: distance(*out) for m, out in answers.items()}
    print(ABOUT.format(len(case[1]), 28, start, weights, tokens.device, torch.get_num_threads()))
    runs = {}
    for mode in modes:
        fmt, _, exact = parts(mode)
        runs.setdefault(exact, {})[fmt] = watched(case, tokens, fmt, exact)
    table(runs[False])
    print()
    for fmt in FORMATS:
        story(fmt, runs[False][fmt])
    print("\nEXACT")
    for fmt, ops in runs[True].items():
        wrong = [op for op in ops if op.differ or op.differ_raw]
        print(f"  {fmt}: {len(ops) - len(wrong)} of {len(ops)} operators give the same bits in "
              "both passes" + "".join(f"; not so {op.where}, {op.name}" for op in wrong[:1]))
    show({fmt: {kind + text: f"{gaps[fmt + end][key]:{spec}}"
                for kind, end in (("", ""), ("exact: ", " exact"))
                for text, (key, spec) in GAPS.items()} for fmt in FORMATS}, "log-probs")
    print(WHY)


if __name__ == "__main__":
    run_main(main)
