"""algorithms.py: what makes one policy-gradient algorithm differ from another, as pure functions.

    advantage   how much better an answer is than its group          rewards (P, G) -> (P, G)
    loss        what one token adds to the loss                      Tokens -> (R, T)
    average     what a token counts, and what divides the sum        mask (R, T) -> (R, 1), (R,)
    correction  a weight for what another policy sampled            log-ratio -> weight, kept (R, T)

R answers of T columns, FP32. Three policies:

    mu       acted. Its log-probs were recorded as it did (`logp_rollout`)
    pi_old   is what PPO's ratio compares pi with (`logp_old`)
    pi       learns (`logp`, the only one with a gradient)

With --old-policy rollout ("bypass") pi_old is mu: the ratio holds the mismatch too. With recomputed
("decoupled") it is pi before the batch's first update: the ratio does not hold the mismatch. Then a
correction, pi_old / mu, can put it back.

A loss of your own is a function like `clipped` and a line in ALGORITHMS at the end.
"""
import math
from dataclasses import dataclass, field
from typing import Callable

import torch

# --------------------------------------------------------------------------------------------------
# Advantages. Example: rewards [[1, 1, 0, 0]]. A group that agrees gets zeros, mostly.


def centred(rewards):
    """Reward - mean of the group (Dr.GRPO: Liu et al. 2025). Example: [.5, .5, -.5, -.5]."""
    agree = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)  # a mean may be off
    return torch.where(agree, 0.0, rewards - rewards.mean(1, keepdim=True))


def standardised(rewards):
    """(reward - mean) / (std + 1e-8), std of the population (GRPO: Shao et al. 2024). Example:
    [1, 1, -1, -1]. One wrong answer of 64 gets -7.9. TRL: the sample's std + 1e-4."""
    return centred(rewards) / (rewards.std(1, correction=0, keepdim=True) + 1e-8)


def leave_one_out(rewards):
    """Reward - mean of the others (RLOO: Ahmadian et al. 2024). Example: [2, 2, -2, -2] / 3."""
    return centred(rewards) * (rewards.shape[1] / (rewards.shape[1] - 1))


def batch_baseline(rewards):
    """Reward - mean of the batch (REINFORCE with a baseline: Williams 1992), without groups."""
    return rewards - rewards.mean()


def overlong(lengths, room, zone):
    """What a long answer loses, (R,): 0 up to room - zone tokens, falling to -1 at `room` (DAPO: Yu
    et al. 2025, eq. 13). Example: room 100, zone 20: 90 tokens -> -0.5."""
    return -((lengths - (room - zone)) / max(1, zone)).clamp(0, 1) * (zone > 0)


# --------------------------------------------------------------------------------------------------
# Losses, a number per token, (R, T)


@dataclass
class Tokens:
    """What a loss may look at: some answers, (R, T) where nothing else is said."""
    mask: torch.Tensor                              # bool: the tokens that were sampled
    logp: torch.Tensor                              # log pi, with its gradient
    entropy: torch.Tensor                           # of pi at each token, nats, with its gradient
    logp_rollout: torch.Tensor                      # log mu
    logp_old: torch.Tensor | None                   # log pi_old; None: pi, before this update
    advantage: torch.Tensor                         # (R,)
    logp_reference: torch.Tensor | None = None      # of the policy before RL, with --kl-beta
    clip: tuple = (0.2, 0.2)                        # the ratio counts from 1 - low to 1 + high
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
    An entropy bonus would be one more term: - 0.01 * t.entropy."""
    return -t.A * t.logp


def clipped(t):
    """max(-A r, -A clip(r, 1 - low, 1 + high)), r = pi / pi_old (PPO: Schulman et al. 2017, eq. 7).
    A token whose ratio has moved past the clip in the wanted direction gets no more gradient."""
    ratio, (low, high) = ratio_of(t.logp - t.logp_old), t.clip
    return torch.maximum(-t.A * ratio, -t.A * ratio.clamp(1 - low, 1 + high))


def sequence_clipped(t):
    """`clipped` with one ratio for a whole answer, s = exp(mean_t log(pi / pi_old)) (GSPO: Zheng et
    al. 2025, eq. 14). Written sg(s) pi / sg(pi): its value is s, its gradient each token's own."""
    s, (low, high) = ratio_of(mean((t.logp - t.logp_old).detach(), t.mask)), t.clip
    ratio = s * ratio_of(t.logp - t.logp.detach())
    return torch.maximum(-t.A * ratio, -t.A * ratio.clamp(1 - low, 1 + high))


def clipped_weight(t):
    """-sg(min(r, 1 + high)) A log pi (CISPO: MiniMax 2025, eq. 4): no token loses its gradient."""
    return -ratio_of(t.logp - t.logp_old).detach().clamp(max=1 + t.clip[1]) * t.A * t.logp


def k3(logp, logp_ref):
    """KL[pi || reference] per token: e^d - 1 - d, d = log ref - log pi (Schulman 2020; GRPO eq.
    4)."""
    d = (logp_ref - logp).clamp(-20, 20)
    return torch.expm1(d) - d


# --------------------------------------------------------------------------------------------------
# Averages: the loss is sum(loss * weight) / units.sum(), over the tokens that the correction kept.
# A rejected token counts in neither: in the denominator it would only make the step smaller.


