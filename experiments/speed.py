"""How fast beside the peers: this program, Hugging Face `generate` and TRL's GRPOTrainer, in one process, turn by turn.

    python -m experiments.speed                        # every size that fits this machine, about 20 minutes on two CPU cores
    python -m experiments.speed --sizes 0.9M           # the default model alone
    python -m experiments.speed --only modes           # of rollout, step, modes, scaling, memory

All contenders get the same weights (checked: their logits agree), the same prompts, number of new tokens and seeds, and none
of them stops early. They take turns A B C A B C in one process, so that a slow minute hits all of them; the first turn warms
up and is not counted; figures are medians of the others, ratios the median of the ratios turn by turn. The machine's own
limits are measured between the turns: the matrix product's FLOP/s, and on a GPU the memory's bytes/s. What needs a package
that is not here, or a GPU, is left out and named. The last line is one JSON object; results/ gets it with --out.
"""
import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch

from algorithms import centred
from experiments.bench import flops, gemm_peak
from model import GPT, GPTConfig
from operators import numerics, why_plain
from operators.device import pick_device
from precision import InputError, make_scaler
from run.console import Parser, ranged, run_main
from run.lines import say
from run.memory import peak_memory
from sample import Sampler
from train_rl import Batch, Config, learn, update


@dataclass(frozen=True)
class Size:
    """A model and what is asked of it: `prompts` x 8 answers of `new` tokens behind prompts of `prompt` tokens."""
    gpt: GPTConfig
    prompts: int
    prompt: int
    new: int
    micro: int                      # answers per forward and backward pass
    step: bool = True               # whether a whole GRPO step is compared too


def sizes(gpu):
    """The default model; 25 M; GPT-2's shape; Qwen2.5-0.5B's shape. A CPU gets fewer rows of the large ones, to finish."""
    default = GPTConfig(vocab_size=258, context=64)
    m25 = GPTConfig(vocab_size=258, n_layers=8, width=512, n_heads=8, n_kv_heads=4, mlp_width=1408, context=256)
    gpt2 = GPTConfig(vocab_size=50257, n_layers=12, width=768, n_heads=12, n_kv_heads=12, mlp_width=2048, context=512,
                     tied_head=True)
    qwen = GPTConfig(vocab_size=151936, n_layers=24, width=896, n_heads=14, n_kv_heads=2, mlp_width=4864, context=512,
                     rope_theta=1e6, qkv_bias=True, tied_head=True)
    if gpu:
        return {"0.9M": Size(default, 32, 8, 33, 256), "25M": Size(m25, 64, 32, 200, 256), "124M": Size(gpt2, 32, 64, 256, 64),
                "0.5B": Size(qwen, 32, 64, 256, 32)}
    return {"0.9M": Size(default, 32, 8, 33, 128), "25M": Size(m25, 8, 16, 48, 32), "124M": Size(gpt2, 4, 16, 32, 16),
            "0.5B": Size(qwen, 2, 16, 16, 8, step=False)}


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def taking_turns(contenders, turns, device, between=lambda: None):
    """name -> seconds of each counted turn. Every turn runs each contender once, in order; turn 0 warms up."""
    times = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, run in contenders.items():
            between()
            sync(device)
            begin = time.perf_counter()
            run(turn)
            sync(device)
            if turn:
                times[name].append(time.perf_counter() - begin)
    return times


def ratio(a, b):
    """Median over the turns of a / b."""
    return float(np.median(np.array(a) / np.array(b)))


def median(x):
    return float(np.median(x))


# ---------------------------------------------------------------------------------------------------------------------
# The peers


