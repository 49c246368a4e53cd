"""Exercise 4: what FP16 loses of small gradients, and the order of unscale, clip, step and update.
The order is judged by where weights end up, with torch's own GradScaler and plain SGD."""
import math

import torch

from data import draw_problems, stream
from data.tokenizer import encode
from operators.device import pick_device
from precision import Numerics
from run.base import get_base, load_task
from train_rl import Batch, learn, parse_config
from workshop.ladder import JOB, call, close, live, one_number, require

SMALLEST = 2.0 ** -24                   # of FP16; half of it and less becomes 0


def check(mine):
    yield from shares(mine)
    yield from scales(mine)
    yield from orders(mine)
    real = gradients()
    scale = one_number(mine, "choose_scale", real)
    told = ", ".join(f"2^{k}: {one_number(mine, 'lost', real, 2.0 ** k):.1%}" for k in (0, 4, 8, 16))
    yield (f"the {len(real):,} gradients of activations in one update of the real program, from "
           f"{float(real[real != 0].abs().min()):.0e} to {float(real.abs().max()):.0e}: lost with a "
           f"scale of {told}. You choose 2^{math.log2(scale):.0f}")
    steps, _ = live("check04", mine, "--init-scale", "4294967296", "--steps", "20")
    norms = [m["grad_norm"] for m in steps if isinstance(m["grad_norm"], float)]    # else "inf"
    require(norms, "A run with it begins with a scale of 2^32, and every update is skipped.")
    yield (f"a live run from a scale of 2^32: {steps[-1]['skipped_steps']} updates skipped, then the "
           f"scale is 2^{math.log2(steps[-1]['loss_scale']):.0f}, |g| {norms[-1]:.2f}. (Your scale is for "
           "one update. Those of other steps have larger gradients, so the scaler goes on halving.)")


def gradients():
    """Of all activations, as the program has them before it rounds them."""
    cfg = parse_config(JOB)[0]
    env = load_task(cfg)
    model = get_base(cfg, pick_device("cpu"), env)
    num, seen = Numerics("fp32"), []
    model.use(num.hold(model.parameters()))
    from sample import Sampler
    asked = [encode(p.prompt) for p in draw_problems(env.task, 16, stream(0, 62))]
    rollout = Sampler(model).generate(asked, 8, env.answer_length, seed=3)
    advantage = torch.tensor([1.0, -1.0]).repeat(64) / 2
    batch = Batch(rollout, advantage=advantage)
    num.spy = lambda kind, where, x, raw: kind == "backward" and seen.append(raw.flatten().clone())
    learn(model, batch, cfg, torch.amp.GradScaler("cpu", enabled=False), env.answer_length)
    num.spy = None
    return torch.cat(seen).float()


def shares(mine):
    tiny = [2.0 ** -25, -(2.0 ** -26), 2.0 ** -30]                              # these become 0
    kept = [2.0 ** -24, -1.5 * 2.0 ** -25, 0.7 * 2.0 ** -24, 1.0, -3.0, -1.0]   # these do not
    some, zeros = tiny + kept, [0.0] * 12
    for scale in (1.0, 2.0 ** 10, 2.0 ** -6):
        x = torch.tensor([v / scale for v in some] + zeros)
        got = one_number(mine, "lost", x, scale)
        few = (f"lost, with {len(tiny)} gradients of {len(some)} that become 0, {len(zeros)} that were 0 "
               f"already, and a scale of {scale:g}, gave {got:.4g}")
        every = len(some) + len(zeros)
        below = sum(abs(v) < SMALLEST for v in some) / len(some)
        negative = [sum(v <= SMALLEST / 2 for v in some) / len(some),
                    sum(v < SMALLEST / 2 for v in some) / len(some)]
        early = sum(float(torch.tensor(v / scale).half()) * scale == 0 for v in some) / len(some)
        require(scale == 1 or not close(got, early), f"{few}: it rounds to FP16 first and multiplies after "
                "it. What became 0 stays 0: multiply first.")
        require(not close(got, (len(tiny) + len(zeros)) / every), f"{few}: it counts those that were 0 "
                "before. Of the numbers that are not 0, how many become 0?")
        require(not close(got, len(tiny) / every), f"{few}: it divides by all numbers. The share is that "
                "of the numbers that are not 0.")
        require(not close(got, below), f"{few}: it counts what lies below FP16's smallest number, 2^-24. "
                "What lies above half of that is rounded up to it, not to 0.")
        require(not any(close(got, n) for n in negative), f"{few}: it counts negative numbers as lost: look at their "
                "size.")
        require(got != 0, f"{few}: nothing is lost.")
        require(close(got, len(tiny) / len(some)), f"{few}, not {len(tiny) / len(some):.3f}. Multiply by "
                "the scale, round to FP16, look for zeros.")
    yield "lost: the share of gradients that FP16 turns into 0"


def scales(mine):
    for largest in (1.0, 0.3, 3e-5, 900.0, 2.0 ** -20):
        x = torch.tensor([largest, -largest / 3, largest * 1e-6, 0.0])
        truth = 2.0 ** max(k for k in range(-40, 60) if largest * 2.0 ** k < 65520)
        for y in (x, -x):
            got = one_number(mine, "choose_scale", y)
            words = f"choose_scale gave {got:g} for gradients up to {largest:g}"
            require(got > 0 and math.log2(got) == round(math.log2(got)), f"{words}: a power of two is "
                    "asked, since it changes the exponent alone.")
            require(got != 1 / truth, f"{words}: that is what the gradients are divided by afterwards.")
            require(not got * largest >= 65520, f"{words}: times it, the largest becomes inf in FP16. "
                    "Did you look at the size, whatever the sign?" if y is not x else
                    f"{words}: times it, the largest becomes inf in FP16, whose numbers end at 65504.")
            require(got == truth, f"{words}: {truth / got:g} times as much would fit as well, and keep "
                    "more of the small ones.")
    yield "choose_scale: the largest power of two at which nothing becomes inf"


