"""hf/config.py: the config.json of a model's folder -> model.GPTConfig, and back.

What this GPT cannot compute is refused by name: a checkpoint loaded nearly right gives answers that
are nearly right, without a sign of it.
"""
import os
import pathlib

from hf import read_json, reading
from model import GPTConfig
from precision import InputError

# model_type: transformers' name, whether it has a QKV bias, QK-norm, experts
FAMILIES = {"llama": ("Llama", False, False, False), "qwen2": ("Qwen2", True, False, False),
            "qwen3": ("Qwen3", False, True, False), "qwen3_moe": ("Qwen3Moe", False, True, True)}
# a field of GPTConfig: what config.json calls it
FIELDS = dict(vocab_size="vocab_size", n_layers="num_hidden_layers", width="hidden_size",
              n_heads="num_attention_heads", n_kv_heads="num_key_value_heads", head_dim="head_dim",
              mlp_width="intermediate_size", norm_eps="rms_norm_eps",
              tied_head="tie_word_embeddings")
EXPERTS = dict(n_experts="num_experts", experts_per_token="num_experts_per_tok",
               expert_width="moe_intermediate_size", norm_topk="norm_topk_prob")
LLAMA3 = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
ROPES = {"default": (), "llama3": LLAMA3}


def config_of(folder):
    path = pathlib.Path(folder) / "config.json"
    with reading(path):
        if not os.path.lexists(path):
            raise InputError(f"{path} is not there: a model is a folder with config.json, "
                             "*.safetensors and tokenizer.json")
        return read_json(path)


def usable(name, value, kind=int):
    """A number that can be one: whole ones are sizes, of no more than memory has."""
    kinds, low, high = {int: ((int,), 1, 1 << 40), float: ((int, float), 1e-30, 1e30),
                        bool: ((bool,), False, True)}[kind]
    if type(value) not in kinds or not low <= value <= high:
        raise InputError(f"no usable value for {name}: {value!r}")
    return kind(value)


def rope_of(c):
    """The entries of rope_scaling (older), rope_parameters (newer) and the config itself as one
    dict. What one says and another contradicts is refused."""
    rope = {k: c[k] for k in ("rope_theta", "partial_rotary_factor") if k in c}
    for entry in c.get("rope_scaling", {}), c.get("rope_parameters", {}):
        for k, value in entry.items():
            k = "rope_type" if k == "type" else k
            if rope.setdefault(k, value) != value:
                raise InputError(f"two values for the rope's {k}: {rope[k]!r} and {value!r}")
    return dict(rope_type="default", rope_theta=10_000.0, partial_rotary_factor=1) | rope


def gpt_config(c, there):
    """A config.json's dict -> GPTConfig. there: how many tensors the files hold."""
    c = {k: v for k, v in c.items() if v is not None}
    kind, act, rope = c.get("model_type"), c.get("hidden_act", "silu"), rope_of(c)
    rope_type, quantised = rope.pop("rope_type"), c.get("quantization_config", {})
    sliding = c.get("use_sliding_window") or {*c.get("layer_types", ())} - {"full_attention"}
    for refused, why in (
            (kind not in FAMILIES, f"model_type {kind!r} (known: {', '.join(FAMILIES)})"),
            (quantised, f"quantised weights ({quantised.get('quant_method')})"),
            (sliding, "sliding-window attention"),
            (act != "silu", f"hidden_act {act!r} (known: silu)"),
            (c.get("attention_bias"), "attention_bias true"),
            (c.get("mlp_bias"), "mlp_bias true"),
            (rope_type not in ROPES, f"rope type {rope_type!r} (known: llama3)"),
            (rope.pop("partial_rotary_factor") != 1, "partial_rotary_factor")):
        if refused:
            raise InputError(f"{why}; not supported")
    theta, *llama3 = [usable(k, rope.pop(k, 0), float) for k in ("rope_theta", *ROPES[rope_type])]
    if rope:                                                # it would be ignored
        raise InputError(f"rope type {rope_type!r} has no {min(rope)}; not supported")
    if llama3 and llama3[1] >= llama3[2]:
        raise InputError("no usable value for low_freq_factor: it is not below high_freq_factor")
    _, qkv_bias, qk_norm, moe = FAMILIES[kind]
    # What is meant where a file says nothing
    c = dict(rms_norm_eps=1e-6, tie_word_embeddings=False, num_experts=c.get("num_local_experts"),
             num_key_value_heads=c.get("num_attention_heads"), norm_topk_prob=False,
             **dict(head_dim=128) if kind == "qwen3" else {}) | c
    names = FIELDS | (EXPERTS if moe else {})
    fields = {ours: usable(theirs, c.get(theirs), GPTConfig.__annotations__[ours])
              for ours, theirs in names.items() if ours != "head_dim" or theirs in c}
    for ours in ("n_layers", "n_experts"):
        if fields.get(ours, 0) > there:
            raise InputError(f"{names[ours]} is {fields[ours]}, and only {there} tensors are there")
    if moe:
        step = usable("decoder_sparse_step", c.get("decoder_sparse_step", 1))
        dense = {i for i in range(fields["n_layers"]) if (i + 1) % step}
        fields["dense_layers"] = sorted(dense.union(c.get("mlp_only_layers", ())))
    cfg = GPTConfig(**fields, rope_theta=theta, rope_llama3=llama3, qkv_bias=qkv_bias,
                    qk_norm=qk_norm)
    usable("head_dim", cfg.head_dim)
    return cfg


def write_config(cfg, dtype, like=None):
    """GPTConfig -> the dict of a config.json. like: that of the folder it came from, for all that a
    GPT does not need."""
    has = cfg.qkv_bias, cfg.qk_norm, bool(cfg.n_experts)
    kind = next((kind for kind, (_, *needs) in FAMILIES.items() if has == tuple(needs)), None)
    if not kind:
        raise InputError("no known family has this mix of QKV bias, QK-norm and experts")
    rope = dict(rope_type="default")
    if cfg.rope_llama3:
        rope = dict(rope_type="llama3", **dict(zip(LLAMA3, cfg.rope_llama3)))
        rope[LLAMA3[3]] = int(rope[LLAMA3[3]])
    out = (like or dict(max_position_embeddings=cfg.context)) | dict(
        architectures=[f"{FAMILIES[kind][0]}ForCausalLM"], model_type=kind, hidden_act="silu",
        rope_theta=cfg.rope_theta, rope_scaling=rope if cfg.rope_llama3 else None,   # older tools
        rope_parameters=dict(rope, rope_theta=cfg.rope_theta),                       # newer ones
        dtype=str(dtype).removeprefix("torch."))
    out.pop("torch_dtype", None)
    if cfg.n_experts:
        out |= dict(mlp_only_layers=list(cfg.dense_layers), decoder_sparse_step=1)
    names = FIELDS | (EXPERTS if cfg.n_experts else {})
    return out | {theirs: getattr(cfg, ours) for ours, theirs in names.items()}