def to_transformers(model):
    """The same weights as a transformers Llama or (with QKV biases) Qwen2 model, FP32, on the same device."""
    import transformers
    c = model.cfg
    kind = ("Qwen2" if c.qkv_bias else "Llama")
    config = getattr(transformers, kind + "Config")(
        vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.mlp_width, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, max_position_embeddings=c.context,
        rms_norm_eps=c.norm_eps, rope_parameters=dict(rope_type="default", rope_theta=c.rope_theta),
        tie_word_embeddings=c.tied_head, bos_token_id=None, eos_token_id=None, pad_token_id=c.vocab_size - 1)
    with torch.device(model.embedding.device):
        peer = getattr(transformers, kind + "ForCausalLM")(config).eval()
    state, heads = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm}, c.n_heads * c.head_dim
    kv = c.n_kv_heads * c.head_dim
    if not c.tied_head:
        state["lm_head.weight"] = model.head
    for i, b in enumerate(model.blocks):
        at = f"model.layers.{i}."
        state |= {at + "input_layernorm.weight": b.norm1, at + "post_attention_layernorm.weight": b.norm2,
                  at + "self_attn.o_proj.weight": b.proj, at + "mlp.down_proj.weight": b.down}
        for suffix, packed in ((".weight", b.qkv), (".bias", b.qkv_bias)):
            if packed is not None:
                for name, part in zip("qkv", packed.split((heads, kv, kv))):
                    state[f"{at}self_attn.{name}_proj{suffix}"] = part
        for name, part in zip(("gate", "up"), b.gate_up.chunk(2)):
            state[f"{at}mlp.{name}_proj.weight"] = part
    missing = peer.load_state_dict({k: v.detach() for k, v in state.items()}, strict=False)
    unset = [k for k in missing.missing_keys if k != "lm_head.weight" or not c.tied_head]
    if unset or missing.unexpected_keys:
        raise InputError(f"transformers {transformers.__version__} names weights otherwise: {unset + missing.unexpected_keys}")
    return peer


def agrees(model, peer):
    """Largest difference of logits on a few tokens, as a share of the largest logit."""
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, model.cfg.vocab_size, (2, 9))).to(model.embedding.device)
    with torch.inference_mode():
        ours = model.logits(model(tokens).flatten(0, 1))
        theirs = peer(tokens).logits.flatten(0, 1).float()
    return float((ours - theirs).abs().max() / theirs.abs().max())


def generate_with(peer, prompts, new, group, cache):
    ids = torch.tensor(prompts, device=peer.device).repeat_interleave(group, 0)

    def run(seed):
        torch.manual_seed(seed)
        with torch.inference_mode():
            out = peer.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                max_new_tokens=new, min_new_tokens=new, cache_implementation=cache)
        assert out.shape == (len(ids), ids.shape[1] + new)
    return run


