"""Does it fit? Qwen2.5's shapes with random weights, whole GRPO steps, and the memory they took.

    python -m experiments.fit               # on a GPU: 0.5 B and 1.5 B, and 1.5 B with LoRA
    python -m experiments.fit --quick       # tiny shapes through the same code

Random weights take as much memory as trained ones. No answer is let end, and rewards are drawn by
lot: every answer is as long as it can be and goes both ways. Each row is a process of its own. The
figure is the peak of what torch had allocated (on a CPU, of what the process held).
"""
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import torch

from data.tokenizer import TOKENIZER
from experiments.lab import ROOT, Lab, show
from hf import weights
from model import GPT, GPTConfig
from run.console import run_main
from run.memory import peak_memory

BIG = GPTConfig(vocab_size=151_936, n_layers=24, width=896, n_heads=14, n_kv_heads=2, context=4096,
                mlp_width=4864, rope_theta=1e6, qkv_bias=True, tied_head=True)
BIGGER = dataclasses.replace(BIG, n_layers=28, width=1536, n_heads=12, mlp_width=8960)
SMALL = dataclasses.replace(BIG, vocab_size=TOKENIZER.n_vocab, n_layers=3, width=64, n_heads=4,
                            mlp_width=96)
# name: shape, flags, the most that it may take, GiB
ROWS = {"0.5B, all weights": (BIG, "", 24), "1.5B, LoRA rank 32": (BIGGER, "--lora-rank 32", 24),
        "1.5B, all weights": (BIGGER, "", 80)}
TINY = {"tiny, all weights": (SMALL, "", 1), "tiny, LoRA rank 4": (SMALL, "--lora-rank 4", 1)}
SIZE = "--prompts 64 --group 8 --max-answer 512"
TINY_SIZE = "--prompts 4 --group 4 --max-answer 24"


def child(folder, flags):
    """One run in this process; its last line is JSON."""
    import train_rl
    from data.env import Env
    from sample import Sampler
    rng = np.random.default_rng(0)
    Sampler.ends = lambda self, tokens: torch.zeros_like(tokens, dtype=torch.bool)
    Env.rewards = lambda self, asked, rollout: rng.integers(0, 2, len(rollout.length)).tolist()
    train_rl.main(["--model", folder, "--task", str(ROOT / "data" / "example_task.py"), "--heldout",
                   "0", "--steps", "2", "--out", f"{folder}/run", *flags])
    device = torch.device("cuda" if torch.cuda.is_available() and "cpu" not in flags else "cpu")
    lines = pathlib.Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [m for m in map(json.loads, lines) if "step" in m][-1]
    keys = "tokens", "t_rollout", "t_train", "grad_norm"
    print(json.dumps(dict(peak_mib=round(peak_memory(device)), **{k: last[k] for k in keys})))


def measure(shape, flags, limit):
    with tempfile.TemporaryDirectory() as folder:
        model = pathlib.Path(folder) / "model"
        weights.save(model, GPT(shape, seed=0), "bf16")
        if not (model / "tokenizer.json").exists():        # bytes, a part of a large vocabulary
            config = json.loads((model / "config.json").read_text()) | weights.byte_tokenizer(model)
            (model / "config.json").write_text(json.dumps(config))
        command = [sys.executable, "-m", "experiments.fit", "--child", str(model), *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return dict(failed=(done.stderr.strip().splitlines() or ["no message"])[-1])
    r = json.loads(done.stdout.strip().splitlines()[-1])
    return dict(r, limit_gib=limit, fits=r["peak_mib"] <= 1024 * limit)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        return child(argv[1], argv[2:])
    lab = Lab("fit", __doc__, argv)
    size = [*lab.pick(TINY_SIZE, TINY_SIZE, SIZE).split(), *lab.device()]

    def make():
        rows = {name: measure(shape, [*size, *flags.split()], limit)
                for name, (shape, flags, limit) in lab.pick(TINY, TINY, ROWS).items()}
        show(rows)
        return dict(rows=rows, size=size), []
    lab.present(make)


if __name__ == "__main__":
    run_main(main)
