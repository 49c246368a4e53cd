"""run/base.py: the policy that RL begins with.

Without --model it is a GPT from scratch that imitates the task's noisy demonstrator, made once and
kept in `.cache/`. It stands in for a pretrained checkpoint: right about half of the time, and
unable to get better by more imitation. With --model it is a checkpoint of the hub, with LoRA
adapters if asked for.
"""
import hashlib
import json
import math
import os
import pathlib
import time
from functools import partial

import numpy as np
import torch

from data import stream
from data.env import Env
from data.tasks import make_task
from data.tokenizer import PAD, STOP, TOKENIZER, Bytes, encode
from hf import tokenizer as hf_tokenizer
from hf import weights
from model import GPT, GPTConfig
from operators import CACHE, numerics, why_plain
from operators.code import fingerprint, fingerprints
from operators.device import reproducible
from precision import InputError, Numerics, make_scaler
from run.checkpoint import load_checkpoint, load_model, save_checkpoint
from run.lines import say, to_go

HEAD_WIDTH, EXPERTS_PER_TOKEN = 64, 2


def load_task(cfg):
    """The task and tokenizer of a run's settings -> data.env.Env."""
    task = make_task(cfg.task, cfg.digits, cfg.noise)
    if cfg.model:
        weights.config_of(cfg.model)                        # is it a model's folder at all?
        tokenizer = hf_tokenizer.load_tokenizer(cfg.model, cfg.prompt_form)
        return Env(task, tokenizer, cfg.max_answer, say)
    if not task.draws:
        raise InputError(f"--task {cfg.task} needs a model that can read: --model FOLDER, a "
                         "checkpoint from the Hugging Face hub")
    return Env(task, Bytes, 0, say)


