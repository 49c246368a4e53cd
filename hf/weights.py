"""hf/weights.py: reads a Hugging Face model folder into model.GPT, and writes one for other tools.

    load("./Qwen2.5-0.5B")           Qwen2, Qwen2.5, Qwen3, Qwen3-MoE, Llama 2 and 3
    save("out/model", model, ...)    config.json, model.safetensors (several if large), a tokenizer
    save_adapter(...)                LoRA in PEFT's format
    health(model, tokens)            how near its activations come to a format's end

Only safetensors are read; a pytorch_model.bin is a pickle, and a pickle is a program.
"""
import hashlib
import json
import math
import os
import pathlib
import shutil
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby

import torch

from data.tokenizer import PAD, STOP, TOKENIZER
from hf import package, reading, regular, short
from hf.config import config_of, gpt_config, usable, write_config
from model import GPT, Adapter
from precision import InputError, Numerics

PLACE = dict(qkv="self_attn", proj="self_attn", gate_up="mlp", down="mlp")   # of a product
DTYPES = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)
STORED = "F32", "F16", "BF16"               # what safetensors calls them
TOKENIZER_FILES = """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json
    vocab.json merges.txt generation_config.json chat_template.jinja chat_template.json
    LICENSE""".split()
SHARD = 4 << 30                             # bytes a file, when writing
CONTEXT = 1 << 17                           # positions that have rotations ready, if nobody says more
MAPPED = 2 << 20                            # bytes of a file in memory at a time, when reading


# --------------------------------------------------------------------------------------------------
# Tensors: which of theirs is which part of ours


def tensors(model, blocks=None):
    """-> (their name, the part of our master weight that it is, a view), in their order. blocks:
    see `outline`."""
    c = model.cfg
    yield "model.embed_tokens.weight", model.embedding
    for i, b in enumerate(blocks or model.blocks):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", b.norm1
        for product, parts in b.parts().items():
            for name, rows in parts.items():
                name = f"{layer}.{PLACE[product]}.{name}"
                yield f"{name}.weight", getattr(b, product).narrow(0, *rows)
                if product == "qkv" and c.qkv_bias:
                    yield f"{name}.bias", b.qkv_bias.narrow(0, *rows)
        if c.qk_norm:
            yield f"{layer}.self_attn.q_norm.weight", b.q_norm
            yield f"{layer}.self_attn.k_norm.weight", b.k_norm
        yield f"{layer}.post_attention_layernorm.weight", b.norm2
        if b.experts:
            yield f"{layer}.mlp.gate.weight", b.experts.router
            for e, (gate_up, down) in enumerate(zip(b.experts.gate_up, b.experts.down)):
                yield f"{layer}.mlp.experts.{e}.gate_proj.weight", gate_up[:c.expert_width]
                yield f"{layer}.mlp.experts.{e}.up_proj.weight", gate_up[c.expert_width:]
                yield f"{layer}.mlp.experts.{e}.down_proj.weight", down
    yield "model.norm.weight", model.norm
    if not c.tied_head:
        yield "lm_head.weight", model.head


def outline(cfg):
    """What `tensors` would give of this GPT, without memory. All blocks of a kind are the same one,
    so a thousand layers take no longer than two."""
    kinds = [GPT(replace(cfg, n_layers=1, context=1, dense_layers=dense), "meta", seed=None)
             for dense in ((), (0,))]
    dense = {*cfg.dense_layers}
    return tensors(kinds[0], (kinds[i in dense].blocks[0] for i in range(cfg.n_layers)))


def described(folder, context=None):
    """-> (GPTConfig, {tensor name: file}): what config.json says and what the files hold, compared
    with each other. Only the files' headers are read, and nothing is allocated: whatever the
    numbers are, an answer is quick. context: the longest sequence that will be needed (default:
    what the model was made for, up to CONTEXT)."""
    folder = pathlib.Path(folder)
    c, where = config_of(folder), files_of(folder)
    with reading(folder / "config.json"):
        cfg = gpt_config(c, len(where))
        longest = usable("max_position_embeddings", c.get("max_position_embeddings") or 2048)
        if context is not None and context > longest:
            raise InputError(f"{context} tokens of prompt and answer are more than the {longest} "
                             "that it was made for: lower --max-answer, or leave out the longest "
                             "problems")
        cfg = replace(cfg, context=context or min(longest, CONTEXT))
        expected = outline(cfg)
    with reading(folder):
        compare(expected, where, cfg.tied_head)
    return cfg, where


