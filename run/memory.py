"""run/memory.py: what a run will need in memory, before it runs. `--plan` prints the estimate;
every run checks it, and tries its largest batch first."""
import dataclasses
import os
import pathlib
import sys
from contextlib import suppress

import torch

from model import GPT, KVCache
from operators import numerics
from operators.device import pick_device
from precision import InputError, make_scaler
from run.base import gpt_config, load_task, trainable
from run.lines import say
from run.problems import TRIES, choose_problems
from sample import Rollout, Sampler

MIB = 2 ** 20
CHUNK = 64 * MIB                        # Numerics.token_logprobs: logits that exist at a time


def saved_per_token(gpt, element, compiled=False, lora=0):
    """Bytes that one layer keeps for the way back, per token, at most. element: bytes of a number
    in the compute dtype. lora: the adapters' rank. What is kept is counted in numbers: the input
    and output of two norms, queries, keys and values before and after they are turned, attention's
    output, SwiGLU's two halves and output in FP32, a scale for each norm and head. The compiled
    block makes at least half of it again."""
    C, F, D, H, KV = gpt.width, gpt.mlp_width, gpt.head_dim, gpt.n_heads, gpt.n_kv_heads
    n = element * (6 * C + (4 * H + 3 * KV) * D + 7 * lora) + 16 * F + 4 * (H + 2)
    n += 4 * (H + KV) * (D + 1) * gpt.qk_norm
    if gpt.n_experts:         # the MLP's part for each expert met, and what goes in and out
        met = gpt.experts_per_token
        n += 16 * (met * gpt.expert_width - F + gpt.n_experts) + met * gpt.width * (element + 4)
    return n // 2 if compiled else n


def most_rows(cfg):
    """Answers that are decoded at once, at most: in a step, while choosing or while evaluating."""
    heldout = int(cfg.heldout) if cfg.heldout.isdecimal() else 256
    choosing = (cfg.pool or cfg.rollout_rows) * TRIES if cfg.keep != (0.0, 1.0) else 0
    return min(cfg.rollout_rows, max(choosing, heldout * cfg.eval_tries, cfg.prompts * cfg.group))


def largest_batch(cfg):
    """Sequences that go forward and back at once, at most: a micro-batch, or a batch of
    demonstrations."""
    return min(cfg.micro_batch, max(cfg.prompts * cfg.group, 0 if cfg.model else cfg.base_batch))


def params(gpt, rank=0):
    """-> parameters of a GPT of this shape, and of LoRA adapters of this rank for it."""
    model = GPT(dataclasses.replace(gpt, context=1), "meta", seed=None)
    whole = model.n_params()
    return whole, model.adapt(rank).n_params() - whole if rank else 0


