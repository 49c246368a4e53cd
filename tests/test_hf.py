"""Real checkpoints against the libraries that write them: every family and flag as a tiny random model made by
transformers, read here, compared, written, and read there again. Nothing is downloaded."""
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import numerics, tiny

from hf import weights
from model import GPTConfig, KVCache
from precision import InputError
from sample import Sampler

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
T = transformers

BASE = dict(vocab_size=131, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=96, max_position_embeddings=128, eos_token_id=7, bos_token_id=None)
LLAMA3 = dict(rope_type="llama3", rope_theta=50_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
MOE = dict(head_dim=16, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32)
FAMILIES = {
    "qwen2": (T.Qwen2Config, dict()),
    "qwen2.5 tied": (T.Qwen2Config, dict(tie_word_embeddings=True, rope_theta=1e6)),
    "qwen3, head_dim apart": (T.Qwen3Config, dict(head_dim=32)),
    "qwen3 tied": (T.Qwen3Config, dict(head_dim=16, tie_word_embeddings=True)),
    "llama 2": (T.LlamaConfig, dict(num_key_value_heads=4, rms_norm_eps=1e-5)),
    "llama 3": (T.LlamaConfig, dict(rope_theta=5e5)),
    "llama 3.1": (T.LlamaConfig, dict(rope_parameters=LLAMA3)),
    "llama 3.2 tied": (T.LlamaConfig, dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "qwen3 moe": (T.Qwen3MoeConfig, dict(MOE, norm_topk_prob=True)),
    "qwen3 moe, unnormalised, one dense layer":
        (T.Qwen3MoeConfig, dict(MOE, norm_topk_prob=False, mlp_only_layers=[1])),
    "qwen3 moe, every other layer": (T.Qwen3MoeConfig, dict(MOE, norm_topk_prob=True, decoder_sparse_step=2)),
}
TOKENS = torch.randint(0, 131, (3, 24), generator=torch.Generator().manual_seed(1))


def theirs(family, folder=None, dtype=torch.float32, gain=4.0, **save):
    """A transformers model of this family with weights large enough that answers vary, saved into `folder`."""
    kind, more = FAMILIES[family]
    torch.manual_seed(0)
    with torch.no_grad():
        model = T.AutoModelForCausalLM.from_config(kind(**{**BASE, **more})).eval()
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1) if p.dim() == 1 else p.mul_(gain)
    model = model.to(dtype)
    if folder:
        model.save_pretrained(folder, **save)
    return model


def ours(folder, device="cpu", fmt="fp32"):
    model = weights.load(folder, device)
    return model.use(numerics(fmt, device).hold(model.parameters()))


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model.logits(model(tokens.to(model.embedding.device)).flatten(0, 1)).view(*tokens.shape, -1).cpu()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_answers_of_every_family(family, tmp_path, device):
    reference = theirs(family, tmp_path)
    model = ours(tmp_path, device)
    with torch.no_grad():
        want = reference(TOKENS).logits
    assert want.std() > 0.3                                             # the comparison is not of near-zeros
    assert (logits(model) - want).abs().max() < 1e-4
    prompts = TOKENS[:, :20].tolist()
    got = Sampler(model, stop=7, pad=0).generate(prompts, 1, 64, temperature=0)
    with torch.no_grad():
        said = reference.generate(TOKENS[:, :20], max_new_tokens=64, do_sample=False, eos_token_id=7, pad_token_id=0)
    for row in range(3):
        end = int(got.length[row])
        assert got.tokens[row, :end].tolist() == said[row, :end].tolist()
        assert end == 84 or got.tokens[row, end - 1] == 7


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_family(family, tmp_path, device):
    reference = theirs(family, tmp_path)
    model = ours(tmp_path, device)
    where = torch.zeros_like(TOKENS, dtype=torch.bool)
    where[:, 9:] = True
    logp, _ = model.token_logprobs(TOKENS.to(model.embedding.device), where.to(model.embedding.device))
    (-logp.mean()).backward()
    out = reference(TOKENS).logits[:, :-1].log_softmax(-1)
    want = out.gather(-1, TOKENS[:, 1:, None])[..., 0][where[:, 1:]]
    assert torch.allclose(logp.detach().cpu(), want.detach(), atol=1e-4)
    (-want.mean()).backward()
    for p in model.parameters():
        p.data = p.grad                                                 # so that `tensors` cuts the gradients up
    got = dict(weights.tensors(model))
    grads = {n: p.grad for n, p in reference.named_parameters()}
    for n in list(grads):                                     # transformers keeps all experts of a layer in one tensor
        if n.endswith(("experts.gate_up_proj", "experts.down_proj")):
            g = grads.pop(n)
            for e in range(len(g)):
                stem = n.rsplit(".", 1)[0] + f".{e}."
                if n.endswith("gate_up_proj"):
                    grads[stem + "gate_proj.weight"], grads[stem + "up_proj.weight"] = g[e].chunk(2)
                else:
                    grads[stem + "down_proj.weight"] = g[e]
    assert set(got) == set(grads)
    scale = max(float(g.abs().max()) for g in grads.values())
    for name, g in got.items():
        assert (g.cpu() - grads[name]).abs().max() < 2e-5 * max(scale, 1), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_is_exact(family, tmp_path):
    reference = theirs(family, tmp_path / "a")
    model = weights.load(tmp_path / "a")
    weights.save(tmp_path / "b", model, like=tmp_path / "a")
    back = T.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert type(back) is type(reference)
    with torch.no_grad():
        assert torch.equal(back(TOKENS).logits, reference(TOKENS).logits)
    again = weights.load(tmp_path / "b")
    assert again.cfg == model.cfg
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))
    weights.save(tmp_path / "c", model)                                 # without the folder that it came from
    with torch.no_grad():
        back = T.AutoModelForCausalLM.from_pretrained(tmp_path / "c")
        assert torch.equal(back(TOKENS).logits, reference(TOKENS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_in_several_files(dtype, tmp_path, monkeypatch):
    """Half-precision weights are read as they are, from shards, and written as they were, in shards."""
    reference = theirs("qwen3 moe", tmp_path / "a", dtype, max_shard_size="50KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 3
    model = weights.load(tmp_path / "a")
    assert torch.equal(model.embedding, reference.model.embed_tokens.weight.float())
    monkeypatch.setattr(weights, "SHARD", 50_000)
    weights.save(tmp_path / "b", model, {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype], like=tmp_path / "a")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3
    back = T.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype="auto")
    assert back.dtype == dtype
    assert all(torch.equal(p, q) for p, q in zip(back.parameters(), reference.parameters()))
    min((tmp_path / "b").glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match="has no tensor model.embed_tokens.weight: is a file missing"):
        weights.load(tmp_path / "b")


def test_a_model_from_scratch_goes_to_transformers(tmp_path):
    """Tokens are bytes: its folder has a tokenizer that says so."""
    model = tiny(vocab_size=258)
    weights.save(tmp_path / "m", model)
    back = T.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    tokenizer = T.AutoTokenizer.from_pretrained(tmp_path / "m")
    text = "187+737= é\n  <|stop|>"
    ids = tokenizer(text)["input_ids"]
    assert ids == [*text.removesuffix("<|stop|>").encode(), 256] and tokenizer.eos_token_id == 256
    with torch.no_grad():
        assert (back(torch.tensor([ids])).logits[0] - logits(model, torch.tensor([ids]))[0]).abs().max() < 1e-4


# --- what is refused


@pytest.mark.parametrize("change, words", [
    (dict(model_type="mamba"), "model_type 'mamba'"),
    (dict(use_sliding_window=True), "sliding-window"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "sliding-window"),
    (dict(quantization_config=dict(quant_method="gptq")), "quantised weights .gptq"),
    (dict(rope_parameters=dict(rope_type="yarn", factor=4.0)), "rope type 'yarn'"),
    (dict(rope_parameters=None, rope_scaling=dict(type="dynamic", factor=2.0)), "rope type 'dynamic'"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
    (dict(attention_bias=True), "attention_bias"),
    (dict(mlp_bias=True), "mlp_bias"),
    (dict(hidden_size=None), "no usable value for hidden_size"),
    (dict(intermediate_size="96"), "no usable value for intermediate_size"),
    (dict(vocab_size=-1), "no usable value for vocab_size"),
    (dict(num_key_value_heads=0), "no usable value for num_key_value_heads"),
    (dict(num_key_value_heads=3), "no multiple"),
    (dict(vocab_size=130), r"embed_tokens.weight has shape \(131, 64\), the config asks for \(130, 64\)"),
    (dict(num_hidden_layers=4), "no tensor model.layers.3.input_layernorm.weight"),
    (dict(num_hidden_layers=2), "no place for: model.layers.2"),
])
def test_what_it_cannot_compute_is_refused_by_name(change, words, tmp_path):
    theirs("llama 3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=words) as e:
        weights.load(tmp_path)
    assert "\n" not in str(e.value)


def test_broken_folders(tmp_path):
    with pytest.raises(InputError, match="config.json is not there"):
        weights.load(tmp_path)
    theirs("llama 3", tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for content in (whole[:1000], whole[:-100], b"", b"hello"):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="no complete safetensors file"):
            weights.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no model.safetensors"):
        weights.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="pytorch_model.bin is a pickle"):
        weights.load(tmp_path)
    for content in ("{", "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(InputError, match="config.json: malformed"):
            weights.load(tmp_path)


def test_numbers_that_are_not_finite_and_formats_too_small(tmp_path):
    from safetensors.torch import load_file, save_file
    theirs("llama 3", tmp_path / "a")
    t = load_file(tmp_path / "a" / "model.safetensors")
    t["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e6
    save_file(t, tmp_path / "a" / "model.safetensors")
    model = weights.load(tmp_path / "a")
    with pytest.raises(InputError, match="up_proj.weight does not fit into torch.float16"):
        weights.save(tmp_path / "b", model, "fp16")
    assert not list(tmp_path.glob("b*"))                                # nothing half-written is left
    t["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(t, tmp_path / "a" / "model.safetensors")
    with pytest.raises(InputError, match="up_proj.weight holds numbers that are not finite"):
        weights.load(tmp_path / "a")
    t["model.layers.1.mlp.up_proj.weight"] = torch.zeros(96, 64, dtype=torch.int8)
    save_file(t, tmp_path / "a" / "model.safetensors")
    with pytest.raises(InputError, match="stored as I8"):
        weights.load(tmp_path / "a")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine").write_text("x")
    with pytest.raises(InputError, match="exists already"):
        weights.save(tmp_path / "c", model)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_little_more_than_the_model(tmp_path):
    """Peak memory of a process that loads 140 MB of FP32 weights from files half as large: 1.2 times the model. A
    small model is loaded first, so that the pages of the libraries' code are not counted."""
    code = textwrap.dedent(f"""
        import sys
        sys.path[:0] = [{os.getcwd()!r}]
        import torch
        torch.set_num_threads(1)
        import safetensors.torch
        from hf import weights
        def memory(key):
            return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(key))
        weights.load({str(tmp_path / '64')!r})
        before = memory("VmRSS")
        model = weights.load({str(tmp_path / '512')!r})
        size = sum(p.numel() * 4 for p in model.parameters())
        print((memory("VmHWM") - before) / size, size)
    """)
    from model import GPT
    for width in (64, 512):
        weights.save(tmp_path / str(width), GPT(GPTConfig(vocab_size=3000, n_layers=8, width=width, n_heads=8, n_kv_heads=4,
                                                          mlp_width=4 * width, context=64)), "bf16")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    share, size = map(float, done.stdout.split())
    assert size > 130e6 and share <= 1.2, share


def test_the_health_check_names_the_layer(tmp_path, capsys):
    theirs("llama 3", tmp_path, gain=1.0)
    model = ours(tmp_path, fmt="fp16")
    said = []
    weights.warn_of_overflow(model, TOKENS, said.append)
    assert len(said) == 1 and said[0].startswith("largest activation") and "times below fp16's end" in said[0]
    for wanted, words in ((65504 / 4, "times of fp16's end, 65504, in"), (1e6, "(beyond it)")):
        model = weights.load(tmp_path)
        while dict((where, size) for size, where in weights.health(model, TOKENS))["blocks.1.mlp"] < wanted:
            with torch.no_grad():
                model.blocks[1].down.mul_(1.5)
        said.clear()
        weights.warn_of_overflow(model.use(numerics("fp16").hold(model.parameters())), TOKENS, said.append)
        assert said[0].startswith("warning") and "blocks.1.mlp" in said[0] and words in said[0], said
        said.clear()
        weights.warn_of_overflow(model.use(numerics("bf16").hold(model.parameters())), TOKENS, said.append)
        assert not said                                                 # that range has no end to speak of


# --- LoRA


@pytest.mark.parametrize("family", ["qwen2.5 tied", "qwen3, head_dim apart", "qwen3 moe"])
def test_adapters_are_pefts(family, tmp_path, device):
    """Logits, gradients and the saved folder, against peft on the same weights. Every projection has one, but the
    experts'."""
    peft = pytest.importorskip("peft")
    reference = theirs(family, tmp_path / "base")
    model = weights.load(tmp_path / "base", device).adapt(4, seed=3)
    with torch.no_grad():
        for b in model.blocks:
            for adapter in b.lora.values():
                for B in adapter.B:
                    B.copy_(torch.randn(B.shape, generator=torch.Generator().manual_seed(5)) * 0.1)
    weights.save_adapter(tmp_path / "adapter", model, tmp_path / "base")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_alpha"] == 8
    model.use(numerics("fp32", device).hold(model.parameters()))
    adapted = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter", is_trainable=True)
    want = adapted(TOKENS).logits
    with adapted.disable_adapter(), torch.no_grad():
        assert (adapted(TOKENS).logits - want).abs().max() > 0.1        # they do something
    assert (logits(model) - want.detach()).abs().max() < 1e-4
    where = torch.ones_like(TOKENS, dtype=torch.bool)
    where[:, 0] = False
    logp, _ = model.token_logprobs(TOKENS.to(model.embedding.device), where.to(model.embedding.device))
    (-logp.mean()).backward()
    (-want[:, :-1].log_softmax(-1).gather(-1, TOKENS[:, 1:, None]).mean()).backward()
    assert all((p.grad is not None) == ("lora" in n) for n, p in model.named_parameters())
    mine = {}
    for i, b in enumerate(model.blocks):
        for adapter in b.lora.values():
            for a, B, name in zip(adapter.A.grad.split(4), adapter.B, adapter.parts):
                mine[f"layers.{i}.", name] = a.cpu(), B.grad.cpu()
    checked = 0
    for n, p in adapted.named_parameters():
        if p.grad is not None:
            a, B = next(v for (layer, name), v in mine.items() if layer in n and f".{name}." in n)
            assert torch.allclose(a if "lora_A" in n else B, p.grad, atol=1e-5, rtol=1e-3), n
            checked += 1
    sparse = sum(b.experts is not None for b in model.blocks)
    assert checked == 2 * len(mine) == 2 * (7 * 3 - 3 * sparse)


def test_lora_keeps_one_rounded_base(device):
    """The base is frozen in the format, once; adapters have FP32 masters."""
    num = numerics("fp16", device)
    model = tiny(device).adapt(2)
    model.keep_rounded(num)
    num.hold(model.parameters())
    for n, p in model.named_parameters():
        assert p.requires_grad == ("lora" in n)
        if "lora" not in n:
            assert num.weight(p).data_ptr() == p.data_ptr() and p.dtype == num.dtype
            assert torch.equal(p.float(), p.half().float())
        else:
            assert p.dtype == torch.float32


@pytest.mark.parametrize("fmt", ["fp32", "fp16"])
def test_a_fresh_adapter_changes_nothing(fmt, device):
    """B is zero: the same log-probs as without, but for a sum that is rounded once more and stays what it is."""
    plain, adapted = tiny(device, fmt, gain=2.0), tiny(device, gain=2.0).adapt(4)
    adapted.use(numerics(fmt, device).hold(adapted.parameters()))
    tokens = (TOKENS % 67).to(plain.embedding.device)
    assert (logits(plain, tokens) - logits(adapted, tokens)).abs().max() < (1e-4 if fmt == "fp32" else 0.1)


# --- experts


def test_replayed_routes_are_followed(device):
    """Sending tokens to the experts they chose is the same as letting them choose; to others is not. A cached pass
    records the same choices as a full one."""
    model = tiny(device, gain=3.0, n_experts=6, experts_per_token=2, expert_width=24, dense_layers=(1,), qk_norm=True)
    tokens = (TOKENS % 67).to(model.embedding.device)
    where = torch.zeros_like(tokens, dtype=torch.bool)
    where[:, 5:] = True
    with torch.no_grad():
        free, _ = model.token_logprobs(tokens, where)
        routes = model.routes()
        assert routes.shape == (3, 23, 2, 2) and routes.dtype == torch.int16
        assert len(routes.unique()) == 6 and not (routes[..., 0] == routes[..., 1]).any()
        assert torch.equal(model.token_logprobs(tokens, where, replay=routes)[0], free)
        assert torch.equal(model.routes(), routes)
        other = (routes + 1) % 6
        assert (model.token_logprobs(tokens, where, replay=other)[0] - free).abs().max() > 1e-3
        assert not torch.equal(model.routes(), other)                   # it says what it would have chosen
        model.token_logprobs(tokens, where)
        cache, steps = KVCache(model.cfg, 3, 24, model.num), []
        for part in tokens[:, :-1].split([7, 1, 1, 14], 1):
            model(part, cache)
            steps.append(model.routes())
        assert torch.equal(torch.cat(steps, 1), routes)


def test_gradients_of_experts_by_finite_differences(device):
    model = tiny(device, gain=2.0, n_experts=4, experts_per_token=2, expert_width=16, n_layers=2)
    tokens = (TOKENS % 67).to(model.embedding.device)
    where = torch.zeros_like(tokens, dtype=torch.bool)
    where[:, 5:] = True
    routes = None

    def value():
        with torch.no_grad():
            return float(model.token_logprobs(tokens, where, replay=routes)[0].double().sum())
    with torch.no_grad():
        model.token_logprobs(tokens, where)
        routes = model.routes()
    model.token_logprobs(tokens, where, replay=routes)[0].sum().backward()
    g = torch.Generator().manual_seed(0)
    block, busy = model.blocks[0], int(routes[:, :, 0].flatten().bincount().argmax())        # an expert that many go to
    masters = dict(router=block.experts.router, gate_up=block.experts.gate_up[busy], down=block.experts.down[busy],
                   norm2=block.norm2, qkv=block.qkv)
    for name, p in masters.items():
        direction = torch.randn(p.shape, generator=g).to(p.device)
        along, h = float((p.grad * direction).sum()), 2e-3 / float(direction.norm())
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(direction, alpha=sign * h)
                model.num.refresh()
                values.append(value())
                p.sub_(direction, alpha=sign * h)
        model.num.refresh()
        assert (values[0] - values[1]) / (2 * h) == pytest.approx(along, rel=0.03, abs=0.05), name


def test_recomputed_activations_are_the_same(device):
    """Gradients bit for bit, with adapters, experts and neither; and less than half is kept for the
    way back."""
    experts = dict(n_experts=4, experts_per_token=2, expert_width=16)
    for rank, kw in ((0, {}), (3, {}), (0, experts)):
        grads, kept = [], []
        for recompute in (False, True):
            model, sizes = tiny(device, "fp16", gain=2.0, **kw), []
            if rank:
                model.adapt(rank)
                with torch.no_grad():
                    for adapter in (a for b in model.blocks for a in b.lora.values()):
                        for B in adapter.B:
                            B.add_(0.01)
                model.num.hold(model.parameters())
            model.recompute = recompute
            tokens = (TOKENS % 67).to(model.embedding.device)
            where = torch.ones_like(tokens, dtype=torch.bool)
            where[:, 0] = False
            with torch.autograd.graph.saved_tensors_hooks(
                    lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
                logp, _ = model.token_logprobs(tokens, where)
            logp.sum().backward()
            grads.append([p.grad for p in model.parameters() if p.requires_grad])
            kept.append(sum(sizes))
        assert all(torch.equal(a, b) for a, b in zip(*grads))
        assert all(g.abs().max() > 0 for g in grads[0])
        assert kept[1] < kept[0] / 2, kept
