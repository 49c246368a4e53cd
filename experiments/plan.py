"""What a run will need in memory, before it runs. `python train_rl.py --plan` ends up here, and so does the advice of a run
that does not fit."""
import dataclasses
import os
import pathlib

import torch

from data.base import gpt_config
from data.env import choose_problems, make_env
from fast import library
from model import GPT, KVCache
from precision import InputError, make_scaler, pick_device
from sample import Rollout, Sampler

MIB = 2 ** 20
CHUNK = 64 * MIB                              # precision.token_logprobs: logits that exist at a time


def saved_per_token(gpt, length, element, lanes, attention, lora=0):
    """Bytes that one layer keeps for the way back, per token of a micro-batch of sequences of this length. `element`: bytes
    of a number in the compute dtype; lanes: panel width of the compiled operators, 0 for torch's; attention: "plain" keeps
    its probabilities, "fused" (a GPU's) its output and a sum a query, "exact" makes all of it again; lora: its adapters' rank."""
    C, F, H, D = gpt.width, gpt.mlp_width, gpt.n_heads, gpt.head_dim
    heads = (H + 2 * gpt.n_kv_heads) * D
    if lanes and D % lanes == 0 and not gpt.qk_norm and not lora:                  # the block in one call makes the rest again
        return 4 * (2 * C + heads + H * D + 2 * F + 2 * H + 2)
    n = 4 * C * element + 8                                           # two norms: what went in and out, and a scale
    n += heads * element + H * D * element                            # q, k, v and attention's output
    n += 7 * lora * element
    n += 8 * H if lanes and D % lanes == 0 else dict(plain=4 * H * length, fused=H * D * element + 4 * H, exact=0)[attention]
    if gpt.n_experts:                                                 # of each expert that it meets: SwiGLU's two, its output
        n += gpt.experts_per_token * (3 * gpt.expert_width + C) * element + 4 * (gpt.n_experts + 3 * gpt.experts_per_token)
    else:
        n += 3 * F * element + (0 if lanes else 4 * F)                 # SwiGLU: its input, its output, silu of the gate
    if gpt.qk_norm:
        n += heads * element + 4 * (H + gpt.n_kv_heads)
    return n


def most_rows(cfg):
    """Answers that are decoded at once, at most: in a step, while choosing or while evaluating."""
    choosing = (cfg.pool or cfg.rollout_rows) * cfg.tries if cfg.keep_from > 0 or cfg.keep_to < 1 else 0
    return min(cfg.rollout_rows, max(choosing, cfg.heldout * cfg.eval_tries, cfg.prompts * cfg.group))


def largest_batch(cfg):
    """Sequences that go forward and back at once, at most: a micro-batch, or a batch of demonstrations."""
    return max(min(cfg.micro_batch, cfg.prompts * cfg.group), 0 if cfg.model else cfg.base_batch)


def adapter_params(gpt, cfg):
    """Parameters of the LoRA adapters that these settings ask for."""
    with torch.device("meta"):
        model = GPT(dataclasses.replace(gpt, n_layers=1, context=1), "meta", seed=None)
    parts = {n: (getattr(model.blocks[0], product).shape[1], rows)
             for product, named in model.blocks[0].parts().items() for n, (_, rows) in named.items()}
    targets = [t.strip() for t in cfg.lora_targets.split(",") if t.strip()]
    return gpt.n_layers * cfg.lora_rank * sum(sum(parts[n]) for n in parts if not targets or n in targets)


