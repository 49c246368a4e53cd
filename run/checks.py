"""run/checks.py: what is looked at when numbers are not what they should be. Exact mode's
self-test, the operator where the first bit differs between rollout and training, the layer where
the first NaN is."""
import itertools
import math
import sys
from dataclasses import dataclass

import torch

from algorithms import Tokens, parse_correction, policy_loss, truncate
from model import KVCache
from precision import InputError
from run.lines import say
from run.meter import Meter

# An operator's name, in words; the products of a block in the order of model.Block
NAMES = dict(embed="embedding", rms_norm="norm", rope="rope", attention="attention", add="residual sum",
             swiglu="swiglu", mix="experts' sum", linear="product")
PRODUCTS = "qkv product", "out product", "gate product", "down product"


@dataclass
class Operator:
    """What one operator gave in both passes, a position a row."""
    where: str
    name: str
    full: torch.Tensor             # (B T, numbers), rounded to the format
    cached: torch.Tensor
    full_raw: torch.Tensor | None  # FP32, before it; None where the hardware rounds as it writes
    cached_raw: torch.Tensor | None

    differ = property(lambda op: unlike(op.full, op.cached))
    differ_raw = property(lambda op: unlike(op.full_raw, op.cached_raw))

    @property
    def size(self):
        """Root mean square of the differences, relative to that of the numbers."""
        off, all_ = (x.square().mean().sqrt() for x in (self.full - self.cached, self.full))
        return float(off / all_.clamp(min=1e-30))


def unlike(a, b):
    """Share of numbers that are not the same."""
    return None if a is None else float((a != b).float().mean())


def watch(model, rows, run):
    """Do run(), a pass over `rows` rows, and return what each operator gave: [(where, operator,
    rounded, raw or None)], each (rows, T, numbers). What the experts do with some of the tokens is
    left out."""
    seen = []

    def spy(kind, where, x, raw):
        frame = sys._getframe(1)
        while frame.f_code.co_name not in NAMES:            # who called `down`?
            frame = frame.f_back
        name = frame.f_code.co_name
        if x.dim() == 2 and name != "mix":
            return
        x, raw = (t.transpose(1, 2).flatten(2) if t.dim() == 4 else t.view(rows, -1, t.shape[-1])
                  for t in (x, raw))
        exact = raw.dtype == torch.float32
        seen.append((where, name, x.float().clone(), raw.clone() if exact else None))
    model.num.spy = spy
    with torch.no_grad():
        run()
    model.num.spy = None
    return seen


def compare(model, tokens, start, alone=False):
    """tokens (B, T) through model.num, a token at a time after the first `start`, and all at once
    -> [Operator], in order. alone: all at once means the first row by itself, and that row is
    compared: does it depend on the company it was in?"""
    B, T = tokens.shape
    shown = slice(0, 1 if alone else B)
    full = watch(model, 1 if alone else B, lambda: model(tokens[shown]))
    cache = KVCache(model.cfg, B, T, model.num)
    steps = [watch(model, B, lambda: model(tokens[:, :start], cache))]
    for t in range(start, T):
        steps.append(watch(model, B, lambda t=t: model(tokens[:, t:t + 1], cache)))
    dense = not any(b.lora or b.experts for b in model.blocks)
    found, products = [], itertools.cycle(PRODUCTS)
    for (where, kind, *whole), *parts in zip(full, *steps):
        name = next(products) if kind == "linear" and dense else NAMES[kind]
        cached = [x if x is None else torch.cat([p[i][shown] for p in parts], 1)
                  for i, x in enumerate(whole, 2)]
        both = [x if x is None else x.flatten(0, 1) for pair in zip(whole, cached) for x in pair]
        found.append(Operator(where, name, *both))
    return found


def first_difference(model, tokens, start):
    """In words: the first operator whose numbers differ between a cached and a full pass over
    tokens (B, T), the first row being one that was found to differ."""
    for alone in (True, False):
        for op in compare(model, tokens, start, alone):
            if not op.differ == 0:
                return (f"{op.where}, {op.name}: {op.differ:.2%} of its numbers differ, the "
                        f"largest by {float((op.full - op.cached).abs().max()):.1e}")
    return (f"not found again with {len(tokens)} rows: it is in the head, in the compiled block, "
            "or takes the company of all rows")


