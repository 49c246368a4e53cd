"""hf/weights.py: reads a Hugging Face model folder into model.GPT, and writes one that other tools load.

    load("./Qwen2.5-0.5B")           Qwen2, Qwen2.5 (and what is distilled into them), Qwen3, Qwen3-MoE, Llama 2 and 3
    save("out/model", model, ...)    config.json, model.safetensors (several if large), the tokenizer's files
    save_adapter(...)                LoRA in PEFT's format
    health(model, tokens)            how near its activations come to a format's end

A folder is read tensor by tensor into FP32 masters and never held twice. What this GPT cannot compute is refused by name: a
checkpoint loaded nearly right gives answers that are nearly right, without a sign of it. Only safetensors are read; a
pytorch_model.bin is a pickle, and a pickle is a program.
"""
import hashlib
import json
import math
import os
import pathlib
import shutil

import torch

from data.tokenizer import PAD, STOP, TOKENIZER
from model import GPT, Adapter, GPTConfig
from precision import InputError, Numerics

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
                   "merges.txt", "generation_config.json", "chat_template.jinja", "chat_template.json", "LICENSE")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHARD = 4 << 30                                              # bytes a file, when writing
MAPPED = 2 << 20                                             # bytes of a file in memory at a time, when reading


def safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise InputError("reading and writing real checkpoints needs safetensors: pip install -e '.[hf]'") from None
    return safetensors


# ---------------------------------------------------------------------------------------------------------------------
# config.json


def read_json(path):
    try:
        data = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is not there: a model is a folder with config.json, *.safetensors and tokenizer.json") from None
    except (OSError, ValueError) as e:
        raise InputError(f"{path} cannot be read: {e}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no JSON object")
    return data


def folder_of(folder):
    """The folder, if a checkpoint is there."""
    if not (pathlib.Path(folder) / "config.json").exists():
        raise InputError(f"--model {folder}: no checkpoint's folder is there (config.json, *.safetensors, tokenizer.json)")
    return folder


