"""Exercise 2: where rollout and training part, and how far. The machine's own passes are watched,
since other processors round elsewhere."""
import math

import numpy as np
import torch

from data import draw_problems, stream
from data.tokenizer import STOP, encode
from experiments import explain
from experiments.explain import study, watched
from experiments.mismatch import passes
from operators.device import pick_device
from run.base import get_base, load_task
from train_rl import parse_config
from workshop.ladder import JOB, Shown, Wrong, close, number, one_number, require, word

BITS = range(3, 11)


def answers(size, seed=0):
    """Log-probs of both sides that lie about `size` apart, with padding that must not count: FP32
    (R, T), and the mask."""
    rng = np.random.default_rng(seed)
    mask = np.arange(9) < rng.integers(2, 9, (6, 1))
    pi = -rng.exponential(1, mask.shape)
    mu = pi + size * (rng.normal(0, 1, mask.shape) + 0.3)
    junk = np.where(mask, 0, 7)                              # what stands where no token was sampled
    mu, pi = (torch.tensor(x + junk * k, dtype=torch.float32) for x, k in ((mu, 1), (pi, 2)))
    return mu, pi, torch.tensor(mask)


def differences(mu, pi, mask):
    """log mu - log pi of the tokens that were sampled."""
    return [float(a) - float(b) for a, b, m in zip(mu.flatten(), pi.flatten(), mask.flatten()) if m]


def mean(x):
    return math.fsum(x) / len(x)


def k3(d):
    """exp(-d) - 1 + d, by its series where the subtraction would cancel."""
    series = math.fsum((-d) ** k / math.factorial(k) for k in range(2, 12))
    return series if abs(d) < 0.5 else math.exp(-d) - 1 + d


OPERATORS = ("embedding", "norm", "qkv product", "rope", "attention", "out product", "residual sum",
             "gate product", "swiglu", "down product")


def check(mine):
    prediction = word(mine, "PREDICTION", "write down which operator you expect, before you look.",
                      OPERATORS)
    case, weights = study()
    tokens, found = next(passes(case, ["fp32"], 3))[1].tokens, {}
    for fmt in ("fp16", "bf16"):
        op = next((op for op in watched(case, tokens, fmt) if op.differ), None)
        truth = f"{op.where}, {op.name}" if op else "none"
        found[fmt], name = truth, f"FIRST_{fmt.upper()}"
        said = word(mine, name, "what does python -m workshop run 2 say? The first operator whose "
                    f"column \"rounded\" is not 0 in {fmt}.")
        require(simple(said) != simple(truth.partition(", ")[2]), f"{name}: {said!r} of which block? "
                "Write it as \"blocks.1.mlp, swiglu\".")
        require(simple(said) == simple(truth), f"{name}: not {said!r}. Look at the column \"rounded\" "
                f"of {fmt}, from the top: the first row that is not 0, such as \"blocks.1.mlp, "
                "swiglu\". \"differ\" is before rounding.")
    yield (f"on this machine (with {weights}) they part in {found['fp16']} in FP16, in {found['bf16']} in "
           f"BF16. You predicted: {prediction}")
    yield from gaps(mine)
    yield from divergences(mine)
    yield from slopes(mine)
    yield from measured(mine)


def simple(text):
    return text.lower().replace(",", " ").split()


def gaps(mine):
    for size in (1.0, 1e-2, 1e-5):
        mu, pi, mask = answers(size)
        d, x = differences(mu, pi, mask), one_number(mine, "gap", mu, pi, mask)
        truth = mean([abs(t) for t in d])
        require(x != 0, "gap is 0, but the log-probs differ.")
        everywhere = float((mu - pi).abs().mean())
        require(not close(x, everywhere, 1e-3), "gap counts padding: the mean is over the sampled "
                "tokens alone, those where mask is True.")
        require(not close(x, float(((mu - pi).abs() * mask).mean()), 1e-3), "gap divides by all "
                "places: the mean is over the sampled tokens, so divide by how many they are.")
        require(not close(x, abs(mean(d)), 1e-3), "gap lets differences cancel: take the absolute "
                "value of each token's difference first, the mean after it.")
        require(not close(x, math.fsum(abs(t) for t in d), 1e-3), "gap is a sum: divide by the "
                "number of sampled tokens.")
        rows = [mean([abs(t) for t in differences(*(y[i:i + 1] for y in (mu, pi, mask)))])
                for i in range(len(mask))]
        require(not close(x, mean(rows), 1e-3), "gap is the mean of the answers' means, so a short answer's "
                "tokens count more. Take one mean over all sampled tokens.")
        require(close(x, truth, 1e-3), f"gap gave {x:.6g}. For differences of about {size:g} it "
                f"should have been {truth:.6g}, the mean of |log mu - log pi| over sampled tokens.")
    yield "gap, at differences of 1, 0.01 and 0.00001"


