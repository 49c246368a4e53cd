"""train_rl.py: GRPO in FP16, from a fresh clone to a passed sanity test.

    python train_rl.py                                    # the main job, on whatever device is here
    python train_rl.py --precision bf16                   # the same job with 7 mantissa bits
    python train_rl.py --model ./Qwen2.5-0.5B-Instruct --task gsm8k      # a checkpoint of the hub
    python train_rl.py --precision fp32 --rollout-precision bf16    # two roundings: watch the gap
    python train_rl.py --exact                            # no mismatch: the same bits on both sides
    python train_rl.py --algo gspo --updates-per-batch 4  # other algorithms: algorithms.py has them
    python train_rl.py --resume out/run1                  # go on, bit for bit, where a run stopped

The job is the paper's sanity test (arXiv 2510.26788, section 4.2) in miniature. A base model
imitates a noisy demonstrator. Of a pool of problems those are kept that it solves in 20 % to 80 %
of its tries. RL trains on these. All can be solved and none is trivial: PASS is 95 %.

One step, top to bottom in `train` below:
    problems -> prompts -> answers, each token's log-prob recorded as it was sampled -> rewards
    -> group advantages -> the same forward pass over whole sequences -> token log-probs
    -> mismatch metrics, before any update -> policy loss -> scaled backward -> unscale, clip, step
    -> weights rounded again, in place -> one metrics line

Names: P prompts, G answers per prompt, R = P * G answers of T columns. mu is the policy that acts
(its log-probs are `logp_rollout`), pi the policy that learns. What differs between GRPO, GSPO, DAPO
and the rest is in algorithms.py. What surrounds the loop is in run/. Left out: a critic, a Trainer
class.
"""
import dataclasses
import math
import time
from dataclasses import dataclass
from functools import partial

import torch

from algorithms import ALGORITHMS, Tokens, correct, decoupled, overlong, policy_loss
from data.tasks import REAL, SCRATCH
from operators.device import reproducible
from precision import InputError, make_scaler
from run import base, checks, flags, memory, problems, start
from run.console import run_main
from run.diary import Diary
from run.flags import setting
from run.folder import Run, interruptible, load_saved, provenance
from run.lines import say
from run.meter import Meter
from run.trackers import TRACKERS
from sample import Rollout, Sampler

ADAM = dict(betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0)     # 1e-8 damps small gradients
GRAD_CLIP = 1.0                         # largest norm of the whole gradient
WARMUP = 6                            # updates of linear rise: Adam's first move every weight by lr

# --------------------------------------------------------------------------------------------------
# Settings. Each is a flag, with help, bounds and defaults (run/flags.py). later: a resumed run may
# change it; free: it does not change what the test asks; common: it is in --help

run_, task_, real_, base_, rl_, num_, size_ = (partial(setting, group) for group in (
    "the run", "the task", "a real model", "a model from scratch", "RL", "precision", "sizes"))
later, free, common = dict(later=True), dict(free=True), dict(common=True)
both = later | free


