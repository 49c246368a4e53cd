"""How fast beside the peers: Hugging Face `generate` and TRL's GRPOTrainer, turn by turn?

    python -m experiments.speed                 # every size that fits, 30 minutes on two cores
    python -m experiments.speed --sizes 0.9M    # the default model alone
    python -m experiments.speed --only modes    # of rollout, step, modes, scaling, memory

All contenders get the same weights (checked: their logits agree), prompts, number of new tokens and
seeds, and none stops early. They take turns A B C A B C in one process, so that a slow minute hits
all of them. Figures are medians, ratios the median of the ratios turn by turn. The machine's own
matrix product is measured between the turns. What needs a package that is not here, or a GPU, is
left out and named. The last line is one JSON object.
"""
import gc
import json
import multiprocessing
import os
import pathlib
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

from experiments.bench import STAGES, Size, Work, race
from experiments.command import Command, show
from experiments.probe import TOY, timed
from hf import weights
from model import GPT, GPTConfig
from operators import numerics, why_plain
from operators.device import pick_device
from run.console import run_main
from run.memory import peak_memory

PARTS = "rollout", "step", "modes", "scaling", "memory"
MODES = ("fp32", "bf16", "fp16", "fp32 exact", "bf16 exact", "fp16 exact", "fp16 --no-fast",
         "fp16 exact --no-fast")
