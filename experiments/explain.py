"""Where does the first bit differ between rollout and training, and how does it grow?

    python -m experiments.explain

The same tokens go through the same model twice: token by token after a cache, as a rollout does, and all
at once, as training does. Every operator's numbers are compared bit by bit, before and after they are
rounded to the format, in ordinary and in exact mode. It is the plain operators that are watched: compiled
ones add up products in one order already, and differ by attention alone.
"""
import torch

from data import draw_problems, stream
from data.tokenizer import encode
from model import GPT, KVCache
from operators import numerics
from operators.device import pick_device
from run.base import find_base, gpt_config, load_task
from run.checks import compare
from run.meter import mismatch
from sample import Sampler
from train_rl import Config

FORMATS = ("fp32", "bf16", "fp16")


def bits(x):
    return f"{float(x):+.9f} (0x{torch.tensor(float(x)).view(torch.int32).item() & 0xFFFFFFFF:08x})"


def subject(device):
    """(model with the default job's base if it is in the cache, tokens (3, T), length of the prompts, whether it is trained)."""
    cfg = Config(preset="cpu")
    env = load_task(cfg)
    model = find_base(cfg, device)[0]
    trained = model is not None
    model = model or GPT(gpt_config(cfg, env), device)
    model.use(numerics("fp32", device, fast=False).hold(model.parameters()))
    problems = draw_problems(env.task, 3, stream(0, 11))
    rollout = Sampler(model, stop=-1, fast=False).generate([encode(p.prompt) for p in problems], 1, 28, seed=3)
    return model, rollout.tokens, int(rollout.prompt_length[0]), trained


def logprobs(model, tokens, start):
    """-> log-probs of tokens[:, start:] as a rollout records them and as training computes them, each (B, T - start)."""
    B, T = tokens.shape
    cache, mu = KVCache(model.cfg, B, T, model.num), []
    with torch.no_grad():
        hidden = model(tokens[:, :start], cache)[:, -1]
        for t in range(start, T):
            mu.append(model.num.log_softmax(model.logits(hidden), 1.0).gather(1, tokens[:, t:t + 1]))
            if t + 1 < T:
                hidden = model(tokens[:, t:t + 1], cache)[:, 0]
        where = torch.zeros_like(tokens, dtype=torch.bool)
        where[:, start:] = True
        pi = model.token_logprobs(tokens, where)[0].view(B, -1)
    return torch.cat(mu, 1), pi


def percent(x):
    return "" if x is None else "0" if x == 0 else f"{100 * x:.2f}%" if x >= 5e-5 else "<.01%"


def table(runs):
    """runs: {format: [Operator]} -> printed: all operators of the first block, then the sum that leaves each later one."""
    print(f"{'':34}" + "".join(f"{f:^27}" for f in runs))
    print(f"{'operator':34}" + f"{'differ':>8} {'rounded':>8} {'size':>8}  " * len(runs))
    operators = next(iter(runs.values()))
    last = {op.where.rsplit(".", 1)[0]: i for i, op in enumerate(operators)}               # of each block
    for i, op in enumerate(operators):
        block = op.where.rsplit(".", 1)[0]
        if not op.where.startswith("blocks.0.") and i != last[block]:
            continue
        name = f"{op.where:19} {op.name}" if op.where.startswith("blocks.0.") else f"{block:19} all of it"
        if op.where == "head":
            name = f"{'':19} last norm"
        print(f"{name:34}", end="")
        for run in runs.values():
            size = f"{run[i].size:.1e}" if run[i].size else "0"
            print(f"{percent(run[i].differ_raw):>8} {percent(run[i].differ):>8} {size:>8}  ", end="")
        print()


