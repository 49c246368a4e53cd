"""run/meter.py: what a step's line of metrics is made of."""
import time

import numpy as np
import torch

from precision import mismatch


class Meter:
    """Collects one step's figures. Sums stay on the device until the end: a number would wait for
    it.

    logp, entropy: (R, T), what training computed for the answers learned from so far, zeros
    elsewhere."""

    def __init__(self, batch):
        self.batch, self.answer = batch, batch.rollout.is_answer
        self.logp, self.entropy = torch.zeros_like(batch.rollout.logp), torch.zeros_like(batch.rollout.logp)
        self.sums, self.losses, self.norms, self.gaps, self.routes = {}, [], [], None, {}
        self.begin = time.time()

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
        self.routes = {k: float(v) for k, v in self.sums.items() if k in ("flips", "fed", "balance")}
        return where & (r.logp != logp)

    def row(self, step, state, model, scaler, lr, shaped, rollout_seconds):
        b, tokens, spent = self.batch, int(self.answer.sum()), time.time() - self.begin
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
