"""How fast beside the peers: this program, Hugging Face `generate` and TRL's GRPOTrainer, turn by turn.

    python -m experiments.speed                        # every size that fits, about 30 minutes on two cores
    python -m experiments.speed --sizes 0.9M           # the default model alone
    python -m experiments.speed --only modes           # of rollout, step, modes, scaling, memory

All contenders get the same weights (checked: their logits agree), prompts, number of new tokens and
seeds, and none stops early. They take turns A B C A B C in one process, so that a slow minute hits all of
them; the first turn warms up. Figures are medians, ratios the median of the ratios turn by turn. The
machine's own limits are measured between the turns: the matrix product's FLOP/s, and on a GPU the
memory's bytes/s. What needs a package that is not here, or a GPU, is left out and named. The last line is
one JSON object; results/ gets it with --out.
"""
import argparse
import gc
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import warnings

import numpy as np
import torch

from experiments.bench import STAGES, Size, Work, gemm_peak, now, ratio, row, seconds, take_turns, tell
from hf import weights
from model import GPT, GPTConfig
from operators import numerics, why_plain
from operators.device import pick_device
from run.console import Parser, ranged, run_main
from run.lines import say
from run.memory import peak_memory

PARTS = "rollout", "step", "modes", "scaling", "memory"
MODES = ("fp32", "bf16", "fp16", "fp32 exact", "bf16 exact", "fp16 exact", "fp16 --no-fast",
         "fp16 exact --no-fast")


def sizes(gpu):
    """The default model; 25 M; GPT-2's shape; Qwen2.5-0.5B's shape. A CPU gets fewer rows of the large
    ones, to finish."""
    default = GPTConfig(vocab_size=258, context=64)
    m25 = GPTConfig(vocab_size=258, n_layers=8, width=512, n_heads=8, n_kv_heads=4, mlp_width=1408,
                    context=256)
    gpt2 = GPTConfig(vocab_size=50257, n_layers=12, width=768, n_heads=12, n_kv_heads=12, mlp_width=2048,
                     context=512, tied_head=True)
    qwen = GPTConfig(vocab_size=151936, n_layers=24, width=896, n_heads=14, n_kv_heads=2, mlp_width=4864,
                     context=512, rope_theta=1e6, qkv_bias=True, tied_head=True)
    if gpu:
        return {"0.9M": Size(default, 32, 8, 33, 256), "25M": Size(m25, 64, 32, 200, 256),
                "124M": Size(gpt2, 32, 64, 256, 64), "0.5B": Size(qwen, 32, 64, 256, 32)}
    return {"0.9M": Size(default, 32, 8, 33, 128), "25M": Size(m25, 8, 16, 48, 32),
            "124M": Size(gpt2, 4, 16, 32, 16), "0.5B": Size(qwen, 2, 16, 16, 8, step=False)}


# --------------------------------------------------------------------------------------------------
# The peers


def to_transformers(model):
    """The same weights as a transformers model, FP32: what sample.py --save leaves, loaded by it."""
    from transformers import AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        weights.save(pathlib.Path(folder) / "model", model)
        peer = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
    peer.generation_config.eos_token_id = None
    peer.generation_config.pad_token_id = model.cfg.vocab_size - 1
    return peer.to(model.embedding.device).eval()


def agrees(model, peer):
    """Largest difference of logits on a few tokens, as a share of the largest logit."""
    tokens = np.random.default_rng(0).integers(0, model.cfg.vocab_size, (2, 9))
    tokens = torch.from_numpy(tokens).to(model.embedding.device)
    with torch.inference_mode():
        ours = model.logits(model(tokens).flatten(0, 1))
        theirs = peer(tokens).logits.flatten(0, 1).float()
    return float((ours - theirs).abs().max() / theirs.abs().max())


def generate_with(peer, size, cache):
    ids = torch.tensor(size.texts(), device=peer.device).repeat_interleave(size.group, 0)

    def run(seed):
        torch.manual_seed(seed)
        with torch.inference_mode():
            out = peer.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0,
                                top_k=0, top_p=1.0, max_new_tokens=size.new, min_new_tokens=size.new,
                                cache_implementation="static" if cache == "static" else None)
        assert out.shape == (len(ids), ids.shape[1] + size.new)
    return run


