"""How fast is a job, and how fast could this machine be?

    python -m experiments.bench                       # the default job; takes the flags of train_rl.py
"""
import json
import time

import numpy as np
import torch

from data import stream
from data.tokenizer import encode
from model import GPT
from operators import numerics
from operators.device import pick_device
from precision import make_scaler
from run.base import gpt_config, load_task
from run.console import run_main
from run.flags import Help
from run.lines import say
from run.memory import peak_memory
from sample import Sampler
from train_rl import Batch, learn, parse_config, update


def gemm_peak(device, num):
    """FLOP/s of this machine's own matrix product in the dtype of `num`: the best of a few sizes, each the median of 3."""
    best, sync = 0.0, torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for m, k, n in (
        ((1024, 1024, 1024), (2048, 1024, 1024), (4096, 512, 512))
        if device.type == "cpu"
        else ((8192, 8192, 8192), (16384, 4096, 4096))
    ):
        a, b = torch.randn(m, k, device=device, dtype=num.dtype), torch.randn(k, n, device=device, dtype=num.dtype)
        times = []
        for _ in range(4):
            sync()
            t = time.perf_counter()
            a @ b
            sync()
            times.append(time.perf_counter() - t)
        best = max(best, 2 * m * k * n / float(np.median(times[1:])))
    return best


def flops(model, tokens, context, heads):
    """Multiply-adds counted as 2, for one forward pass: `tokens` through the blocks, each with `context` keys on average, `heads`
    of them through the head. A token meets experts_per_token of the experts. A backward pass is twice that. Masked scores are not
    counted."""
    c, per_token = model.cfg, 0
    for name, p in model.blocks.named_parameters():
        if p.dim() == 2:
            met = c.experts_per_token / c.n_experts if "experts.gate_up" in name or "experts.down" in name else 1
            per_token += p.numel() * met
    per_token += 2 * c.n_layers * c.n_heads * c.head_dim * context
    return 2 * tokens * per_token + 2 * heads * c.vocab_size * c.width


def bench(cfg):
    """Rollout and training apart, on this job's shapes with random weights, no answer stopping early; the formats take turns
    in one run, and so does the machine's own GEMM peak, so that a slow minute hits all of them."""
    device = pick_device(cfg.device)
    env = load_task(cfg)
    task, model = env.task, GPT(gpt_config(cfg, env), device)
    new, rows = task.answer_length, cfg.prompts * cfg.group
    formats = list(dict.fromkeys(("fp32", cfg.train_format)))
    nums = {f: numerics(f, device, cfg.fast, cfg.exact).hold(model.parameters()) for f in formats}
    prompts = [encode(task.problem(stream(0, i)).prompt) for i in range(cfg.prompts)]
    prompt = sum(map(len, prompts)) / cfg.prompts
    sampler, scaler, optimizer = (
        Sampler(model, stop=-1),
        make_scaler(nums[formats[-1]]),
        torch.optim.AdamW(model.parameters(), fused=True),
    )
    advantage = torch.where(torch.arange(rows, device=device) % 2 == 0, 0.5, -0.5)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    # model FLOPs of real tokens: each prompt prefilled once, each new token but the last decoded; then forward and backward
    work_rollout = flops(model, cfg.prompts * prompt, prompt / 2, cfg.prompts) + flops(
        model, rows * (new - 1), prompt + new / 2, rows * (new - 1)
    )
    work_train = 3 * flops(model, rows * (prompt + new - 1), (prompt + new) / 2, rows * new)
    times = {f: [] for f in formats}
    peaks = []
    say(
        f"{model.n_params() / 1e6:.2f} M parameters, {cfg.prompts} x {cfg.group} answers of {new} tokens behind prompts of "
        f"{prompt:g}; "
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; the median of 5 turns"
    )
    for turn in range(6):
        for f in formats:
            peaks.append(gemm_peak(device, nums[formats[-1]]))
            model.use(nums[f])
            sync()
            t0 = time.perf_counter()
            rollout = sampler.generate(prompts, cfg.group, new, seed=turn)
            sync()
            t1 = time.perf_counter()
            learn(model, Batch(rollout, advantage=advantage), cfg, scaler, new)
            update(model, optimizer, scaler, 0.0)
            nums[f].refresh()
            sync()
            times[f].append((t1 - t0, time.perf_counter() - t1))
    report, peak = {}, float(np.median(peaks[1:]))
    for f in formats:
        r, t = (float(np.median([x[i] for x in times[f][1:]])) for i in (0, 1))
        report[f] = dict(
            rollout_s=r,
            train_s=t,
            rollout_tokens_per_s=rows * new / r,
            step_tokens_per_s=rows * new / (r + t),
            gemm_peak=peak,
            rollout_share=work_rollout / r / peak,
            train_share=work_train / t / peak,
            step_share=(work_rollout + work_train) / (r + t) / peak,
        )
        b = report[f]
        say(
            f"{f:>5}: rollout {r:.3f} s ({b['rollout_tokens_per_s']:.0f} tokens/s, {b['rollout_share']:.0%} of peak), "
            f"training {t:.3f} s ({b['train_share']:.0%}), step {r + t:.3f} s ({b['step_tokens_per_s']:.0f} tokens/s, "
            f"{b['step_share']:.0%} of this machine's {peak / 1e9:.0f} GFLOP/s GEMM)"
        )
    ratio = float(np.median([sum(x) / sum(y) for x, y in zip(times[formats[-1]][1:], times[formats[0]][1:])]))
    say(
        f"{formats[-1]} / {formats[0]} step time: {ratio:.2f} (median of paired turns); "
        f"peak memory {peak_memory(device):.0f} MiB"
    )
    print(
        json.dumps(
            dict(
                bench="train_rl",
                device=str(device),
                threads=torch.get_num_threads(),
                torch=torch.__version__,
                params=model.n_params(),
                rows=rows,
                prompt=prompt,
                new_tokens=new,
                ratio=ratio,
                formats=report,
            )
        )
    )
    return 0


def main(argv=None):
    try:
        return bench(parse_config(argv)[0])
    except Help as e:
        print(e)


if __name__ == "__main__":
    run_main(main)