PEERS = dict(transformers="generate", trl="TRL")
QUIET = dict(TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_DISABLE_PROGRESS_BARS="1",
             TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1")                  # no download


def sizes(gpu, quick=False):
    """The default model; 25 M; GPT-2's shape; Qwen2.5-0.5B's shape. A CPU gets fewer rows of the
    large ones, to finish."""
    default = GPTConfig(vocab_size=258, context=64)
    m25 = GPTConfig(vocab_size=258, n_layers=8, width=512, n_heads=8, n_kv_heads=4, mlp_width=1408,
                    context=256)
    gpt2 = GPTConfig(vocab_size=50257, n_layers=12, width=768, n_heads=12, n_kv_heads=12,
                     mlp_width=2048, context=512, tied_head=True)
    qwen = GPTConfig(vocab_size=151936, n_layers=24, width=896, n_heads=14, n_kv_heads=2,
                     mlp_width=4864, context=512, rope_theta=1e6, qkv_bias=True, tied_head=True)
    if quick:
        return {name: Size(TOY, 2, 8, 9, 8, step=s.step) for name, s in sizes(gpu).items()}
    if gpu:
        return {"0.9M": Size(default, 32, 8, 33, 256), "25M": Size(m25, 64, 32, 200, 256),
                "124M": Size(gpt2, 32, 64, 256, 64), "0.5B": Size(qwen, 32, 64, 256, 32)}
    return {"0.9M": Size(default, 32, 8, 33, 128), "25M": Size(m25, 8, 16, 48, 32),
            "124M": Size(gpt2, 4, 16, 32, 16), "0.5B": Size(qwen, 2, 16, 16, 8, step=False)}


# --------------------------------------------------------------------------------------------------
# The peers


def to_transformers(model):
    """The same weights as a transformers model, FP32: what sample.py --save leaves, loaded."""
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


class Generate:
    """transformers' generate, a contender."""

    def __init__(self, peer, size, cache):
        self.peer, self.size, self.stages = peer, size, (self.run,)
        self.ids = torch.tensor(size.texts(), device=peer.device).repeat_interleave(size.group, 0)
        self.settings = dict(attention_mask=torch.ones_like(self.ids), do_sample=True, top_k=0,
                             temperature=1.0, top_p=1.0, max_new_tokens=size.new,
                             min_new_tokens=size.new, cache_implementation=cache)

    def run(self, seed):
        torch.manual_seed(seed)
        with torch.inference_mode():
            out = self.peer.generate(self.ids, **self.settings)
        assert out.shape == (self.size.rows, self.size.prompt + self.size.new)


def trl_steps(peer, work, turns):
    """Seconds of whole GRPOTrainer steps on `peer`, and of work's own between them: A B A B."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    size, cpu, theirs, ours, lengths = work.size, peer.device.type == "cpu", [], [], []
    V = size.gpt.vocab_size
    words = Tokenizer(models.WordLevel({str(i): i for i in range(V)}, unk_token=str(V - 1)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=str(V - 1),
                                        eos_token=str(V - 2), padding_side="left")
    prompts = [" ".join(map(str, p)) for p in size.texts()] * (turns + 2)

    def reward(completion_ids, **_):
        lengths.extend(map(len, completion_ids))
        return [float(sum(c) % 2) for c in completion_ids]

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            timed([], 0, peer.device)                                  # waits for the GPU
            self.begin = time.perf_counter()

        def on_step_end(self, *_, **__):
            timed([], 0, peer.device)
            theirs.append(time.perf_counter() - self.begin)
            ours.append(timed(work.stages, len(ours), peer.device).sum())
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        config = GRPOConfig(
            output_dir=folder, max_steps=turns + 1, per_device_train_batch_size=size.rows,
            num_generations=size.group, max_completion_length=size.new, temperature=1.0, top_p=1.0,
            generation_kwargs=dict(min_new_tokens=size.new), top_k=0, beta=0.0, bf16=False,
            fp16=not cpu, use_cpu=cpu, loss_type="dr_grpo", scale_rewards="none", seed=0,
            learning_rate=1e-6, gradient_checkpointing=False, disable_dropout=True, report_to=[],
            logging_strategy="no", save_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False)
        GRPOTrainer(peer, reward, args=config, processing_class=tokenizer, callbacks=[Turns()],
                    train_dataset=Dataset.from_dict(dict(prompt=prompts))).train()
    assert lengths == [size.new] * size.rows * (turns + 1), "TRL made another number of tokens"
    return np.array(theirs[1:]), np.array(ours[1:])


def compare(name, size, device, turns, only, peers):
    """This program and its peers on one size -> a dict of figures. peers: package -> its version,
    None if it is not installed."""
    model, gpu = GPT(size.gpt, device, seed=0), device.type == "cuda"
    report = dict(params=model.n_params(), rows=size.rows, prompt=size.prompt, new=size.new)
    steps = "step" in only and size.step
    all_of_it = {f"tenbit {f}": Work(model, size, f, steps)
                 for f in ("fp32", "fp16", *["bf16"] * gpu)}
    if steps:
        all_of_it["tenbit fp16, --no-fast"] = Work(model, size, "fp16 --no-fast")
    if peers["transformers"]:
        peer = to_transformers(model)
        model.use(all_of_it["tenbit fp32"].num)
        report["logits_differ"] = agrees(model, peer)
        assert report["logits_differ"] < 1e-3, f"not the same model: {report['logits_differ']:.1e}"
        if "rollout" in only:
            peer = peer.half() if gpu else peer
            all_of_it |= {f"generate, {cache or 'dynamic'} cache": Generate(peer, size, cache)
                          for cache in (None, "static")}
    rows, report["gemm_peak"] = race(all_of_it, turns, device)
    show(rows, f"{name}, {size.rows} answers of {size.new} tokens")
    if steps and all(peers.values()):
        theirs, ours = trl_steps(peer.float(), all_of_it["tenbit fp16"], turns)
        rows["TRL GRPOTrainer"] = dict(step_s=float(np.median(theirs)))
        report["trl_over_fp16"] = float(np.median(theirs / ours))
        print(f"a step of TRL takes {np.median(theirs):.3g} s, tenbit's in fp16 between these "
              f"{np.median(ours):.3g} s, {report['trl_over_fp16']:.2f} times as fast")
    return dict(report, contenders=rows, peak_memory_mib=peak_memory(device))


# --------------------------------------------------------------------------------------------------
# Modes, scaling, memory


def alone(work, *args):
    """work(*args) in a process of its own, whose memory nothing else fills."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def modes(name, size, device, turns):
    """Whole GRPO steps in each mode, and the peak memory of a process that does two of them."""
    model = GPT(size.gpt, device, seed=0)
    rows, _ = race({mode: Work(model, size, mode) for mode in MODES}, turns, device)
    for mode, r in rows.items():
        ordinary = rows[mode.replace(" exact", "")]
        r["peak_mib"] = alone(peak_of_steps, size, mode)
        r["step_over_ordinary"] = r["step_ratio"] / ordinary["step_ratio"]
        r["memory_over_ordinary"] = r["peak_mib"] / ordinary["peak_mib"]
    show(rows, f"{name}, {size.rows} answers of {size.new} tokens")
    return rows


def peak_of_steps(size, mode):
    device = pick_device()
    timed(Work(GPT(size.gpt, device), size, mode).stages * 2, 0, device)
    return peak_memory(device)


def logprob_memory(V=151936, N=32768, C=128):
    """Log-probs of N tokens over a vocabulary of V, forward and backward: how far memory rises
    above what was there before (weights, hidden states)."""
    device = pick_device()
    w = torch.nn.Parameter(torch.randn(V, C, device=device) * 0.02)
    num = numerics("fp16", device).hold([w])
    h = num.round(torch.randn(N, C, device=device)).requires_grad_()
    targets = torch.randint(0, V, (N,), device=device)
    num.token_logprobs(h[:2], w, targets[:2])[0].sum().backward()      # weights packed
    h.grad = w.grad = None
    gc.collect()
    if device.type == "cuda":                                  # the peak is what is held now
        torch.cuda.reset_peak_memory_stats()
    else:
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = peak_memory(device)
    spent = timed([lambda _: num.token_logprobs(h, w, targets)[0].sum().backward()], 0, device)
    return dict(tokens=N, vocabulary=V, width=C, seconds=float(spent[0]),
                extra_mib=peak_memory(device) - before, whole_logits_mib=4 * V * N / 2 ** 20,
                gradients_mib=(w.grad.nbytes + h.grad.nbytes) / 2 ** 20)


def scaling(device, turns, points=(64, 128, 256, 512, 1024)):
    """The default model, FP16: 64 to 1,024 rows of 64 tokens, and 64 rows of 64 to 1,024 tokens.

    Rule: cost per token does not rise with rows, and with length by no more than attention's own
    term. A step's microseconds per new token are fitted by a + b * (mean number of keys), a and b
    not negative, b = 0 for rows; `off`: the most by which one lies above the line, as a share."""
    gpt, report = GPTConfig(vocab_size=258, context=1024), {}
    for axis, cases in (("rows", [(n, 64) for n in points]), ("length", [(64, n) for n in points])):
        work = {}
        for rows, length in cases:
            size = Size(gpt, rows // 8, 16, length - 16, max(1, min(128, 5120 // length)))
            work[f"{rows} rows of {length}"] = Work(GPT(gpt, device), size, "fp16")
        found = {}
        for name, r in race(work, turns, device)[0].items():
            us = 1e6 / work[name].size.tokens
            found[name] = {f"{k}_us": us * r[f"{k}_s"] for k in ("step", *STAGES)}
        y, keys = np.array([p["step_us"] for p in found.values()]), np.array(cases)[:, 1] / 2
        b, a = np.polyfit(keys, y, 1, w=1 / y) if axis == "length" else (0.0, y[0])
        a, b = (0.0, np.mean(y / keys)) if a < 0 else (np.mean(y), 0.0) if b < 0 else (a, b)
        fit = dict(a=float(a), b=float(b), off=float((y / (a + b * keys) - 1).max()))
        show(found, f"a new token, by {axis}")
        print(fit)
        report[axis] = dict(at=points, points=found, **fit)
    return report


def draw_scaling(plt, result, runs):
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for ax, (axis, r) in zip(axes, result["scaling"].items()):
        for what in ("step", "gradient", "rollout"):
            ax.plot(r["at"], [p[f"{what}_us"] for p in r["points"].values()], "o-", label=what)
        ax.plot(r["at"], [r["a"] + r["b"] * n / 2 for n in r["at"]], "k--", label="a + b x keys")
        ax.set_xscale("log", base=2)
        ax.set_xticks(r["at"], map(str, r["at"]))
        ax.set_xlabel("rows, 64 tokens each" if axis == "rows" else "tokens, 64 rows")
    axes[0].set(ylabel="microseconds per new token, FP16", ylim=(0, None))
    axes[0].legend()
    return fig


def installed(package):
    """Its version, or None."""
    try:
        return __import__(package).__version__
    except ImportError:
        return None


def measure(only, names, device, quick):
    """All parts that are asked for -> their figures. names: of sizes, if not the usual ones."""
    os.environ |= QUIET
    table, turns = sizes(device.type == "cuda", quick), 1 if quick else 5
    peers = {package: installed(package) for package in PEERS}
    missing = [f"{p} is not installed: no rows of {PEERS[p]}" for p in peers if not peers[p]]
    report = dict(turns=turns, threads=torch.get_num_threads(), **peers)
    if device.type == "cpu":
        missing.append("no GPU: no rows of CUDA")
        if why_plain(device):
            missing.append(f"no compiled operators: {why_plain(device)}")
    if {"rollout", "step"} & set(only):
        for name in names or table:
            report[name] = compare(name, table[name], device, turns, only, peers)
            gc.collect()
            if not table[name].step:
                missing.append(f"{name}: no whole step, weights, gradients and AdamW of two models "
                               "at once take too much memory")
    if "modes" in only:
        report["modes"] = {n: modes(n, table[n], device, turns)
                           for n in names or ["0.9M"] if table[n].step}
    if "scaling" in only:
        report["scaling"] = scaling(device, turns, *[(32, 64)] * quick)
    if "memory" in only:
        report["logprob_memory"] = alone(logprob_memory, *(999, 256) * quick)
        show({"log-probs, forward and backward": report["logprob_memory"]})
    report["left_out"] = missing
    for text in missing:
        print(f"left out: {text}")
    return report, []


def main(argv=None):
    def add(p):
        p.add_argument("--sizes", nargs="+", choices=tuple(sizes(False)), help="default: all")
        p.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="default: all parts")
    command, device = Command("speed", __doc__, argv, add), pick_device()
    only = command.args.only
    some = [] if set(only) == set(PARTS) else only
    report = command.present(
        lambda: measure(only, command.args.sizes, device, command.quick),
        draw_scaling if "scaling" in only else None, " ".join(["speed", *some, device.type]))
    print(json.dumps(report))


if __name__ == "__main__":
    run_main(main)
