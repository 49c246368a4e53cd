"""run/start.py: what happens once, before the first step and after the last."""
import time
from functools import partial

import torch

from hf import weights
from operators import numerics, why_plain
from operators.compiled import edited
from operators.device import pick_device
from precision import InputError, make_scaler
from report import page
from run import base, flags, memory
from run.curves import draw
from run.folder import State, restored
from run.lines import banner, say, wrapped
from run.problems import choose_problems
from sample import solve

STARTED = time.monotonic()
PASS = 0.95                             # training accuracy, as in the paper


def prepare(cfg, given, saved, learn):
    """-> task, state, numerics of both sides, model. What can fail at once comes before what takes
    a minute. saved: the checkpoint to go on from; learn: see memory.rehearse."""
    device, env = pick_device(cfg.device), base.load_task(cfg)
    formats = cfg.rollout_format, cfg.train_format
    acting, learning = (numerics(f, device, cfg.fast, cfg.exact) for f in formats)
    acting = learning if acting.fmt == learning.fmt else acting     # the very same rounded weights
    asked = ["asked for" if "preset" in given else f"the device is {device.type}"]
    asked += [f"{k} {flags.plain(v)}" for k, v in given.items() if k not in ("preset", "out")]
    say(wrapped(f"preset {cfg.preset}: " + " | ".join(asked)))
    say(banner(acting, learning, make_scaler(learning, cfg.init_scale)))
    slow = device.type == "cpu" or learning.half and not cfg.exact
    if cfg.fast and slow and why_plain(device):
        say(f"note: plain operators, slower than the compiled ones: {why_plain(device)}")
    if cfg.exact and "precision.py" in edited():
        say("note: precision.py was edited. --exact has products, norms, SwiGLU, attention and "
            "log_softmax of its own in operators/exact.py: make the same edit there")
    if saved:
        state = restored(saved)
        env.prompt_length = state.prompt_length
        if state.step > cfg.steps:
            raise InputError(f"the run has done {state.step} steps, more than --steps {cfg.steps}")
    else:
        state = State(*choose_problems(cfg, env), env.prompt_length,
                      weights.fingerprint(cfg.model) if cfg.model else None)
    # what a run once changed stays changed
    state.changed = list(dict.fromkeys([*state.changed, *flags.changed(cfg)]))
    if cfg.overlong > env.answer_length:
        raise InputError(f"--overlong {cfg.overlong} is longer than the longest answer, "
                         f"{env.answer_length} tokens")
    memory.rehearse(cfg, env, acting, learning, learn)
    model = base.load_policy(cfg, env, device, saved, acting, learning)
    for num in {acting, learning}:
        num.hold(model.parameters())
    if cfg.model and not saved:
        prompt = torch.tensor([env.tokens(state.problems[0])], device=device)
        weights.warn_of_overflow(model.use(learning), prompt, say)
    return env, state, acting, learning, model


def pass_at_1(cfg, sampler, env, asked, purpose, num):
    """Of the policy in the numerics `num`, over cfg.eval_tries sampled answers each."""
    sampler.model.use(num)
    right = solve(sampler, env, asked, cfg.eval_tries, (cfg.seed, purpose),
                  temperature=cfg.temperature, rows=cfg.rollout_rows)
    return sum(right) / (len(asked) * cfg.eval_tries)


def finish(cfg, run, state, sampler, env, acting, learning):
    """The last lines, and the exit status: 0 for PASS or for a run that gets no verdict, 1 for
    FAIL."""
    score = partial(pass_at_1, cfg, sampler, env)
    accuracy = score(state.problems, 8, acting)
    learned = accuracy if acting is learning else score(state.problems, 8, learning)
    after = score(state.heldout, 6, acting) if state.heldout else None
    passed = None if state.changed else accuracy >= PASS
    each = f"{cfg.eval_tries} sampled answer{'s' * (cfg.eval_tries > 1)} each"
    if state.heldout:
        say(f"held-out problems, never trained on, {each}: {state.before:.3f} right before, "
            f"{after:.3f} after")
    say(f"the {len(state.problems)} training problems, {each}, temperature {cfg.temperature:g}: "
        f"{accuracy:.3f} right")
    if acting is not learning:                  # the deployment gap: pi has learned, mu is deployed
        say(f"the same answered in {cfg.train_format}, as it was trained: {learned:.3f}")
    if cfg.model:
        say(f"no verdict: that is for the default job; the paper asks {PASS:.3f} of a perfectible "
            "set (--keep 0.2 0.8)")
    elif passed is None:
        changed = ", ".join(map(flags.flag, state.changed))
        say(wrapped(f"no verdict: changed from the preset: {changed}"))
    else:
        say(f"{'PASS' if passed else 'FAIL'}: {cfg.task} with --digits {cfg.digits}, "
            f"{run.history()[0]['accuracy']:.3f} right in step 1, {accuracy:.3f} now; the sanity "
            f"test asks for {PASS:.3f}")
    run.log(dict(result=dict(accuracy=accuracy, accuracy_train=learned, heldout_before=state.before,
                             heldout_after=after, kept=len(state.problems), passed=passed,
                             changed=state.changed, seconds=time.monotonic() - STARTED)))
    if cfg.model:
        base.export(cfg, run.path, sampler.model)
    say(draw(run.path, PASS))
    say(f"report, to open in a browser: {page.write([run.path])}")
    return 1 if passed is False else 0
