"""The base model: a GPT from scratch that imitates the task's noisy demonstrator, made once and kept in `.cache/`.

It stands in for a pretrained checkpoint: right about half of the time, and unable to get better by more imitation.
"""
import hashlib
import json
import math
import time

import numpy as np
import torch

from data import CACHE, make_task, stream
from fast import library, numerics
from model import GPT, GPTConfig, load_checkpoint, load_model, save_checkpoint
from precision import InputError, Numerics, make_scaler, reproducible
from sample import PAD, STOP, TOKENIZER, encode

RECIPE = 1          # raise it when the way a base is made changes, so that old ones are not taken for new


def gpt_config(cfg, env):
    """The shape of the policy. env: anything with prompt_length and answer_length, a task from scratch or an Env."""
    context = env.prompt_length + env.answer_length
    if cfg.model:
        from hf.weights import read_config
        return read_config(cfg.model, context)
    experts = dict(n_experts=cfg.n_experts, experts_per_token=cfg.experts_per_token, expert_width=cfg.expert_width,
                   qk_norm=True) if cfg.n_experts else {}              # Qwen3-MoE's shape
    return GPTConfig(vocab_size=TOKENIZER.n_vocab, n_layers=cfg.n_layers, width=cfg.width, n_heads=cfg.n_heads,
                     n_kv_heads=cfg.n_kv_heads, mlp_width=cfg.mlp_width, context=context, **experts)


def demonstrations(task, n, rng):
    """n worked answers -> (tokens (n, T) int64 right-padded, is_answer (n, T) bool)."""
    rows = []
    for _ in range(n):
        problem = task.problem(rng)
        prompt, answer = encode(problem.prompt), encode(task.demonstrate(problem, rng)) + [STOP]
        rows.append((len(prompt), prompt + answer))
    tokens = np.full((n, max(len(r) for _, r in rows)), PAD)
    answer = np.zeros(tokens.shape, bool)
    for i, (start, row) in enumerate(rows):
        tokens[i, :len(row)], answer[i, start:len(row)] = row, True
    return torch.from_numpy(tokens), torch.from_numpy(answer)


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def find_base(cfg, device, say=print):
    """-> (the cached base model for these settings or None, the path it has or would have, its key). A checkpoint of --model
    stays where it is; what is found out about it is kept under this path."""
    if cfg.model:
        from hf.weights import fingerprint
        key = dict(model=fingerprint(cfg.model), form=cfg.prompt_form, system=cfg.system, precision=cfg.base_precision,
                   device=device.type, torch=torch.__version__)
        return None, CACHE / f"model-{key['model']}" / "checkpoint.pt", key
    shape = gpt_config(cfg, make_task(cfg.task, cfg.digits, cfg.noise))
    key = dict(recipe=RECIPE, task=cfg.task, digits=cfg.digits, noise=cfg.noise, gpt=shape.__dict__, steps=cfg.base_steps,
               seed=cfg.seed if cfg.base_seed < 0 else cfg.base_seed, batch=cfg.base_batch, lr=cfg.base_lr,
               precision=cfg.base_precision, device=device.type, torch=torch.__version__,
               compiled=device.type == "cpu" and cfg.fast and library()[0] is not None)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    path = CACHE / f"base-{cfg.task}{cfg.digits}-{name}" / "checkpoint.pt"
    if path.exists():
        try:
            return load_model(load_checkpoint(path, device), device, expect=shape), path, key
        except InputError as e:
            say(f"base model: {e}; making it again")
    return None, path, key


def get_base(cfg, device, say=print, env=None):
    """The policy that RL begins with: --model's, else the base model for these settings, from the cache if it is there, else
    trained and put there. env: for --model, whose context is made as long as it needs."""
    if cfg.model:
        from hf.weights import load
        return load(cfg.model, device, env.prompt_length + env.answer_length, say)
    model, path, key = find_base(cfg, device, say)
    if model:
        say(f"base model: {path.parent} (cached), {model.n_params() / 1e6:.2f} M parameters")
        return model
    task = make_task(cfg.task, cfg.digits, cfg.noise)
    model = GPT(gpt_config(cfg, task), device, key["seed"])
    say(f"base model: none in the cache for these settings; {model.n_params() / 1e6:.2f} M parameters learn to imitate a noisy "
        f"demonstrator ({cfg.base_steps} steps of {cfg.base_batch})")
    train_base(model, task, cfg, key["seed"], say)
    save_checkpoint(path, model, config=dict(task=cfg.task, digits=cfg.digits, noise=cfg.noise), key=json.dumps(key))
    return model


def train_base(model, task, cfg, seed, say=print):
    """Cross-entropy on the demonstrators' answers, AdamW, a short warm-up and a linear fall to 0."""
    device = model.embedding.device
    num = numerics(cfg.base_precision, device, cfg.fast).hold(model.parameters())
    model.use(num)
    scaler = make_scaler(num)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.base_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    begin, warmup = time.time(), max(1, cfg.base_steps // 20)
    for step in range(cfg.base_steps):
        for group in optimizer.param_groups:
            group["lr"] = cfg.base_lr * min((step + 1) / warmup, 1 - step / cfg.base_steps)
        tokens, answer = demonstrations(task, cfg.base_batch, stream(seed, 1, step))
        logp, _ = model.token_logprobs(tokens.to(device), answer.to(device))
        loss = -logp.mean()
        with reproducible(device):
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        num.refresh()
        if (step + 1) % max(1, cfg.base_steps // 10) == 0:
            spent = time.time() - begin
            say(f"  warm-up {step + 1:5}/{cfg.base_steps}  loss {loss.item():.3f}  {clock(spent)} spent, "
                f"{clock(spent / (step + 1) * (cfg.base_steps - step - 1))} to go")
    if not math.isfinite(loss.item()) or not all(torch.isfinite(p).all() for p in model.parameters()):
        raise InputError(f"the base model's loss is {loss.item()}: imitation diverged; lower --base-lr")
    model.use(Numerics("fp32", device).hold(model.parameters()))