def divergences(mine):
    for size in (1.0, 1e-2, 1e-4, 1e-6):
        mu, pi, mask = answers(size, 1)
        d = differences(mu, pi, mask)
        truth, x = mean(list(map(k3, d))), one_number(mine, "kl", mu, pi, mask)
        if size >= 1e-2:                                                 # below, FP32 decides
            require(x != 0, "kl is 0, but the policies differ.")
            require(not close(x, mean([k3(-t) for t in d]), 1e-3), "kl has the ratio upside down: "
                    "with d = log mu - log pi it is exp(-d) - 1 + d, since the tokens were sampled "
                    "from mu.")
            require(not close(x, mean(d), 1e-3), "kl is the mean of log mu - log pi. That is the "
                    "estimator k1: unbiased, but single tokens are far off and it can be negative. "
                    "k3 is asked.")
            require(not close(x, mean([t * t / 2 for t in d]), 1e-3), "kl is the mean of d²/2. That "
                    "is the estimator k2, right for small d alone. k3 is asked.")
            require(not close(x, truth * float(mask.float().mean()), 1e-3), "kl divides by all "
                    "places, padding included: divide by the number of sampled tokens.")
            require(x > 0, f"kl gave {x:.6g}. k3 is never negative: look at the signs.")
        require(close(x, truth, 0.02), f"kl gave {x:.3g} for differences of about {size:g}; it should "
                f"have been {truth:.3g}. " + ("exp(-d) - 1 takes 1 from a number near 1: the digits "
                "that are left are noise. Compute in FP64 (.double()), with torch.expm1."
                if size < 1e-2 else "k3 is the mean of exp(-d) - 1 + d, with d = log mu - log pi."))
    yield "kl, at differences from 1 down to 0.000001"


def slopes(mine):
    for by, start in ((-1.0, 0.7), (-2.0, 3e-4), (-0.25, 40.0)):
        bits, wiggle = list(BITS), (0.2, -0.1, -0.2, 0.1, 0.1, -0.2, -0.1, 0.2)
        values = [start * 2 ** (by * b + w) for b, w in zip(bits, wiggle)]
        x, y = bits, [math.log2(v) for v in values]
        sxy = math.fsum((a - mean(x)) * (b - mean(y)) for a, b in zip(x, y))
        sxx, syy = (math.fsum((t - mean(s)) ** 2 for t in s) for s in (x, y))
        got, truth = one_number(mine, "slope", bits, values), sxy / sxx
        require(got != 0, "slope is 0.")
        require(not close(got, truth * math.log(2), 1e-3), "slope takes the natural logarithm: with "
                "the logarithm to base 2, -1 means that each bit halves.")
        require(not close(got, truth * math.log10(2), 1e-3), "slope takes the logarithm to base 10: "
                "with base 2, -1 means that each bit halves.")
        require(not close(got, sxy / syy, 1e-3), "slope is bits per halving: you fitted the bits to "
                "the values. Fit log2 of the values to the bits.")
        require(not close(got, -truth, 1e-3), "slope has the other sign: values that fall with more "
                "bits have a negative one.")
        line = math.fsum((a - mean(x)) * (v - mean(values)) for a, v in zip(x, values)) / sxx
        require(not close(got, line, 1e-3), "slope fits the values themselves. Their logarithms lie "
                "on a line.")
        require(close(got, truth, 1e-3), f"slope gave {got:.4g}; the least-squares line through "
                f"log2 of the values has {truth:.4g}.")
    yield "slope"


def measured(mine):
    """The participant's functions on a real model: rollout in e8mY, training in FP32."""
    cfg = parse_config(JOB)[0]
    env = load_task(cfg)
    model = get_base(cfg, pick_device("cpu"), env)
    prompts = [encode(p.prompt) for p in draw_problems(env.task, 64, stream(0, 60))]
    case = model, prompts, 16, env.answer_length, STOP, cfg
    rows = []
    for bits, (_, rollout, logp) in zip(BITS, passes(case, [f"e8m{b}/fp32" for b in BITS], (0, 61))):
        both = rollout.logp, logp, rollout.is_answer
        rows.append((bits, *(one_number(mine, name, *both) for name in ("gap", "kl"))))
    yield Shown("           rollout in e8mY, training in FP32\n           bits       gap        kl\n" + "\n".join(
        f"           {b:4} {g:9.1e} {k:9.1e}" for b, g, k in rows))
    bits, *both = zip(*rows)
    for name, values, what in zip(("GAP_BY", "KL_BY"), both, ("gap", "kl")):
        if not all(v > 0 for v in values):
            raise Wrong(f"{what} is not above 0 for every number of bits: {values}.")
        found = one_number(mine, "slope", bits, values)
        said = number(mine, name, f"your slope of log2({what}) is {found:.2f}. One bit more divides "
                      f"the {what} by what? Write down the whole number that is nearest.")
        require(said == round(2 ** -found), f"{name}: not {said:g}. Your slope of log2({what}) is "
                f"{found:.2f}, and one bit more divides by 2^{-found:.2f}.")
        yield f"slope of log2({what}) {found:.2f}: one bit more divides the {what} by {said:g}"


def run(mine, flags):
    """Every operator of both passes, with one thread as here."""
    explain.main(flags)
    return 0
