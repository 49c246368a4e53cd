"""algorithms.py: what makes one policy-gradient algorithm differ from another, as short pure functions.

    advantage   how much better an answer is than its group            rewards (P, G) -> (P, G)
    loss        what one token adds to the loss                        Tokens -> (R, T)
    average     what a token counts, and what the sum is divided by    mask (R, T) -> (R, 1), (R,)
    correction  a weight for what another policy sampled               log-ratio (R, T) -> weight, kept

R answers of T columns. `mask` (R, T) is True on the tokens that were sampled; what stands elsewhere does
not matter. All FP32. There are three policies:

    mu       acted. Its log-probs were recorded as it did (`logp_rollout`)
    pi_old   is what PPO's ratio compares pi with (`logp_old`)
    pi       learns (`logp`, the only one with a gradient)

With --old-policy rollout ("bypass") pi_old is mu, and the ratio pi / mu holds the mismatch too. With
--old-policy recomputed ("decoupled") pi_old is pi before the batch's first update, as the training code
computes it. Then the ratio forgets the mismatch, and a correction pi_old / mu has to bring it back.

A loss of your own is a function like `clipped` and a line in ALGORITHMS at the end.
"""
import math
from dataclasses import dataclass, field
from typing import Callable

import torch

from precision import InputError, nearest

# ---------------------------------------------------------------------------------------------------------------------
# Advantages. Example: rewards [[1, 1, 0, 0]]. A group that agrees gets zeros, but from `batch_baseline`.


def centred(rewards):
    """r - mean of the group (Dr.GRPO: Liu et al. 2025, arXiv 2503.20783). Example: [.5, .5, -.5, -.5]."""
    agree = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)      # the mean of equal fractions may be off by a bit
    return torch.where(agree, 0.0, rewards - rewards.mean(1, keepdim=True))


def standardised(rewards):
    """(r - mean) / (std + 1e-8), std of the population (GRPO: Shao et al. 2024, section 4.1.2). Example: [1, 1, -1, -1].
    Nearly solved problems get large advantages: one wrong answer of 64 gets -7.9. TRL divides by the sample's std + 1e-4."""
    return centred(rewards) / (rewards.std(1, correction=0, keepdim=True) + 1e-8)


def leave_one_out(rewards):
    """r - mean of the others, = G / (G - 1) * centred (RLOO: Ahmadian et al. 2024, section 2.3). Example: [2, 2, -2, -2] / 3."""
    return centred(rewards) * (rewards.shape[1] / (rewards.shape[1] - 1))


def batch_baseline(rewards):
    """r - mean of the batch (REINFORCE with a baseline: Williams 1992). Groups do not matter."""
    return rewards - rewards.mean()


