"""Exercise 6: mismatch and its cures. The participant's words are held to the participant's own
runs: processors round differently, and now and then a run of another machine ends otherwise."""
import math
import shlex

import torch

from algorithms import CORRECTIONS
from experiments.lab import LAB, collapsed, smooth
from precision import InputError
from run.flags import check as check_flags
from train_rl import parse_config
from workshop.ladder import Shown, Wrong, call, place, require, steps_of, tensor, word

# Of seeds 0 to 4 four collapse: with compiled operators all but 1, with plain ones all but 0
BASE = [*LAB, "--device", "cpu", "--preset", "cpu", "--seed", "2"]
BITS = "e8m2"
ARMS = {                    # (rollout's format, training's), whether token-TIS weighs the tokens
    "fp32": ("fp32", "fp32", False),
    "mismatch": ("fp32", BITS, False),
    "token-tis": ("fp32", BITS, True),
    "matched": (BITS, BITS, False)}
OWN = "precision", "rollout_precision", "algo", "old_policy", "correction"      # what an arm may set
WHY_MATCHED = dict(
    a="two mantissa bits are enough to hold every gradient",
    b="the rollout's noise makes the policy explore",
    c="the policy that acts is the policy that learns: the gradient is that of what was sampled",
    d="FP32 on the rollout's side was too slow to keep up")


def check(mine):
    yield from weights(mine)
    arms = getattr(mine, "ARMS", None)
    require(isinstance(arms, dict) and set(arms) == set(ARMS),
            f"ARMS has the entries {', '.join(ARMS)}, each with the flags of that run.")
    configs = {name: settings(name, flags) for name, flags in arms.items()}
    for name, wanted in ARMS.items():
        right(name, configs[name], *wanted)
    yield "the flags of the four runs"
    steps = {name: steps_of(place(f"06-{name}")) for name in ARMS}
    missing = [name for name in ARMS if not steps[name]]
    require(not missing, f"No finished run of {', '.join(missing)} is there: python -m workshop run 6 "
            "(a minute or two)")
    changed = [name for name in ARMS if any(steps[name][0][k] != getattr(configs[name], k) for k in OWN)]
    require(not changed, f"The flags of {', '.join(changed)} are others now than when it ran: "
            "python -m workshop run 6")
    curves = {name: [m["accuracy"] for m in steps[name][1]] for name in ARMS}
    ends = {name: smooth(c) for name, c in curves.items()}
    yield Shown(f"{'':11}{'run':10} {'best ten':>9} {'last ten':>9} {'KL a token':>11}\n" + "\n".join(
        f"{'':11}{name:10} {e.max():9.2f} {e[-1]:9.2f} {mean_kl(steps[name][1]):11.0e}"
        for name, e in ends.items()))
    yield from words(mine, steps, curves, ends)


def weights(mine):
    """token-TIS: pi / mu of each token, at most 2."""
    rng = torch.Generator().manual_seed(0)
    mu = -torch.rand(5, 7, generator=rng) * 3
    for size in (1.0, 1e-3):
        d = torch.randn(5, 7, generator=rng) * size
        x = tensor(mine, "weight", (5, 7), mu + d, mu)
        logs = d.double().tolist()

        def like(rule, x=x, logs=logs):
            truth = torch.tensor([[rule(v) for v in row] for row in logs])
            return bool(((x - truth).abs() <= 1e-4 * truth.abs().clamp(min=0.1)).all())
        require(bool((x != 0).any()), "weight is 0 everywhere: no token would count.")
        for rule, said in (
                (lambda v: 1.0, "weight is 1 everywhere: nothing is weighed."),
                (lambda v: math.exp(v), "weight has no cap: a token with pi / mu = 50 would outweigh all "
                 "others. At most 2."),
                (lambda v: min(math.exp(-v), 2), "weight is mu / pi, upside down: what mu sampled too often "
                 "would count more."),
                (lambda v: min(v, 2), "weight is the log of the ratio. exp makes the ratio of it."),
                (lambda v: math.exp(min(v, 2)), "weight caps the log at 2, and so the ratio at 7.4: cap "
                 "after exp."),
                (lambda v: max(math.exp(v), 2), "weight is at least 2: the cap is an upper end."),
                (lambda v: math.exp(v) if math.exp(v) <= 2 else 0.0, "weight leaves out what is above 2. "
                 "That is MIS, masked; TIS cuts it to 2.")):
            require(not like(rule) or size < 1 and rule(0.1) != 1, said)
        truth = d.exp().clamp(max=2)
        at = divmod(int((x - truth).abs().argmax()), 7)
        whole = d.sum(1, keepdim=True).exp().clamp(max=2).expand(5, 7)
        require(size < 1 or not bool(((x - whole).abs() <= 1e-3).all()), "weight is one number for a whole "
                "answer. That is seq-TIS; here each token has its own.")
        require(like(lambda v: min(math.exp(v), 2)), "weight is not pi / mu, at most 2: for log pi - log mu "
                f"= {float(d[at]):.4g} it gave {float(x[at]):.4g}, not {float(truth[at]):.4g}.")
    yield "weight: pi / mu of each token, at most 2"