@dataclass
class Config:
    preset: str = run_("auto", "two sets of defaults; auto takes the device's",
                       choices=("auto", "cpu", "gpu"), **free)
    device: str = run_("auto", "auto, cpu, cuda or cuda:N", **both)
    seed: int = run_(0, "everything random follows from it", 0, 2 ** 31, **free, **common)
    out: str = run_("", "folder of this run (default: the next out/runN)", **free, **common)
    save_every: int = run_(25, "steps between checkpoints", 1, 10 ** 6, model=50, **both)
    sample_every: int = run_(5, "steps between whole groups of answers in samples.jsonl", 1,
                             10 ** 6, **both)
    watch: bool = run_(False, "rewrite report.html as the run goes on; its page reloads itself",
                       **both)
    log_to: str = run_("none", "a tracker that gets the metrics too", choices=("none", *TRACKERS),
                       **both)
    verbose: bool = run_(False, "print every metric of every step", **both)

    task: str = task_("addition", f"what to learn: {', '.join(SCRATCH)}, yours.py; with --model "
                      f"also {', '.join(REAL)}", **common)
    digits: int = task_(3, "length of numbers and working", 1, 200, gpu=20, when=flags.DRAWN)
    noise: float = task_(0.15, "how often the base's demonstrator gets a column wrong", 0.0, 0.9,
                         gpu=0.025, when=flags.IMITATED)
    data: str = task_("", "JSON Lines file of problems", **common)
    heldout: str = task_("256", "problems, not in the pool, for pass@1 before and after (0: none); "
                         "or a file of such")
    pool: int = task_(256, "problems to choose from; 0: all", 0, 10 ** 6, gpu=1024, model=0)
    keep: tuple = task_((0.2, 0.8), "problems that the base solves at least, at most this often",
                        0.0, 1.0, model=(0.0, 1.0))

    model: str = real_("", "folder of a Hugging Face checkpoint (Qwen2, Qwen3, Llama)", **common)
    prompt_form: str = real_("auto", "how a problem is put to it; auto: as its chat template would",
                             choices="auto plain chatml llama3 r1".split(), when=flags.READING)
    max_answer: int = real_(0, "longest answer, tokens (0: the task's own, else 512)", 0, 10 ** 6,
                            when=flags.READING)
    lora_rank: int = real_(0, "train adapters of this rank, freeze the rest; 0: train all", 0, 4096)
    recompute: bool = real_(False, "keep a block's input only, compute it again on the way back: "
                            "less memory, a third more work", model=True, **both)
    replay_routing: bool = real_(False, "training sends a token to the experts of its rollout",
                                 when=flags.EXPERTS, **later)

    n_layers: int = base_(4, "transformer blocks", 1, 200, gpu=8, when=flags.SCRATCHED)
    width: int = base_(128, "width of the residual stream; heads and MLP follow", 8, 16384, gpu=512,
                       when=flags.SCRATCHED)
    n_experts: int = base_(0, "experts in the MLP's place, of which a token goes to 2", 0, 1024,
                           when=flags.SCRATCHED)
    base_steps: int = base_(400, "imitation steps", 1, 10 ** 6, gpu=2000, when=flags.SCRATCHED)
    base_batch: int = base_(32, "demonstrations a step", 1, 10 ** 5, gpu=128, when=flags.SCRATCHED)
    base_lr: float = base_(2e-3, "its peak learning rate", 0.0, 1.0, gpu=1e-3, when=flags.SCRATCHED)

    steps: int = rl_(80, "RL steps", 1, 10 ** 7, model=200, **later, **common)
    prompts: int = rl_(64, "P, problems a step", 1, 10 ** 5, **common)
    group: int = rl_(8, "G, answers per problem; their mean is the baseline", 2, 4096, **common)
    algo: str = rl_("dr-grpo", f"{', '.join(ALGORITHMS)}: see --help-all", **both, **common)
    old_policy: str = rl_(
        "rollout", "what the ratio compares pi with: rollout, the recorded mu; recomputed, pi "
        "before the batch's first update, which hides the mismatch unless a correction is added",
        choices=("rollout", "recomputed"), when=flags.RATIO, **both)
    correction: str = rl_(
        "none", "weight pi/mu for what mu sampled, of a token or an answer: token-is, token-tis, "
        "token-mis, seq-is, seq-tis, seq-mis, geometric; -is as it is, -tis truncated, -mis "
        "rejected outside a band; another cap as in seq-mis:10, another band as in token-mis:0.5:5",
        **both)
    updates_per_batch: int = rl_(1, "updates from one rollout, each with its share of the prompts "
                                 "(the paper: 4)", 1, 10 ** 4, **free)
    kl_beta: float = rl_(0.0, "weight of KL[pi || base model] in the loss", 0.0, 1e6, **free)
    dynamic_sampling: int = rl_(1, "rollouts a step, to replace groups that agree", 1, 100, **both)
    overlong: int = rl_(0, "tokens before the longest answer in which the reward falls to -1", 0,
                        10 ** 6, **both)
    lr: float = rl_(6e-4, "peak learning rate", 0.0, 1.0, gpu=1e-4, model=1e-6, lora=4e-5,
                    **later, **common)
    lr_schedule: str = rl_("linear", "linear falls to 0 at the last step, constant stays",
                           choices=("linear", "constant"), model="constant", **later)
    clip: tuple = rl_((0.2, 0.2), "the ratio counts from 1 - LOW to 1 + HIGH", 0.0, 100.0,
                      when=flags.RATIO, **both)
    temperature: float = rl_(1.0, "divides the logits, in sampling and in training", 0.01, 100.0)

    precision: str = num_("fp16", "number format: fp32, tf32, bf16, fp16 or eXmY", **both, **common)
    rollout_precision: str = num_("", "... of the rollout, if it is another", **both)
    exact: bool = num_(False, "rollout and training give a token the same log-prob, bit for bit",
                       **both, **common)
    init_scale: float = num_(2.0 ** 16, "first loss scale", 1, 2.0 ** 40, when=flags.SCALED, **free)

    micro_batch: int = size_(128, "answers per forward and backward pass", 1, 10 ** 5, gpu=64,
                             model=16, **both)
    rollout_rows: int = size_(512, "answers decoded at once", 1, 10 ** 6, gpu=1024, model=256,
                              **both)
    fast: bool = size_(True, "plain operators, to read and to compare: no compiled code, no graphs",
                       **both)

    rollout_format = property(lambda c: c.rollout_precision or c.precision)
    train_format = property(lambda c: c.precision)
    eval_tries = property(lambda c: 1 if c.model else 4)         # sampled answers per problem
    # Imitation and the choice of problems: one format, so that every --precision starts alike
    base_precision = property(lambda c: "fp16" if c.model or c.preset == "gpu" else "fp32")