def needs(cfg, device, env):
    """name -> (bytes, the flags that change it). env: of these settings, its problems chosen."""
    gpt = gpt_config(cfg, env)
    N, matrices, length = gpt.n_params(), gpt.n_matrix_params(), env.prompt_length + env.answer_length
    gpu = device.type == "cuda"
    native = {f: 2 if gpu and f in ("fp16", "bf16") else 4 for f in (cfg.rollout_format, cfg.train_format)}
    lanes = library()[0].panel_width() if not gpu and cfg.fast and library()[0] else 0
    trained = adapter_params(gpt, cfg) if cfg.lora_rank else N
    frozen = N if cfg.lora_rank else 0
    reference = (8 if cfg.train_format != "fp32" else 4) * N if cfg.kl_beta and not frozen else 0
    rounded = sum(0 if f == "fp32" else b * trained for f, b in native.items())
    if frozen and len(native) > 1:                                    # two formats: the frozen weights stay FP32, with two copies
        frozen = 4 * N + sum(0 if f == "fp32" else b * N for f, b in native.items())
    elif frozen:
        frozen = native[cfg.train_format] * N
    if lanes:                                                         # packed a second time, for each direction that is used
        rounded += 4 * matrices * (2 + (cfg.rollout_format != cfg.train_format))
    element = native[cfg.train_format]
    rows = most_rows(cfg)
    width = -(-length // (64 if length <= 256 else 256)) * (64 if length <= 256 else 256) if gpu and cfg.fast else length
    cache = 2 * gpt.n_layers * gpt.n_kv_heads * gpt.head_dim * width * native[cfg.rollout_format]
    step = min(cfg.rollout_rows, cfg.prompts * cfg.group)
    kept = cache * (rows + (step if step < rows else 0) if gpu and cfg.fast else 3 * rows // 2)  # two sets of graphs; or a copy
    tokens = largest_batch(cfg) * (length - 1)
    attention = "exact" if cfg.exact else "fused" if gpu and element == 2 else "plain"
    layer = saved_per_token(gpt, length, element, lanes, attention, cfg.lora_rank)
    kept_layers = gpt.n_layers * layer
    if cfg.recompute:                                                 # a block's input each, and all of one block
        kept_layers = gpt.n_layers * gpt.width * element + layer
    logits = (5 if cfg.exact and not lanes else 3) * min(CHUNK, 4 * gpt.vocab_size * tokens)
    passing = tokens * 4 * element * max(gpt.mlp_width, gpt.experts_per_token * gpt.expert_width)
    if cfg.exact and not lanes:                                       # all probabilities of a layer, on the way back
        passing = max(passing, 3 * 4 * tokens * gpt.n_heads * length)
    size_flags = "--lora-rank" if cfg.lora_rank or cfg.model else "--n-layers --width --mlp-width"
    return {
        **({"frozen weights": (frozen, "--model")} if frozen else {}),
        "master weights, FP32": (4 * trained, size_flags),
        **({"reference model": (reference, "--kl-beta")} if reference else {}),
        "rounded weights": (rounded, size_flags),
        "gradients, FP32": (4 * trained, size_flags),
        "AdamW's two moments, FP32": (8 * trained, size_flags),
        f"KV cache of {rows} rows of {width}": (kept, "--rollout-rows --prompts --group --digits"),
        f"logits of {rows} rows": (rows * gpt.vocab_size * (4 if lanes else 29), "--rollout-rows --prompts"),
        f"activations of {tokens} tokens": (tokens * (kept_layers + gpt.width * element), "--micro-batch --recompute"),
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


def advice(cfg, device, env):
    """What to lower, biggest first, and a --micro-batch that fits if one does."""
    rows = sorted(needs(cfg, device, env).items(), key=lambda x: -x[1][0])[:2]
    text = "; ".join(f"{name} take {size / MIB:.0f} MiB ({flags})" for name, (size, flags) in rows)
    free, small = available(device), cfg
    while free and small.micro_batch > 1:
        small = dataclasses.replace(small, micro_batch=small.micro_batch // 2)
        if sum(size for size, _ in needs(small, device, env).values()) < free:
            return f"{text}. By the estimate of --plan, --micro-batch {small.micro_batch} fits, with the same result"
    return f"{text}. Lower what these flags say"


def plan(cfg, say):
    """The table of --plan. Returns 0 if the run fits by this estimate, else 1."""
    device, env = pick_device(cfg.device), make_env(cfg, say)
    choose_problems(cfg, env, say)
    gpt = gpt_config(cfg, env)
    table, free = needs(cfg, device, env), available(device)
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
        say(advice(cfg, device, env))
    return 0 if total < free else 1


def rehearse(cfg, device, env, rollout_num, train_num, model=None):
    """The largest batch that this run can meet, for nothing: the KV cache of the most rows, the longest micro-batch there and
    back, the optimizer's state. Running out of memory shows now, and not in an hour. On random weights, unless there is a
    model already; it is left as it was."""
    from train_rl import accumulate_gradient
    free, need = available(device), sum(size for size, _ in needs(cfg, device, env).values())
    if model is not None:                                                 # it is there already, and so are they
        need -= 4 * sum(p.numel() for p in model.parameters())
    if device.type == "cpu" and free is not None and need > free:         # a CPU's system kills without a word: do not try
        raise InputError(f"this run needs about {need / MIB:.0f} MiB, {free / MIB:.0f} are free. {advice(cfg, device, env)}")
    try:
        if model is None:
            model = GPT(gpt_config(cfg, env), device)
        for num in {rollout_num, train_num}:
            num.hold(model.parameters())
        rows = most_rows(cfg)
        cache = KVCache(model.cfg, rows, env.prompt_length + env.answer_length, rollout_num)
        prompts = [[0] * env.prompt_length] * -(-rows // cfg.group)
        Sampler(model.use(rollout_num), stop=-1, fast=False).generate(prompts, cfg.group, 2)
        del cache
        part = largest_batch(cfg)
        length = torch.full((part,), env.prompt_length + env.answer_length, device=device)
        tokens = torch.zeros(part, int(length[0]), dtype=torch.int64, device=device)
        longest = Rollout(tokens, tokens.float(), torch.full_like(length, env.prompt_length), length, length > 0)
        accumulate_gradient(
            model.use(train_num), longest, torch.ones(part, device=device),
            dataclasses.replace(cfg, micro_batch=part, replay_routing=False), make_scaler(train_num), env.answer_length
        )
        moments = [torch.zeros_like(p) for p in model.parameters() if p.requires_grad for _ in range(2)]
        del moments
    except (torch.OutOfMemoryError, RuntimeError) as e:
        if not isinstance(e, torch.OutOfMemoryError) and "memory" not in str(e):
            raise
        raise InputError(f"{device} has not enough memory for this run's largest batch. {advice(cfg, device, env)}") from e
    finally:
        if model is not None:
            model.zero_grad(set_to_none=True)
        for num in {rollout_num, train_num}:
            num.release()