def not_exact(model, rollout, differ, advice):
    """differ (R, T): the answers' tokens with other bits in training than in the rollout."""
    rows = torch.argsort((~differ.any(1)).int(), stable=True)[:24]       # one that differs first
    end = int(rollout.length[rows[0]])
    prompt = min(int(rollout.prompt_length[rows].max()), end - 1)
    where = first_difference(model, rollout.tokens[rows, :end], prompt)
    return InputError(
        f"stopped: exact mode is not exact here: {int(differ.sum())} of "
        f"{int(rollout.is_answer.sum())} tokens got other bits in training than in the rollout. An "
        "edit of an operator can be the cause, or this machine. First difference: "
        f"{where}. {advice}")


def self_test(model, batch, learn):
    """Exact mode claims nothing unchecked: a step of this job's own sizes, with a gradient and
    without one, gives the same bits on both sides, or the run stops. Leaves everything as it
    was."""
    rollout = batch.rollout
    batch.advantage = (torch.arange(len(rollout.length), device=rollout.length.device) % 2).float()
    meter = Meter(batch)
    learn(meter=meter)
    model.zero_grad(set_to_none=True)
    differ = (meter.logp != rollout.logp) & rollout.is_answer & torch.isfinite(rollout.logp)
    if differ.any():                                # what is not finite stops the loop itself
        raise not_exact(model, rollout, differ, "Run without --exact")
    say(f"self-test of exact mode: {int(rollout.is_answer.sum())} tokens of a step of this job, "
        "the same bits in rollout and training")


def first_bad_layer(model, learn):
    """Do the update once more (learn() -> the loss) and look at everything that is computed: where,
    in order, inf or NaN first shows up, in words."""
    fmt = model.num.fmt
    for name, p in model.named_parameters():
        if not torch.isfinite(model.num.weight(p)).all():
            return f"the weights of {name}, rounded to {fmt.name}"
    found, largest = [], (0.0, "nothing")

    def spy(kind, where, x, raw):
        nonlocal largest
        if not found and not torch.isfinite(x).all():
            found.append(f"the {kind} pass of {where} (largest number until then: {largest[0]:.3g} "
                         f"in {largest[1]}; {fmt.name} ends at {fmt.max:.3g})")
        elif not found:
            largest = max(largest, (float(x.abs().max()), where))
    model.num.spy = spy
    loss, model.num.spy = float(learn()), None
    model.zero_grad(set_to_none=True)
    if math.isfinite(loss) or (found and "forward" in found[0]):
        return found[0] if found else "no layer this time: it came and went"
    return "the loss itself, all log-probs being finite: look at rewards and advantages"


def broken(what, run, model, once):
    """The end of a run. once(): the update again."""
    return InputError(
        f"stopped: {what}; first seen in {first_bad_layer(model, once)}. Try --precision bf16 or "
        "fp32 to see whether range is the matter, a lower --lr, or a lower --init-scale. The last "
        f"good checkpoint is {run.checkpoint}")


def check_finite(run, model, acting, learning, meter, rows, once):
    """Log-probs of both sides are numbers, or the run ends with the name of a layer."""
    where = meter.answer[rows]
    both = meter.batch.rollout.logp, meter.logp
    mu, pi = (bool(torch.isfinite(x[rows][where]).all()) for x in both)
    if not (mu and pi):
        raise broken("log-probs are no longer finite", run,
                     model.use(learning if mu else acting), once)


def check_scale(run, model, scaler, norm, once):
    """Gradients are numbers, or the loss scale can still fall."""
    if scaler.get_scale() < 1:
        raise broken("the loss scale fell below 1", run, model, once)
    if not scaler.is_enabled() and not math.isfinite(norm):
        raise broken("gradients are no longer finite", run, model, once)


def rejects(correction):
    """Whether it leaves tokens out, and so out of the denominator as well."""
    return parse_correction(correction)[1] is not truncate


@torch.enable_grad()
def idle(cfg):
    """Whether an answer without advantage has no gradient. The loss itself is asked, on one token."""
    logp, entropy, zero = (torch.zeros(1, 1, requires_grad=True) for _ in range(3))
    before, reference = logp.detach() - 1, logp.detach() - 2 if cfg.kl_beta else None
    t = Tokens(logp > -1, logp - 1, entropy, before, before, zero[0].detach(), reference, cfg.clip)
    grads = torch.autograd.grad(policy_loss(cfg, t)[0], (logp, entropy), allow_unused=True)
    return not any(g is not None and g.any() for g in grads)