def files_of(folder):
    """-> {tensor name: file that holds it}. No index is read: it could only say the same, or name
    files elsewhere."""
    where, folder = {}, pathlib.Path(folder)
    for path in sorted(folder.glob("*.safetensors")):
        names = dict.fromkeys(opened(path).keys(), path)
        if twice := where.keys() & names.keys():
            raise InputError(short(f"{path}: {min(twice)} is in another file as well"))
        where |= names
    if not where:
        pickles = [f.name for f in folder.glob("*") if f.suffix in (".bin", ".pt", ".pth")]
        why = f"; {pickles[0]} is a pickle, which could run any program" if pickles else ""
        raise InputError(short(f"no model.safetensors in {folder}{why}"))
    return where


def opened(path):
    """safe_open, with an error that names the file."""
    library = package("safetensors")
    with reading(path):
        open(regular(path), "rb").close()               # the library says "not found" for "may not"
        try:
            return library.safe_open(str(path), "pt")
        except (OSError, library.SafetensorError) as e:
            raise InputError(f"no complete safetensors file: {e}") from None


def compare(expected, where, tied):
    """Raise InputError where the files' headers do not hold what is expected, and nothing else."""
    left, path = {*where}, None
    for name, part in expected:
        if name not in where:
            raise InputError(f"it has no tensor {name}: is a file missing, or is it another "
                             "architecture than its config.json says?")
        if path != where[name]:
            path = where[name]
            file = opened(path)
        there = file.get_slice(name)
        if there.get_dtype() not in STORED:
            raise InputError(f"{path}: {name} is stored as {there.get_dtype()}, quantised perhaps; "
                             f"known: {', '.join(STORED)}")
        if there.get_shape() != [*part.shape]:
            raise InputError(f"{path}: {name} has shape {tuple(there.get_shape())}, the config asks "
                             f"for {tuple(part.shape)}")
        left.remove(name)
    spare = ("rotary_emb.inv_freq", *["lm_head.weight"] * tied)
    if left := sorted(n for n in left if not n.endswith(spare)):
        raise InputError(f"it has {len(left)} tensors that this model has no place for: "
                         f"{', '.join(left[:3])}")


@torch.no_grad()
def load(folder, device="cpu", context=None, say=lambda text: None):
    """A model folder -> GPT with FP32 masters, in use with fp32. Host memory is the model's and a
    tensor more: a file is mapped into memory, and its pages count as this process's until it is
    closed, so it is closed every so often."""
    cfg, where = described(folder, context)
    model, path, seen = GPT(cfg, device, seed=None), None, 0
    for name, part in tensors(model):
        if path != where[name] or seen > max(MAPPED, path.stat().st_size >> 6):
            path, seen = where[name], 0
            file = opened(path)
        tensor = file.get_tensor(name)
        part.copy_(tensor)
        if not torch.isfinite(part).all():
            raise InputError(short(f"{path}: {name} holds numbers that are not finite"))
        seen += tensor.nbytes
    say(f"model: {folder}, {model.n_params() / 1e6:.1f} M parameters, {cfg.n_layers} layers of "
        f"width {cfg.width}")
    return model.use(Numerics("fp32", device).hold(model.parameters()))


def save(folder, model, fmt="fp32", like=None, replace=False):
    """Write a folder that transformers, vLLM and other tools load. fmt: fp32, fp16 or bf16, how the
    weights are stored. like: the folder that the model came from, whose tokenizer is copied; a
    model from scratch gets one for its bytes. An existing folder is refused, unless it is to be
    replaced; a new one appears whole."""
    like = pathlib.Path(like) if like else None
    dtype, number, size = DTYPES[fmt], {}, 0
    config = write_config(model.cfg, dtype, config_of(like) if like else None)
    for name, part in tensors(model):
        number[name] = size // SHARD
        size += part.numel() * dtype.itemsize
    files, where = len({*number.values()}), {}
    with new_folder(folder, replace) as out:
        for i, (_, some) in enumerate(groupby(tensors(model), lambda t: number[t[0]]), 1):
            file = f"model-{i:05}-of-{files:05}.safetensors" if files > 1 else "model.safetensors"
            shard = {n: part.detach().to("cpu", dtype, copy=True) for n, part in some}
            write(out / file, shard)
            where |= dict.fromkeys(shard, file)
        if files > 1:
            index = dict(metadata=dict(total_size=size), weight_map=where)
            write_json(out / "model.safetensors.index.json", index)
        if like:
            for name in TOKENIZER_FILES:
                if (like / name).is_file():
                    shutil.copy(like / name, out / name)
        elif model.cfg.vocab_size == TOKENIZER.n_vocab:
            config |= byte_tokenizer(out)
        write_json(out / "config.json", config)