class Watched(torch.amp.GradScaler):
    """Keeps the order of the calls, for words."""

    def __init__(self, scale):
        super().__init__("cpu", init_scale=scale, growth_interval=400)
        self.calls = []

    def __getattribute__(self, name):
        if name in ("unscale_", "step", "update"):
            self.calls.append(name)
        return super().__getattribute__(name)


def once(mine, gradient, scale, max_norm=1.0):
    """One update of weights 0 by plain SGD with learning rate 1 -> what it gave, weights, scaler."""
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in gradient]          # one number each
    for w, g in zip(weights, gradient):
        w.grad = torch.tensor([g * scale])
    optimizer, scaler = torch.optim.SGD(weights, lr=1.0), Watched(scale)
    emptied = optimizer.zero_grad
    optimizer.zero_grad = lambda *args, **kw: scaler.calls.append("zero_grad") or emptied(*args, **kw)
    scaler.scale(torch.zeros(()))                              # as a backward pass would have done
    try:
        norm = call(mine, "update", weights, optimizer, scaler, max_norm)
    except ValueError as e:
        require("unscale_() has already been called" not in str(e), "Unscaled twice: GradScaler refuses "
                "the second unscale_ before step. Each update has one.")
        require("No inf checks" not in str(e), f"GradScaler says: {e}. It looks for inf in unscale_ "
                "and step, and update comes after them.")
        raise
    return norm, [w.item() for w in weights], scaler, [w.grad for w in weights]


def orders(mine):
    scale = 2.0 ** 12
    norm, w, scaler, grads = once(mine, [3.0, 4.0], scale)                # a norm of 5, clipped to 1
    length, calls, order = math.hypot(*w), scaler.calls, " then ".join(scaler.calls)
    before = {name: name in calls[:calls.index("step")] for name in ("update", "zero_grad")
              if "step" in calls}
    require(not before.get("update"), f"scaler.update came before scaler.step: {order}. update changes the "
            "scale and forgets what unscale_ has found; it ends an update.")
    require(not before.get("zero_grad"), f"The gradients were gone when the step came: {order}. "
            "optimizer.zero_grad ends an update.")
    require(length > 0, "update left the weights where they were." + f" Calls: {order}." * bool(calls))
    require(not close(length, scale, 1e-2) and not close(length, 5 * scale, 1e-2), "The weights moved "
            f"by {length:g}: the gradients are still multiplied by the loss scale of {scale:g}. "
            "Unscale them, or let the scaler take the step.")
    require(not close(length, 1 / scale, 1e-2), f"The gradient has a norm of 5 and is clipped to 1, but "
            f"the weights moved by {length:.2g}, {scale:g} times too little: it was clipped before it "
            "was unscaled. Unscale first, so that the clip sees the true gradient.")
    require(not close(length, 5, 1e-2), "The weights moved by 5: the gradient was not clipped to a norm "
            "of 1.")
    require(close(w[0], -0.6, 1e-3) and close(w[1], -0.8, 1e-3), f"From the gradient (3, 4), clipped to "
            f"a norm of 1, the weights went to ({w[0]:.4g}, {w[1]:.4g}), not (-0.6, -0.8).")
    yield "a gradient of norm 5 is unscaled, clipped to 1, and moves the weights by it"
    require(norm is not None, "update gave nothing: it gives the norm, which the step line shows.")
    require(close(norm, 5, 1e-3), f"update gave a norm of {float(norm):g}. It is 5: that of the unscaled "
            "gradient, before the clip.")
    require(all(g is None or not g.any() for g in grads), "After the update the gradients are still "
            "there: the next backward pass will add to them. optimizer.zero_grad() ends an update.")
    _, w, scaler, _ = once(mine, [0.003, 0.004], scale)                           # not clipped
    require(close(w[0], -0.003, 1e-3), f"A gradient of (0.003, 0.004) is within the clip of 1; the "
            f"weights went to ({w[0]:.3g}, {w[1]:.3g}), not (-0.003, -0.004).")
    yield "a small gradient passes the clip as it is, and none is left for the next update"
    _, w, scaler, _ = once(mine, [math.inf, 1.0], scale)
    require(all(x == 0 for x in w), f"A gradient of inf moved the weights to ({w[0]:g}, {w[1]:g}): "
            "scaler.step skips such an update, optimizer.step does not.")
    require(scaler.get_scale() == scale / 2, f"After a gradient of inf the scale is "
            f"{scaler.get_scale():g}, not half of {scale:g}: scaler.update() was not called, and every "
            "update to come would overflow as well.")
    yield "an overflow is skipped, and halves the scale"


# --------------------------------------------------------------------------------------------------


def jobs(mine, flags):
    return {"04": [*JOB, *flags]}


def install(mine):
    """train_rl.update, with the participant's order."""
    import train_rl

    def update(model, optimizer, scaler, lr):
        with_gradient = [p for p in model.parameters() if p.grad is not None]
        if not with_gradient:
            return 0.0, False
        for group in optimizer.param_groups:
            group["lr"] = lr
        before = scaler.get_scale()
        norm = call(mine, "update", with_gradient, optimizer, scaler, train_rl.GRAD_CLIP)
        return float(norm), scaler.get_scale() < before
    train_rl.update = update
