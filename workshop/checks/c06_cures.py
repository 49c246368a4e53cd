"""Exercise 6: mismatch and its cures. The participant's words are held to the participant's own
runs: processors round differently, and now and then a run of another machine ends otherwise."""
import shlex

from experiments.lab import LAB, collapsed, smooth
from precision import InputError
from run.flags import check as check_flags
from train_rl import parse_config
from workshop.ladder import Wrong, place, require, steps_of, word

BITS = "e8m2"
ARMS = {                    # (rollout's format, training's), whether token-TIS weighs the tokens
    "fp32": ("fp32", "fp32", False),
    "mismatch": ("fp32", BITS, False),
    "token-tis": ("fp32", BITS, True),
    "matched": (BITS, BITS, False)}
WHY_TIS = dict(
    a="it makes rollout and training compute the same numbers",
    b="it weighs each token's gradient by pi / mu, at most 2: what mu sampled too often counts less",
    c="it makes the learning rate smaller",
    d="it leaves out the answers that are wrong")
WHY_MATCHED = dict(
    a="two mantissa bits are enough to hold every gradient",
    b="the rollout's noise makes the policy explore",
    c="the policy that acts is the policy that learns: the gradient is that of what was sampled",
    d="FP32 on the rollout's side was too slow to keep up")


def check(mine):
    arms = getattr(mine, "ARMS", None)
    require(isinstance(arms, dict) and set(arms) == set(ARMS),
            f"ARMS has the entries {', '.join(ARMS)}, each with the flags of that run.")
    for name, wanted in ARMS.items():
        right(name, settings(name, arms[name]), *wanted)
    yield "the flags of the four runs"
    steps = {name: steps_of(place(f"06-{name}")) for name in ARMS}
    missing = [name for name in ARMS if not steps[name]]
    require(not missing, f"No finished run of {', '.join(missing)} is there: python -m workshop run 6 "
            "(about two minutes)")
    changed = [name for name in ARMS if differs(steps[name][0], settings(name, arms[name]))]
    require(not changed, f"The flags of {', '.join(changed)} are others now than when it ran: "
            "python -m workshop run 6")
    curves = {name: [m["accuracy"] for m in steps[name][1]] for name in ARMS}
    ends = {name: smooth(c) for name, c in curves.items()}
    yield "; ".join(f"{name}: best {e.max():.2f}, in the end {e[-1]:.2f}" for name, e in ends.items())
    fell = {name for name, c in curves.items() if collapsed(dict(curves=dict(accuracy=c)))}
    said = getattr(mine, "COLLAPSED", None)
    require(isinstance(said, (list, tuple, set)) and said != [], "COLLAPSED is empty: which runs "
            "collapsed? The rule: the last ten steps lie 0.2 or more below the best ten.")
    require(set(said) <= set(ARMS), f"COLLAPSED names {', '.join(set(said) - set(ARMS))}; the runs are "
            f"{', '.join(ARMS)}.")
    if "mismatch" not in fell:
        raise Wrong("On this machine the run with the mismatch did not collapse, as one seed in five "
                    "does not. Take another: python -m workshop run 6 --seed 2")
    for name in ARMS:
        require((name in said) == (name in fell), f"{name} {'did' if name in fell else 'did not'} "
                f"collapse: its best ten steps were at {ends[name].max():.2f}, its last ten at "
                f"{ends[name][-1]:.2f}.")
    yield f"collapsed: {', '.join(sorted(fell))}"
    for name, key, choices, wrong in (
            ("TIS", "b", WHY_TIS, dict(
                a=f"its KL was {mean_kl(steps['token-tis'][1]):.1e}, not 0: the mismatch is still there.",
                c="its flags have the same --lr as the others.",
                d="that is no importance weight. It looks at pi and mu alone, not at rewards.")),
            ("MATCHED", "c", WHY_MATCHED, dict(
                a=f"it ends at {ends['matched'][-1]:.2f} and fp32 at {ends['fp32'][-1]:.2f}: two bits do "
                  "cost something. But it does not collapse.",
                b="the rollout without noise, of fp32, does not collapse either.",
                d="no run waits for another: all are steps of one program."))):
        said = word(mine, name, "which letter is it?", choices)
        require(said == key, f"{name}: not {said!r}, \"{choices[said]}\": {wrong.get(said)}")
        yield f"{name}: {choices[said]}"
    yield f"KL a token: mismatch {mean_kl(steps['mismatch'][1]):.0e}, token-tis " \
          f"{mean_kl(steps['token-tis'][1]):.0e}, matched {mean_kl(steps['matched'][1]):.0e}"


def mean_kl(steps):
    return sum(float(m["kl_k3"]) for m in steps) / len(steps)


def settings(name, flags):
    require(isinstance(flags, str), f"ARMS[{name!r}] is a text with flags.")
    try:
        cfg, given = parse_config([*LAB, "--device", "cpu", "--preset", "cpu", *shlex.split(flags)])
        return check_flags(cfg, given)
    except (InputError, ValueError) as e:
        raise Wrong(f"ARMS[{name!r}]: {e}") from None
    except SystemExit:
        raise Wrong(f"ARMS[{name!r}] = {flags!r}: see the line above.") from None


def differs(then, now):
    return any(then[k] != getattr(now, k) for k in
               ("precision", "rollout_precision", "algo", "old_policy", "correction", "exact"))


def right(name, cfg, rollout, training, weighed):
    have, where = (cfg.rollout_format, cfg.train_format), f"ARMS[{name!r}]"
    require(have != (training, rollout) or rollout == training, f"{where} has the two formats the "
            f"wrong way round. --precision is training's, --rollout-precision the rollout's: here "
            f"training has {training}.")
    require(have == (rollout, training), f"{where}: the rollout is in {have[0]} and training in "
            f"{have[1]}; asked for are {rollout} and {training} (--rollout-precision, --precision).")
    require(cfg.algo == "dr-grpo", f"{where} takes the algorithm {cfg.algo}: compare like with like, "
            "all four are dr-grpo.")
    require(cfg.old_policy == "recomputed", f"{where} lacks --old-policy recomputed. Without it the "
            "ratio is taken to mu and holds the mismatch already: that is a cure of its own.")
    if weighed:
        require(cfg.correction != "none", f"{where} has no correction: --correction token-tis.")
        require(cfg.correction == "token-tis", f"{where} has the correction {cfg.correction}, not "
                "token-tis.")
    else:
        require(cfg.correction == "none", f"{where} has a correction. Only token-tis has one: each run "
                "changes one thing.")


# --------------------------------------------------------------------------------------------------


def jobs(mine, flags):
    return {f"06-{name}": [*LAB, "--device", "cpu", "--preset", "cpu", *shlex.split(text), *flags]
            for name, text in mine.ARMS.items()}


def install(mine):
    """Nothing: the program as it is."""
