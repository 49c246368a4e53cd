"""train_rl.py: GRPO in FP16, from a fresh clone to a passed sanity test.

    python train_rl.py                                    # the main job, on whatever device is here
    python train_rl.py --precision bf16                   # the same job with 7 mantissa bits
    python train_rl.py --rollout-precision fp16 --train-precision fp32       # two roundings: watch the gap
    python train_rl.py --exact                            # no mismatch at all: the same bits on both sides
    python train_rl.py --algo gspo --updates-per-batch 4  # other algorithms: --help lists them, algorithms.py has them
    python train_rl.py --resume out/run1                  # go on, bit for bit, where a run stopped
    python train_rl.py --bench                            # how fast, against what this machine can do

The job is the paper's sanity test (arXiv 2510.26788, section 4.2) in miniature. A base model imitates a noisy demonstrator;
of a pool of problems those are kept that it solves in 20 % to 80 % of its tries; RL trains on that fixed set. Each of its
problems is known to be solvable and none is trivial, so a sound algorithm must come near 100 % on it: PASS is 95 %.

One step, top to bottom in `train` below:
    problems -> prompts -> answers, each token's log-prob recorded as it was sampled -> rewards -> group advantages
    -> the same forward pass over whole sequences -> token log-probs -> mismatch metrics, before any update
    -> policy loss -> scaled backward -> unscale, clip, step -> weights rounded again, in place -> one metrics line

Names: P prompts, G answers per prompt, R = P * G answers, N answer tokens of a batch. mu is the policy that acted
(`logp_rollout`), pi the policy that learns (`logp_train`). What differs between GRPO, GSPO, DAPO and the rest is in
algorithms.py. Left out: a critic, a Trainer class.
"""
import argparse
import dataclasses
import hashlib
import inspect
import json
import math
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from algorithms import ALGORITHMS, CORRECTIONS, band, overlong, policy_loss
from data import REAL, TASKS, Problem, stream
from data.base import clock, find_base, get_base, gpt_config
from data.env import choose_problems, make_env
from fast import library, numerics
from model import GPT, load_checkpoint, load_model, save_checkpoint
from precision import InputError, banner, make_scaler, mismatch, parse_format, pick_device, reproducible
from sample import Parser, Rollout, Sampler, number, run_main, solve

# ---------------------------------------------------------------------------------------------------------------------
# Settings: a field a line, and each is a flag


def opt(default, text, low=None, high=None, choices=None):
    return field(default=default, metadata=dict(help=text, low=low, high=high, choices=choices))


@dataclass
class Config:
    preset: str = opt("auto", "two sets of defaults; auto takes the device's", choices=("auto", "cpu", "gpu"))
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    seed: int = opt(0, "everything random follows from it", 0, 2 ** 31)
    out: str = opt("", "folder of this run (default: the next free out/runN)")
    resume: str = opt("", "folder of a run to go on with; its settings hold, other flags given here override them")
    # the task
    task: str = opt("addition", f"what to learn: {', '.join(TASKS)}; with --model also {', '.join(REAL)} or yours.py")
    digits: int = opt(3, "length of the numbers, and with it of the chain of thought", 1, 200)
    noise: float = opt(0.15, "how often the base model's demonstrator gets a column wrong", 0.0, 0.9)
    data: str = opt("", "JSON Lines file of problems to train on in place of drawn ones")
    heldout_data: str = opt("", "... and of held-out problems, in place of some of --data")
    max_prompt: int = opt(0, "with --model: leave out problems with longer prompts, tokens (0: the longest there is)", 0, 10 ** 6)
    max_answer: int = opt(0, "with --model: longest answer, tokens (0: 512)", 0, 10 ** 6)
    reward_seconds: float = opt(5.0, "what a slow reward (math, one of your own) may take before its answer counts 0", 0.01, 1e4)
    # a real model
    model: str = opt("", "folder of a Hugging Face checkpoint (Qwen2, Qwen3, Qwen3-MoE, Llama) to start from")
    prompt_form: str = opt("auto", "how a problem is put to it; auto: as its tokenizer's chat template would",
                           choices=("auto", "plain", "chatml", "llama3", "r1"))
    system: str = opt("", "a system prompt for it")
    lora_rank: int = opt(0, "train adapters of this rank and freeze the rest; 0: train all weights", 0, 4096)
    lora_alpha: float = opt(0.0, "adapters count alpha / rank times (0: 2 * rank)", 0.0, 1e6)
    lora_targets: str = opt("", "projections to adapt, such as q_proj,v_proj (default: all)")
    recompute: bool = opt(False, "keep a block's input only and compute it again on the way back: less memory, a third more work")
    replay_routing: bool = opt(False, "with experts: training sends each token to the experts that it met in the rollout")
    # the base model
    n_layers: int = opt(4, "transformer blocks", 1, 200)
    width: int = opt(128, "width of the residual stream", 8, 16384)
    n_heads: int = opt(4, "query heads", 1, 256)
    n_kv_heads: int = opt(2, "key/value heads, a divisor of n_heads", 1, 256)
    mlp_width: int = opt(384, "hidden width of SwiGLU", 8, 65536)
    n_experts: int = opt(0, "experts in the MLP's place (0: none)", 0, 1024)
    experts_per_token: int = opt(2, "experts that a token goes to", 1, 1024)
    expert_width: int = opt(96, "hidden width of an expert's SwiGLU", 8, 65536)
    base_steps: int = opt(400, "imitation steps", 1, 10 ** 6)
    base_batch: int = opt(32, "demonstrations a step", 1, 10 ** 5)
    base_lr: float = opt(2e-3, "peak learning rate of imitation", 0.0, 1.0)
    base_precision: str = opt("fp32", "format of imitation; the same base serves every --precision")
    base_seed: int = opt(-1, "seed of the base model (-1: that of the run)", -1, 2 ** 31)
    # the perfectible set
    pool: int = opt(256, "problems to choose from (0, the default with --model: all that the file has)", 0, 10 ** 6)
    tries: int = opt(16, "answers per problem while choosing (the paper: 40)", 1, 4096)
    keep_from: float = opt(0.2, "keep problems solved at least this often", 0.0, 1.0)
    keep_to: float = opt(0.8, "... and at most this often", 0.0, 1.0)
    # RL
    steps: int = opt(80, "RL steps", 1, 10 ** 7)
    prompts: int = opt(64, "P, problems a step", 1, 10 ** 5)
    group: int = opt(8, "G, answers per problem; their mean reward is the baseline", 2, 4096)
    algo: str = opt("dr-grpo", "; ".join(f"{k}: {a.about}" for k, a in ALGORITHMS.items()), choices=tuple(ALGORITHMS))
    old_policy: str = opt("rollout", "what the ratio compares pi with: rollout, the recorded mu; recomputed, pi before the "
                          "batch's first update, which hides the mismatch unless a correction brings it back",
                          choices=("rollout", "recomputed"))
    correction: str = opt("none", "weight pi/mu for what mu sampled, of a token or an answer: -is as it is, -tis truncated, -mis "
                          "rejected outside a band", choices=("none", *CORRECTIONS))
    correction_low: float = opt(-1.0, "lower end of its band (-1: the correction's own)", -1.0, math.inf)
    correction_high: float = opt(-1.0, "its cap, or upper end of its band (-1: the correction's own)", -1.0, math.inf)
    updates_per_batch: int = opt(1, "updates from one rollout, each with its share of the prompts (the paper: 4)", 1, 10 ** 4)
    kl_beta: float = opt(0.0, "weight of KL[pi || base model] (k3) in the loss; the paper: 0", 0.0, 1e6)
    dynamic_sampling: int = opt(1, "rollouts a step at most, to replace groups that agree; 1: they stay", 1, 100)
    overlong: int = opt(0, "tokens before the longest answer in which the reward falls to -1", 0, 10 ** 6)
    lr: float = opt(6e-4, "peak learning rate", 0.0, 1.0)
    lr_warmup: int = opt(6, "updates of linear rise; Adam's first updates move every weight by the learning rate", 0, 10 ** 6)
    lr_schedule: str = opt("linear", "linear falls to 0 at the last step, constant stays", choices=("linear", "constant"))
    clip_low: float = opt(0.2, "the ratio counts down to 1 - this", 0.0, 1.0)
    clip_high: float = opt(0.2, "... and up to 1 + this", 0.0, 100.0)
    temperature: float = opt(1.0, "divides the logits, in sampling and in training", 0.01, 100.0)
    grad_clip: float = opt(1.0, "largest norm of the whole gradient", 0.0, 1e9)
    adam_beta1: float = opt(0.9, "AdamW's first moment", 0.0, 0.9999)
    adam_beta2: float = opt(0.95, "AdamW's second moment", 0.0, 0.9999)
    adam_eps: float = opt(1e-15, "small, since RL gradients are small: 1e-8 would damp them", 1e-30, 1.0)
    # precision
    precision: str = opt("fp16", "number format of rollout and training: fp32, tf32, bf16, fp16 or eXmY")
    rollout_precision: str = opt("", "... of the rollout alone")
    train_precision: str = opt("", "... of the training alone")
    exact: bool = opt(False, "rollout and training give every token the same log-prob, bit for bit; somewhat slower")
    init_scale: float = opt(2.0 ** 16, "first loss scale, for formats that need one", 1.0, 2.0 ** 40)
    # size of the pieces
    micro_batch: int = opt(128, "answers per forward and backward pass", 1, 10 ** 5)
    fast: bool = opt(True, "compiled operators on a CPU, CUDA graphs on a GPU; --no-fast: the plain ones, to read and to compare")
    rollout_rows: int = opt(512, "answers decoded at once", 1, 10 ** 6)
    # measuring and keeping
    heldout: int = opt(256, "problems, not in the pool, for pass@1 before and after (0: none)", 0, 10 ** 6)
    eval_tries: int = opt(4, "sampled answers per problem in every evaluation", 1, 4096)
    save_every: int = opt(25, "steps between checkpoints", 1, 10 ** 6)
    sample_every: int = opt(10, "steps between entries of samples.jsonl", 1, 10 ** 6)
    plot: bool = opt(True, "draw curves.png at the end, if matplotlib is installed")
    plan: bool = opt(False, "say what the run will need in memory, and run nothing")
    bench: bool = opt(False, "time rollout and training on this job's shapes, and train nothing")

    @property
    def rollout_format(self):
        return self.rollout_precision or self.precision

    @property
    def train_format(self):
        return self.train_precision or self.precision


