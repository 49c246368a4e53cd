"""What a run will need in memory, before it runs. `python train_rl.py --plan` ends up here, and so does the advice of a run
that does not fit."""
import dataclasses
import os
import pathlib

import torch

from data import make_task
from data.base import gpt_config
from fast import library
from precision import pick_device

MIB = 2 ** 20
CHUNK = 64 * MIB                              # precision.token_logprobs: logits that exist at a time


def saved_per_token(gpt, length, element, lanes, attention):
    """Bytes that one layer keeps for the way back, per token of a micro-batch of sequences of this length. `element`: bytes
    of a number in the compute dtype; lanes: panel width of the compiled operators, 0 for torch's; attention: "plain" keeps
    its probabilities, "fused" (a GPU's) its output and a sum a query, "exact" makes all of it again."""
    C, F, H, D = gpt.width, gpt.mlp_width, gpt.n_heads, gpt.head_dim
    heads = (H + 2 * gpt.n_kv_heads) * D
    if lanes and D % lanes == 0 and not gpt.qk_norm:                  # the block in one call makes the rest again
        return 4 * (2 * C + heads + H * D + 2 * F + 2 * H + 2)
    n = 4 * C * element + 8                                           # two norms: what went in and out, and a scale
    n += heads * element + H * D * element                            # q, k, v and attention's output
    n += 8 * H if lanes and D % lanes == 0 else dict(plain=4 * H * length, fused=H * D * element + 4 * H, exact=0)[attention]
    n += 3 * F * element + (0 if lanes else 4 * F)                 # SwiGLU: its input, its output, silu of the gate
    if gpt.qk_norm:
        n += heads * element + 4 * (H + gpt.n_kv_heads)
    return n


def most_rows(cfg):
    """Answers that are decoded at once, at most: in a step, while choosing or while evaluating."""
    return max(cfg.prompts * cfg.group, min(cfg.rollout_rows, max(cfg.pool * cfg.tries, cfg.heldout * cfg.eval_tries)))


def largest_batch(cfg):
    """Sequences that go forward and back at once, at most: a micro-batch, or a batch of demonstrations."""
    return max(min(cfg.micro_batch, cfg.prompts * cfg.group), cfg.base_batch)


def needs(cfg, device):
    """name -> (bytes, the flags that change it)."""
    task = make_task(cfg.task, cfg.digits, cfg.noise)
    gpt = gpt_config(cfg, task)
    N, matrices, length = gpt.n_params(), gpt.n_matrix_params(), task.prompt_length + task.answer_length
    gpu = device.type == "cuda"
    native = {f: 2 if gpu and f in ("fp16", "bf16") else 4 for f in (cfg.rollout_format, cfg.train_format)}
    lanes = library()[0].panel_width() if not gpu and cfg.fast and library()[0] else 0
    reference = (8 if cfg.train_format != "fp32" else 4) * N if cfg.kl_beta else 0
    rounded = sum(0 if f == "fp32" else b * N for f, b in native.items())
    if lanes:                                                         # packed a second time, for each direction that is used
        rounded += 4 * matrices * (2 + (cfg.rollout_format != cfg.train_format))
    element = native[cfg.train_format]
    rows = most_rows(cfg)
    width = -(-length // 64) * 64 if gpu and cfg.fast else length
    cache = 2 * gpt.n_layers * gpt.n_kv_heads * gpt.head_dim * width * native[cfg.rollout_format]
    kept = cache * (rows + cfg.prompts * cfg.group if gpu and cfg.fast else 3 * rows // 2)      # two sets of graphs; or a copy
    tokens = largest_batch(cfg) * (length - 1)
    attention = "exact" if cfg.exact else "fused" if gpu and element == 2 else "plain"
    layer = saved_per_token(gpt, length, element, lanes, attention)
    logits = (5 if cfg.exact and not lanes else 3) * min(CHUNK, 4 * gpt.vocab_size * tokens)
    passing = tokens * 4 * element * gpt.mlp_width
    if cfg.exact and not lanes:                                       # all probabilities of a layer, on the way back
        passing = max(passing, 3 * 4 * tokens * gpt.n_heads * length)
    return {
        "master weights, FP32": (4 * N, "--n-layers --width --mlp-width"),
        **({"reference model": (reference, "--kl-beta")} if reference else {}),
        "rounded weights": (rounded, "--n-layers --width --mlp-width"),
        "gradients, FP32": (4 * N, "--n-layers --width --mlp-width"),
        "AdamW's two moments, FP32": (8 * N, "--n-layers --width --mlp-width"),
        f"KV cache of {rows} rows of {width}": (kept, "--rollout-rows --prompts --group --digits"),
        f"logits of {rows} rows": (rows * gpt.vocab_size * (4 if lanes else 20), "--rollout-rows --prompts"),
        f"activations of {tokens} tokens": (tokens * (gpt.n_layers * layer + gpt.width * element), "--micro-batch --base-batch"),
        "the layer at work": (passing, "--micro-batch --digits"),
        "logits while training, a chunk": (logits, "--micro-batch"),
    }


def available(device):
    """Bytes that this process may still take, or None if nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = []
    try:
        info = dict(line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
        limits.append(int(info["MemAvailable"].split()[0]) * 1024)
        group = pathlib.Path("/sys/fs/cgroup")                        # a container's own limit
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError, KeyError):
        pass
    if not limits:
        try:
            limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (AttributeError, ValueError, OSError):                 # Windows
            return None
    return min(limits)


def advice(cfg, device):
    """What to lower, biggest first, and a --micro-batch that fits if one does."""
    rows = sorted(needs(cfg, device).items(), key=lambda x: -x[1][0])[:2]
    text = "; ".join(f"{name} take {size / MIB:.0f} MiB ({flags})" for name, (size, flags) in rows)
    free, small = available(device), cfg
    while free and small.micro_batch > 1:
        small = dataclasses.replace(small, micro_batch=small.micro_batch // 2)
        if sum(size for size, _ in needs(small, device).values()) < free:
            return f"{text}. By the estimate of --plan, --micro-batch {small.micro_batch} fits, with the same result"
    return f"{text}. Lower what these flags say"


def plan(cfg, say):
    """The table of --plan. Returns 0 if the run fits by this estimate, else 1."""
    device = pick_device(cfg.device)
    gpt = gpt_config(cfg, make_task(cfg.task, cfg.digits, cfg.noise))
    table, free = needs(cfg, device), available(device)
    say(f"{gpt.n_params() / 1e6:.2f} M parameters, rollout {cfg.rollout_format}, train {cfg.train_format}, {cfg.prompts} x "
        f"{cfg.group} answers a step, --micro-batch {cfg.micro_batch}, on {device}")
    for name, (size, flags) in table.items():
        say(f"  {size / MIB:9.1f} MiB  {name:38} {flags}")
    total = sum(size for size, _ in table.values())
    say(f"  {total / MIB:9.1f} MiB  in all, besides Python and torch themselves (some 300 MiB)")
    if free is None:
        say("how much memory is free here, nobody says")
        return 0
    say(f"  {free / MIB:9.1f} MiB  are free on {device}: {'it fits' if total < free else 'it does not fit'}")
    if total >= free:
        say(advice(cfg, device))
    return 0 if total < free else 1