def trl_steps(peer, size, turns, own_step, folder):
    """Seconds of whole GRPOTrainer steps on `peer`, and of own_step(turn) run between them: A B A B."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    V, rows = size.gpt.vocab_size, size.prompts * 8
    words = Tokenizer(models.WordLevel({str(i): i for i in range(V)}, unk_token=str(V - 1)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=str(V - 1), eos_token=str(V - 2), padding_side="left")
    prompts = [" ".join(map(str, p)) for p in prompts_of(size)] * (turns + 2)
    theirs, ours, lengths = [], [], []

    def reward(completion_ids, **_):
        lengths.extend(map(len, completion_ids))
        return [float(sum(c) % 2) for c in completion_ids]

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            sync(peer.device)
            self.begin = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            sync(peer.device)
            theirs.append(time.perf_counter() - self.begin)
            begin = time.perf_counter()
            own_step(len(ours))
            sync(peer.device)
            ours.append(time.perf_counter() - begin)
    cpu = peer.device.type == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = GRPOConfig(
            output_dir=folder, max_steps=turns + 1, per_device_train_batch_size=rows, num_generations=8,
            max_completion_length=size.new, generation_kwargs=dict(min_new_tokens=size.new), temperature=1.0, top_p=1.0, top_k=0,
            beta=0.0, loss_type="dr_grpo", scale_rewards="none", learning_rate=1e-6, use_cpu=cpu, bf16=False, fp16=not cpu,
            gradient_checkpointing=False,
            report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True, disable_dropout=True, seed=0,
            dataloader_pin_memory=False)
        trainer = GRPOTrainer(peer, reward, args=config, train_dataset=Dataset.from_dict(dict(prompt=prompts)),
                              processing_class=tokenizer, callbacks=[Turns()])
        trainer.train()
    assert set(lengths) == {size.new} and len(lengths) == rows * (turns + 1), "TRL made another number of tokens"
    return theirs[1:], ours[1:]


# ---------------------------------------------------------------------------------------------------------------------
# This program


def prompts_of(size):
    return np.random.default_rng(1).integers(0, min(256, size.gpt.vocab_size - 2), (size.prompts, size.prompt)).tolist()


class Own:
    """This program's rollout and whole GRPO step on a model, in one format."""

    def __init__(self, model, size, fmt, fast=True, exact=False):
        device = model.embedding.device
        self.model, self.size, self.device = model, size, device
        self.num = numerics(fmt, device, fast, exact).hold(model.parameters())
        self.sampler = Sampler(model, stop=-1, pad=0, fast=fast)
        self.scaler = make_scaler(self.num)
        self.cfg = replace(Config(), micro_batch=size.micro, prompts=size.prompts, group=8)
        self.optimizer, self.split = None, []

    def rollout(self, seed):
        return self.sampler_in_use().generate(prompts_of(self.size), 8, self.size.new, seed=seed)

    def sampler_in_use(self):
        self.model.use(self.num)
        return self.sampler

    def step(self, seed):
        """Rollout, rewards, advantages, log-probs and gradients in micro-batches, clip, AdamW, weights rounded again."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
        marks = [time.perf_counter()]

        def mark():
            sync(self.device)
            marks.append(time.perf_counter())
        out = self.rollout(seed)
        mark()
        rewards = torch.tensor([float(sum(row) % 2) for row in out.tokens.tolist()])
        advantage = centred(rewards.view(-1, 8)).flatten().to(self.device)
        # no group is skipped for want of a signal: every answer goes forward and back, as in the peer
        advantage = torch.where(advantage == 0, 0.1, advantage)
        mark()
        learn(self.model, Batch(out, advantage=advantage), self.cfg, self.scaler, self.size.new)
        mark()
        update(self.model, self.optimizer, self.scaler, 1e-6)
        self.num.refresh()
        mark()
        self.split.append(np.diff(marks))

    def flops(self):
        """Model FLOPs of real tokens -> (rollout, step): prompts prefilled once, each new token but the last decoded, then
        forward and backward over whole sequences. Padding, masked scores and what is computed twice are not counted."""
        s, m = self.size, self.model
        rows, mean = s.prompts * 8, s.prompt + s.new / 2
        prefill = flops(m, s.prompts * s.prompt, s.prompt / 2, s.prompts)
        rollout = prefill + flops(m, rows * (s.new - 1), mean, rows * (s.new - 1))
        return rollout, rollout + 3 * flops(m, rows * (s.prompt + s.new - 1), (s.prompt + s.new) / 2, rows * s.new)

    def decode_bytes(self):
        """Bytes that decoding must read: all weights and the filled KV cache, once a step."""
        s, m, e = self.size, self.model, self.num.dtype.itemsize
        per_slot = 2 * m.cfg.n_layers * m.cfg.n_kv_heads * m.cfg.head_dim * e
        matrices = sum(p.numel() for p in [*m.blocks.parameters(), m.head] if p.dim() == 2)
        return (s.new - 1) * (matrices * e + s.prompts * 8 * per_slot * (s.prompt + s.new / 2))


def bandwidth(device):
    """Bytes/s of a copy within the GPU's memory, reads and writes counted; the median of 5."""
    a = torch.empty(1 << 28, dtype=torch.float32, device=device)
    b, times = torch.empty_like(a), []
    for _ in range(6):
        sync(device)
        begin = time.perf_counter()
        b.copy_(a)
        sync(device)
        times.append(time.perf_counter() - begin)
    return 2 * a.numel() * 4 / median(times[1:])


