"""algorithms.py: what makes one policy-gradient algorithm differ from another, as short pure functions.

    advantage   how much better an answer is than its group               rewards (P, G) -> (P, G)
    loss        what one token adds to the loss                           (R, T) -> (R, T)
    average     what one token counts, and what the sum is divided by     mask (R, T) -> (R, 1), (R,)
    correction  a weight for what another policy sampled                  log-ratio (R, T) -> weight, kept (R, T)

R answers of T columns; `mask` (R, T) is True on the tokens that were sampled, what stands elsewhere does not matter. All FP32.
Three policies: mu acted and its log-probs were recorded as it did (`logp_rollout`); pi_old is the proximal anchor of PPO's ratio
(`logp_old`); pi learns (`logp`, the only one with a gradient). With --old-policy rollout ("bypass") pi_old is mu, and the ratio
pi / mu holds the mismatch too. With --old-policy recomputed ("decoupled") pi_old is pi before the batch's first update, as the
training code computes it: the ratio forgets the mismatch, and a correction pi_old / mu has to bring it back, else it is hidden.

A loss of your own is a function like `clipped` and a line in ALGORITHMS at the end.
"""
import math
from dataclasses import dataclass, field
from typing import Callable

import torch

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
# Losses. advantage (R, 1). `low`, `high`: the ratio counts from 1 - low to 1 + high.


def ratio_of(log_ratio):
    """exp, of log-ratios within 20: 5e8 is enough of a weight, and e^89 would be inf."""
    return log_ratio.clamp(-20, 20).exp()


def policy_gradient(logp, logp_old, advantage, mask, low, high):
    """-A log pi (Williams 1992). No ratio, no clip: what keeps it near mu is a correction, or nothing."""
    return -advantage * logp


def clipped(logp, logp_old, advantage, mask, low, high):
    """max(-A r, -A clip(r, 1 - low, 1 + high)), r = pi / pi_old (PPO: Schulman et al. 2017, eq. 7). The pessimistic of the two:
    what has moved far enough in the good direction has no gradient, what has moved in the bad one always has."""
    ratio = ratio_of(logp - logp_old)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))


def sequence_clipped(logp, logp_old, advantage, mask, low, high):
    """`clipped` with one ratio for a whole answer, the geometric mean of its tokens': s = exp(mean_t log(pi / pi_old))
    (GSPO: Zheng et al. 2025, eq. 14). Written sg(s) pi / sg(pi): its value is s, its gradient each token's own."""
    s = ratio_of(mean((logp - logp_old).detach(), mask))
    ratio = s * ratio_of(logp - logp.detach())
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))


def clipped_weight(logp, logp_old, advantage, mask, low, high):
    """-sg(min(r, 1 + high)) A log pi (CISPO: MiniMax 2025, arXiv 2506.13585, eq. 4): every token keeps its gradient, its
    weight is cut."""
    return -ratio_of(logp - logp_old).detach().clamp(max=1 + high) * advantage * logp


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


def band(name, low=-1.0, high=-1.0):
    """The ends of a correction's band: its own where -1 is given."""
    _, _, own_low, own_high = CORRECTIONS[name]
    return own_low if low < 0 else low, own_high if high < 0 else high


def correct(name, log_ratio, mask, low=-1.0, high=-1.0):
    """log(pi / mu) (R, T) -> weight (R, T), kept (R, T) bool, False off the answers. low, high: -1 takes the correction's own."""
    if name == "none":
        return mask.float(), mask
    level, rule, _, _ = CORRECTIONS[name]
    weight, kept = rule(level(log_ratio.detach(), mask), *band(name, low, high))
    return weight * mask, kept & mask


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Algorithm:
    about: str
    advantage: Callable
    loss: Callable
    average: Callable
    settings: dict = field(default_factory=dict)          # what it sets in Config, unless a flag says otherwise

    @property
    def has_ratio(self):
        return self.loss is not policy_gradient


