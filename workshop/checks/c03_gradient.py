"""Exercise 3: the advantage and the clipped loss, against the formula a number at a time, finite
differences of it, and a live run."""
import numpy as np
import torch

from algorithms import ALGORITHMS, Algorithm, constant
from workshop.ladder import JOB, call, close, live, require, tensor

LOW, HIGH = 0.1, 0.3                    # unlike each other, so that an exchange is seen


def check(mine):
    yield from advantages(mine)
    yield from losses(mine)
    yield from gradients(mine)
    steps, _ = live("check03", mine, "--algo", "mine")
    accuracy = [m["accuracy"] for m in steps]
    last = sum(accuracy[-5:]) / 5
    require(last >= 0.85, f"A live run with it ends at an accuracy of {last:.2f}. It begins at "
            f"{accuracy[0]:.2f} and comes to 0.95 with the formula.")
    yield f"a live run with it: accuracy {accuracy[0]:.2f} in the first step, {last:.2f} in the last five"


def advantages(mine):
    for size in (1.0, 1e-3):
        rewards = np.array([[1, 0, 0, 0], [1, 1, 1, 0], [0.5, 0.25, 1, 0.125]]) * size
        truth = [[x - sum(row) / 4 for x in row] for row in rewards.tolist()]
        truth, x = np.array(truth), tensor(mine, "advantage", (3, 4), torch.tensor(rewards).float()).numpy()

        def like(other, x=x, truth=truth):
            return np.abs(x - other).max() <= 1e-4 * np.abs(truth).max()
        require(np.abs(x).max() > 0, "advantage is 0 everywhere: nothing would be learned.")
        require(not like(-truth), "advantage has the wrong sign: better answers get less.")
        require(not like(rewards), "advantage is the reward itself: take off the group's mean.")
        require(not like(rewards - rewards.mean(0)), "advantage takes off the mean over the problems. "
                "A row is a group, the answers to one problem: the mean is over the row.")
        require(not like(rewards - rewards.mean()), "advantage takes off the mean of all rewards. An "
                "easy problem's answers would all be good: the mean is over each row.")
        require(not like(truth * 4 / 3), "advantage takes off the mean of the others (that is RLOO): "
                "the group's mean holds the answer itself.")
        by = np.stack([truth / rewards.std(1, ddof=n, keepdims=True) for n in (0, 1)])
        require(not any(np.abs(x - b).max() <= 1e-2 * np.abs(b).max() for b in by), "advantage is "
                "divided by the group's deviation. That is GRPO; here Dr.GRPO's is asked, which only "
                "takes off the mean.")
        require(like(truth), f"advantage gave {x[0].round(6).tolist()} for the rewards "
                f"{rewards[0].tolist()}, not {truth[0].round(6).tolist()}.")
    for same in (1.0, 0.1, 0.7):
        x = tensor(mine, "advantage", (1, 7), torch.tensor([[same] * 7]))
        require((x.abs() < 1e-6).all(), f"Seven rewards of {same} gave advantages up to "
                f"{float(x.abs().max()):.2g}: a group that agrees teaches nothing.")
    yield "advantage"


def ratio_loss(logp, old, a):
    """The formula, for one token."""
    r = float(np.exp(logp - old))
    return max(-a * r, -a * min(max(r, 1 - LOW), 1 + HIGH))


def cases():
    """Advantages of several sizes and log-ratios on both sides of both ends: -> arrays (R, T), and
    (R, 1)."""
    rng = np.random.default_rng(0)
    a = np.array([[1.0], [-1.0], [1e-3], [-1e-3], [40.0], [-40.0]])
    shift = np.array([-1.0, -0.3, -0.05, 0.0, 0.05, 0.2, 0.6, 1.5])             # log r; ends: -0.105, 0.262
    old = -rng.exponential(1, (6, 8))
    return old + shift, old, a


def token_losses(mine, logp, old, a):
    return tensor(mine, "loss", logp.shape, torch.tensor(logp), torch.tensor(old), torch.tensor(a),
                  LOW, HIGH)