def compare(name, size, device, turns, only, missing, folder):
    """All contenders on one size -> a dict of figures."""
    model = GPT(size.gpt, device, seed=0)
    rows, made = size.prompts * 8, size.prompts * 8 * size.new
    say(f"\n{name}: {model.n_params() / 1e6:.1f} M parameters, {rows} answers of {size.new} tokens, prompts of {size.prompt}")

    def line(kind, who, seconds, text):
        say(f"  {kind:8} {who:24} {median(seconds):8.3f} s {made / median(seconds):8.0f} tokens/s   {text}")
    own = {"tenbit fp32": Own(model, size, "fp32"), "tenbit fp16": Own(model, size, "fp16")}
    if device.type == "cuda":
        own["tenbit bf16"] = Own(model, size, "bf16")
    if size.step:
        own["tenbit fp16, --no-fast"] = Own(model, size, "fp16", fast=False)
    peer = None
    try:
        peer = to_transformers(model)
    except ImportError:
        missing.add("transformers is not installed: no rows of generate")
    report, peaks = dict(params=model.n_params(), rows=rows, prompt=size.prompt, new=size.new), []
    half = next(o.num for n, o in own.items() if n == "tenbit fp16")

    def measure_peak():
        peaks.append(gemm_peak(device, half))

    if "rollout" in only:
        contenders = {n: o.rollout for n, o in own.items()}
        if peer is not None:
            model.use(own["tenbit fp32"].num)
            report["logits_differ"] = agrees(model, peer)
            assert report["logits_differ"] < 1e-3, f"not the same model: logits differ by {report['logits_differ']:.1e}"
            if device.type == "cuda":
                peer.half()
            prompts = prompts_of(size)
            contenders |= {"generate, dynamic cache": generate_with(peer, prompts, size.new, 8, None),
                           "generate, static cache": generate_with(peer, prompts, size.new, 8, "static")}
        times = taking_turns(contenders, turns, device, measure_peak)
        base = "tenbit fp32" if device.type == "cpu" else "tenbit fp16"
        flops, peak = own[base].flops()[0], median(peaks)
        report["rollout"] = {
            n: dict(seconds=median(t), tokens_per_s=made / median(t), times=t) for n, t in times.items()}
        for n in own:
            report["rollout"][n]["share_of_gemm_peak"] = flops / median(times[n]) / peak
        if device.type == "cuda":
            report["bandwidth"] = bandwidth(device)
            for n, o in own.items():
                report["rollout"][n]["share_of_bandwidth"] = o.decode_bytes() / median(times[n]) / report["bandwidth"]
        for n, t in times.items():
            r = report["rollout"][n]
            against = f"{base} is {ratio(t, times[base]):5.2f} x as fast" if n not in own else \
                f"{r['share_of_gemm_peak']:4.0%} of GEMM peak"
            against += f", {r['share_of_bandwidth']:.0%} of bandwidth" if "share_of_bandwidth" in r else ""
            line("rollout", n, t, against)
        report["rollout_ratio"] = {n: ratio(t, times[base]) for n, t in times.items()}
        report["rollout_fp16_over_fp32"] = ratio(times["tenbit fp16"], times["tenbit fp32"])

    if "step" in only and size.step:
        peaks.clear()
        times = taking_turns({n: o.step for n, o in own.items()}, turns, device, measure_peak)
        peak = median(peaks)
        report["gemm_peak"] = peak
        parts = ("rollout", "rewards", "gradient", "update")
        report["step"] = {
            n: dict(seconds=median(t), tokens_per_s=made / median(t), times=t,
                    share_of_gemm_peak=own[n].flops()[1] / median(t) / peak,
                    split=dict(zip(parts, np.median(own[n].split[1:], 0).tolist()))) for n, t in times.items()}
        for n, t in times.items():
            r = report["step"][n]
            split = ", ".join(f"{k} {v:.3f}" for k, v in r["split"].items())
            line("step", n, t, f"{r['share_of_gemm_peak']:4.0%} of GEMM peak ({split})")
        for other in ("fp32", "bf16"):
            if f"tenbit {other}" in times:
                report[f"step_fp16_over_{other}"] = ratio(times["tenbit fp16"], times[f"tenbit {other}"])
                say(f"  step     fp16 / {other}: {report[f'step_fp16_over_{other}']:.3f}")
        try:
            if peer is not None:
                theirs, ours = trl_steps(peer.float(), size, turns, own["tenbit fp16"].step, folder)
                report["trl"] = dict(seconds=median(theirs), tokens_per_s=made / median(theirs), times=theirs, own_times=ours,
                                     ratio=ratio(theirs, ours))
                line("step", "TRL GRPOTrainer", theirs, f"tenbit fp16, run between its steps, {median(ours):.3f} s: "
                     f"{report['trl']['ratio']:.2f} x as fast")
        except ImportError as e:
            missing.add(f"{e.name} is not installed: no rows of TRL")
    report["peak_memory_mib"] = peak_memory(device)
    say(f"  GEMM peak {median(peaks) / 1e9:.0f} GFLOP/s, peak memory of the process so far {report['peak_memory_mib']:.0f} MiB")
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Modes: what do formats and exactness cost?

