"""How fast is a job, and how fast could this machine be?

    python -m experiments.bench                       # the default job; takes the flags of train_rl.py

Random weights of the job's shape, no answer stops early. The formats take turns in one process, and so
does the machine's own matrix product, so that a slow minute hits all of them. The clock and the work
here are those of experiments.speed too. The last line is one JSON object.
"""
import json
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from algorithms import centred
from experiments.lab import show
from model import GPT, GPTConfig
from operators import numerics
from operators.device import pick_device
from precision import make_scaler
from run.base import gpt_config, load_task
from run.console import run_main
from run.flags import Help
from run.memory import peak_memory
from sample import Sampler
from train_rl import Batch, Config, learn, parse_config, update

STAGES = "rollout", "rewards", "gradient", "update"


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(contenders, turns, device, between=lambda: None):
    """The one clock. contenders: name -> the stages of its work, called with the turn's number ->
    name -> seconds (turns, stages). Each turn runs every contender once; the first one warms up and is
    not counted."""
    times = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, stages in contenders.items():
            between()
            marks = [now(device)]
            for stage in stages:
                stage(turn)
                marks.append(now(device))
            times[name].append(np.diff(marks))
    return {name: np.array(t[1:]) for name, t in times.items()}


def seconds(times):
    """Median over the turns of all stages together."""
    return float(np.median(times.sum(1)))


def ratio(a, b):
    """Median over the turns of a / b."""
    return float(np.median(a.sum(1) / b.sum(1)))


def gemm_peak(device, dtype):
    """FLOP/s of this machine's own matrix product: the best of a few sizes, each the median of 3."""
    sizes = ([(1024, 1024, 1024), (2048, 1024, 1024), (4096, 512, 512)] if device.type == "cpu" else
             [(8192, 8192, 8192), (16384, 4096, 4096)])
    best = 0.0
    for m, k, n in sizes:
        a, b = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((m, k), (k, n)))
        best = max(best, 2 * m * k * n / seconds(take_turns({0: [lambda _: a @ b]}, 3, device)[0]))  # noqa: B023
    return best


def flops(model, tokens, context, heads):
    """Multiply-adds counted as 2, for one forward pass: `tokens` through the blocks, each with `context`
    keys on average, `heads` of them through the head. A token meets experts_per_token of the experts. A
    backward pass is twice that. Masked scores are not counted."""
    c, per_token = model.cfg, 2 * model.cfg.n_layers * model.cfg.n_heads * model.cfg.head_dim * context
    for name, p in model.blocks.named_parameters():
        if p.dim() == 2:
            sparse = "experts.gate_up" in name or "experts.down" in name
            per_token += p.numel() * (c.experts_per_token / c.n_experts if sparse else 1)
    return 2 * tokens * per_token + 2 * heads * c.vocab_size * c.width


@dataclass(frozen=True)
class Size:
    """A model and what is asked of it: `prompts` x `group` answers of `new` tokens to prompts of `prompt`
    tokens."""
    gpt: GPTConfig
    prompts: int
    prompt: int
    new: int
    micro: int                      # answers per forward and backward pass
    group: int = 8
    step: bool = True               # whether speed compares a whole GRPO step too

    @property
    def tokens(self):
        return self.prompts * self.group * self.new

    def texts(self):
        most = min(256, self.gpt.vocab_size - 2)
        return np.random.default_rng(1).integers(0, most, (self.prompts, self.prompt)).tolist()