def overlong(lengths, room, zone):
    """What a long answer loses, (R,): 0 up to room - zone tokens, then falling to -1 at `room`, where answers are cut off
    (DAPO: Yu et al. 2025, eq. 13). lengths (R,), stop token included. Example: room 100, zone 20: 90 tokens -> -0.5."""
    return -((lengths - (room - zone)) / zone).clamp(0, 1) if zone else torch.zeros_like(lengths, dtype=torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Losses, each a number per token, (R, T)


@dataclass
class Tokens:
    """What a loss may look at: some answers, (R, T) where nothing else is said."""
    mask: torch.Tensor                              # bool: the tokens that were sampled
    logp: torch.Tensor                              # log pi, with its gradient
    entropy: torch.Tensor                           # of pi's distribution at each token, nats, with its gradient
    logp_rollout: torch.Tensor                      # log mu
    logp_old: torch.Tensor | None                   # log pi_old; None: pi itself, before this update
    advantage: torch.Tensor                         # (R,)
    logp_reference: torch.Tensor | None = None      # log-probs of the policy before RL, with --kl-beta
    clip: tuple = (0.2, 0.2)                        # the ratio counts from 1 - clip[0] to 1 + clip[1]
    room: int = 1                                   # tokens of the longest answer possible

    def __post_init__(self):
        self.A = self.advantage[:, None]
        if self.logp_old is None:
            self.logp_old = self.logp.detach()


def ratio_of(log_ratio):
    """exp, of log-ratios within 20: 5e8 is enough of a weight, and e^89 would be inf."""
    return log_ratio.clamp(-20, 20).exp()


def policy_gradient(t):
    """-A log pi (Williams 1992). No ratio, no clip: a correction keeps it near mu, or nothing does.
    With an entropy bonus it would be -A log pi - 0.01 * entropy, so: - 0.01 * t.entropy."""
    return -t.A * t.logp


def clipped(t):
    """max(-A r, -A clip(r, 1 - low, 1 + high)), r = pi / pi_old (PPO: Schulman et al. 2017, eq. 7). The
    pessimistic of the two: what has moved far enough in the good direction has no gradient, what has
    moved in the bad one always has."""
    ratio, (low, high) = ratio_of(t.logp - t.logp_old), t.clip
    return torch.maximum(-t.A * ratio, -t.A * ratio.clamp(1 - low, 1 + high))


def sequence_clipped(t):
    """`clipped` with one ratio for a whole answer, the geometric mean of its tokens':
    s = exp(mean_t log(pi / pi_old)) (GSPO: Zheng et al. 2025, eq. 14). Written sg(s) pi / sg(pi): its
    value is s, its gradient each token's own."""
    s, (low, high) = ratio_of(mean((t.logp - t.logp_old).detach(), t.mask)), t.clip
    ratio = s * ratio_of(t.logp - t.logp.detach())
    return torch.maximum(-t.A * ratio, -t.A * ratio.clamp(1 - low, 1 + high))


def clipped_weight(t):
    """-sg(min(r, 1 + high)) A log pi (CISPO: MiniMax 2025, arXiv 2506.13585, eq. 4): every token keeps
    its gradient, its weight is cut."""
    weight = ratio_of(t.logp - t.logp_old).detach().clamp(max=1 + t.clip[1])
    return -weight * t.A * t.logp


def k3(logp, logp_ref):
    """KL[pi || reference] per token: e^d - 1 - d with d = log ref - log pi, never negative (Schulman 2020; GRPO eq. 4)."""
    d = (logp_ref - logp).clamp(-20, 20)
    return torch.expm1(d) - d


# ---------------------------------------------------------------------------------------------------------------------
# Averages: the loss is sum(loss * weight) / units.sum(), over the tokens that the correction kept. What is rejected counts in
# neither: left in the denominator it would lower the learning rate without a word.


def mean(x, mask):
    """(R, T) -> (R, 1), over each answer's own tokens."""
    return (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def per_answer(kept, room):
    """Each answer counts 1, however long; so a token of a long answer counts less, and long wrong answers are punished less."""
    n = kept.sum(1, keepdim=True)
    return 1 / n.clamp(min=1), (n > 0).float()[:, 0]


def constant(kept, room):
    """Each token counts 1 / room, the longest possible answer, and the sum is divided by the answers: no such bias (Dr.GRPO). So
    a rejected token leaves no denominator, there being none of tokens; an answer does when all of its tokens are rejected."""
    return torch.full((len(kept), 1), 1 / room, device=kept.device), kept.any(1).float()


def per_token(kept, room):
    """The mean over all tokens of the batch (DAPO)."""
    return torch.ones(len(kept), 1, device=kept.device), kept.sum(1).float()


# ---------------------------------------------------------------------------------------------------------------------
# Corrections: weights rho of pi / mu (without a gradient) for samples of mu. A level says of what, a rule what becomes of it.


def token(log_ratio, mask):
    """rho_t of each token by itself: small variance, biased as soon as answers are long."""
    return ratio_of(log_ratio)


def sequence(log_ratio, mask):
    """The product over the answer: unbiased, and its variance grows exponentially with the answer's length."""
    return ratio_of((log_ratio * mask).sum(1, keepdim=True)).expand(mask.shape)


def geometric(log_ratio, mask):
    """The geometric mean over the answer: a measure of its mismatch that does not grow with its length."""
    return ratio_of(mean(log_ratio, mask)).expand(mask.shape)


def truncate(rho, low, high):
    """min(rho, high), and not below low: TIS, truncated importance sampling."""
    return rho.clamp(low, high), torch.ones_like(rho, dtype=torch.bool)


def reject(rho, low, high):
    """rho where low <= rho <= high, elsewhere the token or the answer is left out: MIS, masked importance sampling."""
    kept = (rho >= low) & (rho <= high)
    return rho * kept, kept


def only_reject(rho, low, high):
    """`reject` with a weight of 1."""
    kept = (rho >= low) & (rho <= high)
    return kept.float(), kept


# name: (level, rule, low, high). Sources: token-tis Yao et al. 2025 and arXiv 2510.26788; token-mis IcePop (arXiv 2510.18855);
# seq-* arXiv 2510.26788, C = 3 in its sanity test (its scripts' "PG seq MIS" truncates; here the name says what is done);
# geometric: verl's rollout correction.
CORRECTIONS = {
    "token-is": (token, truncate, 0.0, math.inf),
    "token-tis": (token, truncate, 0.0, 2.0),
    "token-mis": (token, reject, 0.5, 5.0),
    "seq-is": (sequence, truncate, 0.0, math.inf),
    "seq-tis": (sequence, truncate, 0.0, 3.0),
    "seq-mis": (sequence, reject, 0.0, 3.0),
    "geometric": (geometric, only_reject, 0.999, 1.001),
}


def parse_correction(text):
    """`seq-mis`, `seq-mis:10` (another cap) or `token-mis:0.5:5` (another band) -> (name, low, high)."""
    name, *ends = text.split(":")
    if name == "none" and not ends:
        return "none", 0.0, math.inf
    if name not in CORRECTIONS:
        raise InputError(f"no correction {name[:40]!r}{nearest(name, CORRECTIONS)}: use none, "
                         f"{', '.join(CORRECTIONS)}, with an end or a band of its own as in seq-mis:10")
    _, _, low, high = CORRECTIONS[name]
    try:
        ends = [float(e) for e in ends]
        low, high = {0: (low, high), 1: (low, *ends), 2: tuple(ends)}[len(ends)]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"correction {text[:60]!r}: after the name stand a cap, or a low and a high end, "
                         "as in token-mis:0.5:5") from None
    if not 0 <= low < high:
        raise InputError(f"correction {text[:60]!r} keeps nothing: from {low:g} to {high:g}")
    return name, low, high


def correct(correction, log_ratio, mask):
    """log(pi / mu) (R, T) -> weight (R, T), kept (R, T) bool, False off the answers. correction: its
    text, as --correction has it."""
    name, low, high = parse_correction(correction)
    if name == "none":
        return mask.float(), mask
    level, rule, _, _ = CORRECTIONS[name]
    weight, kept = rule(level(log_ratio.detach(), mask), low, high)
    return weight * mask, kept & mask


def rejects(correction):
    """Whether it leaves tokens out, and so out of the denominator."""
    name = parse_correction(correction)[0]
    return name != "none" and CORRECTIONS[name][1] is not truncate


# -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Algorithm:
    about: str
    advantage: Callable
    loss: Callable
    average: Callable
    has_ratio: bool                                 # whether the loss looks at logp_old
    settings: dict = field(default_factory=dict)    # what it sets, unless a flag says otherwise


ALGORITHMS = {
    "dr-grpo": Algorithm("A = r - group mean, PPO's clipped ratio, constant denominator",
                         centred, clipped, constant, True),
    "grpo": Algorithm("A / std, clipped ratio, mean over each answer",
                      standardised, clipped, per_answer, True),
    "reinforce": Algorithm("A = r - batch mean, no ratio, no clip",
                           batch_baseline, policy_gradient, constant, False),
    "pg": Algorithm("A = r - group mean, no ratio, no clip",
                    centred, policy_gradient, constant, False),
    "rloo": Algorithm("A = r - mean of the others, no ratio, no clip",
                      leave_one_out, policy_gradient, constant, False),
    "gspo": Algorithm("A / std, one clipped ratio per answer",
                      standardised, sequence_clipped, per_answer, True, dict(clip=(3e-4, 4e-4))),
    "dapo": Algorithm("grpo with clip-higher, mean over tokens, dynamic sampling; --overlong where there "
                      "is room", standardised, clipped, per_token, True,
                      dict(clip=(0.2, 0.28), dynamic_sampling=3)),
    "cispo": Algorithm("A / std, ratio as a cut weight, mean over tokens",
                       standardised, clipped_weight, per_token, True, dict(clip=(0.2, 4.0))),
}
# The paper's names for what is an algorithm and a correction. Its scripts take Dr.GRPO's advantage and
# denominator for all of them.
DECOUPLED = dict(algo="dr-grpo", old_policy="recomputed")
PAPER = {
    "pg-seq-is": dict(algo="pg", correction="seq-is"),
    "pg-seq-tis": dict(algo="pg", correction="seq-tis"),
    "pg-seq-mis": dict(algo="pg", correction="seq-mis"),
    "pg-token-tis": dict(algo="pg", correction="token-tis"),
    "grpo-token-tis": dict(DECOUPLED, correction="token-tis"),
    "grpo-seq-mis": dict(DECOUPLED, correction="seq-mis:10"),
}


def decoupled(cfg):
    """Whether the ratio is taken to pi as the training code computes it, and not to mu."""
    return ALGORITHMS[cfg.algo].has_ratio and cfg.old_policy == "recomputed"


def count(cfg, kept, room):
    """What the loss of some answers is to be divided by, as a number."""
    return float(ALGORITHMS[cfg.algo].average(kept, room)[1].sum())


def policy_loss(cfg, t):
    """The loss of some answers, summed and not yet divided: a scalar, and sums over tokens for the
    metrics. The weight is of pi_old / mu where the ratio is pi / pi_old, else of pi / mu."""
    algorithm, (low, high) = ALGORITHMS[cfg.algo], t.clip
    acted = t.logp_old if decoupled(cfg) else t.logp.detach()
    weight, kept = correct(cfg.correction, acted - t.logp_rollout, t.mask)
    loss, penalty = weight * algorithm.loss(t), torch.zeros_like(t.logp)
    if t.logp_reference is not None:
        penalty = k3(t.logp, t.logp_reference)
    per, _ = algorithm.average(kept, t.room)
    total = ((loss + cfg.kl_beta * penalty) * per)[kept].sum()
    with torch.no_grad():
        level = geometric if algorithm.loss is sequence_clipped else token
        ratio = level(t.logp - t.logp_old, t.mask)
        outside = (ratio < 1 - low) | (ratio > 1 + high)
        stats = dict(tokens=t.mask.sum(), kept=kept.sum(), clipped=(outside & t.mask).sum(),
                     weight=weight[kept].double().sum(),
                     weight2=weight[kept].double().square().sum(),
                     kl_ref=penalty[t.mask].sum())
    return total, stats