def needs(cfg, device, env):
    """name -> (bytes, the flags that change it). env: of these settings, its problems chosen."""
    gpt, gpu, num = gpt_config(cfg, env), device.type == "cuda", numerics("fp32", device, cfg.fast)
    (N, adapters), length = params(gpt, cfg.lora_rank), env.prompt_length + env.answer_length
    formats = dict.fromkeys((cfg.rollout_format, cfg.train_format))
    element = {f: 2 if gpu and f in ("fp16", "bf16") else 4 for f in formats}
    compiled, graphs, two = hasattr(num, "knows"), gpu and cfg.fast, len(element) > 1
    block = compiled and num.knows(gpt) and not (gpt.n_experts or adapters)

    def copies(n):                                          # of n numbers, rounded to each format
        return sum(n * size for f, size in element.items() if f != "fp32")
    trained, products = adapters or N, N - gpt.vocab_size * gpt.width * (not gpt.tied_head)
    # frozen weights have FP32 masters only if the two sides round otherwise
    frozen = (4 * N + copies(N) if two else N * element[cfg.train_format]) * bool(adapters)
    packed = 4 * products * (2 + two) * compiled            # once more, for each direction
    reference = N * (4 if cfg.train_format == "fp32" else 8) * bool(cfg.kl_beta and not adapters)

    rows, step = most_rows(cfg), min(cfg.rollout_rows, cfg.prompts * cfg.group)
    piece = (64 if length <= 256 else 256) if graphs else 1         # they read the cache in pieces
    width = -(-length // piece) * piece
    slot = 2 * gpt.n_layers * gpt.n_kv_heads * gpt.head_dim * element[cfg.rollout_format]
    held = rows + step * (step < rows) if graphs else 3 * rows // 2

    tokens, size = largest_batch(cfg) * (length - 1), element[cfg.train_format]
    layer = saved_per_token(gpt, size, block, cfg.lora_rank)
    layers = gpt.width * size * gpt.n_layers + layer if cfg.recompute else layer * gpt.n_layers
    if not (gpu or block):
        layers = layers * 8 // 5                            # measured: malloc's heap fragments
    passing = 4 * size * max(gpt.mlp_width, gpt.experts_per_token * gpt.expert_width)
    shape = "--lora-rank" if cfg.lora_rank or cfg.model else "--n-layers --width"
    return {k: v for k, v in {
        "frozen weights": (frozen, "--model"),
        "master weights, FP32": (4 * trained, shape),
        "reference model": (reference, "--kl-beta"),
        "rounded weights": (copies(trained) + packed, shape),
        "gradients, FP32": (4 * trained, shape),
        "AdamW's two moments, FP32": (8 * trained, shape),
        f"KV cache of {rows} rows of {width}": (slot * width * held,
                                                "--rollout-rows --prompts --group"),
        f"logits of {rows} rows": (rows * gpt.vocab_size * (4 if compiled else 29),
                                   "--rollout-rows"),
        f"activations of {tokens} tokens": (tokens * (layers + gpt.width * size),
                                            "--micro-batch --recompute"),
        "the layer at work": (tokens * passing, "--micro-batch --digits"),
        "logits while training, a chunk": (5 * min(CHUNK, 4 * gpt.vocab_size * tokens),
                                           "--micro-batch"),
    }.items() if v[0]}


def total(cfg, device, env):
    return sum(size for size, _ in needs(cfg, device, env).values())


def available(device):
    """Bytes that this process may still take, or None if nothing says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    limits = []
    with suppress(OSError, ValueError, KeyError):
        lines = pathlib.Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        limits.append(int(dict(x.split(":") for x in lines)["MemAvailable"].split()[0]) * 1024)
        group = pathlib.Path("/sys/fs/cgroup")              # a container's own limit
        used = int((group / "memory.current").read_text(encoding="utf-8"))
        limits.append(int((group / "memory.max").read_text(encoding="utf-8")) - used)
    if not limits:
        with suppress(AttributeError, ValueError, OSError):                     # Windows has none
            limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)


def advice(cfg, device, env):
    """What to lower, biggest first, and a --micro-batch that fits if one does."""
    rows = sorted(needs(cfg, device, env).items(), key=lambda x: -x[1][0])[:2]
    text = "; ".join(f"{name} take {size / MIB:.0f} MiB ({flags})" for name, (size, flags) in rows)
    free, micro = available(device), cfg.micro_batch
    while free and (micro := micro // 2):
        if total(dataclasses.replace(cfg, micro_batch=micro), device, env) < free:
            return (f"{text}. By the estimate of --plan, --micro-batch {micro} fits, with the "
                    "same result")
    return f"{text}. Lower what these flags say"


def plan(cfg):
    """The table of --plan. Returns 0 if the run fits by this estimate, else 1."""
    device, env = pick_device(cfg.device), load_task(cfg)
    choose_problems(cfg, env)
    need, free = total(cfg, device, env), available(device)
    say(f"{params(gpt_config(cfg, env))[0] / 1e6:.2f} M parameters, rollout {cfg.rollout_format}, "
        f"train {cfg.train_format}, {cfg.prompts} x {cfg.group} answers a step, "
        f"--micro-batch {cfg.micro_batch}, on {device}")
    for name, (size, flags) in needs(cfg, device, env).items():
        say(f"  {size / MIB:9.1f} MiB  {name:38} {flags}")
    say(f"  {need / MIB:9.1f} MiB  in all, besides Python and torch themselves (some 300 MiB)")
    if free is None:
        say("how much memory is free here is not known")
        return 0
    fits = need < free
    say(f"  {free / MIB:9.1f} MiB  are free on {device}: it {'fits' if fits else 'does not fit'}")
    if not fits:
        say(advice(cfg, device, env))
    return 0 if fits else 1


def rehearse(cfg, env, acting, learning, learn):
    """The largest batch that this run can get, for nothing, on a model of zeros: the KV cache of
    the most rows, the longest micro-batch there and back, the optimizer's state. A lack of memory
    shows now, and not in an hour.

    learn(model, rollout, scaler, room): forward and backward over a rollout; room: the longest
    answer."""
    device = acting.device
    free, need = available(device), total(cfg, device, env)
    if device.type == "cpu" and free is not None and need > free:      # its system kills in silence
        raise InputError(f"this run needs about {need / MIB:.0f} MiB, {free / MIB:.0f} are free. "
                         f"{advice(cfg, device, env)}")
    rows, room, length = most_rows(cfg), env.answer_length, env.prompt_length + env.answer_length
    try:
        model = GPT(gpt_config(cfg, env), device, seed=None)
        for p in model.parameters():
            p.data.zero_()
        model = trainable(model, cfg, acting, learning)
        for num in {acting, learning}:
            num.hold(model.parameters())
        cache = KVCache(model.cfg, rows, length, acting)
        prompts = [[0] * env.prompt_length] * -(-rows // cfg.group)
        Sampler(model.use(acting), stop=-1, fast=False).generate(prompts, cfg.group, 2)
        del cache
        tokens = torch.zeros(largest_batch(cfg), length, dtype=torch.int64, device=device)
        lengths = torch.full((len(tokens),), length, device=device)
        longest = Rollout(tokens, tokens.float(), lengths - room, lengths, lengths > 0)
        learn(model.use(learning), longest, make_scaler(learning), room)
        moments = [torch.zeros_like(p) for p in model.parameters() if p.requires_grad
                   for _ in range(2)]
        del moments
    except RuntimeError as e:
        if not isinstance(e, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(e):
            raise
        raise InputError(f"{device} has not enough memory for this run's largest batch. "
                         f"{advice(cfg, device, env)}") from e
    finally:
        for num in {acting, learning}:
            num.hold(())


def peak_memory(device):
    """Peak memory of this process on the device, MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    with suppress(OSError, IndexError):    # getrusage would count what the parent had at the start
        status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024
    with suppress(ImportError):                                                 # Windows has none
        import resource
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / (MIB if sys.platform == "darwin" else 1024)
    return float("nan")