class Work:
    """This program's rollout and whole GRPO step on a model, in one format. `stages`: for the clock."""

    def __init__(self, model, size, fmt, fast=True, exact=False, cfg=None):
        self.model, self.size, self.optimizer = model, size, None
        self.num = numerics(fmt, model.embedding.device, fast, exact).hold(model.parameters())
        self.sampler, self.scaler = Sampler(model, stop=-1, pad=0, fast=fast), make_scaler(self.num)
        self.cfg = replace(cfg or Config(), micro_batch=size.micro)
        self.stages = self.rollout, self.rewards, self.gradient, self.update

    def rollout(self, turn):
        self.model.use(self.num)
        self.out = self.sampler.generate(self.size.texts(), self.size.group, self.size.new, seed=turn)

    def rewards(self, turn):
        rewards = torch.tensor([float(sum(row) % 2) for row in self.out.tokens.tolist()])
        advantage = centred(rewards.view(-1, self.size.group)).flatten().to(self.out.logp.device)
        # no group is skipped for want of a signal: every answer goes forward and back, as in the peer
        self.batch = Batch(self.out, advantage=torch.where(advantage == 0, 0.1, advantage))

    def gradient(self, turn):
        learn(self.model, self.batch, self.cfg, self.scaler, self.size.new)

    def update(self, turn):
        self.optimizer = self.optimizer or torch.optim.AdamW(self.model.parameters(), weight_decay=0.0,
                                                             fused=True)
        update(self.model, self.optimizer, self.scaler, 1e-6)
        self.num.refresh()

    def flops(self):
        """Model FLOPs of real tokens -> (rollout, step): prompts prefilled once, each new token but the
        last decoded, then forward and backward over whole sequences. Padding, masked scores and what is
        computed twice are not counted."""
        s, m = self.size, self.model
        rows, mean = s.prompts * s.group, s.prompt + s.new / 2
        prefill = flops(m, s.prompts * s.prompt, s.prompt / 2, s.prompts)
        rollout = prefill + flops(m, rows * (s.new - 1), mean, rows * (s.new - 1))
        return rollout, rollout + 3 * flops(m, rows * (s.prompt + s.new - 1), (s.prompt + s.new) / 2,
                                            rows * s.new)


def row(times, size, work=None, peak=None):
    """The figures of a contender from its seconds (turns, stages)."""
    out = dict(seconds=seconds(times), tokens_per_s=size.tokens / seconds(times))
    if times.shape[1] > 1:
        out |= zip(STAGES, np.median(times, 0).tolist())
    if peak:
        out["gemm_share"] = work.flops()[times.shape[1] > 1] / out["seconds"] / peak
    return out


def tell(title, rows):
    show({n: {k: f"{v:.3g}" for k, v in r.items()} for n, r in rows.items()}, title)


def main(argv=None):
    try:
        cfg = parse_config(argv)[0]
    except Help as e:
        return print(e)
    device, env, peaks = pick_device(cfg.device), load_task(cfg), []
    model = GPT(gpt_config(cfg, env), device)
    size = Size(model.cfg, cfg.prompts, env.prompt_length, env.answer_length, cfg.micro_batch, cfg.group)
    work = {f: Work(model, size, f, cfg.fast, cfg.exact, cfg)
            for f in dict.fromkeys(("fp32", cfg.train_format))}
    times = take_turns({f: w.stages for f, w in work.items()}, 5, device,
                       lambda: peaks.append(gemm_peak(device, work[cfg.train_format].num.dtype)))
    peak, report = float(np.median(peaks)), {}
    for f, t in times.items():
        kinds = dict(rollout=row(t[:, :1], size, work[f], peak), step=row(t, size, work[f], peak))
        report[f] = {f"{kind}_{k}": v for kind, r in kinds.items() for k, v in r.items()}
        tell(f"{f}, medians of 5 turns", kinds)
    about = dict(bench="train_rl", device=str(device), threads=torch.get_num_threads(),
                 torch=torch.__version__, params=model.n_params(), rows=cfg.prompts * cfg.group,
                 prompt=size.prompt, new_tokens=size.new, gemm_peak=peak,
                 peak_memory_mib=peak_memory(device), ratio=ratio(times[cfg.train_format], times["fp32"]))
    print(f"\nseconds; shares of this machine's GEMM, {peak / 1e9:.0f} GFLOP/s; a step in {cfg.train_format} "
          f"takes {about['ratio']:.2f} times fp32's\n{json.dumps(dict(about, formats=report))}")


if __name__ == "__main__":
    run_main(main)