DECOUPLED = dict(old_policy="recomputed")
ALGORITHMS = {
    "dr-grpo": Algorithm("A = r - group mean, PPO's clipped ratio, constant denominator", centred, clipped, constant),
    "grpo": Algorithm("A / std, clipped ratio, mean over each answer", standardised, clipped, per_answer),
    "reinforce": Algorithm("A = r - batch mean, no ratio, no clip", batch_baseline, policy_gradient, constant),
    "pg": Algorithm("A = r - group mean, no ratio, no clip", centred, policy_gradient, constant),
    "rloo": Algorithm("A = r - mean of the others, no ratio, no clip", leave_one_out, policy_gradient, constant),
    "gspo": Algorithm("A / std, one clipped ratio per answer", standardised, sequence_clipped, per_answer,
                      dict(clip_low=3e-4, clip_high=4e-4)),
    "dapo": Algorithm("grpo with clip-higher, mean over tokens, dynamic sampling; --overlong for tasks with room to spare",
                      standardised, clipped, per_token, dict(clip_high=0.28, dynamic_sampling=3)),
    "cispo": Algorithm("A / std, ratio as a cut weight, mean over tokens", standardised, clipped_weight, per_token,
                       dict(clip_high=4.0)),
    # as the paper names them; its scripts take Dr.GRPO's advantage and denominator for all of these
    "pg-seq-is": Algorithm("pg, weight pi/mu of the answer", centred, policy_gradient, constant, dict(correction="seq-is")),
    "pg-seq-tis": Algorithm("pg, ... at most 3", centred, policy_gradient, constant, dict(correction="seq-tis")),
    "pg-seq-mis": Algorithm("pg, ... rejected above 3", centred, policy_gradient, constant, dict(correction="seq-mis")),
    "pg-token-tis": Algorithm("pg, weight pi/mu of the token, at most 2", centred, policy_gradient, constant,
                              dict(correction="token-tis")),
    "grpo-token-tis": Algorithm("dr-grpo against a recomputed pi_old, times pi_old/mu of the token, at most 2", centred, clipped,
                                constant, dict(correction="token-tis", **DECOUPLED)),
    "grpo-seq-mis": Algorithm("dr-grpo against a recomputed pi_old, times pi_old/mu of the answer, rejected above 10", centred,
                              clipped, constant, dict(correction="seq-mis", correction_high=10.0, **DECOUPLED)),
}


def policy_loss(algorithm, cfg, logp, logp_old, logp_rollout, advantage, mask, room, logp_ref=None):
    """The loss of some answers, summed and not yet divided by its units. logp under gradient, all (R, T); advantage (R,).

    logp_old None: pi itself before this update, that is logp without its gradient. Returns (sum, units, stats): a scalar, a
    number (what the sum over the whole batch is to be divided by), and sums over tokens for the metrics."""
    anchor = logp.detach() if logp_old is None else logp_old
    decoupled = algorithm.has_ratio and cfg.old_policy == "recomputed"
    rho = (anchor if decoupled else logp.detach()) - logp_rollout
    weight, kept = correct(cfg.correction, rho, mask, cfg.correction_low, cfg.correction_high)
    loss = weight * algorithm.loss(logp, anchor, advantage[:, None], mask, cfg.clip_low, cfg.clip_high)
    penalty = k3(logp, logp_ref) if logp_ref is not None else torch.zeros_like(logp)
    per, units = algorithm.average(kept, room)
    total = ((loss + cfg.kl_beta * penalty) * per)[kept].sum()
    with torch.no_grad():
        ratio = (geometric if algorithm.loss is sequence_clipped else token)(logp - anchor, mask)
        outside = (ratio < 1 - cfg.clip_low) | (ratio > 1 + cfg.clip_high)
        stats = dict(tokens=mask.sum(), kept=kept.sum(), clipped=(outside & mask).sum(), weight=weight[kept].sum(),
                     weight2=weight[kept].square().sum(), kl_ref=penalty[mask].sum())
    return total, units.sum(), stats
