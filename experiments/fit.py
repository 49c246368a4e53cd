"""Does it fit? Qwen2.5's shapes with random weights, whole GRPO steps, and the memory that they took.

    python -m experiments.fit               # on a GPU: 0.5 B and 1.5 B, and 1.5 B with LoRA; 64 x 8 answers of 512 tokens
    python -m experiments.fit --quick       # tiny shapes through the same code

Random weights take as much memory as trained ones. No answer is let end, and rewards are drawn by lot: every answer is as long
as it can be and goes both ways. Each row is a process of its own; the figure is the peak of what
torch had allocated (on a CPU, of what the process held). Writes results/fit.json.
"""
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import torch

from data.tokenizer import TOKENIZER
from experiments.lab import ROOT, Lab
from model import GPT, GPTConfig
from run.console import run_main
from run.memory import peak_memory

SHAPES = {
    "0.5B": dict(vocab_size=151_936, n_layers=24, width=896, n_heads=14, n_kv_heads=2, mlp_width=4864),
    "1.5B": dict(vocab_size=151_936, n_layers=28, width=1536, n_heads=12, n_kv_heads=2, mlp_width=8960),
    "tiny": dict(vocab_size=TOKENIZER.n_vocab, n_layers=3, width=64, n_heads=4, n_kv_heads=2, mlp_width=96),
}
# name: (shape, flags, the most that it may take, GiB)
ROWS = {
    "0.5B, all weights": ("0.5B", [], 24),
    "1.5B, LoRA rank 32": ("1.5B", ["--lora-rank", "32"], 24),
    "1.5B, all weights": ("1.5B", [], 80),
}
TINY = {"tiny, all weights": ("tiny", [], None), "tiny, LoRA rank 4": ("tiny", ["--lora-rank", "4"], None)}


def child(folder, flags):
    """One run in this process; its last line is JSON."""
    import train_rl
    from data.env import Env
    from sample import Sampler
    rng = np.random.default_rng(0)
    Sampler.ends = lambda self, tokens: torch.zeros_like(tokens, dtype=torch.bool)      # by chance one would, now and then
    Env.rewards = lambda self, problems, rollout: rng.integers(0, 2, len(rollout.length)).astype(float).tolist()
    args = ["--model", folder, "--task", str(ROOT / "data" / "example_task.py"), "--heldout", "0", "--steps", "2",
            "--out", f"{folder}/run", *flags]
    train_rl.main(args)
    device = torch.device("cuda" if torch.cuda.is_available() and "cpu" not in flags else "cpu")
    steps = [json.loads(x) for x in open(f"{folder}/run/metrics.jsonl", encoding="utf-8")]
    last = [m for m in steps if "step" in m][-1]
    print(json.dumps(dict(peak_mib=round(peak_memory(device)), tokens=last["tokens"], rollout_s=last["t_rollout"],
                          train_s=last["t_train"], grad_norm=last["grad_norm"])))


def make(folder, shape):
    """A checkpoint of this shape in `folder`, random, in bf16, its tokens bytes."""
    from hf import weights
    model = GPT(GPTConfig(**SHAPES[shape], context=4096, rope_theta=1e6, qkv_bias=True, tied_head=True), seed=0)
    weights.save(folder, model, "bf16")
    if not (folder / "tokenizer.json").exists():                           # a large vocabulary, of which bytes are the beginning
        config = json.loads((folder / "config.json").read_text()) | weights.byte_tokenizer(folder)
        (folder / "config.json").write_text(json.dumps(config))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        return child(argv[1], argv[2:])
    lab = Lab("fit", __doc__, argv)
    rows = lab.pick(TINY, TINY, ROWS)
    size = lab.pick(*2 * [["--prompts", "4", "--group", "4", "--max-answer", "24"]],
                    ["--prompts", "64", "--group", "8", "--max-answer", "512"])
    result = {}
    for name, (shape, flags, limit) in rows.items():
        with tempfile.TemporaryDirectory() as folder:
            make(pathlib.Path(folder) / "model", shape)
            command = [sys.executable, "-m", "experiments.fit", "--child", f"{folder}/model", *size, *flags, *lab.device()]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            result[name] = dict(failed=(done.stderr.strip().splitlines() or ["no message"])[-1], limit_gib=limit)
            print(f"{name:20} FAILED: {result[name]['failed']}", flush=True)
            continue
        r = result[name] = dict(json.loads(done.stdout.strip().splitlines()[-1]), limit_gib=limit)
        fits = "" if limit is None else f", {'within' if r['peak_mib'] <= limit * 1024 else 'MORE THAN'} {limit} GiB"
        print(f"{name:20} {r['peak_mib'] / 1024:6.2f} GiB{fits}; {r['tokens']} answer tokens a step, {r['rollout_s']:.1f} + "
              f"{r['train_s']:.1f} s", flush=True)
    lab.save(dict(rows=result), config=dict(size=size, rows={k: v[:2] for k, v in rows.items()}))


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
