"""report/checks.py: is this run healthy? Each check gives a color, its figure and what it means."""
import math

import numpy as np

from run.lines import diagnose

GOOD, LOOK, BAD = "good", "look", "bad"


def checks(steps):
    """steps: the metrics of a run -> [(color, question, figure, sentence)]."""
    if not steps:
        return []
    return [check(Series(steps)) for check in (loss, learning, entropy, clipped, truncated, gap,
                                               skipped, signal)]


class Series:
    """Metrics by name. first, last: means of five steps at either end. off: what the run's own
    notes say of these steps, by topic."""

    def __init__(self, steps):
        self.steps, self.off = steps, dict(diagnose(steps))

    def all(self, key):
        return np.array([float(m.get(key, math.nan)) for m in self.steps])

    def first(self, key):
        return float(self.all(key)[:5].mean())

    def last(self, key):
        return float(self.all(key)[-5:].mean())


def grade(x, good, bad):
    """Small is good."""
    return GOOD if x <= good else LOOK if x <= bad else BAD


def loss(s):
    same = s.last("frac_zero_std")
    color = LOOK if same > 0.9 and s.last("accuracy") < 0.9 else GOOD
    return color, "Why is my loss near 0?", f"loss {s.last('loss'):.1e}", (
        "It should be. The advantages of a group add up to 0, and before an update the ratio is 1: "
        "so the losses of a group cancel, but for what its answers differ in length, and for what is "
        "clipped. The gradient does not cancel: its norm is "
        f"{s.last('grad_norm'):.2g}. Look at the accuracy.")


def learning(s):
    a, b = s.first("accuracy"), s.last("accuracy")
    color = BAD if "falls" in s.off else GOOD if b >= 0.95 or b > a + 0.02 else LOOK
    return color, "Does it learn?", f"accuracy {a:.2f} to {b:.2f}", s.off.get("falls") or (
        "Means of the first and the last five steps."
        + " It falls: try a lower learning rate." * (color == LOOK and b < a - 0.02)
        + " It is level: look at the groups without signal below." * (color == LOOK and b >= a - 0.02))


def entropy(s):
    a, b = s.first("entropy"), s.last("entropy")
    kept = b / a if a > 0 else 1.0
    color = GOOD if kept > 0.1 or s.last("accuracy") > 0.9 else LOOK
    return color, "Does it still explore?", f"entropy {a:.3f} to {b:.3f} nats", (
        "It falls as the model gets sure. At 0 all answers of a group are the same, and nothing is "
        "learned any more.")


def clipped(s):
    x = s.last("clipped_share")
    return grade(x, 0.05, 0.2), "How much is clipped?", f"{x:.1%} of the tokens", (
        "Tokens whose ratio has left the clip range get no gradient. Before the first update of a "
        "batch there are none.")


def truncated(s):
    x = s.last("truncated")
    return grade(x, 0.05, 0.2), "Do answers end?", f"{x:.1%} cut off", (
        "An answer without a stop token counts as wrong.")


def gap(s):
    kl, a, b = s.last("kl_k3"), s.first("logp_gap_mean"), s.last("logp_gap_mean")
    color = BAD if "mismatch" in s.off else grade(kl, 1e-4, 1e-3)
    figure = f"KL {kl:.0e} nats a token, mean gap {a:.0e} to {b:.0e}"
    return color, "Do rollout and training agree?", figure, s.off.get("mismatch") or (
        "In the paper two engines in BF16 have a KL of 1e-3. The gap tends to fall as the entropy "
        "does: rounding changes a sure model little.")


def skipped(s):
    n = int(s.all("skipped_steps")[-1])
    color = grade(n / len(s.steps), 0.1, 0.3)
    return color, "Do gradients overflow?", f"{n} updates skipped", (
        "The loss scaler skips an update whose gradients are not finite, and halves the scale. A "
        "few at the start are normal.")


def signal(s):
    x, solved = s.last("frac_zero_std"), s.last("accuracy") > 0.9
    color = GOOD if solved else grade(x, 0.6, 0.9)
    return color, "Which groups teach something?", f"{1 - x:.0%} of the groups", (
        "The others agree: all right or all wrong, advantage 0. " + (
            "Nearly everything is solved." if solved else
            "Problems of middling difficulty teach most."))