def trl_steps(peer, size, turns, work):
    """Seconds (turns, 1) of whole GRPOTrainer steps on `peer`, and of work's between them: A B A B."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    V, rows, cpu = size.gpt.vocab_size, size.prompts * size.group, peer.device.type == "cpu"
    words = Tokenizer(models.WordLevel({str(i): i for i in range(V)}, unk_token=str(V - 1)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=str(V - 1),
                                        eos_token=str(V - 2), padding_side="left")
    prompts = [" ".join(map(str, p)) for p in size.texts()] * (turns + 2)
    theirs, ours, lengths = [], [], []

    def reward(completion_ids, **_):
        lengths.extend(map(len, completion_ids))
        return [float(sum(c) % 2) for c in completion_ids]

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            self.begin = now(peer.device)

        def on_step_end(self, args, state, control, **_):
            theirs.append([now(peer.device) - self.begin])
            begin = now(peer.device)
            for stage in work.stages:
                stage(len(ours))
            ours.append([now(peer.device) - begin])
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        config = GRPOConfig(
            output_dir=folder, max_steps=turns + 1, per_device_train_batch_size=rows,
            num_generations=size.group, max_completion_length=size.new,
            generation_kwargs=dict(min_new_tokens=size.new), temperature=1.0, top_p=1.0, top_k=0, beta=0.0,
            loss_type="dr_grpo", scale_rewards="none", learning_rate=1e-6, use_cpu=cpu, bf16=False,
            fp16=not cpu, gradient_checkpointing=False, report_to=[], logging_strategy="no",
            save_strategy="no", disable_tqdm=True, disable_dropout=True, seed=0, dataloader_pin_memory=False)
        GRPOTrainer(peer, reward, args=config, train_dataset=Dataset.from_dict(dict(prompt=prompts)),
                    processing_class=tokenizer, callbacks=[Turns()]).train()
    assert set(lengths) == {size.new} and len(lengths) == rows * (turns + 1), "TRL made other tokens"
    return np.array(theirs[1:]), np.array(ours[1:])


def bandwidth(device):
    """Bytes/s of a copy within the GPU's memory, reads and writes counted."""
    a = torch.empty(1 << 28, dtype=torch.float32, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / seconds(take_turns({0: [lambda _: b.copy_(a)]}, 5, device)[0])


def decode_bytes(work):
    """Bytes that decoding must read: all weights and the filled KV cache, once a step."""
    s, m = work.size, work.model
    per_slot = 2 * m.cfg.n_layers * m.cfg.n_kv_heads * m.cfg.head_dim
    matrices = sum(p.numel() for p in [*m.blocks.parameters(), m.head] if p.dim() == 2)
    slots = s.prompts * s.group * (s.prompt + s.new / 2)
    return (s.new - 1) * work.num.dtype.itemsize * (matrices + slots * per_slot)


def compare(name, size, device, turns, only, missing):
    """All contenders on one size -> a dict of figures."""
    model, gpu, peer, peaks = GPT(size.gpt, device, seed=0), device.type == "cuda", None, []
    report = dict(params=model.n_params(), rows=size.tokens // size.new, prompt=size.prompt, new=size.new)
    own = {f"tenbit {f}": Work(model, size, f) for f in ("fp32", "fp16", *["bf16"] * gpu)}
    half, base = own["tenbit fp16"], "tenbit fp16" if gpu else "tenbit fp32"
    if size.step:
        own["tenbit fp16, --no-fast"] = Work(model, size, "fp16", fast=False)
    else:
        missing.add(f"{name}: no whole step, weights, gradients and AdamW of two models at once take too "
                    "much memory")
    try:
        peer = to_transformers(model)
    except ImportError:
        missing.add("transformers is not installed: no rows of generate")
    for part in PARTS[:2] if size.step else PARTS[:1]:
        if part not in only:
            continue
        contenders = {n: w.stages if part == "step" else w.stages[:1] for n, w in own.items()}
        if peer is not None and part == "rollout":
            model.use(own["tenbit fp32"].num)
            report["logits_differ"] = agrees(model, peer)
            assert report["logits_differ"] < 1e-3, f"not the same model: {report['logits_differ']:.1e}"
            peer.half() if gpu else peer.float()
            contenders |= {f"generate, {cache} cache": [generate_with(peer, size, cache)]
                           for cache in ("dynamic", "static")}
        times = take_turns(contenders, turns, device,
                           lambda: peaks.append(gemm_peak(device, half.num.dtype)))
        if peer is not None and part == "step":
            try:
                theirs, ours = trl_steps(peer.float(), size, turns, half)
                times |= {"TRL GRPOTrainer": theirs, "tenbit fp16, between": ours}
                report["trl_ratio"] = ratio(theirs, ours)
            except ImportError as e:
                missing.add(f"{e.name} is not installed: no rows of TRL")
        report["gemm_peak"] = peak = float(np.median(peaks))
        rows = report[part] = {n: row(t, size, own.get(n), n in own and peak) for n, t in times.items()}
        for n, r in rows.items():
            r[f"over_{base[7:]}"] = ratio(times[n], times[base])
            if gpu and part == "rollout" and n in own:
                report.setdefault("bandwidth", bandwidth(device))
                r["read_share"] = decode_bytes(own[n]) / r["seconds"] / report["bandwidth"]
        tell(f"{name}, {report['rows']} answers of {size.new} tokens, {part}", rows)
    report["peak_memory_mib"] = peak_memory(device)
    say("".join(f"{k} {report[k]:.3g}   " for k in report if type(report[k]) is float))
    return report


# --------------------------------------------------------------------------------------------------
# Modes, scaling, memory


def in_mode(size, device, mode):
    fmt, *words = mode.split()
    return Work(GPT(size.gpt, device, seed=0), size, fmt, "--no-fast" not in words, "exact" in words)


def modes(name, size, device, turns):
    """Whole GRPO steps in each mode, turn by turn, and the peak memory of a process that does two."""
    times = take_turns({m: in_mode(size, device, m).stages for m in MODES}, turns, device)
    report = {}
    for m, t in times.items():
        ordinary, peak = m.replace(" exact", ""), probe(m, device, name)["peak_mib"]
        report[m] = row(t, size) | dict(over_fp32=ratio(t, times["fp32"]), peak_mib=peak,
                                        over_ordinary=ratio(t, times[ordinary]))
        report[m]["memory_ratio"] = peak / report[ordinary]["peak_mib"]     # to the ordinary twin's
    tell(f"{name}, whole steps", report)
    return report


def probe(what, device, name="0.9M"):
    """What `probed` says in a process of its own, whose memory nothing else fills."""
    command = [sys.executable, "-m", "experiments.speed", "--probe", what, "--sizes", name, "--device",
               str(device)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def probed(what, size, device):
    """Two steps in a mode; or log-probs of 32,768 tokens over a vocabulary of 151,936, forward and
    backward: how far memory rises above what was there before (weights, hidden states)."""
    if what in MODES:
        work = in_mode(size, device, what)
        for turn in range(2):
            for stage in work.stages:
                stage(turn)
        return dict(mode=what, peak_mib=peak_memory(device))
    V, N, C = 151936, 32768, 128
    w = torch.nn.Parameter(torch.randn(V, C, device=device) * 0.02)
    num = numerics("fp16", device).hold([w])
    h = num.round(torch.randn(N, C, device=device)).requires_grad_()
    targets = torch.randint(0, V, (N,), device=device)
    num.token_logprobs(h[:2], w, targets[:2])[0].sum().backward()      # weights packed, libraries loaded
    h.grad = w.grad = None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2 ** 20
    else:
        with open("/proc/self/statm") as f:
            before = int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20
    begin = now(device)
    num.token_logprobs(h, w, targets)[0].sum().backward()
    return dict(tokens=N, vocabulary=V, width=C, seconds=now(device) - begin,
                extra_mib=peak_memory(device) - before,
                gradients_mib=(w.grad.nbytes + h.grad.nbytes) / 2 ** 20, whole_mib=4 * V * N / 2 ** 20)


def scaling(device, turns):
    """The default model, FP16: 64 to 1,024 rows of 64 tokens, and 64 rows of 64 to 1,024 tokens.

    Rule: cost per token does not rise with rows, and with length by no more than attention's own term.
    A step's microseconds per new token are fitted by a + b * (mean number of keys), b = 0 for rows, a
    and b not negative; `off` is the largest amount by which one lies above the line, as a share."""
    points, gpt, report = (64, 128, 256, 512, 1024), GPTConfig(vocab_size=258, context=1024), {}
    for axis, cases in (("rows", [(n, 64) for n in points]), ("length", [(64, n) for n in points])):
        sizes = {f"{r} rows of {n}": Size(gpt, r // 8, 16, n - 16, max(1, min(128, 5120 // n)))
                 for r, n in cases}
        times = take_turns({n: Work(GPT(gpt, device), s, "fp16").stages for n, s in sizes.items()}, turns,
                           device)
        us = {n: 1e6 / sizes[n].tokens * np.array([seconds(t), *np.median(t, 0)]) for n, t in times.items()}
        points_ = {n: dict(zip(("step", *STAGES), x.tolist())) for n, x in us.items()}
        y, keys = np.array([x[0] for x in us.values()]), np.array([n / 2 for _, n in cases])
        b, a = np.polyfit(keys, y, 1, w=1 / y) if axis == "length" else (0.0, y[0])
        a, b = (0.0, np.mean(y / keys)) if a < 0 else (np.mean(y), 0.0) if b < 0 else (a, b)
        off = float((y / (a + b * keys) - 1).max())
        report[axis] = dict(points=points_, a=float(a), b=float(b), off=off)
        tell("microseconds a new token", points_)
        say(f"{off:.0%} above {a:.1f} us a token and {1e3 * b:.0f} ns a token and key, at most")
    return report


def draw_scaling(report, path, machine):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, constrained_layout=True)
    for ax, (axis, r) in zip(axes, report.items()):
        x = [int(n.split(" rows of ")[axis == "length"]) for n in r["points"]]
        for what in ("step", "gradient", "rollout"):
            ax.plot(x, [p[what] for p in r["points"].values()], "o-", label=what)
        ax.plot(x, [r["a"] + r["b"] * n / 2 for n in x], "k--", lw=1, label="a + b x keys")
        ax.set_xscale("log", base=2)
        ax.set_xticks(x, map(str, x))
        ax.set_xlabel("rows, 64 tokens each" if axis == "rows" else "tokens, 64 rows")
    axes[0].set(ylabel="microseconds per new token", ylim=(0, None))
    axes[0].legend()
    fig.suptitle(f"0.9 M parameters, FP16, {machine}", fontsize=10)
    fig.savefig(path, dpi=100)


def main(argv=None):
    p = Parser(prog="python -m experiments.speed", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--sizes", nargs="+", choices=tuple(sizes(False)), help="models to compare on (default: all)")
    p.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="which parts (default: all)")
    p.add_argument("--turns", type=ranged(int, 1, 100), default=5, help="counted turns of each contender")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--out", default="", help="folder for speed-DEVICE.json (with --only: "
                   "speed-PARTS-DEVICE.json) and the figure")
    p.add_argument("--probe", choices=(*MODES, "logprobs"), help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    device, missing = pick_device(a.device), set()
    table, cpu = sizes(device.type == "cuda"), device.type == "cpu"
    if a.probe:
        return print(json.dumps(probed(a.probe, table[a.sizes[0]], device)))
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")                       # nothing here is downloaded
    if a.out:
        os.makedirs(a.out, exist_ok=True)                              # before the long measurements
    if cpu:
        missing.add("no GPU: no rows of CUDA")
        if why_plain(device):
            missing.add(f"no compiled operators: {why_plain(device)}")
    versions = dict(torch=torch.__version__, python=platform.python_version())
    for package in ("transformers", "trl"):
        try:
            versions[package] = __import__(package).__version__
        except ImportError:
            versions[package] = None
    if versions["transformers"]:
        import transformers
        transformers.logging.set_verbosity_error()
    machine = platform.processor() or platform.machine() if cpu else torch.cuda.get_device_name(device)
    report = dict(bench="speed", command=["python", "-m", "experiments.speed", *(argv or sys.argv[1:])],
                  turns=a.turns, device=machine, threads=torch.get_num_threads(), **versions)
    if {"rollout", "step"} & set(a.only):
        for name in a.sizes or table:
            report[name] = compare(name, table[name], device, a.turns, a.only, missing)
            gc.collect()
    if "modes" in a.only:
        report["modes"] = {n: modes(n, table[n], device, a.turns) for n in a.sizes or ["0.9M"] if table[n].step}
    if "scaling" in a.only:
        report["scaling"] = scaling(device, a.turns)
        try:
            if a.out:
                draw_scaling(report["scaling"], f"{a.out}/speed-scaling-{device.type}.png", machine)
        except ImportError:
            missing.add("matplotlib is not installed: no figure")
    if "memory" in a.only:
        report["logprob_memory"] = probe("logprobs", device)
        say("\nlog-probs, forward and backward: " + json.dumps(report["logprob_memory"]))
    report["left_out"] = sorted(missing)
    for text in report["left_out"]:
        say(f"left out: {text}")
    if a.out:
        only = "" if set(a.only) == set(PARTS) else "-".join(a.only) + "-"
        with open(f"{a.out}/speed-{only}{device.type}.json", "w", encoding="utf-8") as f:
            json.dump(report, f, indent=1)
    print(json.dumps(report))


if __name__ == "__main__":
    run_main(main)
