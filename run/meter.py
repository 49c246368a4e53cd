"""run/meter.py: what a step's line of metrics is made of."""
import time

import numpy as np
import torch


class Meter:
    """Collects one step's figures. Sums stay on the device until the end: a number would wait for
    it.

    logp, entropy: (R, T), what training computed for the answers learned from so far, zeros
    elsewhere."""

    def __init__(self, batch):
        self.batch, self.answer = batch, batch.rollout.is_answer
        self.logp, self.entropy = torch.zeros_like(batch.rollout.logp), torch.zeros_like(batch.rollout.logp)
        self.sums, self.losses, self.norms, self.gaps, self.routes = {}, [], [], None, {}
        self.begin = time.monotonic()

    def add(self, model, part, t, stats):
        """A micro-batch: the answers `part`, their Tokens t, sums over tokens by name."""
        end = t.mask.shape[1]
        self.logp[part, :end], self.entropy[part, :end] = t.logp.detach(), t.entropy.detach()
        if self.batch.rollout.routes is not None:
            stats = stats | routing(model, self.batch.rollout, part, t.mask)
        for k, v in stats.items():
            self.sums[k] = self.sums.get(k, 0.0) + v

    def measure(self, rows, logp=None):
        """The mismatch of the answers `rows`, before any update. logp: of all answers, where they
        were scored beforehand. Returns which tokens got other bits in training than in the rollout,
        (R, T)."""
        r, logp = self.batch.rollout, self.logp if logp is None else logp
        where = torch.zeros_like(self.answer)
        where[rows] = self.answer[rows]
        self.gaps = mismatch(r.logp[where], logp[where], (r.length - r.prompt_length)[rows])
        self.before, self.gap = logp, torch.where(where, r.logp - logp, 0.0)             # (R, T)
        self.routes = {k: float(v) for k, v in self.sums.items() if k in ("flips", "fed", "balance")}
        return where & (r.logp != logp)

    def row(self, step, state, model, scaler, lr, shaped, rollout_seconds):
        b, tokens, spent = self.batch, int(self.answer.sum()), time.monotonic() - self.begin
        names = list(self.sums)
        sums = dict(zip(names, torch.stack([self.sums[k].double() for k in names]).tolist()))
        kept = max(1.0, sums["kept"])
        weight = sums["weight"] / kept
        m = dict(
            step=step, reward=shaped.mean().item(), accuracy=(b.seen == 1).float().mean().item(),
            tokens=tokens, length=tokens / len(self.answer),
            truncated=1 - b.rollout.stopped.float().mean().item(),
            entropy=(self.entropy.sum() / tokens).item(),
            frac_zero_std=(b.seen.amax(1) == b.seen.amin(1)).float().mean().item(), **self.gaps,
            loss=float(np.mean(self.losses)), grad_norm=float(np.mean(self.norms)),
            kept_share=sums["kept"] / tokens, clipped_share=sums["clipped"] / tokens, weight_mean=weight,
            weight_sd=max(0.0, sums["weight2"] / kept - weight ** 2) ** 0.5,
            kl_reference=sums["kl_ref"] / tokens)
        if self.routes:
            # route_flips: share of (token, layer) whose experts were others in training than in the
            # rollout; expert_balance: tokens of a layer's most loaded expert over the mean
            layers = sum(block.experts is not None for block in model.blocks)
            m |= dict(route_flips=self.routes["flips"] / (self.routes["fed"] * layers),
                      expert_balance=self.routes["balance"] / self.routes["fed"])
        return m | dict(
            loss_scale=scaler.get_scale(), skipped_steps=state.skipped, lr=lr, t_rollout=rollout_seconds,
            t_train=spent, tokens_per_s=tokens / (rollout_seconds + spent))


def routing(model, rollout, part, where):
    """Sums over the tokens that the answers `part` fed to the experts, where (r, end) bool: times
    that a layer chose other experts than in the rollout; a layer's busiest expert over the mean,
    times tokens; tokens."""
    fed, now = where[:, 1:], model.routes()               # position t is fed to predict token t + 1
    then = rollout.routes[part, :now.shape[1]]
    flipped = (now.sort(-1).values != then.sort(-1).values).any(-1)      # the order does not matter
    chosen = now[fed].long().transpose(0, 1).flatten(1)                     # (layers, N K)
    load = torch.zeros(len(chosen), model.cfg.n_experts, device=now.device)
    load.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=load.dtype))
    balance = (load.amax(1) / load.mean(1).clamp(min=1e-9)).mean()
    return dict(flips=flipped[fed].sum(), fed=fed.sum(), balance=balance * fed.sum())


def mismatch(logp_rollout, logp_train, lengths):
    """How far the policy that acted (mu) is from the policy that learns (pi), before any update.

    logp_rollout, logp_train: FP32 (N,), the tokens of one answer after another; lengths: (R,)
    tokens per answer. With d = log mu(y_t) - log pi(y_t):
      logp_gap_mean, _p99, _max   of |d|, nats
      prob_gap_mean   mean |mu - pi| (verl's rollout_probs_diff)
      kl_k1           mean d, unbiased KL[mu || pi] per token
      kl_k3           mean (e^-d - 1 + d), never negative
      seq_kl          mean over answers of sum_t d, the paper's figure
      ratio_outliers  share of pi/mu outside [0.9, 1.1]
      exact_share     share of tokens with d == 0, bit for bit
    Source: arXiv 2510.26788 section 3; Schulman, "Approximating KL divergence" (2020)."""
    d = (logp_rollout - logp_train).double()
    gap, ratio = d.abs(), torch.exp(-d)
    answer = torch.arange(len(lengths), device=d.device).repeat_interleave(lengths.to(d.device))
    seq = d.new_zeros(len(lengths)).index_add_(0, answer, d)
    prob = (logp_rollout.double().exp() - logp_train.double().exp()).abs()
    found = dict(
        logp_gap_mean=gap.mean(), logp_gap_max=gap.max(), prob_gap_mean=prob.mean(),
        logp_gap_p99=gap.sort().values[min(len(d) - 1, int(0.99 * len(d)))],
        kl_k1=d.mean(), kl_k3=(torch.expm1(-d) + d).mean(), seq_kl=seq.mean(),
        ratio_outliers=((ratio < 0.9) | (ratio > 1.1)).double().mean(),
        exact_share=(d == 0).double().mean())
    return {k: float(v) for k, v in found.items()}