def write(path, named):
    """Tensors, none a part of another, into one safetensors file."""
    for name, t in named.items():
        if not torch.isfinite(t).all():
            raise InputError(f"{name} does not fit into {t.dtype}: numbers become infinite")
    package("safetensors.torch").torch.save_file(named, str(path), metadata=dict(format="pt"))
    path.chmod(0o644)                                    # the library leaves it to its owner alone


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def new_folder(path, replace=False):
    """A folder that appears under its name only when all in it is written."""
    path = pathlib.Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        if path.exists() and not replace and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path} exists already: name another folder")
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
    except (OSError, RecursionError, package("safetensors").SafetensorError) as e:
        raise InputError(short(f"cannot write {path}: {getattr(e, 'strerror', e)}")) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def byte_tokenizer(folder):
    """tokenizer.json for a model from scratch, whose tokens are bytes -> what its config.json has
    to say of it."""
    library = package("tokenizers")
    letters = sorted(library.pre_tokenizers.ByteLevel.alphabet())     # GPT-2's letters for bytes:
    printable = [ord(c) for c in letters if ord(c) < 256]             # a printable byte is its own,
    others = [b for b in range(256) if b not in printable]            # the others follow in order
    tok = library.Tokenizer(library.models.BPE(dict(zip(letters, printable + others)), []))
    tok.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = library.decoders.ByteLevel()
    tok.add_special_tokens(["<|stop|>", "<|pad|>"])                   # STOP and PAD, the next ids
    tok.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast", eos_token="<|stop|>", pad_token="<|pad|>",
        clean_up_tokenization_spaces=False))
    return dict(eos_token_id=STOP, pad_token_id=PAD, bos_token_id=None)


def fingerprint(folder):
    """A hash of what the folder holds: names, sizes, and both ends of each weight file. So that a
    run is not resumed, nor an adapter applied, upon another base."""
    h = hashlib.sha256()
    for path in sorted({*files_of(folder).values()}):
        with open(path, "rb") as f:
            h.update(f"{path.name} {path.stat().st_size}".encode() + f.read(1 << 20))
            f.seek(max(0, path.stat().st_size - (1 << 20)))
            h.update(f.read())
    return h.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# LoRA


def save_adapter(folder, model, base, replace=False):
    """The adapters in PEFT's format: PeftModel.from_pretrained(base model, folder) loads them.
    FP32, as they were trained."""
    found, targets, rank = {}, {}, model.lora["rank"]
    for i, b in enumerate(model.blocks):
        for product, adapter in b.lora.items():
            for a, B, name in zip(adapter.A.split(rank), adapter.B, adapter.parts):
                key = f"base_model.model.model.layers.{i}.{PLACE[product]}.{name}.lora_"
                for end, part in (("A.weight", a), ("B.weight", B)):
                    found[key + end] = part.detach().to("cpu", copy=True)
                targets[name] = True
    with new_folder(folder, replace) as out:
        write(out / "adapter_model.safetensors", found)
        write_json(out / "adapter_config.json", dict(
            peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base), r=rank,
            lora_alpha=Adapter.scale * rank, target_modules=list(targets), inference_mode=True))


# --------------------------------------------------------------------------------------------------
# FP16's range


@torch.no_grad()
def health(model, tokens):
    """One forward pass over tokens (B, T) in the model's present format -> [(largest activation,
    where)], a layer each in order; inf where it went beyond the format's end."""
    largest = {}

    def spy(kind, where, x, raw):
        size = float(x.abs().max())                                     # nan comes of inf
        largest[where] = max(largest.get(where, 0.0), math.inf if math.isnan(size) else size)
    model.num.spy = spy
    try:
        model(tokens)
    finally:
        model.num.spy = None
    return [(size, where) for where, size in largest.items()]


def warn_of_overflow(model, tokens, say, headroom=8):
    """Say which layers come within `headroom` of the format's largest number. Formats with FP32's
    exponent have no such end."""
    fmt = model.num.fmt
    if fmt.exp >= 8:
        return
    found = health(model, tokens)
    near = [f for f in found if f[0] * headroom > fmt.max]              # the first: where it began
    if not near:
        size, where = max(found)
        if not size:
            return say("warning: every activation on a prompt is 0: are there weights in the files?")
        return say(f"largest activation on a prompt: {size:.0f} in {where}, {fmt.max / size:.0f} "
                   f"times below {fmt.name}'s end")
    names = ", ".join(f"{where} ({'beyond it' if math.isinf(size) else f'{size:.0f}'})"
                      for size, where in near[:3])
    say(f"warning: activations come within {headroom} times of {fmt.name}'s end, {fmt.max:.0f}, in "
        f"{len(near)} of {len(found)} layers: {names}. Training may overflow there; "
        "--precision bf16 has the range")