def losses(mine):
    logp, old, a = cases()
    truth = np.vectorize(ratio_loss)(logp, old, a)
    x, r, scale = token_losses(mine, logp, old, a).detach().numpy(), np.exp(logp - old), np.abs(a)
    clip = r.clip(1 - LOW, 1 + HIGH)

    def like(other):
        return (np.abs(x - other) <= 1e-4 * scale).all()
    require((x != 0).any(), "loss is 0 everywhere.")
    for other, words in (
            (-truth, "loss has the wrong sign: it would make worse answers more probable."),
            (np.minimum(-a * r, -a * clip), "loss takes the smaller of the two. Of the losses -A r and "
             "-A clip(r) it is the larger one, so that the clip can only hold a token back."),
            (-a * r, "loss does not clip: with r = 4 a token would still be pushed."),
            (-a * clip, "loss always clips. A token that has moved the wrong way must keep its "
             "gradient: take the larger of -A r and -A clip(r)."),
            (np.maximum(-a * r, -a * r.clip(1 - HIGH, 1 + LOW)), "loss has the clip's ends exchanged: "
             "the ratio counts from 1 - low to 1 + high."),
            (np.maximum(-a / r, -a * (1 / r).clip(1 - LOW, 1 + HIGH)), "loss has the ratio upside "
             "down: r = pi / pi_old = exp(logp - logp_old)."),
            (np.maximum(-a * (logp - old), -a * (logp - old).clip(1 - LOW, 1 + HIGH)), "loss takes "
             "logp - logp_old for the ratio. That is its logarithm: r = exp(logp - logp_old)."),
            (truth / 2, "loss is half of what it should be."),
            (np.maximum(-a * (logp / old), -a * (logp / old).clip(1 - LOW, 1 + HIGH)), "loss divides "
             "log-probs. The ratio is one of probabilities: exp(logp - logp_old)."),
            (np.maximum(-a * r, -a * r.clip(0.8, 1.2)), "loss clips at 0.8 and 1.2. Use low and high."),
            (-a * logp, "loss is -A log pi, REINFORCE: without a ratio, and without a clip.")):
        require(not like(other), words)
    wrong = np.abs(x - truth) > 1e-4 * scale
    i = np.unravel_index(int(wrong.argmax()), wrong.shape)
    require(not wrong.any(), f"loss gave {x[i]:.6g} for A = {a[i[0], 0]:g} and r = {r[i]:.4g}, not "
            f"{truth[i]:.6g}: the larger of -A r and -A clip(r, {1 - LOW:g}, {1 + HIGH:g}).")
    yield "loss: its value, for advantages from 0.001 to 40 and ratios from 0.4 to 4.5"


def gradients(mine):
    """Of the sum of the losses, against finite differences of the formula in FP64."""
    logp, old, a = cases()
    pi = torch.tensor(logp, requires_grad=True)
    y = tensor(mine, "loss", logp.shape, pi, torch.tensor(old), torch.tensor(a), LOW, HIGH).sum()
    require(y.requires_grad, "loss has no gradient: logp went through .detach(), .item() or numpy on "
            "its way.")
    grad, = torch.autograd.grad(y, [pi], allow_unused=True)
    formula, step = np.vectorize(ratio_loss), 1e-6
    truth = (formula(logp + step, old, a) - formula(logp - step, old, a)) / (2 * step)
    require(grad is not None and bool((grad != 0).any()), "loss has the right value and no gradient: "
            "logp went through .detach() on its way.")
    wrong = np.abs(grad.numpy() - truth) > 1e-4 * np.abs(a)
    i = np.unravel_index(int(wrong.argmax()), wrong.shape)
    require(not wrong.any(), f"loss has the right value, but at A = {a[i[0], 0]:g} and r = "
            f"{float(np.exp(logp - old)[i]):.3g} its gradient is {float(grad[i]):.4g}; finite "
            f"differences of the formula give {truth[i]:.4g}.")
    yield "loss: its gradient, against finite differences of the formula"
    outside = int((truth == 0).sum())
    require(close((grad == 0).sum(), outside), "The gradient of a token past the clip is not 0.")
    yield f"the {outside} of {truth.size} tokens that are past the clip get no gradient"


# --------------------------------------------------------------------------------------------------


def jobs(mine, flags):
    return {"03": [*JOB, "--algo", "mine", *flags]}


def install(mine):
    """--algo mine."""
    ALGORITHMS["mine"] = Algorithm("exercise 3", lambda rewards: call(mine, "advantage", rewards),
                                   lambda t: call(mine, "loss", t.logp, t.logp_old, t.A, *t.clip),
                                   constant, True)
