"""run/problems.py: the problems of a run. A pool and held-out ones, the perfectible set of the
pool, and the order in which they come."""
import dataclasses
import json
import time
from contextlib import suppress

import numpy as np

from data import draw_problems, input_error, stream
from data.tokenizer import Bytes
from operators import numerics
from precision import InputError, parse_format
from run.base import base_key, cached, code, keep
from run.checkpoint import replacing
from run.lines import say, to_go
from sample import Sampler, solve

POOL = 256              # problems, where a task draws its own without end and --pool 0 asks for all
HELDOUT = 256           # problems at most, of a held-out file
TRIES = 16              # answers per problem while choosing (the paper: 40)


def choose_problems(cfg, env):
    """-> (the pool to train on or to choose from, held-out problems), all that a run needs. Sets
    env.prompt_length for a model that reads, to the longest of them."""
    task, rng = env.task, stream(cfg.seed, 4)
    from_file = task.loads and env.reads or not task.draws      # else the task draws them
    count = int(cfg.heldout) if cfg.heldout.isdecimal() else None
    if from_file:
        rows = shuffled(task.load(cfg.data), rng)
    else:
        rows = task.load(cfg.data) if cfg.data else draw_problems(task, cfg.pool or POOL, rng)
    rng = stream(cfg.seed, 5)
    if count is None:
        heldout = shuffled(task.load(cfg.heldout), rng)[:HELDOUT]
    elif not from_file:
        drawn, others = {p.prompt for p in rows}, f"of {cfg.data}" if cfg.data else "others"
        heldout = draw_problems(task, count, rng, drawn, others) if count else []
    elif count < len(rows):
        heldout = rows[:count]
    else:
        raise input_error(f"{cfg.data or cfg.task} has {len(rows)} problems, no more than --heldout "
                          f"{count} sets aside")
    asked = {p.prompt for p in heldout}              # a line may stand twice, or in both files
    pool = [p for p in rows if p.prompt not in asked][:cfg.pool or None]
    if not pool:
        raise input_error(f"every problem of {cfg.data or cfg.task} is held out as well: none is "
                          "left to train on")
    if env.tokenizer is Bytes:
        for p in pool + heldout:
            for text, room in ((p.prompt, env.prompt_length), (p.answer, env.answer_length - 1)):
                if len(text.encode()) > room:
                    raise input_error(f"{text[:80]!r} does not fit: {cfg.task} with these settings "
                                      f"has room for {room} tokens")
    else:
        env.prompt_length = max(len(env.tokens(p)) for p in pool + heldout)
    return pool, heldout


def shuffled(rows, rng):
    return [rows[i] for i in rng.permutation(len(rows))]


def perfectible(model, env, pool, cfg, nums):
    """The problems of the pool that the base model solves in cfg.keep of its tries (paper: 20 % to
    80 % of 40).

    It answers in one format (cfg.base_precision), so that the set is a property of the base and the
    same for every --precision. How often each problem was solved is kept in the cache. nums:
    numerics that hold the model's weights already."""
    low, high = cfg.keep
    if low <= 0 and high >= 1:
        say(f"all {len(pool)} problems are kept")
        return pool
    right = solved(model, env, pool, cfg, nums)
    kept = [p for p, r in zip(pool, right) if low <= r / TRIES <= high]
    say(f"perfectible set: kept {len(kept)} of {len(pool)} problems, those right in {low:.0%} to "
        f"{high:.0%} of {TRIES} tries (mean over the pool {np.mean(right) / TRIES:.3f})")
    if not kept:
        raise InputError("no problem was kept: the base model solves all or none of them. Change "
                         "--noise, --digits or --base-steps, or widen --keep")
    return kept


def solved(model, env, pool, cfg, nums):
    """How many of TRIES answers to each problem were right, from the cache if this very question
    was asked of this very code."""
    device, fmt = model.embedding.device, parse_format(cfg.base_precision)
    path = cached("solved", [base_key(cfg, device, env), code(cfg, "sample.py", "run/problems.py"),
                             TRIES, cfg.temperature, cfg.rollout_rows, cfg.seed, env.answer_length,
                             env.task.system, [dataclasses.astuple(p) for p in pool]])
    with suppress(OSError, ValueError):                     # not there, or damaged
        return json.loads(path.read_text(encoding="utf-8"))
    num = next((n for n in nums if cfg.model and n.fmt == fmt), None)
    model.use(num or numerics(fmt, device, cfg.fast).hold(model.parameters()))
    sampler = Sampler(model, env.tokenizer.stop, env.tokenizer.pad, cfg.fast)
    begin, quarters = time.monotonic(), [0]

    def progress(share):
        if int(4 * share) > quarters[-1]:
            quarters.append(int(4 * share))
            say(f"  choosing {share:4.0%}  {to_go(begin, share)}")
    right = solve(sampler, env, pool, TRIES, (cfg.seed, 2), temperature=cfg.temperature,
                  rows=cfg.rollout_rows, progress=progress)

    def write():
        with replacing(path) as f:
            f.write(json.dumps(right).encode())
    keep(write)
    return right


def problems_of_step(problems, drawn, cfg):
    """P problems from place `drawn` on: epochs over the set, each in an order of its own that
    follows from the seed."""
    out = []
    for i in range(drawn, drawn + cfg.prompts):
        epoch, at = divmod(i, len(problems))
        if at == 0 or not out:
            order = stream(cfg.seed, 3, epoch).permutation(len(problems))
        out.append(problems[order[at]])
    return out