def words(mine, steps, curves, ends):
    fell = {name for name, c in curves.items() if collapsed(dict(curves=dict(accuracy=c)))}
    said = getattr(mine, "COLLAPSED", None)
    require(isinstance(said, (list, tuple, set)), "COLLAPSED is a list, such as [\"fp32\", \"matched\"].")
    require(said, "COLLAPSED is empty: which runs collapsed? The rule: the last ten steps lie 0.2 or more "
            "below the best ten.")
    require(set(said) <= set(ARMS), f"COLLAPSED names {', '.join(map(str, set(said) - set(ARMS)))}; the "
            f"runs are {', '.join(ARMS)}.")
    if "mismatch" not in fell:
        raise Wrong("On this machine the run with the mismatch did not collapse, as one seed in five "
                    "does not. Take another: python -m workshop run 6 --seed 3")
    for name in ARMS:
        require((name in said) == (name in fell), f"{name} {'did' if name in fell else 'did not'} "
                f"collapse: its best ten steps were at {ends[name].max():.2f}, its last ten at "
                f"{ends[name][-1]:.2f}.")
    yield f"collapsed: {', '.join(sorted(fell))}"
    wrong = dict(
        a=f"it ends at {ends['matched'][-1]:.2f} and fp32 at {ends['fp32'][-1]:.2f}: two bits do cost "
          "something. But it does not collapse.",
        b="the rollout without noise, of fp32, does not collapse either.",
        d="no run waits for another: all are steps of one program.")
    letter = word(mine, "MATCHED", "which letter is it?", WHY_MATCHED)
    require(letter == "c", f"MATCHED: not {letter!r}, \"{WHY_MATCHED[letter]}\": {wrong.get(letter)}")
    yield f"matched: {WHY_MATCHED[letter]}"
    if mean_kl(steps["matched"][1]) == 0:
        yield ("(its KL is exactly 0, without --exact: in FP32 the sums of both passes differ by 1e-7, and "
               "e8m2's numbers lie so far apart that no sum crossed a border)")


def mean_kl(steps):
    return sum(float(m["kl_k3"]) for m in steps) / len(steps)


def settings(name, flags, base=BASE):
    """An arm's flags -> the run's settings."""
    require(isinstance(flags, str), f"ARMS[{name!r}] is a text with flags.")
    try:
        cfg, given = parse_config([*base, *shlex.split(flags)])
        return check_flags(cfg, given)
    except (InputError, ValueError) as e:
        raise Wrong(f"ARMS[{name!r}]: {e}") from None
    except SystemExit:
        raise Wrong(f"ARMS[{name!r}] = {flags!r}: see the line above.") from None


def right(name, cfg, rollout, training, weighed):
    have, where = (cfg.rollout_format, cfg.train_format), f"ARMS[{name!r}]"
    require(have != (training, rollout) or rollout == training, f"{where} has the two formats the "
            f"wrong way round. --precision is training's, --rollout-precision the rollout's: here "
            f"training has {training}.")
    require(have == (rollout, training), f"{where}: the rollout is in {have[0]} and training in "
            f"{have[1]}. Asked: rollout {rollout} (--rollout-precision), training {training} (--precision).")
    require(cfg.algo == "dr-grpo", f"{where} takes the algorithm {cfg.algo}: compare like with like, "
            "all four are dr-grpo.")
    require(cfg.old_policy == "recomputed", f"{where} lacks --old-policy recomputed. Without it the "
            "ratio is pi / mu and holds the mismatch already: that is a cure of its own.")
    if weighed:
        require(cfg.correction != "none", f"{where} has no correction: --correction token-tis.")
        require(cfg.correction == "token-tis", f"{where} has the correction {cfg.correction}, not "
                "token-tis.")
    else:
        require(cfg.correction == "none", f"{where} has a correction. Only token-tis has one: each run "
                "changes one thing.")
    usual = vars(parse_config(BASE)[0])
    more = [k for k, v in vars(cfg).items() if k not in OWN and v != usual[k]]
    require(not more, f"{where} also sets {', '.join(more)}: each run changes one thing.")


# --------------------------------------------------------------------------------------------------


def jobs(mine, flags):
    list(weights(mine))                      # else the run would weigh with what the check refuses
    require(isinstance(getattr(mine, "ARMS", None), dict), "ARMS has a name and flags for each run.")
    return {f"06-{name}": [*BASE, *shlex.split(text), *flags] for name, text in mine.ARMS.items()}


def install(mine):
    """token-tis weighs with the participant's function, of log pi - log mu and 0."""
    def level(log_ratio, mask):
        return call(mine, "weight", log_ratio, torch.zeros_like(log_ratio))
    CORRECTIONS["token-tis"] = level, CORRECTIONS["token-tis"][1], 0.0, math.inf