MODES = ("fp32", "bf16", "fp16", "fp32 exact", "bf16 exact", "fp16 exact", "fp16 --no-fast", "fp16 exact --no-fast")


def in_mode(model, size, mode):
    fmt, *words = mode.split()
    return Own(model, size, fmt, fast="--no-fast" not in words, exact="exact" in words)


def modes(name, size, device, turns):
    """Whole GRPO steps in each mode, turn by turn, and the peak memory of a process that does two of them."""
    model = GPT(size.gpt, device, seed=0)
    say(f"\n{name}: {model.n_params() / 1e6:.1f} M parameters, {size.prompts * 8} answers of {size.new} tokens, whole steps")
    own = {m: in_mode(model, size, m) for m in MODES}
    times = taking_turns({m: o.step for m, o in own.items()}, turns, device)
    report = {}
    for m, t in times.items():
        ordinary = m.replace(" exact", "")
        split = dict(zip(("rollout", "rewards", "gradient", "update"), np.median(own[m].split[1:], 0).tolist()))
        probe = subprocess.run([sys.executable, "-m", "experiments.speed", "--mode-probe", m, "--sizes", name, "--device",
                                str(device)], capture_output=True, text=True, check=True)
        report[m] = dict(seconds=median(t), times=t, split=split, over_fp32=ratio(t, times["fp32"]),
                         over_ordinary=ratio(t, times[ordinary]), peak_mib=json.loads(probe.stdout.splitlines()[-1])["peak_mib"])
        report[m]["memory_over_ordinary"] = report[m]["peak_mib"] / report[ordinary]["peak_mib"]
        r = report[m]
        say(f"  {m:22} {r['seconds']:7.3f} s ({split['rollout']:.3f} rollout, {split['gradient']:.3f} gradient)   "
            f"{r['over_fp32']:.2f} x fp32, {r['over_ordinary']:.2f} x ordinary, {r['peak_mib']:.0f} MiB")
    return report


def mode_probe(mode, size, device):
    own = in_mode(GPT(size.gpt, device, seed=0), size, mode)
    for turn in range(2):
        own.step(turn)
    print(json.dumps(dict(mode=mode, peak_mib=peak_memory(device))))


# ---------------------------------------------------------------------------------------------------------------------
# Scaling and memory