GPU = dict(digits=20, noise=0.025, n_layers=8, width=512, n_heads=8, n_kv_heads=4, mlp_width=1408,      # about 25 M parameters
           base_steps=2000, base_batch=256, base_lr=1e-3, base_precision="fp16", pool=1024, tries=40,
           lr=1e-4, micro_batch=512, rollout_rows=4096)

# With --model. Learning rates are the paper's, for full weights and for adapters; all problems of the file are trained on.
MODEL = dict(lr=1e-6, lr_schedule="constant", lr_warmup=0, pool=0, keep_from=0.0, keep_to=1.0, steps=200, eval_tries=1,
             micro_batch=16, rollout_rows=256, recompute=True, base_precision="fp16", save_every=50, sample_every=1)
LORA = dict(lr=4e-5)

# A verdict is given for the test as it stands. These settings may differ: they say how and where it runs, not what it asks.
FREE = set("""preset device seed base_seed out resume precision rollout_precision train_precision exact init_scale algo
              old_policy correction correction_low correction_high updates_per_batch kl_beta dynamic_sampling overlong
              clip_low clip_high micro_batch recompute reward_seconds rollout_rows fast save_every sample_every plot plan
              bench""".split())


# What a resumed run may be told anew. A model's shape is compared with the checkpoint's and refused there, with both numbers.
CAN_CHANGE_ON_RESUME = set("""resume device steps precision rollout_precision train_precision exact algo old_policy
    correction correction_low correction_high dynamic_sampling overlong lr lr_warmup lr_schedule
    clip_low clip_high grad_clip micro_batch recompute replay_routing reward_seconds rollout_rows fast eval_tries save_every
    sample_every plot plan bench
    n_layers width n_heads n_kv_heads mlp_width""".split())


