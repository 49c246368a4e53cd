"""FP16 ends at 65,504. Runs that are driven over that edge: what the loss scaler does, and what the diagnosis says.

    python -m experiments.overflow

Overflow of gradients is ordinary: a loss scale of 2^32 makes gradients inf, the scaler skips the update and halves the scale
until they fit, and nothing is lost but the steps. Overflow of the forward pass has no such cure. It is brought about without
changing what the model says: norms make a model blind to the size of its residual stream, so the embedding and all products
that add to the stream are multiplied by 2^k. (Large checkpoints come near by themselves: 12,712 is reported of Qwen2.5.) A
format of three exponent bits, and a learning rate that blows up the weights, do it in other ways. The program must not go on
silently: it stops, names the layer, and leaves the last good checkpoint. Writes results/overflow.json and .png.
"""
import dataclasses
import shutil
import sys

import torch

from data import draw_problems, stream
from data.tasks import make_task
from data.tokenizer import encode
from experiments.lab import GPU, LAB, QUICK, Job, Lab, band, summary
from operators import numerics
from operators.device import pick_device
from precision import parse_format
from run.base import find_base, get_base, gpt_config, load_task
from run.checkpoint import save_checkpoint
from run.console import run_main
from train_rl import parse_config


def grown(lab, cfg, k):
    """A cache of its own with the same base model, its residual stream 2^k times as large -> its path, the largest activation."""
    device, cache = pick_device(cfg.device), lab.folder / f"cache-{k}-seed{cfg.seed}"
    model = get_base(cfg, device)
    _, path, _ = find_base(cfg, device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == "embedding" or name.endswith((".proj", ".down")):
                p *= 2.0 ** k
    save_checkpoint(cache / path.parent.name / path.name, model, config=dataclasses.asdict(gpt_config(cfg, load_task(cfg))))
    for library in [*path.parent.parent.glob("*.so"), *path.parent.parent.glob("*.sha256")]:     # need not be compiled again
        shutil.copy(library, cache)
    num, largest = numerics("fp32", device), [0.0]
    num.spy = lambda kind, where, x, raw: largest.append(float(x.abs().max()))
    tokens = [encode(p.prompt) for p in draw_problems(make_task(cfg.task, cfg.digits, cfg.noise), 1, stream(0))]
    with torch.no_grad():
        model.use(num.hold(model.parameters()))(torch.tensor(tokens, device=device))
    return cache, max(largest)


def main(argv=None):
    lab = Lab("overflow", __doc__, argv)
    size = lab.pick([*LAB, "--steps", "60"], [*QUICK, "--heldout", "0", "--steps", "3"],
                    [*GPU, "--steps", "40"])
    cases = {"fp16": [], "fp16, first scale 2^32": ["--init-scale", str(2.0 ** 32)], "fp16, residual stream x 2^8": 8,
             "fp16, residual stream x 2^16": 16, "bf16, residual stream x 2^16": 16,
             "fp16, training in e3m10": ["--precision", "e3m10", "--rollout-precision", "fp16"],
             "fp16, learning rate 0.3": ["--lr", "0.3"]}
    if lab.quick:
        cases = {k: v for k, v in cases.items() if "2^" in k and "2^8" not in k and "bf16" not in k}
    jobs, largest = [], {}
    for seed in range(lab.seeds):
        for name, how in cases.items():
            flags = [*lab.device(), *size, "--precision", name[:4], *(how if isinstance(how, list) else [])]
            cfg = parse_config([*flags, "--seed", str(seed)])[0]
            env = ()
            if isinstance(how, int):
                cache, largest[how] = grown(lab, cfg, how)
                env = (("TENBIT_CACHE", str(cache)),)
            jobs.append(Job(name, seed, tuple(flags), env=env))
    records = lab.sweep(jobs)
    result = summary(records)
    for k, x in largest.items():
        print(f"residual stream x 2^{k}: largest activation of a prompt {x:.3g}, of {parse_format('fp16').max:.0f}")
    for name, s in result.items():
        rs = [r for r in records if r["name"] == name]
        print(f"\n{name}: " + (f"{s['failed']} of {s['seeds']} stopped; " if s["failed"] else "") +
              (f"accuracy {s['accuracy']['mean']:.3f}; " if s["accuracy"] else "") + f"{s['skipped']} updates skipped in all")
        for text in sorted({r["failed"] for r in rs if "failed" in r})[:1]:
            print(f"  {text}")
    messages = {r["name"]: r["failed"] for r in records if "failed" in r}
    lab.save(dict(summary=result, largest_activation=largest, messages=messages), records)
    plot = lab.figure(1, 2, (12, 4.2))
    if plot:
        fig, ((left, right),) = plot
        for i, name in enumerate(cases):
            rs = [r for r in records if r["name"] == name]
            steps = min(len(r["curves"]["loss_scale"]) for r in rs)
            stopped = f" (stopped after {steps} steps)" if result[name]["failed"] else ""
            if name.startswith("fp16"):
                band(left, rs, "loss_scale", name, color=f"C{i}")
            band(right, rs, "accuracy", name + stopped, window=min(3, len(rs[0]["curves"]["accuracy"]) or 1), color=f"C{i}")
            if result[name]["failed"] and not rs[0]["curves"]["accuracy"]:
                right.plot([], [], color=f"C{i}", label=name + stopped)
        left.set(title="loss scale", xlabel="RL step (4 updates each)", ylabel="scale")
        left.set_yscale("log", base=2)
        right.set(title="sampled accuracy, mean and range over seeds", xlabel="RL step (4 updates each)", ylabel="share right",
                  ylim=(0, 1.02))
        left.legend(fontsize=8)
        right.legend(fontsize=8, loc="lower right")
        lab.draw(fig)


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