def read_config(folder, context=None):
    """config.json -> GPTConfig. context: the longest sequence that will be needed (default: what the model was made for)."""
    path = pathlib.Path(folder) / "config.json"
    c = read_json(path)
    kind = c.get("model_type")

    def refuse(why):
        raise InputError(f"{path}: {why}; not supported")
    if kind not in ("qwen2", "qwen3", "qwen3_moe", "llama"):
        refuse(f"model_type {kind!r} (known: qwen2, qwen3, qwen3_moe, llama)")
    if c.get("quantization_config"):
        refuse(f"quantised weights ({c['quantization_config'].get('quant_method', 'of some kind')})")
    if c.get("use_sliding_window") or any(t != "full_attention" for t in c.get("layer_types") or ()):
        refuse("sliding-window attention")
    if c.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act {c['hidden_act']!r} (known: silu)")
    for name in ("attention_bias", "mlp_bias"):
        if c.get(name):
            refuse(f"{name} true")
    rope = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        refuse(f"rope type {rope_type!r} (known: default, llama3)")
    if rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1)) != 1:
        refuse("rotary positions on a part of each head (partial_rotary_factor)")
    try:
        heads, layers, longest = c["num_attention_heads"], c["num_hidden_layers"], c.get("max_position_embeddings", 2048)
        moe = {}
        if kind == "qwen3_moe":
            step = c.get("decoder_sparse_step", 1)
            dense = {*(c.get("mlp_only_layers") or ()), *(i for i in range(layers) if (i + 1) % step)}
            moe = dict(n_experts=c.get("num_experts", c.get("num_local_experts")), experts_per_token=c["num_experts_per_tok"],
                       expert_width=c["moe_intermediate_size"], norm_topk=c.get("norm_topk_prob", False),
                       dense_layers=tuple(sorted(dense)))
        if context is not None and context > longest:
            raise InputError(f"{context} tokens of prompt and answer are more than the {longest} that {folder} was made for: "
                             "lower --max-answer, or leave out the longest problems")
        keys = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
        for name in ("vocab_size", "hidden_size", "intermediate_size"):
            if type(c[name]) is not int or c[name] < 1:
                raise TypeError(f"{name}: {c[name]!r}")
        return GPTConfig(
            vocab_size=c["vocab_size"], n_layers=layers, width=c["hidden_size"], n_heads=heads,
            n_kv_heads=c.get("num_key_value_heads") or heads,
            head_dim=c.get("head_dim") or (128 if kind == "qwen3" else c["hidden_size"] // heads),
            mlp_width=c["intermediate_size"], context=context or longest,
            rope_theta=float(rope.get("rope_theta", c.get("rope_theta", 10_000.0))),
            rope_llama3=tuple(float(rope[k]) for k in keys) if rope_type == "llama3" else (),
            norm_eps=c.get("rms_norm_eps", 1e-6), qkv_bias=kind == "qwen2", qk_norm=kind.startswith("qwen3"),
            tied_head=bool(c.get("tie_word_embeddings", False)), **moe)
    except (KeyError, TypeError, ZeroDivisionError) as e:
        raise InputError(f"{path}: no usable value for {e}") from None


def write_config(cfg, fmt, like=None):
    """GPTConfig -> the dict of a config.json. like: that of the folder it came from, for all that a GPT does not need."""
    if cfg.qk_norm and cfg.qkv_bias:
        raise InputError("no known family has both a QKV bias and QK-norm")
    kind = "qwen3_moe" if cfg.n_experts else "qwen3" if cfg.qk_norm else "qwen2" if cfg.qkv_bias else "llama"
    if cfg.n_experts and not cfg.qk_norm:
        raise InputError("experts without QK-norm are no known family")
    name = {"qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "llama": "Llama"}[kind]
    keys = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    rope = dict(rope_type="llama3", **dict(zip(keys, cfg.rope_llama3))) if cfg.rope_llama3 else dict(rope_type="default")
    if cfg.rope_llama3:
        rope[keys[3]] = int(rope[keys[3]])
    out = {**(like or dict(max_position_embeddings=cfg.context)), **dict(
        architectures=[f"{name}ForCausalLM"], model_type=kind, vocab_size=cfg.vocab_size, num_hidden_layers=cfg.n_layers,
        hidden_size=cfg.width, num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.n_kv_heads, head_dim=cfg.head_dim,
        intermediate_size=cfg.mlp_width, rms_norm_eps=cfg.norm_eps, hidden_act="silu", tie_word_embeddings=cfg.tied_head,
        rope_theta=cfg.rope_theta, rope_scaling=rope if cfg.rope_llama3 else None,              # as older tools read it, and ...
        rope_parameters=dict(rope, rope_theta=cfg.rope_theta),                                  # ... as newer ones do
        dtype=dict(fp32="float32", fp16="float16", bf16="bfloat16")[fmt])}
    out.pop("torch_dtype", None)
    if cfg.n_experts:
        out |= dict(num_experts=cfg.n_experts, num_experts_per_tok=cfg.experts_per_token, moe_intermediate_size=cfg.expert_width,
                    norm_topk_prob=cfg.norm_topk, mlp_only_layers=list(cfg.dense_layers), decoder_sparse_step=1)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Tensors: which of theirs is which part of ours


def tensors(model):
    """-> (their name, the part of our master weight that it is, a view), one by one, in their order."""
    c = model.cfg
    yield "model.embed_tokens.weight", model.embedding
    for i, b in enumerate(model.blocks):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", b.norm1
        for product, parts in b.parts().items():
            place = "self_attn" if product in ("qkv", "proj") else "mlp"
            for name, (first, rows) in parts.items():
                yield f"{layer}.{place}.{name}.weight", getattr(b, product).narrow(0, first, rows)
                if product == "qkv" and c.qkv_bias:
                    yield f"{layer}.{place}.{name}.bias", b.qkv_bias.narrow(0, first, rows)
        if c.qk_norm:
            yield f"{layer}.self_attn.q_norm.weight", b.q_norm
            yield f"{layer}.self_attn.k_norm.weight", b.k_norm
        yield f"{layer}.post_attention_layernorm.weight", b.norm2
        if b.experts:
            yield f"{layer}.mlp.gate.weight", b.experts.router
            for e in range(c.n_experts):
                yield f"{layer}.mlp.experts.{e}.gate_proj.weight", b.experts.gate_up[e][:c.expert_width]
                yield f"{layer}.mlp.experts.{e}.up_proj.weight", b.experts.gate_up[e][c.expert_width:]
                yield f"{layer}.mlp.experts.{e}.down_proj.weight", b.experts.down[e]
    yield "model.norm.weight", model.norm
    if not c.tied_head:
        yield "lm_head.weight", model.head


def files_of(folder):
    """-> {tensor name: file that holds it}, from the index or from the one file's own header."""
    folder = pathlib.Path(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or any(pathlib.PurePath(str(f)).name != f for f in where.values()):
            raise InputError(f"{index} has no usable weight_map")
        return {name: folder / f for name, f in where.items()}
    if not single.exists():
        pickles = sorted(f.name for f in folder.glob("*.bin")) or sorted(f.name for f in folder.glob("*.pt*"))
        why = f"; {pickles[0]} is a pickle, which could run any program: convert it to safetensors" if pickles else ""
        raise InputError(f"no model.safetensors in {folder}{why}")
    with opened(single) as f:
        return dict.fromkeys(f.keys(), single)


def opened(path):
    """safe_open, with an error that names the file."""
    library = safetensors()
    try:
        return library.safe_open(str(path), "pt")
    except (OSError, library.SafetensorError) as e:
        raise InputError(f"{path} is no complete safetensors file: {e}") from None


@torch.no_grad()
def load(folder, device="cpu", context=None, say=lambda text: None):
    """A model folder -> GPT with FP32 masters, in use with fp32. Peak host memory is the model's and one tensor more: a file is
    mapped into memory, and its pages count as this process's until it is closed, so it is closed every so often."""
    cfg = read_config(folder, context)
    where = files_of(folder)
    model = GPT(cfg, device, seed=None)
    there = set(where)
    file, path, seen = None, None, 0
    for name, part in tensors(model):
        if name not in where:
            raise InputError(f"{folder} has no tensor {name}: another architecture than its config.json says?")
        if path != where[name] or seen > max(MAPPED, path.stat().st_size >> 6):
            file, path, seen = opened(where[name]), where[name], 0
        try:
            about = file.get_slice(name)
            shape, dtype = tuple(about.get_shape()), about.get_dtype()
            if dtype not in DTYPES:
                raise InputError(f"{path}: {name} is stored as {dtype}, quantised perhaps; known: {', '.join(DTYPES)}")
            if shape != tuple(part.shape):
                raise InputError(f"{path}: {name} has shape {shape}, the config asks for {tuple(part.shape)}")
            tensor = file.get_tensor(name)
        except safetensors().SafetensorError as e:
            raise InputError(f"{path}: {name} cannot be read: {e}") from None
        part.copy_(tensor)
        if not torch.isfinite(part).all():
            raise InputError(f"{path}: {name} holds numbers that are not finite")
        seen += tensor.numel() * tensor.element_size()
        there.discard(name)
        del tensor, about
    there -= {"lm_head.weight"} if cfg.tied_head else set()
    there = sorted(n for n in there if not n.endswith("rotary_emb.inv_freq"))
    if there:
        raise InputError(f"{folder} has tensors that this model has no place for: {', '.join(there[:3])}"
                         + (f" and {len(there) - 3} more" if len(there) > 3 else ""))
    say(f"model: {folder}, {model.n_params() / 1e6:.1f} M parameters, {cfg.n_layers} layers of width {cfg.width}")
    return model.use(Numerics("fp32", device).hold(model.parameters()))


def save(folder, model, fmt="fp32", like=None, replace=False):
    """Write a folder that transformers, vLLM and other tools load. fmt: fp32, fp16 or bf16, how the weights are stored. like:
    the folder that the model came from, whose tokenizer is copied; a model from scratch gets one for its bytes. An existing
    folder is refused, unless it is to be replaced; a new one appears whole."""
    if fmt not in ("fp32", "fp16", "bf16"):
        raise InputError(f"weights can be stored as fp32, fp16 or bf16, not as {fmt}")
    if any(b.lora for b in model.blocks):
        raise InputError("this model has LoRA adapters: save_adapter writes them, and its base is where it was")
    dtype = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)[fmt]
    with new_folder(folder, replace) as out:
        like = pathlib.Path(like) if like else None
        config = write_config(model.cfg, fmt, read_json(like / "config.json") if like else None)
        shard, size, shards = {}, 0, []
        for name, part in tensors(model):
            t = part.detach().to("cpu", dtype).clone()                 # a view of a fused weight has to stand by itself
            if not torch.isfinite(t).all():
                raise InputError(f"{name} does not fit into {fmt}: numbers become infinite")
            if shard and size + t.numel() * t.element_size() > SHARD:
                shards.append(shard_file(out, len(shards), shard))
                shard, size = {}, 0
            shard[name], size = t, size + t.numel() * t.element_size()
        shards.append(shard_file(out, len(shards), shard))
        if len(shards) == 1:
            os.replace(out / shards[0][0], out / "model.safetensors")
        else:
            names = {old: f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i, (old, _, _) in enumerate(shards)}
            for old, new in names.items():
                os.replace(out / old, out / new)
            index = dict(metadata=dict(total_size=sum(s for _, _, s in shards)),
                         weight_map={n: names[f] for f, ns, _ in shards for n in ns})
            (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
        if like:
            for name in TOKENIZER_FILES:
                if (like / name).exists():
                    shutil.copy(like / name, out / name)
        elif model.cfg.vocab_size == TOKENIZER.n_vocab:
            config |= byte_tokenizer(out)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def shard_file(folder, number, shard):
    """-> (file name, tensor names, bytes)"""
    name = f"part-{number}.safetensors"
    safetensors().torch.save_file(shard, str(folder / name), metadata=dict(format="pt"))
    return name, list(shard), sum(t.numel() * t.element_size() for t in shard.values())


class new_folder:
    """A folder that appears under its name only when all in it is written."""

    def __init__(self, path, replace=False):
        self.path, self.replace = pathlib.Path(path), replace
        self.partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")

    def __enter__(self):
        if self.path.exists() and not self.replace and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(f"{self.path} exists already: name another folder")
        self.partial.mkdir(parents=True)
        return self.partial

    def __exit__(self, kind, error, trace):
        if kind is None:
            for path in self.partial.glob("*.safetensors"):
                path.chmod(0o644)                                       # the library leaves them to their owner alone
            if self.path.exists():
                shutil.rmtree(self.path)
            os.replace(self.partial, self.path)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)


def byte_tokenizer(folder):
    """tokenizer.json for a model from scratch, whose tokens are bytes -> what its config.json has to say of it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]        # GPT-2's letters for bytes
    letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in printable)}
    special = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=True)
    tokenizer = dict(
        version="1.0", truncation=None, padding=None, normalizer=None, pre_tokenizer=byte_level, post_processor=None,
        added_tokens=[dict(id=i, content=t, **special) for i, t in ((STOP, "<|stop|>"), (PAD, "<|pad|>"))], decoder=byte_level,
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                   fuse_unk=False, byte_fallback=False, ignore_merges=False, vocab={letter[b]: b for b in range(256)}, merges=[]))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="<|stop|>", pad_token="<|pad|>",
                  clean_up_tokenization_spaces=False)
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return dict(eos_token_id=STOP, pad_token_id=PAD, bos_token_id=None)


def fingerprint(folder):
    """A hash of what the folder holds: names, sizes, and both ends of each weight file. So that a run is not resumed, nor an
    adapter applied, upon another base."""
    h = hashlib.sha256()
    for path in sorted({*files_of(folder).values()}):
        with open(path, "rb") as f:
            h.update(f"{path.name} {path.stat().st_size}".encode() + f.read(1 << 20))
            f.seek(max(0, path.stat().st_size - (1 << 20)))
            h.update(f.read())
    return h.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


def save_adapter(folder, model, base, replace=False):
    """The adapters in PEFT's format: PeftModel.from_pretrained(base model, folder) loads them. FP32, as they were trained."""
    found, targets, rank = {}, {}, 0
    for i, b in enumerate(model.blocks):
        for product, adapter in b.lora.items():
            place = "self_attn" if product in ("qkv", "proj") else "mlp"
            for a, B, name in zip(adapter.A.split(adapter.rank), adapter.B, adapter.parts):
                key = f"base_model.model.model.layers.{i}.{place}.{name}.lora_"
                found[key + "A.weight"], found[key + "B.weight"] = a.detach().cpu().clone(), B.detach().cpu().clone()
                targets[name], rank = True, adapter.rank
    if not found:
        raise InputError("this model has no LoRA adapters")
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base), r=rank,
                  lora_alpha=Adapter.scale * rank,
                  target_modules=list(targets), lora_dropout=0.0, bias="none", fan_in_fan_out=False, inference_mode=True,
                  init_lora_weights=True, modules_to_save=None, use_rslora=False, use_dora=False)
    with new_folder(folder, replace) as out:
        safetensors().torch.save_file(found, str(out / "adapter_model.safetensors"), metadata=dict(format="pt"))
        (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# FP16's range


@torch.no_grad()
def health(model, tokens):
    """One forward pass over tokens (B, T) in the model's present format -> [(largest activation, where)], a layer each in order;
    inf where it went beyond the format's end."""
    largest = {}

    def spy(kind, where, x, raw):
        largest[where] = max(largest.get(where, 0.0), float(torch.nan_to_num(x.abs().max().float(), nan=math.inf)))
    num = model.num
    num.spy = spy
    try:
        model(tokens)
    finally:
        num.spy = None
    return [(size, where) for where, size in largest.items()]


def warn_of_overflow(model, tokens, say, headroom=8):
    """Say which layers come within `headroom` of the format's largest number. Formats with FP32's exponent have no such end."""
    fmt = model.num.fmt
    if fmt.exp >= 8:
        return
    found = health(model, tokens)
    size, where = max(found)
    if size * headroom <= fmt.max:
        say(f"largest activation on a prompt: {size:.0f} in {where}, {fmt.max / size:.0f} times below {fmt.name}'s end")
        return
    near = [f for f in found if f[0] * headroom > fmt.max]              # the first one is where it began
    names = ", ".join(f"{w} ({'beyond it' if math.isinf(s) else f'{s:.0f}'})" for s, w in near[:3])
    say(f"warning: activations come within {headroom} times of {fmt.name}'s end, {fmt.max:.0f}, in {len(near)} of {len(found)} "
        f"layers: {names}. Training may overflow there; --precision bf16 has the range")