def parse_config(argv=None):
    """Command line -> (Config, the flags that were given). A resumed run's Config is the saved one with the flags over it."""
    parser = Parser(prog="train_rl.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    for f in dataclasses.fields(Config):
        m, flag = f.metadata, "--" + f.name.replace("_", "-")
        text = f"{m['help']} (default {f.default!r}{f', on a GPU {GPU[f.name]!r}' if f.name in GPU else ''})"
        if isinstance(f.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=m["help"])
        elif isinstance(f.default, str):
            parser.add_argument(flag, choices=m["choices"], help=text)
        else:
            parser.add_argument(flag, type=lambda s, f=f: number(type(f.default), f.metadata["low"], f.metadata["high"], s),
                                metavar=type(f.default).__name__, help=text)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    device = pick_device(given.get("device", "auto"))
    preset = given.get("preset", "auto")
    use_gpu = preset == "gpu" or (preset == "auto" and device.type == "cuda")
    algorithm = ALGORITHMS[given.get("algo", Config.algo)].settings
    model = {**MODEL, **(LORA if given.get("lora_rank") else {})} if given.get("model") else {}
    cfg = Config(**{**(GPU if use_gpu else {}), **model, **algorithm, **given, "preset": "gpu" if use_gpu else "cpu"})
    return cfg if cfg.resume else check(cfg), given                     # a resumed run's settings are not complete yet


def check(cfg):
    """Complain, in one line, about settings that cannot work together."""
    for name in (cfg.rollout_format, cfg.train_format, cfg.base_precision):
        parse_format(name)
    if cfg.exact and parse_format(cfg.rollout_format) != parse_format(cfg.train_format):
        raise InputError(f"--exact needs one format on both sides, not {cfg.rollout_format} and {cfg.train_format}")
    if cfg.correction not in ("none", "geometric") and ALGORITHMS[cfg.algo].has_ratio and cfg.old_policy == "rollout":
        raise InputError(f"--correction {cfg.correction}: the ratio of --algo {cfg.algo} against the rollout holds the mismatch "
                         "already, and a weight would count it twice; add --old-policy recomputed")
    if cfg.correction != "none":
        low, high = band(cfg.correction, cfg.correction_low, cfg.correction_high)
        if low > high:
            raise InputError(f"--correction {cfg.correction} from {low:g} to {high:g} keeps nothing")
    if cfg.prompts % cfg.updates_per_batch:
        raise InputError(f"--prompts {cfg.prompts} must be a multiple of --updates-per-batch {cfg.updates_per_batch}")
    if cfg.keep_from > cfg.keep_to:
        raise InputError(f"--keep-from {cfg.keep_from} is above --keep-to {cfg.keep_to}: no problem can be kept")
    if cfg.width % cfg.n_heads or cfg.width // cfg.n_heads % 2:
        raise InputError(f"--width {cfg.width} must be an even multiple of --n-heads {cfg.n_heads}")
    if cfg.replay_routing and not cfg.n_experts and not cfg.model:
        raise InputError("--replay-routing is for models with experts: --n-experts, or a --model that has some")
    if cfg.experts_per_token > cfg.n_experts > 0:
        raise InputError(f"--experts-per-token {cfg.experts_per_token} is more than --n-experts {cfg.n_experts}")
    if cfg.n_heads % cfg.n_kv_heads:
        raise InputError(f"--n-heads {cfg.n_heads} must be a multiple of --n-kv-heads {cfg.n_kv_heads}")
    return cfg


# ---------------------------------------------------------------------------------------------------------------------
# One step


def learning_rate(cfg, updates):
    """Counted in updates: a step that the loss scaler skips must not use up the warm-up."""
    rise = min(1.0, (updates + 1) / (cfg.lr_warmup + 1))
    total = cfg.steps * cfg.updates_per_batch
    return cfg.lr * min(rise, max(0.0, 1 - updates / total) if cfg.lr_schedule == "linear" else 1.0)


def collect(sampler, env, problems, cfg, seed):
    """G answers to each problem, --rollout-rows at a time -> Rollout, rewards (P, G) on the CPU. One that was cut off gets 0."""
    per, parts = max(1, cfg.rollout_rows // cfg.group), []
    for i in range(0, len(problems), per):
        tokens = [env.tokens(p) for p in problems[i:i + per]]
        parts.append(sampler.generate(tokens, cfg.group, env.answer_length, cfg.temperature, (*seed, i) if i else seed))
    rollout = parts[0] if len(parts) == 1 else Rollout.join(parts, sampler.pad)
    return rollout, torch.tensor(env.rewards(problems, rollout)).view(-1, cfg.group)


def collect_step(sampler, env, problems, drawn, cfg, step):
    """One step's answers: P problems from place `drawn` on, G answers each -> (Rollout, problems, rewards, seen, drawn).

    With dynamic sampling (DAPO: Yu et al. 2025, section 3.2) groups that agree are replaced by those of the next P problems, up
    to cfg.dynamic_sampling rollouts; what is still missing then is filled with groups that agree. rewards (P, G) belong to the
    answers that are returned; `seen` has those of every answer of the step, for an accuracy that no choice has touched."""
    parts, seen = [], []
    for again in range(cfg.dynamic_sampling):
        batch = batch_of(problems, drawn, cfg)
        drawn += cfg.prompts
        parts.append((batch, *collect(sampler, env, batch, cfg, (cfg.seed, 7, step, again) if again else (cfg.seed, 7, step))))
        seen.append(parts[-1][-1])
        if sum(int((r.std(1, correction=0) > 0).sum()) for r in seen) >= cfg.prompts:
            break
    batches, rollouts, _ = zip(*parts)
    if len(parts) == 1:
        return rollouts[0], batches[0], seen[0], seen[0], drawn
    seen, batch = torch.cat(seen), sum(batches, [])
    groups = torch.argsort((seen.std(1, correction=0) == 0).int(), stable=True)[:cfg.prompts]        # those with signal first ...
    groups = groups.sort().values                                       # ... and then as they came: each update gets its share
    rows = (groups[:, None] * cfg.group + torch.arange(cfg.group)).flatten()
    rollout = Rollout.join(rollouts, sampler.pad).rows(rows.to(sampler.model.embedding.device))
    return rollout, [batch[g] for g in groups.tolist()], seen[groups], seen, drawn


def micro_batches(rollout, rows, size):
    """Answers of like length together: -> (their rows, the length of the longest), `size` of `rows` (indices) at a time."""
    rows = rows[torch.argsort(rollout.length[rows], stable=True)]
    for i in range(0, len(rows), size):
        part = rows[i:i + size]
        yield part, int(rollout.length[part[-1]])


@torch.no_grad()
def score(model, rollout, cfg):
    """Log-probs of all answers under this model as it is, (R, T), zeros off the answers: pi_old, or the reference."""
    out, answer = torch.zeros_like(rollout.logp), rollout.is_answer
    for part, end in micro_batches(rollout, torch.arange(len(out), device=out.device), cfg.micro_batch):
        where, replay = answer[part, :end], rollout.routes[part] if cfg.replay_routing else None
        out[part, :end] = padded(model.token_logprobs(rollout.tokens[part, :end], where, cfg.temperature, replay)[0], where)
    return out


def routing(model, rollout, part, where):
    """Sums over the tokens that the answers `part` fed to the experts, where (r, end) bool -> (times that a layer chose other
    experts than in the rollout; how often each layer chose each expert (MoE layers, E); tokens)."""
    fed, now = where[:, 1:], model.routes()                               # position t is fed to predict token t + 1
    then = rollout.routes[part, :now.shape[1]]
    flipped = (now.sort(-1).values != then.sort(-1).values).any(-1)        # (r, T, layers); the order among the K is no matter
    chosen = now[fed].long()                                              # (N, layers, K)
    load = torch.zeros(chosen.shape[1], model.cfg.n_experts, device=now.device)
    return flipped[fed].sum(), load.scatter_add_(1, chosen.transpose(0, 1).flatten(1), torch.ones_like(load[:, :1]).expand(
        -1, chosen.shape[0] * chosen.shape[2])), fed.sum()


def padded(flat, where):
    """(N,) in row-major order of `where` (R, T) -> (R, T), zeros elsewhere."""
    return torch.zeros(where.shape, device=flat.device).masked_scatter(where, flat)


def accumulate_gradient(model, rollout, advantage, cfg, scaler, room, rows=None, logp_old=None, logp_ref=None):
    """Forward and backward over the answers `rows` (indices, default all), in micro-batches. advantage (R,); logp_old, logp_ref:
    (R, T) where the algorithm needs them; room: the longest answer possible, tokens.

    Returns the loss (a number), logp_train and entropy as (R, T) with zeros off the answers, and sums for the metrics. Answers
    without advantage have no gradient, but that of a KL penalty: they go forward only, for the metrics."""
    algorithm = ALGORITHMS[cfg.algo]
    logp_train, entropy = torch.zeros_like(rollout.logp), torch.zeros_like(rollout.logp)
    answer = rollout.is_answer
    rows = torch.arange(len(answer), device=answer.device) if rows is None else rows
    if cfg.old_policy == "rollout" and logp_old is None:
        logp_old = rollout.logp
    planned = float(algorithm.average(answer[rows], room)[1].sum())       # what the sum is divided by, if nothing is rejected
    has_signal = (advantage[rows] != 0) | (cfg.kl_beta > 0)
    sums = {}
    for learn, some in ((True, rows[has_signal]), (False, rows[~has_signal])):
        for part, end in micro_batches(rollout, some, cfg.micro_batch):
            tokens, where = rollout.tokens[part, :end], answer[part, :end]
            with torch.set_grad_enabled(learn):
                replay = rollout.routes[part] if cfg.replay_routing else None
                flat, ent = model.token_logprobs(tokens, where, cfg.temperature, replay)
                logp = padded(flat, where)                                                                # (r, end)
                old, mu, ref = (None if x is None else x[part, :end] for x in (logp_old, rollout.logp, logp_ref))
                loss, units, stats = policy_loss(algorithm, cfg, logp, old, mu, advantage[part], where, room, ref)
            if learn:
                with reproducible(advantage.device):
                    scaler.scale(loss / planned).backward()
            stats |= dict(loss=loss.detach() * learn, units=units)
            if rollout.routes is not None:
                flips, load, fed = routing(model, rollout, part, where)
                balance = load.amax(1) / load.mean(1).clamp(min=1e-9)     # of each layer: 1 where all experts get as many tokens
                stats |= dict(flips=flips, fed=fed, balance=balance.mean() * fed)
            sums = {k: sums.get(k, 0.0) + v for k, v in stats.items()}     # stay on the device: a number here would wait for it
            logp_train[part, :end], entropy[part, :end] = logp.detach(), padded(ent, where)
    sums = dict(zip(sums, torch.stack([v.float() for v in sums.values()]).tolist()))
    total, kept = sums.pop("loss"), sums.pop("units")
    if kept == 0:                                                         # all rejected: no step, and not one of momentum alone
        model.zero_grad(set_to_none=True)
    elif kept != planned:                                                 # only now is it known how much the correction rejected
        for p in model.parameters():
            if p.grad is not None:
                p.grad *= planned / kept
    return total / (kept or planned), logp_train, entropy, sums


def routing_metrics(model, sums):
    """route_flips: share of (token, layer) whose experts were others in training than in the rollout, before any update;
    expert_balance: tokens of a layer's most loaded expert over the mean, 1 where all have as many."""
    if "flips" not in sums:
        return {}
    return dict(route_flips=sums["flips"] / (sums["fed"] * sum(b.moe for b in model.blocks)),
                expert_balance=sums["balance"] / sums["fed"])


def apply_gradient(model, optimizer, scaler, cfg, lr):
    """Unscale once, clip, step, update: in this order. Returns (gradient norm, True if the scaler skipped the step)."""
    if all(p.grad is None for p in model.parameters()):                 # no answer had an advantage: nothing to do
        return 0.0, False
    for group in optimizer.param_groups:
        group["lr"] = lr
    before = scaler.get_scale()
    scaler.unscale_(optimizer)                                          # clipping a scaled gradient would clip the wrong thing
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
    if scaler.is_enabled() or math.isfinite(norm):                      # without a scaler nobody else would keep a NaN out
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm.item(), scaler.get_scale() < before


def first_bad_layer(model, *batch):
    """Do the update once more (batch: what accumulate_gradient got) and look at everything that is computed: where, in order,
    inf or NaN first shows up, in words."""
    fmt = model.num.fmt
    for name, p in model.named_parameters():
        if not torch.isfinite(model.num.weight(p)).all():
            return f"the weights of {name}, rounded to {fmt.name}"
    found, largest = [], [0.0, "nothing"]

    def spy(where, kind, x):
        if not found and not torch.isfinite(x).all():
            found.append(f"the {kind} pass of {where} (largest number until then: {largest[0]:.3g} in {largest[1]}; "
                         f"{fmt.name} ends at {fmt.max:.3g})")
        elif not found:
            largest[:] = max(largest, [float(x.abs().max()), where])
    model.num.spy = spy
    try:
        loss, *_ = accumulate_gradient(model, *batch)
    finally:
        model.num.spy = None
        model.zero_grad(set_to_none=True)
    if math.isfinite(loss) or (found and "forward" in found[0]):
        return found[0] if found else "no layer this time: it came and went"
    return "the loss itself, all log-probs being finite: look at rewards and advantages"


# ---------------------------------------------------------------------------------------------------------------------
# The run


class Run:
    """The folder of a run: metrics.jsonl, samples.jsonl, checkpoint.pt, curves.png."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.metrics, self.samples = self.path / "metrics.jsonl", self.path / "samples.jsonl"
        self.checkpoint = self.path / "checkpoint.pt"

    @classmethod
    def new(cls, out):
        """A fresh folder: `out`, or the next free out/runN. A folder that already holds a run is refused."""
        if out:
            run = cls(out)
            if run.metrics.exists() or run.checkpoint.exists():
                raise InputError(f"{out} already holds a run: go on with --resume {out}, or give --out another name")
            run.path.mkdir(parents=True, exist_ok=True)
            return run
        for n in range(1, 10 ** 6):
            try:
                path = pathlib.Path("out") / f"run{n}"
                path.mkdir(parents=True)
                return cls(path)
            except FileExistsError:
                continue

    def forget_if_empty(self):
        """A run that failed before its first line leaves no folder behind."""
        try:
            self.path.rmdir()
        except OSError:                                                 # not empty
            pass

    def rewind(self, step):
        """Drop what was written after `step`, and an earlier result: a killed run has lines of steps about to be done again."""
        for path in (self.metrics, self.samples):
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
                try:
                    row = json.loads(line)
                    if row.get("step", 0) <= step and "result" not in row:
                        kept.append(line + "\n")
                except json.JSONDecodeError:                            # a line cut short by the kill
                    pass
            partial = path.with_name(path.name + ".partial")
            partial.write_text("".join(kept), encoding="utf-8")
            os.replace(partial, path)

    def log(self, path, row):
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def history(self):
        if not self.metrics.exists():
            return []
        return [row for row in map(json.loads, self.metrics.read_text(encoding="utf-8").splitlines()) if "step" in row]


def provenance(cfg, device):
    """The first line of metrics.jsonl: enough to run it again."""
    def ask(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True,
                                  cwd=pathlib.Path(__file__).parent).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None                                                 # not a git checkout, or no git
    gpu = device.type == "cuda"
    return dict(
        config=dataclasses.asdict(cfg),
        command=[pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        git=ask("git", "rev-parse", "HEAD"),
        git_dirty=bool(ask("git", "status", "--porcelain")),
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=np.__version__,
        system=f"{platform.system()} {platform.machine()}",
        device=torch.cuda.get_device_name(device) if gpu else platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
    )


def perfectible(model, env, pool, cfg, nums, say):
    """The problems of the pool that the base model solves in keep_from to keep_to of its tries (paper: 20 % to 80 % of 40).

    It answers in one format (--base-precision), so that the set is a property of the base and the same for every --precision.
    How often each problem was solved is kept beside the base. nums: what the run holds already, by format."""
    if cfg.keep_from <= 0 and cfg.keep_to >= 1:
        say(f"all {len(pool)} problems are kept")
        return pool
    device = model.embedding.device
    _, path, base = find_base(cfg, device, say)
    code = pathlib.Path(cfg.task).read_text("utf-8") if cfg.task.endswith(".py") else inspect.getsource(
        sys.modules[type(env.task).__module__])                            # another reward, another set
    key = json.dumps([base, code, cfg.tries, cfg.temperature, cfg.rollout_rows, cfg.seed, env.answer_length,
                      [dataclasses.astuple(p) for p in pool]])
    path = path.with_name(f"solved-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json")
    try:
        right = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        right = []
    begin, shown = time.time(), [0]

    def progress(share):
        if share >= shown[0] + 0.25:
            shown[0] = share
            spent = time.time() - begin
            say(f"  choosing {share:4.0%}  {clock(spent)} spent, {clock(spent / share * (1 - share))} to go")

    if len(right) != len(pool):
        num = next((n for n in nums if cfg.model and n.fmt == parse_format(cfg.base_precision)), None)
        model.use(num or numerics(cfg.base_precision, device, cfg.fast).hold(model.parameters()))
        sampler = Sampler(model, env.tokenizer.stop, env.tokenizer.pad, cfg.fast)
        right = solve(sampler, env, pool, cfg.tries, (cfg.seed, 2), temperature=cfg.temperature, rows=cfg.rollout_rows,
                      progress=progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(right), encoding="utf-8")
        os.replace(partial, path)
    kept = [p for p, r in zip(pool, right) if cfg.keep_from <= r / cfg.tries <= cfg.keep_to]
    say(
        f"perfectible set: kept {len(kept)} of {len(pool)} problems, those right in {cfg.keep_from:.0%} to {cfg.keep_to:.0%} "
        f"of {cfg.tries} tries (mean over the pool {np.mean(right) / cfg.tries:.3f})"
    )
    if not kept:
        raise InputError(
            "no problem was kept: the base model solves all or none of them. Change --noise, --digits or --base-steps, "
            "or widen --keep-from and --keep-to"
        )
    return kept


def self_test(model, sampler, env, problems, cfg, scaler, num):
    """Exact mode claims nothing unchecked: a step of this job's own sizes, the rollout's log-probs against those of training,
    with a gradient and without one. Returns the number of tokens compared; leaves everything as it was."""
    rollout, _ = collect(sampler, env, batch_of(problems, 0, cfg), cfg, (cfg.seed, 12))
    half = (torch.arange(len(rollout.length), device=num.device) % 2).float()
    _, logp_train, *_ = accumulate_gradient(model.use(num), rollout, half, cfg, scaler, env.answer_length)
    model.zero_grad(set_to_none=True)
    differ = (logp_train != rollout.logp) & rollout.is_answer & torch.isfinite(rollout.logp)      # the loop stops what is not
    if differ.any():
        raise not_exact(model, rollout, differ, "Run without --exact")
    return int(rollout.is_answer.sum())


def not_exact(model, rollout, differ, advice):
    """differ (R, T): the answers' tokens with other bits in training than in the rollout."""
    from experiments.explain import first_difference
    rows = torch.argsort(differ.any(1).int(), descending=True, stable=True)[:24]                   # one that differs first
    end = int(rollout.length[rows[0]])
    where = first_difference(model, rollout.tokens[rows, :end], min(int(rollout.prompt_length[rows].max()), end - 1))
    return InputError(f"stopped: exact mode is not exact on this machine: {int(differ.sum())} of {int(rollout.is_answer.sum())} "
                      f"tokens got other bits in training than in the rollout. First difference: {where}. {advice}")


def batch_of(problems, drawn, cfg):
    """P problems from place `drawn` on: epochs over the set, each in an order of its own that follows from the seed."""
    out = []
    for i in range(drawn, drawn + cfg.prompts):
        epoch, at = divmod(i, len(problems))
        if at == 0 or not out:
            order = stream(cfg.seed, 3, epoch).permutation(len(problems))
        out.append(problems[order[at]])
    return out


def diagnose(history):
    """What is off, in plain words, from the metrics of the last steps: a list of (topic, sentence)."""
    last, found = history[-5:], {}
    if len(last) < 5:
        return []
    if all(m["frac_zero_std"] > 0.8 for m in last):
        found["signal"] = f"{last[-1]['frac_zero_std']:.0%} of the groups agree on their reward and teach nothing; " + (
            "nearly everything is solved: done, or time for harder problems (--digits)" if last[-1]["accuracy"] > 0.5 else
            "nearly nothing is solved: easier problems (--digits), a better base (--base-steps) or more answers (--group)")
    skipped = last[-1]["skipped_steps"] - last[0]["skipped_steps"]
    if skipped >= 3:
        found["skips"] = (f"the loss scaler skipped {skipped} updates in the last 4 steps: gradients overflow; a few at the "
                          "start are normal, else lower --init-scale or --lr")
    if all(m["truncated"] > 0.1 for m in last):
        found["truncated"] = f"{last[-1]['truncated']:.0%} of the answers were cut off before their stop token and count as wrong"
    if len(history) >= 30:
        gap = [m["logp_gap_mean"] for m in history]
        early, middle, late = np.mean(gap[:10]), np.mean(gap[-20:-10]), np.mean(gap[-10:])
        if late > 3 * early and late > middle > early and late > 1e-3:
            found["mismatch"] = (f"the mismatch rises: mean gap {early:.1e} at first, {late:.1e} now. In the paper this comes "
                                 "before a collapse; try --precision fp16 on both sides")
    if last[-1]["ratio_outliers"] > 0.05:
        found["outliers"] = f"{last[-1]['ratio_outliers']:.1%} of the tokens have pi/mu outside [0.9, 1.1] before any update"
    return list(found.items())


def step_line(m, cfg, eta):
    return (f"step {m['step']:4}/{cfg.steps} | acc {m['accuracy']:.3f} len {m['length']:5.1f} ent {m['entropy']:.3f} "
            f"flat {m['frac_zero_std']:4.0%} | gap {m['logp_gap_mean']:.1e} max {m['logp_gap_max']:.1e} kl {m['kl_k3']:.1e} "
            f"exact {math.floor(1000 * m['exact_share']) / 1000:.3f} | "
            + (f"weight {m['weight_mean']:.3f} kept {m['kept_share']:.3f} | " if cfg.correction != "none" else "")
            + (f"kl to base {m['kl_reference']:.1e} | " if cfg.kl_beta else "")
            + (f"flips {m['route_flips']:.2%} load {m['expert_balance']:.2f} | " if "route_flips" in m else "") +
            f"loss {m['loss']:+.4f} |g| {m['grad_norm']:8.2e} scale {m['loss_scale']:.0f} lr {m['lr']:.1e} | "
            f"{m['t_rollout']:.2f}+{m['t_train']:.2f} s {m['tokens_per_s']:6.0f} tok/s | eta {clock(eta)}")


def say(text):
    print(text, flush=True)


def train(cfg, given, run):
    device = pick_device(cfg.device)
    env = make_env(cfg, say)
    resumed = load_checkpoint(cfg.resume, "cpu" if cfg.model else device) if cfg.resume else None
    rollout_num, train_num = (numerics(f, device, cfg.fast, cfg.exact) for f in (cfg.rollout_format, cfg.train_format))
    if rollout_num.fmt == train_num.fmt:
        rollout_num = train_num                                         # literally the same rounded weights
    scaler = make_scaler(train_num, cfg.init_scale)
    say(f"preset {cfg.preset}: {'asked for' if 'preset' in given else 'the device is ' + device.type}"
        + "".join(f" | {k} {v}" for k, v in given.items() if k not in ("preset", "out", "resume")))
    say(banner(rollout_num, train_num, scaler))
    if device.type == "cpu" and cfg.fast and not library()[0]:
        say(f"note: torch's operators, slower than the compiled ones: {library()[1]}")

    changed = changed_settings(cfg)

    # The problems, the policy, the optimizer: fresh, or as they were. What can fail at once comes before what takes a minute.
    if resumed:
        env.prompt_length = resumed.get("prompt_length") or env.prompt_length
    else:
        pool, heldout = choose_problems(cfg, env, say)
    if cfg.overlong > env.answer_length:
        raise InputError(f"--overlong {cfg.overlong} is longer than the longest answer, {env.answer_length} tokens")
    from experiments.plan import rehearse
    if not cfg.model:
        rehearse(cfg, device, env, rollout_num, train_num)
    model = make_policy(cfg, env, device, resumed, train_num if rollout_num is train_num else None)
    if cfg.model:
        rehearse(cfg, device, env, rollout_num, train_num, model)
    for num in (rollout_num, train_num):
        num.hold(model.parameters())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=cfg.lr, eps=cfg.adam_eps,
                                  betas=(cfg.adam_beta1, cfg.adam_beta2), weight_decay=0.0, fused=True)
    sampler = Sampler(model.use(rollout_num), env.tokenizer.stop, env.tokenizer.pad, cfg.fast)
    if cfg.model and not resumed:
        from hf.weights import warn_of_overflow
        warn_of_overflow(model.use(train_num), torch.tensor([env.tokens(pool[0])], device=device), say)
    reference = None
    if cfg.kl_beta and not cfg.lora_rank:                               # the policy as it was before RL, in the training's format
        reference = GPT(model.cfg, device, seed=None)
        reference.load_state_dict(resumed["reference"] if resumed else model.state_dict())
        reference.use(numerics(cfg.train_format, device, cfg.fast, cfg.exact).hold(reference.parameters()))

    if cfg.exact:
        problems = [Problem(*p) for p in resumed["problems"]] if resumed else pool
        say(f"self-test of exact mode: {self_test(model, sampler, env, problems, cfg, scaler, train_num)} tokens of a step of "
            "this job, the same bits in rollout and training")

    def pass_at_1(problems, purpose, num=rollout_num):
        model.use(num)
        right = solve(
            sampler, env, problems, cfg.eval_tries, (cfg.seed, purpose), temperature=cfg.temperature, rows=cfg.rollout_rows
        )
        return sum(right) / (len(problems) * cfg.eval_tries)
    if resumed:
        problems, heldout = ([Problem(*p) for p in resumed[k]] for k in ("problems", "heldout"))
        start, updates, skipped, before = (resumed[k] for k in ("step", "updates", "skipped", "before"))
        drawn = resumed.get("drawn", start * cfg.prompts)              # problems so far; older checkpoints do not say
        if start > cfg.steps:
            raise InputError(f"{run.path} has done {start} steps, more than --steps {cfg.steps}")
        try:
            optimizer.load_state_dict(resumed["optimizer"])
            scaler.load_state_dict(resumed["scaler"]) if scaler.is_enabled() and resumed["scaler"] else None
        except (ValueError, KeyError) as e:
            raise InputError(f"{run.checkpoint} does not fit these settings: {e}") from None
        torch.set_rng_state(resumed["torch_rng"].cpu())                # nothing here draws from these; what you add may
        if device.type == "cuda" and resumed["cuda_rng"] is not None:
            torch.cuda.set_rng_state(resumed["cuda_rng"].cpu(), device)
        changed = sorted({*changed, *resumed["changed"]})              # what a run once changed, its resumption cannot undo
        run.rewind(start)
        run.log(run.metrics, dict(resumed_at=start, given={k: v for k, v in given.items() if k != "resume"}))
        say(f"resumed {run.path} at step {start}")
    else:
        problems = perfectible(model, env, pool, cfg, (rollout_num, train_num), say)
        start, updates, skipped, drawn = 0, 0, 0, 0
        before = pass_at_1(heldout, 6) if heldout else None
        run.log(run.metrics, provenance(cfg, device))
    say(
        f"training on {len(problems)} problems, {cfg.prompts} x {cfg.group} answers a step, {cfg.algo}; everything goes to "
        f"{run.path}/"
    )

    base = find_base(cfg, device)[2].get("model")

    def save(step):
        save_checkpoint(run.checkpoint, model, only_trained=bool(cfg.model and cfg.lora_rank), config=dataclasses.asdict(cfg),
                        changed=changed, step=step, updates=updates, prompt_length=env.prompt_length, base=base,
                        drawn=drawn, skipped=skipped, before=before, reference=reference and reference.state_dict(),
                        optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), torch_rng=torch.get_rng_state(),
                        cuda_rng=torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
                        problems=[dataclasses.astuple(p) for p in problems], heldout=[dataclasses.astuple(p) for p in heldout])

    if not resumed:
        save(0)
    stop = []  # a first Ctrl-C ends the step, a second one ends at once

    def on_interrupt(*_):
        stop.append(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say("\nstopping after this step (Ctrl-C again: at once)")
    signal.signal(signal.SIGINT, on_interrupt)

    history, told, begin = run.history(), {}, time.time()
    for step in range(start + 1, cfg.steps + 1):
        # --- rollout: the policy acts, in the rollout's format
        t0 = time.time()
        model.use(rollout_num)
        rollout, batch, rewards, seen, drawn = collect_step(sampler, env, problems, drawn, cfg, step)
        t1 = time.time()

        # --- training: the same forward, over whole sequences, in the training's format
        model.use(train_num)
        where, lengths = rollout.is_answer, rollout.length - rollout.prompt_length
        shaped = rewards.to(device).flatten() + overlong(lengths, env.answer_length, cfg.overlong)
        advantage = ALGORITHMS[cfg.algo].advantage(shaped.view(-1, cfg.group)).flatten()
        # pi_old is recomputed if the policy is about to move under it; before the first update it is pi, and costs nothing
        decoupled = cfg.old_policy == "recomputed" and ALGORITHMS[cfg.algo].has_ratio
        pi_before = score(model, rollout, cfg) if cfg.updates_per_batch > 1 and (decoupled or cfg.exact) else None
        logp_old = pi_before if decoupled else None
        logp_ref = None
        if cfg.kl_beta:                                                 # with LoRA, the policy as it was is the base alone
            model.adapters(False)
            logp_ref = score(reference or model, rollout, cfg)
            model.adapters(True)
        losses, norms, sums, entropy = [], [], {}, torch.zeros_like(rollout.logp)
        for rows in torch.arange(len(lengths), device=device).chunk(cfg.updates_per_batch):      # whole groups
            update = rollout, advantage, cfg, scaler, env.answer_length, rows, logp_old, logp_ref
            loss, logp_train, ent, stats = accumulate_gradient(model, *update)
            here = torch.zeros_like(where)
            here[rows] = where[rows]
            mu, pi = rollout.logp[here], logp_train[here]
            if not (torch.isfinite(mu).all() and torch.isfinite(pi).all()):
                model.use(train_num if torch.isfinite(mu).all() else rollout_num)
                raise broken(run, "log-probs are no longer finite", first_bad_layer(model, *update))
            if not losses:  # before any update: this is the mismatch and nothing else. Later answers have an update between
                routes = stats
                first, at, n = (logp_train, here, lengths[rows]) if pi_before is None else (pi_before, where, lengths)
                gaps = mismatch(rollout.logp[at], first[at], n)
                if cfg.exact and gaps["exact_share"] < 1:
                    raise not_exact(model, rollout, at & (rollout.logp != first),
                                    f"Stopped at step {step}; go on without it: --resume {run.path} --no-exact")
            lr = learning_rate(cfg, updates)
            norm, skip = apply_gradient(model, optimizer, scaler, cfg, lr)
            updates, skipped = updates + (not skip), skipped + skip
            if not skip:
                for num in {rollout_num, train_num}:
                    num.refresh()                                       # once per update, in place, for both sides
            if (not scaler.is_enabled() and not math.isfinite(norm)) or (scaler.is_enabled() and scaler.get_scale() < 1):
                raise broken(run, "gradients are no longer finite" if not scaler.is_enabled() else "the loss scale fell below 1",
                             first_bad_layer(model, *update))
            losses.append(loss)
            norms.append(norm)
            entropy += ent
            sums = {k: sums.get(k, 0.0) + v for k, v in stats.items()}
        t2 = time.time()
        # --- end of the step; everything below is diagnostics

        n = int(where.sum())
        kept = max(1.0, sums["kept"])
        m = dict(step=step, reward=shaped.mean().item(), accuracy=(seen == 1).float().mean().item(), tokens=n,
                 length=n / len(lengths), truncated=1 - rollout.stopped.float().mean().item(), entropy=(entropy.sum() / n).item(),
                 frac_zero_std=(seen.std(1, correction=0) == 0).float().mean().item(), **gaps, loss=float(np.mean(losses)),
                 grad_norm=float(np.mean(norms)), kept_share=sums["kept"] / n, clipped_share=sums["clipped"] / n,
                 weight_mean=sums["weight"] / kept,
                 weight_sd=max(0.0, sums["weight2"] / kept - (sums["weight"] / kept) ** 2) ** 0.5,
                 kl_reference=sums["kl_ref"] / n, **routing_metrics(model, routes), loss_scale=scaler.get_scale(),
                 skipped_steps=skipped, lr=lr, t_rollout=t1 - t0,
                 t_train=t2 - t1, tokens_per_s=n / (t2 - t0))
        history.append(m)
        run.log(run.metrics, {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in m.items()})
        say(step_line(m, cfg, (time.time() - begin) / (step - start) * (cfg.steps - step)))
        for topic, sentence in diagnose(history):
            if step - told.get(topic, -100) >= 25:
                told[topic] = step
                say(f"  note: {sentence}")
        if step % cfg.sample_every == 0 or step == 1:
            texts = rollout.texts(env.tokenizer)
            for i in range(0, min(3, len(batch)) * cfg.group, max(1, cfg.group // 2)):
                problem = batch[i // cfg.group]
                run.log(run.samples, dict(step=step, prompt=problem.prompt, text=texts[i], right_answer=problem.answer,
                                          reward=rewards.flatten()[i].item(), stopped=bool(rollout.stopped[i])))
        if step % cfg.save_every == 0 or step == cfg.steps or stop:
            save(step)
        if stop and step < cfg.steps:
            say(f"stopped at step {step}; go on with: python train_rl.py --resume {run.path}")
            return 130
    signal.signal(signal.SIGINT, signal.default_int_handler)
    accuracy, after = pass_at_1(problems, 8), pass_at_1(heldout, 6) if heldout else None
    learned = pass_at_1(problems, 8, train_num) if train_num is not rollout_num else accuracy
    status = verdict(cfg, run, changed, accuracy, learned, before, after, len(problems))
    if cfg.model:
        export(cfg, run, model)
    if cfg.plot:
        from experiments.curves import draw
        say(draw(run.path, history, f"rollout {cfg.rollout_format}, train {cfg.train_format}"))
    return status


def make_policy(cfg, env, device, resumed, num):
    """The model that learns, from its checkpoint or from the base. num: the numerics of both sides, if they are the same."""
    if resumed:
        base = None
        if cfg.model and cfg.lora_rank:                                 # the checkpoint holds the adapters alone
            if find_base(cfg, device)[2]["model"] != resumed["base"]:
                raise InputError(f"{cfg.model} is not the model that this run began with")
            base = get_base(cfg, device, say, env)
        model = load_model(resumed, device, gpt_config(cfg, env), base)
    else:
        model = get_base(cfg, device, say, env)
        if cfg.lora_rank:
            targets = [t.strip() for t in cfg.lora_targets.split(",") if t.strip()]
            model.adapt(cfg.lora_rank, cfg.lora_alpha or 2.0 * cfg.lora_rank, targets, cfg.seed)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            say(f"LoRA: {trained / 1e6:.3f} M parameters are trained, {model.n_params() / 1e6:.2f} M are frozen")
    if num is not None:
        model.keep_rounded(num)
    if cfg.replay_routing and not model.cfg.n_experts:
        raise InputError("--replay-routing: this model has no experts")
    model.recompute = cfg.recompute
    return model


def export(cfg, run, model):
    """What a run of --model leaves for other tools: a folder for transformers, or an adapter for peft."""
    from hf import weights
    if cfg.lora_rank:
        weights.save_adapter(run.path / "adapter", model, cfg.model, model.lora["alpha"], replace=True)
        return say(f"adapter, for peft: {run.path}/adapter/")
    fmt = cfg.rollout_format if cfg.rollout_format in ("fp16", "bf16") else "fp32"
    weights.save(run.path / "model", model, fmt, like=cfg.model, replace=True)
    say(f"model, for transformers and others, in {fmt} as it was rolled out: {run.path}/model/")


def broken(run, what, where):
    return InputError(
        f"stopped: {what}; first seen in {where}. Try --train-precision bf16 or fp32 to see whether range is the matter, "
        f"a lower --lr, or a lower --init-scale. The last good checkpoint is {run.checkpoint}"
    )


def changed_settings(cfg):
    """The settings that make this another test than the preset's, by name."""
    preset = Config(**{**(GPU if cfg.preset == "gpu" else {}), "preset": cfg.preset})
    return [f.name for f in dataclasses.fields(Config) if f.name not in FREE and getattr(cfg, f.name) != getattr(preset, f.name)]


def verdict(cfg, run, changed, accuracy, learned, before, after, kept):
    """The last lines, and the exit status: 0 for PASS or for a run that gets no verdict, 1 for FAIL."""
    if before is not None:
        say(f"held-out problems, pass@1 over {cfg.eval_tries} sampled answers each: {before:.3f} before, {after:.3f} after")
    say(
        f"training accuracy, sampled at temperature {cfg.temperature:g}, {cfg.eval_tries} answers to each of the {kept} "
        f"problems: {accuracy:.3f}"
    )
    if cfg.rollout_format != cfg.train_format:                          # the deployment gap: pi has learned, mu is deployed
        say(f"the same answered in {cfg.train_format}, as it was trained: {learned:.3f}")
    passed = None if changed else accuracy >= 0.95
    if cfg.model:
        say("no verdict: that is for the default job; the paper asks 0.950 of a perfectible set (--keep-from 0.2 --keep-to 0.8)")
    elif changed:
        say(f"no verdict: changed from the preset: {', '.join('--' + c.replace('_', '-') for c in changed)}")
    else:
        say(f"{'PASS' if passed else 'FAIL'}: the sanity test asks for 0.950 or more")
    run.log(run.metrics, dict(result=dict(accuracy=accuracy, accuracy_train=learned, heldout_before=before, heldout_after=after,
                                          kept=kept, passed=passed, changed=changed, seconds=time.time() - STARTED)))
    return 1 if passed is False else 0


STARTED = time.time()


def main(argv=None):
    cfg, given = parse_config(argv)
    if cfg.resume:
        if pathlib.Path(cfg.resume).is_file():                          # the checkpoint itself was named
            given["resume"] = str(pathlib.Path(cfg.resume).parent)
        saved = load_checkpoint(given["resume"])
        known = {f.name for f in dataclasses.fields(Config)}
        if "step" not in saved or not set(saved["config"]) <= known:
            raise InputError(f"{cfg.resume} holds a model but no run to go on with")
        fixed = [k for k in given if k not in CAN_CHANGE_ON_RESUME]
        if fixed:
            raise InputError(f"--{fixed[0].replace('_', '-')} was settled when the run began and cannot change on --resume")
        if "algo" in given:                                             # with its own settings, and without those of the old one
            own = {k: getattr(Config, k) for a in ALGORITHMS.values() for k in a.settings}
            saved["config"].update({**own, **ALGORITHMS[given["algo"]].settings})
        if "precision" in given:                                        # for both sides, whatever was set apart before
            saved["config"].update(rollout_precision="", train_precision="")
        cfg = check(Config(**{**saved["config"], **given}))
    try:
        if cfg.plan:
            from experiments.plan import plan
            return plan(cfg, say)
        if cfg.bench:
            from experiments.bench import bench
            return bench(cfg)
        run = Run(cfg.resume) if cfg.resume else Run.new(cfg.out)
        try:
            return train(cfg, given, run)
        finally:
            run.forget_if_empty()
    except KeyboardInterrupt:
        say("\ninterrupted")
        return 130
    except BrokenPipeError:                                             # `train_rl.py | head`: run_main knows
        raise
    except OSError as e:
        raise InputError(
            f"{e.filename or 'a file of the run'}: {e.strerror}; the last checkpoint, if there was one, is untouched"
        ) from e


if __name__ == "__main__":
    run_main(main)