def mean(x, mask):
    """(R, T) -> (R, 1), over each answer's own tokens."""
    return (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def per_answer(kept, room):
    """Each answer counts 1, however long: a token of a long wrong one is punished less."""
    n = kept.sum(1, keepdim=True)
    return 1 / n.clamp(min=1), (n > 0).float()[:, 0]


def constant(kept, room):
    """Each token counts 1 / room, the longest possible answer: no such bias (Dr.GRPO)."""
    return torch.full((len(kept), 1), 1 / room, device=kept.device), kept.any(1).float()


def per_token(kept, room):
    """The mean over all tokens of the batch (DAPO)."""
    return torch.ones(len(kept), 1, device=kept.device), kept.sum(1).float()


# --------------------------------------------------------------------------------------------------
# Corrections: weights rho of pi / mu, without a gradient. Level: token, answer. Rule: how it is cut


def token(log_ratio, mask):
    """rho_t of each token by itself: small variance, biased as soon as answers are long."""
    return ratio_of(log_ratio)


def sequence(log_ratio, mask):
    """The product over the answer: unbiased, its variance grows exponentially with the length."""
    return ratio_of((log_ratio * mask).sum(1, keepdim=True)).expand(mask.shape)


def geometric(log_ratio, mask):
    """The geometric mean over the answer: its mismatch, whatever its length."""
    return ratio_of(mean(log_ratio, mask)).expand(mask.shape)


def truncate(rho, low, high):
    """min(rho, high), and not below low: TIS, truncated importance sampling."""
    return rho.clamp(low, high), torch.ones_like(rho, dtype=torch.bool)


def reject(rho, low, high):
    """rho where low <= rho <= high; the rest is left out: MIS, masked importance sampling."""
    kept = (rho >= low) & (rho <= high)
    return rho * kept, kept


def only_reject(rho, low, high):
    """`reject` with a weight of 1."""
    _, kept = reject(rho, low, high)
    return kept.float(), kept


# name: (level, rule, low, high). token-tis: Yao et al. 2025; token-mis: IcePop (arXiv 2510.18855);
# seq-*: arXiv 2510.26788, C = 3 in its sanity test (its scripts' "PG seq MIS" truncates; here the
# name says what is done); geometric: verl's rollout correction.
CORRECTIONS = {
    "token-is": (token, truncate, 0.0, math.inf),
    "token-tis": (token, truncate, 0.0, 2.0),
    "token-mis": (token, reject, 0.5, 5.0),
    "seq-is": (sequence, truncate, 0.0, math.inf),
    "seq-tis": (sequence, truncate, 0.0, 3.0),
    "seq-mis": (sequence, reject, 0.0, 3.0),
    "geometric": (geometric, only_reject, 0.999, 1.001),
    "none": (token, truncate, 1.0, 1.0),
}


def parse_correction(text):
    """`seq-mis`, `seq-mis:10` (another cap), `token-mis:0.5:5` (another band) -> level, rule,
    ends."""
    name, *ends = text.split(":")
    level, rule, low, high = CORRECTIONS[name]
    return level, rule, *map(float, ends if len(ends) > 1 else (low, *(ends or [high])))


def correct(correction, log_ratio, mask):
    """log(pi / mu) (R, T) -> weight (R, T), kept (R, T) bool, False off the answers."""
    level, rule, low, high = parse_correction(correction)
    weight, kept = rule(level(log_ratio.detach(), mask), low, high)
    return weight * mask, kept & mask


# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Algorithm:
    about: str
    advantage: Callable
    loss: Callable
    average: Callable
    has_ratio: bool                                 # whether the loss looks at logp_old
    settings: dict = field(default_factory=dict)    # what it sets, unless a flag says otherwise


ALGORITHMS = {
    "dr-grpo": Algorithm("reward - group mean, clipped ratio", centred, clipped, constant, True),
    "grpo": Algorithm("A / std, clipped ratio, mean over each answer",
                      standardised, clipped, per_answer, True),
    "reinforce": Algorithm("reward - batch mean", batch_baseline, policy_gradient, constant, False),
    "pg": Algorithm("reward - group mean, no ratio", centred, policy_gradient, constant, False),
    "rloo": Algorithm("reward - others' mean", leave_one_out, policy_gradient, constant, False),
    "gspo": Algorithm("A / std, one clipped ratio per answer", standardised, sequence_clipped,
                      per_answer, True, dict(clip=(3e-4, 4e-4))),
    "dapo": Algorithm("grpo with clip-higher, mean over tokens, dynamic sampling", standardised,
                      clipped, per_token, True, dict(clip=(0.2, 0.28), dynamic_sampling=3)),
    "cispo": Algorithm("A / std, ratio as a cut weight, mean over tokens", standardised,
                       clipped_weight, per_token, True, dict(clip=(0.2, 4.0))),
}


def decoupled(cfg):
    """Whether the ratio is taken to pi as the training code computes it, and not to mu."""
    return ALGORITHMS[cfg.algo].has_ratio and cfg.old_policy == "recomputed"


def policy_loss(cfg, t):
    """-> the loss of some answers, summed and not yet divided, and sums of tokens for the metrics.
    The weight is of pi_old / mu where the ratio is pi / pi_old, else of pi / mu."""
    algorithm, (low, high) = ALGORITHMS[cfg.algo], t.clip
    acted = t.logp_old if decoupled(cfg) else t.logp.detach()
    weight, kept = correct(cfg.correction, acted - t.logp_rollout, t.mask)
    penalty = torch.zeros_like(t.logp) if t.logp_reference is None else k3(t.logp, t.logp_reference)
    loss = weight * algorithm.loss(t) + cfg.kl_beta * penalty
    total = (loss * algorithm.average(kept, t.room)[0])[kept].sum()
    with torch.no_grad():
        level = geometric if algorithm.loss is sequence_clipped else token
        ratio, used = level(t.logp - t.logp_old, t.mask), weight[kept].double()
        outside = (ratio < 1 - low) | (ratio > 1 + high)
        stats = dict(tokens=t.mask.sum(), kept=kept.sum(), clipped=(outside & t.mask).sum(),
                     weight=used.sum(), weight2=used.square().sum(), kl_ref=penalty[t.mask].sum())
    return total, stats