# --------------------------------------------------------------------------------------------------
# Act


@dataclass
class Batch:
    """One step's R = P * G answers, and what learning needs to know of them."""
    rollout: Rollout
    problems: list = ()
    rewards: torch.Tensor | None = None             # (P, G) FP32
    seen: torch.Tensor | None = None    # rewards of all answers, of replaced groups as well
    advantage: torch.Tensor | None = None           # (R,)
    logp_old: torch.Tensor | None = None   # (R, T) log pi_old, where it is neither mu nor pi itself
    logp_reference: torch.Tensor | None = None      # (R, T)

    def micro_batches(self, rows, size):
        """Answers of like length together: -> (their rows, the length of the longest), `size` at a
        time."""
        length = self.rollout.length
        rows = rows[torch.argsort(length[rows], stable=True)]
        for part in rows.split(size) if len(rows) else ():
            yield part, int(length[part[-1]])


def collect(sampler, env, asked, cfg, seed, first=0):
    """G answers to each problem, --rollout-rows at a time -> Rollout, rewards (P, G). Cut off: 0.
    first: the number of the first problem, for the random numbers of its answers."""
    per, parts = max(1, cfg.rollout_rows // cfg.group), []
    for i in range(0, len(asked), per):
        tokens = [env.tokens(p) for p in asked[i:i + per]]
        parts.append(sampler.generate(tokens, cfg.group, env.answer_length, cfg.temperature, seed,
                                      first + i))
    rollout = Rollout.join(parts, sampler.pad)
    rewards = torch.tensor(env.rewards(asked, rollout)).view(-1, cfg.group)
    return rollout, rewards.to(rollout.tokens.device)


def agree(rewards):
    """Which groups of (P, G) rewards give all answers the same, and so teach nothing."""
    return rewards.amax(1) == rewards.amin(1)


def act(sampler, env, state, cfg, step):
    """One step's answers: P problems, G answers each -> Batch. state.drawn moves on.

    With dynamic sampling (DAPO: Yu et al. 2025, section 3.2) groups that agree are replaced by
    those of the next P problems, up to cfg.dynamic_sampling rollouts. What is still missing then is
    filled with groups that agree. `seen` has all answers of the step, for an accuracy that no
    choice has touched."""
    parts, asked, seen = [], [], []
    for again in range(cfg.dynamic_sampling):
        some = problems.problems_of_step(state.problems, state.drawn, cfg)
        state.drawn += cfg.prompts
        key, first = (cfg.seed, 7, step), again * cfg.prompts
        rollout, rewards = collect(sampler, env, some, cfg, key, first)
        parts, asked, seen = [*parts, rollout], asked + some, [*seen, rewards]
        if sum(int((~agree(r)).sum()) for r in seen) >= cfg.prompts:
            break
    rollout, seen = Rollout.join(parts, sampler.pad), torch.cat(seen)
    if len(parts) == 1:
        return Batch(rollout, asked, seen, seen)
    # Those with signal first, and then as they came: each update gets its share.
    groups = torch.argsort(agree(seen).int(), stable=True)[:cfg.prompts].sort().values
    rows = (groups[:, None] * cfg.group + torch.arange(cfg.group, device=groups.device)).flatten()
    return Batch(rollout.rows(rows), [asked[g] for g in groups.tolist()], seen[groups], seen)


# --------------------------------------------------------------------------------------------------
# Learn


def padded(flat, where):
    """(N,) in row-major order of `where` (R, T) -> (R, T), zeros elsewhere."""
    return torch.zeros(where.shape, device=flat.device).masked_scatter(where, flat)


@torch.no_grad()
def score(model, batch, cfg, rows=None):
    """Log-probs of the answers `rows` (default: all) under this model as it is, (R, T), zeros
    elsewhere."""
    rollout, out = batch.rollout, torch.zeros_like(batch.rollout.logp)
    rows = torch.arange(len(out), device=out.device) if rows is None else rows
    answer = rollout.is_answer
    for part, end in batch.micro_batches(rows, cfg.micro_batch):
        where, replay = answer[part, :end], rollout.routes[part] if cfg.replay_routing else None
        logp, _ = model.token_logprobs(rollout.tokens[part, :end], where, cfg.temperature, replay)
        out[part, :end] = padded(logp, where)
    return out


def forward(model, batch, part, end, cfg, room):
    """The training forward over the answers `part`, `end` columns -> Tokens, what a loss may look
    at."""
    r, where = batch.rollout, batch.rollout.is_answer[part, :end]
    replay = r.routes[part] if cfg.replay_routing else None
    logp, entropy = model.token_logprobs(r.tokens[part, :end], where, cfg.temperature, replay)
    every = r.logp, batch.logp_old if decoupled(cfg) else r.logp, batch.logp_reference
    mu, old, reference = (None if x is None else x[part, :end] for x in every)
    return Tokens(where, padded(logp, where), padded(entropy, where), mu, old,
                  batch.advantage[part], reference, cfg.clip, room)


def denominator(model, batch, rows, cfg, room):
    """What the loss over the answers `rows` is divided by, known before the backward pass. What a
    correction rejects is not counted, and what it rejects depends on pi or pi_old."""
    mask = batch.rollout.is_answer[rows]
    if checks.rejects(cfg.correction):
        known = batch.logp_old if decoupled(cfg) else None
        logp = score(model, batch, cfg, rows) if known is None else known
        _, mask = correct(cfg.correction, (logp - batch.rollout.logp)[rows], mask)
    return float(ALGORITHMS[cfg.algo].average(mask, room)[1].sum())


def learn(model, batch, cfg, scaler, room, meter=None, rows=None):
    """Forward and backward over the answers `rows` (default: all), in micro-batches. room: tokens
    of the longest answer possible. Returns the loss.

    Answers with advantage 0 get no backward pass if nothing else gives them a gradient (such as a
    KL penalty). They still go forward: the mismatch is measured on all tokens."""
    device = batch.rollout.tokens.device
    rows = torch.arange(len(batch.advantage), device=device) if rows is None else rows
    divisor, loss = denominator(model, batch, rows, cfg, room), 0.0
    has_signal = (batch.advantage[rows] != 0) | (not checks.idle(cfg))
    for learns, some in ((True, rows[has_signal]), (False, rows[~has_signal])):
        for part, end in batch.micro_batches(some, cfg.micro_batch):
            with torch.set_grad_enabled(learns):
                t = forward(model, batch, part, end, cfg, room)
                part_loss, stats = policy_loss(cfg, t)
            if learns and divisor:            # all rejected: no step, and not one of momentum alone
                with reproducible(device):
                    scaler.scale(part_loss / divisor).backward()
                loss += part_loss.detach() / divisor
            if meter:
                meter.add(model, part, t, stats)
    return float(loss)


def update(model, optimizer, scaler, lr):
    """Unscale once, clip, step, update: in this order. -> (gradient norm, whether the scaler
    skipped it)."""
    if all(p.grad is None for p in model.parameters()):  # no answer had an advantage: nothing to do
        return 0.0, False
    for group in optimizer.param_groups:
        group["lr"] = lr
    before = scaler.get_scale()
    scaler.unscale_(optimizer)               # clipping a scaled gradient would clip the wrong thing
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
    if scaler.is_enabled() or math.isfinite(norm):          # without a scaler, this keeps a NaN out
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm.item(), scaler.get_scale() < before


def learning_rate(cfg, updates):
    """Counted in updates: a step that the loss scaler skips must not use up the warm-up."""
    rise = 1.0 if cfg.model else min(1.0, (updates + 1) / (WARMUP + 1))
    fall = max(0.0, 1 - updates / (cfg.steps * cfg.updates_per_batch))
    return cfg.lr * min(rise, fall if cfg.lr_schedule == "linear" else 1.0)


def score_before(model, reference, batch, cfg):
    """Log-probs that are asked before the batch's first update: those of the reference, for a KL
    penalty, and pi_old's if the policy is about to move under it. Before the first update pi_old is
    pi, and costs nothing. Returns pi's, (R, T), where they were asked, else None."""
    if cfg.kl_beta:
        model.adapters(False)                    # with LoRA, the policy as it was is the base alone
        batch.logp_reference = score(reference or model, batch, cfg)
        model.adapters(True)
    if cfg.updates_per_batch == 1 or not (decoupled(cfg) or cfg.exact):
        return None
    batch.logp_old = score(model, batch, cfg)
    return batch.logp_old


# --------------------------------------------------------------------------------------------------
# The run


def train(cfg, given, run, saved=None):
    env, state, acting, learning, model = start.prepare(cfg, given, saved, partial(learn_all, cfg))
    scaler, device = make_scaler(learning, cfg.init_scale), learning.device
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, fused=True, **ADAM)
    sampler = Sampler(model.use(acting), env.tokenizer.stop, env.tokenizer.pad, cfg.fast)
    reference = base.load_reference(cfg, model, saved, device)
    save = partial(run.save, state, cfg, model, optimizer, scaler, reference)
    if cfg.exact:
        asked = problems.problems_of_step(state.problems, 0, cfg)
        batch = Batch(collect(sampler, env, asked, cfg, (cfg.seed, 12))[0])
        checks.self_test(model.use(learning), batch, partial(learn, model, batch, cfg,
                                                             scaler, env.answer_length))
    if saved:
        run.resume(saved, state.step, given, optimizer, scaler)
    else:
        nums = acting, learning
        state.problems = problems.perfectible(model, env, state.problems, cfg, nums)
        if state.heldout:
            state.before = start.pass_at_1(cfg, sampler, env, state.heldout, 6, acting)
        run.log(provenance(cfg, device) | dict(differs=flags.changed(cfg, free=True)))
        save()
    say(f"training on {len(state.problems)} problems, {cfg.prompts} x {cfg.group} answers a step, "
        f"{cfg.algo}; everything goes to {run.path}/" if state.step < cfg.steps else
        f"all {cfg.steps} steps are done; to go on: --resume {run.path} --steps {2 * cfg.steps}")
    diary = Diary(run, cfg, env, state.step)

    with interruptible() as stop:
        for step in range(state.step + 1, cfg.steps + 1):
            # --- act: the policy answers, in the rollout's format
            torch.manual_seed(cfg.seed * 10 ** 7 + step)    # draws nothing here; what you add may
            t0 = time.monotonic()
            model.use(acting)
            batch = act(sampler, env, state, cfg, step)
            t1 = time.monotonic()

            # --- learn: the same forward over whole sequences, in the training's format
            model.use(learning)
            meter, lengths = Meter(batch), batch.rollout.length - batch.rollout.prompt_length
            shaped = batch.rewards.flatten() + overlong(lengths, env.answer_length, cfg.overlong)
            batch.advantage = ALGORITHMS[cfg.algo].advantage(shaped.view(-1, cfg.group)).flatten()
            before = score_before(model, reference, batch, cfg)
            every = torch.arange(len(shaped), device=device)
            for rows in every.chunk(cfg.updates_per_batch):                         # whole groups
                once = partial(learn, model, batch, cfg, scaler, env.answer_length, rows=rows)
                meter.losses.append(once(meter=meter))
                checks.check_finite(run, model, acting, learning, meter, rows, once)
                if meter.gaps is None:      # before any update: the mismatch and nothing else
                    differ = meter.measure(rows if before is None else every, before)
                    if cfg.exact and differ.any():
                        go_on = f"--resume {run.path} --no-exact"
                        raise checks.not_exact(model, batch.rollout, differ,
                                               f"Stopped at step {step}; go on without it: {go_on}")
                lr = learning_rate(cfg, state.updates)
                norm, skipped = update(model, optimizer, scaler, lr)
                meter.norms.append(norm)
                state.updates += not skipped
                state.skipped += skipped
                for num in {acting, learning}:
                    num.refresh()           # once per update, in place, for both sides
                checks.check_scale(run, model, scaler, norm, once)
            state.step = step

            # --- log: what is below changes nothing
            diary.write(meter.row(step, state, model, scaler, lr, shaped, t1 - t0), batch, meter)
            if step % cfg.save_every == 0 or step == cfg.steps or stop:
                save()
            if stop and step < cfg.steps:
                say(f"stopped at step {step}; go on with: python train_rl.py --resume {run.path}")
                return 128 + stop[0]
    return start.finish(cfg, run, state, sampler, env, acting, learning)