def main():
    device = pick_device("auto")
    model, tokens, start, trained = subject(device)
    B, T = tokens.shape
    print(
        f"{B} answers of {T - start} tokens behind prompts of {start}, "
        f"{'the default base model' if trained else 'random weights'}, {device}, {torch.get_num_threads()} threads.\n"
        "Pass 1, as in a rollout: the prompts, then a token at a time behind a cache. Pass 2, as in training: all at once.\n\n"
        "differ   share of the operator's numbers whose bits differ, in FP32, before rounding to the format\n"
        "rounded  the same after rounding: what the next operator gets\n"
        "size     of the differences after rounding (root mean square, relative to the numbers')\n"
    )
    ordinary, exact, gaps = {}, {}, {}
    for fmt in FORMATS:
        for mode, runs in ((False, ordinary), (True, exact)):
            model.use(numerics(fmt, device, fast=False, exact=mode).hold(model.parameters()))
            runs[fmt] = compare(model, tokens, start)
            mu, pi = logprobs(model, tokens, start)
            gaps[fmt, mode] = mismatch(mu.flatten(), pi.flatten(), torch.full((B,), T - start))
    print("ORDINARY")
    table(ordinary)
    print()
    for fmt in FORMATS:
        story(fmt, ordinary[fmt])
    print("\nEXACT")
    n = len(exact["fp32"])
    for fmt in FORMATS:
        wrong = [op for op in exact[fmt] if op.differ or op.differ_raw]
        print(f"  {fmt}: {n - len(wrong)} of {n} operators give the same bits in both passes"
              + (f"; the first that does not: {wrong[0].where}, {wrong[0].name}" if wrong else ""))
    print(f"\n{'':10}{'ordinary':^44}{'exact':^44}")
    print(f"{'log-prob':10}" + f"{'mean gap':>10} {'largest':>10} {'KL (k3)':>10} {'same bits':>10} " * 2)
    for fmt in FORMATS:
        print(f"{fmt:10}" + "".join(
            f"{g['logp_gap_mean']:10.1e} {g['logp_gap_max']:10.1e} {g['kl_k3']:10.1e} {g['exact_share']:10.1%} "
            for g in (gaps[fmt, False], gaps[fmt, True])))
    print("\nWhy: a library picks its product, and with it an order of summation, by the shape of the call, and addition of\n"
          "rounded numbers is not associative. In FP32 most numbers then differ a little. Rounding to a format hides\n"
          "most of that, and now and then, where a sum lies close to a border between two of the format's numbers, makes a\n"
          "jump of it: rare and wide with 7 mantissa bits, more often and 8 times smaller with 10. From the first jump on,\n"
          "whatever depends on that number differs too. Exact mode gives every product one shape, every sum one order, and\n"
          "every key its place.")


def story(fmt, operators):
    """The first differing number, and the first that survives rounding, told with their bits."""
    raw = next((op for op in operators if op.differ_raw or op.differ), None)
    if raw is None:
        return print(f"{fmt}: no bit differs in these passes")
    one, two = (raw.cached, raw.full) if raw.full_raw is None else (raw.cached_raw, raw.full_raw)
    at = tuple((one != two).nonzero()[0])
    print(f"{fmt}: the first differing bit is in {raw.where}, {raw.name}. One of its numbers is\n"
          f"      {bits(one[at])} in the rollout,\n      {bits(two[at])} in training", end="")
    if fmt == "fp32" or raw.full_raw is None:                      # nothing is rounded, or the hardware did as it wrote
        return print(".")
    op = next((op for op in operators if op.differ), None)
    if op is None:
        return print(f". Rounding to {fmt} hides this one, and all others.")
    here = tuple((op.full != op.cached).nonzero()[0])
    before, after = (float(x[here] - y[here]) for x, y in ((op.full_raw, op.cached_raw), (op.full, op.cached)))
    print(f".\n      Of all that reaches {fmt}, the first is in {op.where}, {op.name}:\n"
          f"      {bits(op.cached_raw[here])} becomes {float(op.cached[here]):+.7f} in the rollout,\n"
          f"      {bits(op.full_raw[here])} becomes {float(op.full[here]):+.7f} in training"
          + (f", {after / before:.0f} times as far apart." if before else "."))


if __name__ == "__main__":
    main()
