"""Why FP16 needs a loss scale, and BF16 does not: where gradients lie, what is lost, and what that does to learning.

    python -m experiments.loss_scale

Left: exponents of all gradients of activations in one update, FP32, as they are; what FP16 cannot hold it turns to zero. Middle:
the share lost for any loss scale. The gradients of a batch shrink as 1 / (tokens of the batch), so a long-answer job has
smaller ones: the scale's axis is the answer to "what if" too. Right: learning in FP16 from first scales of 1 to 2^16, in tf32,
which has FP16's mantissa and FP32's exponents and no scale, and in e4m10, whose smallest number is 256 times as large as
FP16's: what FP16 would do with batches of 256 times as many tokens. Writes results/loss_scale.json and .png.
"""
import sys

import numpy as np
import torch

from algorithms import centred
from data import draw_problems, stream
from experiments.lab import GPU, LAB, QUICK, Job, Lab, band, paired, spread, summary
from operators import numerics
from operators.device import pick_device
from precision import make_scaler, parse_format
from run.base import get_base, load_task
from run.console import run_main
from sample import Sampler
from train_rl import Batch, collect, learn, parse_config

LOW, HIGH = -80, 20                                             # exponents of 2 that are told apart
SCALES = (0, 4, 8, 16)


def exponents(cfg, seed):
    """Counts of floor(log2 |x|) from LOW on, over the gradients of all activations of one step; the first place counts zeros."""
    device, env = pick_device(cfg.device), load_task(cfg)
    model = get_base(cfg, device)
    num = numerics("fp32", device)
    model.use(num.hold(model.parameters()))
    problems = draw_problems(env.task, cfg.prompts, stream(seed, 40))
    rollout, rewards = collect(Sampler(model), env, problems, cfg, (seed, 41))
    counts = np.zeros(HIGH - LOW + 1, dtype=np.int64)           # the first place counts zeros

    def spy(kind, where, x, raw):
        if kind == "backward":
            e = torch.where(x == 0, LOW - 1.0, x.abs().log2().floor().clamp(LOW, HIGH - 1)).long() - LOW + 1
            counts[:] += torch.bincount(e.flatten(), minlength=len(counts)).cpu().numpy()
    num.spy = spy
    rows = torch.arange(len(rollout.length), device=device).chunk(cfg.updates_per_batch)[0]      # one update's, as a run has
    batch = Batch(rollout, advantage=centred(rewards).flatten())
    learn(model, batch, cfg, make_scaler(num), env.answer_length, rows=rows)
    return counts


def lost(counts, scale, fmt):
    """Share of the nonzero gradients, times 2^scale, that the format rounds to zero: below half its smallest subnormal number."""
    edge = int(np.log2(fmt.smallest)) - 1 - scale
    e = np.arange(LOW, HIGH)
    return float(counts[1:][e < edge].sum() / counts[1:].sum())


def main(argv=None):
    lab = Lab("loss_scale", __doc__, argv)
    size = lab.pick([*LAB, "--steps", "100"], [*QUICK, "--heldout", "0", "--steps", "3"],
                    [*GPU, "--steps", "60"])
    scales = SCALES[::3] if lab.quick else SCALES
    seeds = lab.seeds
    names = {**{f"fp16, scale 2^{k}": ["--precision", "fp16", "--init-scale", str(2.0 ** k)] for k in scales},
             "tf32, no scale": ["--precision", "tf32"]}
    if not lab.quick:                                           # as FP16 would be with batches of 256 times as many tokens
        names |= {f"e4m10, scale 2^{k}": ["--precision", "e4m10", "--init-scale", str(2.0 ** k)] for k in (0, 10)}
    records = lab.sweep([Job(n, s, (*lab.device(), *size, *f)) for s in range(seeds) for n, f in names.items()])
    result = summary(records)
    counts = [exponents(parse_config([*lab.device(), *size, "--seed", str(seed)])[0], seed) for seed in range(seeds)]
    fp16, bf16 = parse_format("fp16"), parse_format("bf16")
    share = {k: spread([lost(c, k, fp16) for c in counts]) for k in range(-24, 33, 4)}
    total = sum(c.sum() for c in counts)
    print(f"{total} gradients of activations, {sum(c[0] for c in counts) / total:.1%} of them zero in FP32 already")
    for k in (0, 16):
        print(f"scale 2^{k}: FP16 turns {share[k]['mean']:.2%} of the others to zero, BF16 "
              f"{np.mean([lost(c, k, bf16) for c in counts]):.2%}")
    pairs = {f"{n} - tf32": paired(records, n, "tf32, no scale") for n in names if n != "tf32, no scale"}
    if not lab.quick:
        pairs["e4m10, 2^0 - 2^10"] = d = paired(records, "e4m10, scale 2^0", "e4m10, scale 2^10")
        print(f"e4m10 without a scale against e4m10 with one: {d['mean'] or 0:+.3f} (standard error {d['se'] or 0:.3f}), "
              f"{'differ' if d['significant'] else 'no difference shown'}")
    for n, s in result.items():
        a, d = s["accuracy"], pairs.get(f"{n} - tf32", {})
        told = f"; against tf32 {d['mean']:+.3f} (standard error {d['se']:.3f})" if d.get("se") is not None else ""
        print(f"{n:18} {'accuracy {mean:.3f} sd {sd}'.format(**a) if a else 'broke off'}, {s['skipped']} skips{told}")
    lab.save(dict(summary=result, pairs=pairs, lost_by_scale=share, exponents=[c.tolist() for c in counts], lowest=LOW), records)
    plot = lab.figure(1, 3, (14, 4.2))
    if plot:
        fig, (ax,) = plot
        e, c = np.arange(LOW, HIGH), np.sum(counts, 0)[1:]
        ax[0].bar(e, c / c.sum(), 1.0, color="gray")
        for k, color in ((0, "C3"), (16, "C0")):
            ax[0].axvline(int(np.log2(fp16.smallest)) - 1 - k, color=color, label=f"left of this FP16 has zeros, scale 2^{k}")
        ax[0].set(title="gradients of activations, FP32", xlabel="exponent of 2", ylabel="share", xlim=(-60, 5),
                  ylim=(0, 1.3 * (c / c.sum()).max()))
        ax[0].legend(fontsize=7, loc="upper left")
        ax[1].plot(list(share), [s["mean"] for s in share.values()], "o-", ms=3)
        ax[1].axvline(16, color="C0", ls=":", label="the first scale of a run")
        ax[1].axvline(0, color="C3", ls=":", label="none")
        ax[1].set(title="share that FP16 turns to zero", xlabel="log2 of the loss scale", ylabel="share of nonzero gradients")
        ax[1].legend(fontsize=8)
        for n in names:
            rs = [r for r in records if r["name"] == n]
            band(ax[2], rs, "accuracy", n, window=min(5, len(rs[0]["curves"]["accuracy"])))
        ax[2].set(title=f"learning, mean and range of {seeds} seeds", xlabel="RL step", ylabel="sampled accuracy", ylim=(0, 1.02))
        ax[2].legend(fontsize=8, loc="lower right")
        lab.draw(fig)


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