def scaling(device, turns, folder):
    """The default model, FP16: rows from 64 to 1,024 at 64 tokens, and lengths from 64 to 1,024 at 64 rows.

    Rule: cost per token does not rise with rows, and with length by no more than attention's own term. Time per token is
    fitted by a + b * (mean number of keys), a and b not negative; `off` is the largest amount by which a measured point lies
    above the line, as a share."""
    points = {"rows": [(r, 64) for r in (64, 128, 256, 512, 1024)], "length": [(64, n) for n in (64, 128, 256, 512, 1024)]}
    report = {}
    for axis, cases in points.items():
        contenders, own = {}, {}
        for rows, length in cases:
            size = Size(GPTConfig(vocab_size=258, context=1024), rows // 8, 16, length - 16, max(1, min(128, 5120 // length)))
            own[rows, length] = Own(GPT(size.gpt, device), size, "fp16")
            contenders[rows, length] = own[rows, length].step
        times = taking_turns(contenders, turns, device)
        table = []
        for (rows, length), t in times.items():
            new = rows * (length - 16)
            split = np.median(own[rows, length].split[1:], 0)
            table.append(dict(rows=rows, length=length, step_us=1e6 * median(t) / new, rollout_us=1e6 * float(split[0]) / new,
                              gradient_us=1e6 * float(split[2]) / new))
        report[axis] = table
        for what in ("rollout_us", "gradient_us", "step_us"):
            y = np.array([p[what] for p in table])
            keys = np.array([p["length"] / 2 for p in table])
            if axis == "length":
                b, a = np.polyfit(keys, y, 1, w=1 / y)
                if a < 0 or b < 0:
                    a, b = (0.0, float(np.mean(y / keys))) if a < 0 else (float(np.mean(y)), 0.0)
                line = a + b * keys
            else:
                a, b, line = float(y[0]), 0.0, np.full(len(y), y[0])
            report[f"{axis}_{what}"] = dict(a=float(a), b=float(b), off=float((y / line - 1).max()))
        say(f"\nscaling with {axis}, microseconds per new token (rollout + gradient = step):")
        for p in table:
            say(f"  {p['rows']:5} rows, length {p['length']:5}: "
                f"{p['rollout_us']:7.1f} + {p['gradient_us']:7.1f} = {p['step_us']:7.1f}")
        f = report[f"{axis}_step_us"]
        say(f"  largest amount above {'the line' if axis == 'length' else 'the first'}: {f['off']:.0%}" +
            (f"; {f['a']:.1f} us a token and {1e3 * f['b']:.0f} ns a token and key" if axis == "length" else ""))
    if folder:
        try:
            draw_scaling(report, f"{folder}/speed-scaling-{device.type}.png", device)
        except ImportError:
            say("no figure: matplotlib is not installed")
    return report


def draw_scaling(report, path, device):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for ax, axis in zip(axes, ("rows", "length")):
        x = [p[axis] for p in report[axis]]
        for what, color in (("step_us", "C0"), ("gradient_us", "C1"), ("rollout_us", "C2")):
            ax.plot(x, [p[what] for p in report[axis]], "o-", color=color, label=what[:-3])
            if axis == "length":
                fit = report[f"length_{what}"]
                ax.plot(x, [fit["a"] + fit["b"] * n / 2 for n in x], "--", color=color, lw=1)
        ax.set_xscale("log", base=2)
        ax.set_xticks(x, [str(n) for n in x])
        ax.set_xlabel("rows, 64 tokens each" if axis == "rows" else "tokens, 64 rows (dashed: a + b x keys)")
        ax.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("microseconds per new token")
    axes[1].legend(loc="upper left")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    fig.suptitle(f"0.9 M parameters, FP16, {name}", fontsize=10)
    fig.tight_layout()
    fig.savefig(path, dpi=150)


def memory(device):
    """Log-probs of 32,768 tokens over a vocabulary of 151,936, forward and backward, in a process of its own: how far its
    memory rises above what was there before (weights, hidden states) and above the gradients that it leaves."""
    report = json.loads(subprocess.run([sys.executable, "-m", "experiments.speed", "--memory-probe", "--device", str(device)],
                                       capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    say(f"\nlog-probs of {report['tokens']} tokens, vocabulary {report['vocabulary']}, width {report['width']}, fp16, forward "
        f"and backward: {report['extra_mib']:.0f} MiB above what was there, {report['gradients_mib']:.0f} of them the gradients "
        f"themselves; whole logits would take {report['whole_mib']:.0f} MiB")
    return report


def memory_probe(device):
    import threading
    V, N, C = 151936, 32768, 128
    w = torch.nn.Parameter(torch.randn(V, C, device=device) * 0.02)
    num = numerics("fp16", device).hold([w])
    h = num.round(torch.randn(N, C, device=device)).requires_grad_()
    targets = torch.randint(0, V, (N,), device=device)
    num.token_logprobs(h[:2], w, targets[:2])[0].sum().backward()             # weights packed, libraries loaded
    h.grad = w.grad = None
    gc.collect()
    page = os.sysconf("SC_PAGE_SIZE")

    def resident():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * page
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before, seen, stop = resident(), [0], threading.Event()

        def watch():
            while not stop.wait(0.005):
                seen[0] = max(seen[0], resident())
        watcher = threading.Thread(target=watch)
        watcher.start()
    begin = time.perf_counter()
    logp, _ = num.token_logprobs(h, w, targets)
    logp.sum().backward()
    sync(device)
    seconds = time.perf_counter() - begin
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        stop.set()
        watcher.join()
        peak = seen[0]
    gradients = w.grad.nbytes + h.grad.nbytes
    print(json.dumps(dict(tokens=N, vocabulary=V, width=C, extra_mib=(peak - before) / 2 ** 20, gradients_mib=gradients / 2 ** 20,
                          whole_mib=4 * V * N / 2 ** 20, seconds=seconds)))


def main(argv=None):
    p = Parser(prog="python -m experiments.speed", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--sizes", nargs="+", choices=("0.9M", "25M", "124M", "0.5B"), help="models to compare on (default: all)")
    parts = ("rollout", "step", "modes", "scaling", "memory")
    p.add_argument("--only", nargs="+", choices=parts, default=parts, help="which parts (default: all)")
    p.add_argument("--turns", type=ranged(int, 1, 100), default=5, help="counted turns of each contender")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--out", default="", help="folder for speed-DEVICE.json (with --only: speed-PARTS-DEVICE.json) and the figure")
    p.add_argument("--memory-probe", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--mode-probe", choices=MODES, help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    device = pick_device(a.device)
    if a.memory_probe:
        return memory_probe(device)
    if a.mode_probe:
        return mode_probe(a.mode_probe, sizes(device.type == "cuda")[a.sizes[0]], device)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")                       # nothing here is downloaded
    try:
        import transformers
        transformers.logging.set_verbosity_error()
    except ImportError:
        pass
    if a.out:
        os.makedirs(a.out, exist_ok=True)                              # before the long measurements, not after
    missing = set()
    if device.type == "cpu":
        missing.add("no GPU: no rows of CUDA")
        if why_plain(device):
            missing.add(f"no compiled operators: {why_plain(device)}")
    table = sizes(device.type == "cuda")
    chosen = a.sizes or [n for n in table]
    report = dict(
        bench="speed", command=["python", "-m", "experiments.speed", *(argv or sys.argv[1:])], turns=a.turns,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        threads=torch.get_num_threads(), torch=torch.__version__, python=platform.python_version())
    for package in ("transformers", "trl"):
        try:
            report[package] = __import__(package).__version__
        except ImportError:
            report[package] = None
    if {"rollout", "step"} & set(a.only):
        import tempfile
        for name in chosen:
            with tempfile.TemporaryDirectory() as folder:
                report[name] = compare(name, table[name], device, a.turns, a.only, missing, folder)
            if not table[name].step:
                missing.add(f"{name}: no whole step, weights, gradients and AdamW of two models at once take too much memory")
            gc.collect()
    if "modes" in a.only:
        report["modes"] = {name: modes(name, table[name], device, a.turns) for name in a.sizes or ["0.9M"] if table[name].step}
    if "scaling" in a.only:
        report["scaling"] = scaling(device, a.turns, a.out)
    if "memory" in a.only:
        report["logprob_memory"] = memory(device)
    report["left_out"] = sorted(missing)
    for line in report["left_out"]:
        say(f"left out: {line}")
    if a.out:
        only = "" if set(a.only) == set(parts) else "-".join(a.only) + "-"
        with open(f"{a.out}/speed-{only}{device.type}.json", "w") as f:
            json.dump(report, f, indent=1)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    run_main(main)