def gpt_config(cfg, env):
    """The shape of the policy. Without --model width and layers say it all: heads of 64 features,
    but 4 of them at least, two query heads to a key head, an MLP three times as wide; with experts
    Qwen3-MoE's shape, and the two that a token goes to are together as wide as the MLP."""
    context = env.prompt_length + env.answer_length
    if cfg.model:
        return weights.described(cfg.model, context)[0]
    heads = max(4, cfg.width // HEAD_WIDTH // 2 * 2)
    if cfg.width % heads or cfg.width // heads % 2:
        raise InputError(f"--width {cfg.width} must be an even multiple of its {heads} heads")
    experts = dict(n_experts=cfg.n_experts, experts_per_token=EXPERTS_PER_TOKEN, qk_norm=True,
                   expert_width=3 * cfg.width // EXPERTS_PER_TOKEN) if cfg.n_experts else {}
    return GPTConfig(vocab_size=TOKENIZER.n_vocab, n_layers=cfg.n_layers, width=cfg.width, n_heads=heads,
                     n_kv_heads=heads // 2, mlp_width=3 * cfg.width, context=context, **experts)


def base_key(cfg, device, env):
    """All that makes the base what it is, the code included."""
    key = dict(precision=cfg.base_precision, device=device.type, torch=torch.__version__)
    if cfg.model:
        return key | dict(model=weights.fingerprint(cfg.model), form=cfg.prompt_form)
    plain = why_plain(device, cfg.fast)
    return key | dict(
        task=cfg.task, digits=cfg.digits, noise=cfg.noise, gpt=vars(gpt_config(cfg, env)),
        seed=cfg.seed, steps=cfg.base_steps, batch=cfg.base_batch, lr=cfg.base_lr,
        micro=min(cfg.micro_batch, cfg.base_batch),
        code=code(cfg, "run/base.py", "run/checkpoint.py"),
        compiled=not plain and fingerprint("operators/block.c"))


def code(cfg, *more):
    """A hash of the code that shapes what a policy does: its operators, its model, its task."""
    own = (fingerprint(pathlib.Path(cfg.task).resolve()),) if cfg.task.endswith(".py") else ()
    return fingerprints("precision.py", "model.py", "operators/*.py", "data/*.py", *more), *own


def cached(name, key):
    """Where in the cache that stands which is made of `key`."""
    name += "-" + hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return CACHE / name


def keep(write):
    """Write to the cache. One that cannot be written to is no reason to stop."""
    try:
        write()
    except (OSError, InputError) as e:
        say(f"note: not kept for other runs: {e}")


def find_base(cfg, device, env=None):
    """-> the cached base model for these settings or None, the path it has or would have."""
    name = "base-" + pathlib.Path(cfg.task).stem
    path = cached(name, base_key(cfg, device, env or load_task(cfg))) / "checkpoint.pt"
    try:
        return load_model(load_checkpoint(path, device), device) if path.exists() else None, path
    except (OSError, InputError) as e:
        say(f"base model: {e}; making it again")
        return None, path


def get_base(cfg, device, env):
    """The policy that RL begins with: --model's, else the base model for these settings, from the
    cache if it is there, else trained and put there."""
    if cfg.model:
        return weights.load(cfg.model, device, env.prompt_length + env.answer_length, say)
    model, path = find_base(cfg, device, env)
    if model:
        say(f"base model: {path.parent} (cached), {model.n_params() / 1e6:.2f} M parameters")
        return model
    model = GPT(gpt_config(cfg, env), device, cfg.seed)
    say("base model: none in the cache for these settings and this code; "
        f"{model.n_params() / 1e6:.2f} M parameters learn to imitate a noisy demonstrator "
        f"({cfg.base_steps} steps of {cfg.base_batch})")
    train_base(model, env, cfg)
    config = dict(task=cfg.task, digits=cfg.digits, noise=cfg.noise)
    keep(partial(save_checkpoint, path, model, config=config))
    return model


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


def train_base(model, env, cfg):
    """Cross-entropy on the demonstrators' answers, AdamW, a short warm-up and a linear fall to
    0."""
    device, room = model.embedding.device, model.cfg.context
    num = numerics(cfg.base_precision, device, cfg.fast).hold(model.parameters())
    model.use(num)
    scaler = make_scaler(num)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.base_lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    begin, warmup = time.monotonic(), max(1, cfg.base_steps // 20)
    for step in range(cfg.base_steps):
        for group in optimizer.param_groups:
            group["lr"] = cfg.base_lr * min((step + 1) / warmup, 1 - step / cfg.base_steps)
        tokens, answer = demonstrations(env.task, cfg.base_batch, stream(cfg.seed, 1, step))
        tokens, answer = tokens[:, :room].to(device), answer[:, :room].to(device)
        loss, count = 0.0, answer.sum()
        for part, where in zip(tokens.split(cfg.micro_batch), answer.split(cfg.micro_batch)):
            share = -model.token_logprobs(part, where)[0].sum() / count
            with reproducible(device):
                scaler.scale(share).backward()
            loss += share.detach()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        num.refresh()
        if (step + 1) % max(1, cfg.base_steps // 10) == 0:
            say(f"  imitation {step + 1:5}/{cfg.base_steps}  loss {loss.item():.3f}  "
                + to_go(begin, (step + 1) / cfg.base_steps))
    if not math.isfinite(loss.item()) or not all(torch.isfinite(p).all() for p in model.parameters()):
        raise InputError(f"the base model's loss is {loss.item()}: imitation diverged; lower --base-lr")
    model.use(Numerics("fp32", device).hold(model.parameters()))


def load_policy(cfg, env, device, saved, acting, learning):
    """The model that learns, from its checkpoint (the dict `saved`) or from the base."""
    if saved:
        model = load_trained(saved, device, gpt_config(cfg, env))
    else:
        model = get_base(cfg, device, env)
    trainable(model, cfg, acting, learning)
    if model.lora:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        say(f"LoRA: {trained / 1e6:.3f} M parameters are trained, {model.n_params() / 1e6:.2f} M "
            "are frozen")
    if cfg.replay_routing and not model.cfg.n_experts:
        raise InputError("--replay-routing: this model has no experts")
    return model


def trainable(model, cfg, acting, learning):
    """With adapters, if these are what is trained. Frozen weights are kept in the format alone, if
    both sides have the same."""
    if cfg.lora_rank and not model.lora:
        model.adapt(cfg.lora_rank, cfg.seed)
    if acting is learning:
        model.keep_rounded(learning)
    model.recompute = cfg.recompute
    return model


def load_trained(saved, device, expect=None):
    """The model of a checkpoint. With --model and LoRA it holds the adapters alone."""
    run, base = saved.get("config", {}), None
    if run.get("model") and saved["lora"]:
        if weights.fingerprint(run["model"]) != saved["base"]:
            raise InputError(f"{run['model']} is not the model that this run began with")
        base = weights.load(run["model"], device, saved["gpt"]["context"])
    return load_model(saved, device, expect, base)


def load_reference(cfg, model, saved, device):
    """The policy as it was before RL, for --kl-beta. None with LoRA: there it is the base alone."""
    if not cfg.kl_beta or cfg.lora_rank:
        return None
    reference = GPT(model.cfg, device, seed=None)
    reference.load_state_dict(saved["reference"] if saved else model.state_dict())
    num = numerics(cfg.train_format, device, cfg.fast, cfg.exact)
    return reference.use(num.hold(reference.parameters()))


def export(cfg, folder, model):
    """What a run of --model leaves for other tools: a folder for transformers, or an adapter for
    peft."""
    if cfg.lora_rank:
        weights.save_adapter(folder / "adapter", model, cfg.model, replace=True)
        return say(f"adapter, for peft: {folder}/adapter/")
    fmt = cfg.rollout_format if cfg.rollout_format in ("fp16", "bf16") else "fp32"
    weights.save(folder / "model", model, fmt, like=cfg.model, replace=True)
    say(f"model, for transformers and others, in {fmt} as it was rolled out: {folder}/model/")


def open_model(path, device):
    """-> (model, its tokenizer, the settings of the run that made it). path: a run's folder, a
    checkpoint file, or the folder of a Hugging Face checkpoint."""
    path = pathlib.Path(path)
    here = os.path.exists                                   # False where a name is far too long
    if here(path / "config.json") and not here(path / "checkpoint.pt"):
        return weights.load(path, device), hf_tokenizer.load_tokenizer(path), dict(model=str(path))
    saved = load_checkpoint(path, device)
    run, tokenizer = saved.get("config", {}), Bytes
    if run.get("model"):
        tokenizer = hf_tokenizer.load_tokenizer(run["model"], run["prompt_form"])
    return load_trained(saved, device), tokenizer, run