def learn_all(cfg, model, rollout, scaler, room):
    """Forward and backward over all of a rollout at once, for the rehearsal of the longest one."""
    batch = Batch(rollout, advantage=torch.ones(len(rollout.length), device=rollout.tokens.device))
    cfg = dataclasses.replace(cfg, micro_batch=len(rollout.length), replay_routing=False,
                              correction="none", kl_beta=0.0)
    learn(model, batch, cfg, scaler, room)


def parse_config(argv=None):
    """Command line -> (Config, the flags that were given), without --resume."""
    cfg, given, *_ = flags.parse(Config, argv, __doc__)
    return flags.check(cfg, given), given


def main(argv=None):
    cfg, given, resume, plan = flags.parse(Config, argv, __doc__)
    path, saved = load_saved(resume, Config) if resume else (None, None)
    if saved:
        cfg = Config(**flags.resumed(Config, saved["config"], given))
    flags.check(cfg, given)
    if plan:
        return memory.plan(cfg)
    run = Run(path) if saved else Run.new(cfg.out)
    run.occupy()
    try:
        return train(cfg, given, run, saved)
    except OSError as e:                                 # BrokenPipeError: `train_rl.py | head`
        closed, at = isinstance(e, BrokenPipeError), run.checkpoint
        what = "the output was closed" if closed else f"{e.filename or 'output'}: {e.strerror}"
        kept = f"; the last checkpoint, {at}, is untouched" if at.exists() else ""
        raise InputError(what + kept) from e
    finally:
        run.leave()


if __name__ == "__main__":
    run_main(main)
