"""How fast is a job, and how fast could this machine be?

    python -m experiments.bench             # the default job; takes the flags of train_rl.py

Random weights of the job's shape, and no answer stops early. The formats take turns in one process,
and so does the machine's own matrix product, so that a slow minute hits all of them. The race and
the work are those of experiments.speed too.
"""
from dataclasses import dataclass, replace

import numpy as np
import torch

from algorithms import centred
from experiments.command import show
from experiments.probe import gemm_peak, timed
from model import GPT, GPTConfig
from operators import numerics
from operators.device import pick_device
from precision import make_scaler
from run.base import gpt_config, load_task
from run.console import run_main
from run.memory import peak_memory
from sample import Sampler
from train_rl import Batch, Config, learn, parse_config, update

STAGES = "rollout", "rewards", "gradient", "update"


def race(contenders, turns, device):
    """name -> figures, and the GEMM peak; medians over the turns. contenders: name -> what has
    `stages` and a `size`, a Work or a peer. Each turn runs every contender once, in order; the
    first turn warms up. A ratio is to the first contender's time, turn by turn."""
    times, peaks, rows = {name: [] for name in contenders}, [], {}
    for turn in range(turns + 1):
        for name, c in contenders.items():
            peaks.append(gemm_peak(device))
            times[name].append(timed(c.stages, turn, device))
    times = {name: np.array(t[1:]) for name, t in times.items()}
    peak, base = float(np.median(peaks)), next(iter(times.values()))
    for name, c in contenders.items():
        t, row = times[name], rows.setdefault(name, {})
        for i, part in enumerate(("rollout", "step") if t.shape[1] > 1 else ("rollout",)):
            whole, first = (x.sum(1) if i else x[:, 0] for x in (t, base))
            s = float(np.median(whole))
            row |= {f"{part}_s": s, f"{part}_tokens_per_s": c.size.tokens / s,
                    f"{part}_ratio": float(np.median(whole / first))}
            if isinstance(c, Work):
                row[f"{part}_gemm_share"] = c.flops()[i] / s / peak
            if i:
                row |= {f"{stage}_s": x for stage, x in zip(STAGES, np.median(t, 0).tolist())}
                learned = c.flops()[1] - c.flops()[0]
                row["gradient_gemm_share"] = learned / row["gradient_s"] / peak
    return rows, peak


def flops(model, tokens, context, heads):
    """Multiply-adds counted as 2, for one forward pass: `tokens` through the blocks, each with
    `context` keys on average, `heads` of them through the head. A token meets experts_per_token of
    the experts. A backward pass is twice that. Masked scores are not counted."""
    c = model.cfg
    per_token = 2 * c.n_layers * c.n_heads * c.head_dim * context
    for name, p in model.blocks.named_parameters():
        if p.dim() == 2:
            sparse = "experts.gate_up" in name or "experts.down" in name
            per_token += p.numel() * (c.experts_per_token / c.n_experts if sparse else 1)
    return 2 * tokens * per_token + 2 * heads * c.vocab_size * c.width


@dataclass(frozen=True)
class Size:
    """A model and what is asked of it: `prompts` x `group` answers of `new` tokens to prompts of
    `prompt` tokens; micro: answers per forward and backward pass."""
    gpt: GPTConfig
    prompts: int
    prompt: int
    new: int
    micro: int
    group: int = 8
    step: bool = True               # whether speed compares a whole GRPO step too

    rows = property(lambda s: s.prompts * s.group)
    tokens = property(lambda s: s.rows * s.new)

    def texts(self):
        most = min(256, self.gpt.vocab_size - 2)
        return np.random.default_rng(1).integers(0, most, (self.prompts, self.prompt)).tolist()


class Work:
    """This program's rollout, or whole GRPO step, on a model. mode: such as "fp16 exact", or
    "fp16 --no-fast"."""

    def __init__(self, model, size, mode, step=True, cfg=None):
        fmt, fast, exact = mode.split()[0], "--no-fast" not in mode, "exact" in mode
        self.model, self.size, self.optimizer = model, size, None
        self.num = numerics(fmt, model.embedding.device, fast, exact).hold(model.parameters())
        self.sampler, self.scaler = Sampler(model, stop=-1, pad=0, fast=fast), make_scaler(self.num)
        self.cfg = replace(cfg or Config(), micro_batch=size.micro)
        self.stages = self.rollout, self.rewards, self.gradient, self.update
        self.stages = self.stages if step else self.stages[:1]

    def rollout(self, turn):
        self.model.use(self.num)
        s = self.size
        self.out = self.sampler.generate(s.texts(), s.group, s.new, seed=turn)

    def rewards(self, turn):
        rewards = torch.tensor([float(sum(row) % 2) for row in self.out.tokens.tolist()])
        advantage = centred(rewards.view(-1, self.size.group)).flatten().to(self.out.logp.device)
        # no group is skipped for want of a signal: every answer goes forward and back, as in a peer
        self.batch = Batch(self.out, advantage=torch.where(advantage == 0, 0.1, advantage))

    def gradient(self, turn):
        learn(self.model, self.batch, self.cfg, self.scaler, self.size.new)

    def update(self, turn):
        self.optimizer = self.optimizer or torch.optim.AdamW(self.model.parameters(), fused=True,
                                                             weight_decay=0.0)
        update(self.model, self.optimizer, self.scaler, 1e-6)
        self.num.refresh()

    def flops(self):
        """Model FLOPs of real tokens -> (rollout, step): prompts prefilled once, each new token but
        the last decoded, then forward and backward over whole sequences. Padding, masked scores and
        what is computed twice are not counted."""
        s, m, decoded = self.size, self.model, self.size.rows * (self.size.new - 1)
        prefill = flops(m, s.prompts * s.prompt, s.prompt / 2, s.prompts)
        rollout = prefill + flops(m, decoded, s.prompt + s.new / 2, decoded)
        whole = flops(m, s.rows * (s.prompt + s.new - 1), (s.prompt + s.new) / 2, s.tokens)
        return rollout, rollout + 3 * whole

    def decode_bytes(self):
        """Bytes that decoding must read: all weights and the filled KV cache, once a step."""
        s, c = self.size, self.model.cfg
        slots = s.rows * (s.prompt + s.new / 2) * 2 * c.n_layers * c.n_kv_heads * c.head_dim
        matrices = sum(p.numel() for p in [*self.model.blocks.parameters(), self.model.head]
                       if p.dim() == 2)
        return (s.new - 1) * (matrices + slots) * self.num.dtype.itemsize


def main(argv=None):
    cfg = parse_config(argv)[0]
    device, env = pick_device(cfg.device), load_task(cfg)
    model = GPT(gpt_config(cfg, env), device)
    size = Size(model.cfg, cfg.prompts, env.prompt_length, env.answer_length, cfg.micro_batch,
                cfg.group)
    flags = " exact" * cfg.exact + " --no-fast" * (not cfg.fast)
    work = {f: Work(model, size, f + flags, cfg=cfg) for f in ("fp32", cfg.train_format)}
    rows, peak = race(work, 5, device)
    print(f"{model.n_params() / 1e6:.1f} M parameters, {size.rows} answers of {size.new} tokens to "
          f"prompts of {size.prompt}\n{device}, {torch.get_num_threads()} threads, matrix product "
          f"{peak / 1e9:.0f} GFLOP/s, peak memory {peak_memory(device):.0f} MiB")
    show({k: {f: r[k] for f, r in rows.items()} for k in rows["fp32"]}, "medians of 5 turns")


if __name__ == "__main__":
    run_main(main)
