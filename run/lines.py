"""run/lines.py: what a run prints. Its banner, a line a step, notes on what is off."""
import math
import re
import textwrap
import time

import numpy as np
import torch


def say(text):
    print(text, flush=True)


def wrapped(text, first="", rest="  "):
    """In lines of at most 100 columns. first, rest: what the first line begins with, and the
    others."""
    return textwrap.fill(text, 100, initial_indent=first, subsequent_indent=rest,
                         break_on_hyphens=False)


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def to_go(begin, share):
    """What took from the time `begin` until now is this share of all."""
    spent = time.monotonic() - begin
    return f"{clock(spent)} spent, {clock(spent / share * (1 - share))} to go"


def banner(rollout, train, scaler):
    """What is computed in which format, on what, and why: three lines."""
    if train.device.type == "cuda":
        where = torch.cuda.get_device_name(train.device)
        if torch.cuda.get_device_capability(train.device)[0] == 7:                      # such as a T4
            where += " (tensor cores for FP16, none for BF16)"
    else:
        n = torch.get_num_threads()
        where = f"CPU, {n} thread{'s' * (n > 1)}, {train.operators} operators"
    how = "products in FP32"
    if train.half:
        how = "tensor cores, 16-bit reductions off: sums in FP32"
    elif train.emulated:
        why = "a CPU's own half products are slow" if train.device.type == "cpu" else "not a format of the GPU"
        how += f", results rounded ({why})"
    same = "the same roundings on both sides"
    if rollout.fmt != train.fmt:
        same = "DIFFERENT roundings on the two sides"
    elif train.exact:
        same = "exact, one order of summation on both sides"
    bits = f"{train.fmt.exp} exponent bits"
    scale = (f"loss scale {power_of_two(scaler.get_scale())} ({bits})" if scaler.is_enabled()
             else f"no loss scale ({bits} reach as far as FP32)")
    return (f"{where}: {how}\nrollout {rollout.fmt.name}, train {train.fmt.name}: {same}\n{scale}")


def short(x, digits=1):
    """9.6e-06 -> 9.6e-6"""
    return "0" if x == 0 else re.sub(r"e([+-])0+", r"e\1", f"{x:.{digits}e}")


def power_of_two(x):
    """65536.0 -> 2^16"""
    power = math.log2(x)
    return f"2^{power:.0f}" if power and power == int(power) else f"{x:.0f}"


def step_line(m, steps, eta):
    """One step in at most 100 columns. The rest of its metrics is in metrics.jsonl."""
    spent = m["t_rollout"] + m["t_train"]
    left = clock(eta) if eta < 3600 else f"{eta / 60:.0f}m"
    return (f"step {m['step']:{len(str(steps))}}/{steps}  "
            f"acc {m['accuracy']:.3f} len {m['length']:3.0f} ent {m['entropy']:.3f}  "
            f"gap {short(m['logp_gap_mean']):7} kl {short(m['kl_k3'], 0):5}  "
            f"|g| {m['grad_norm']:<5.2g} scale {power_of_two(m['loss_scale'])}  "
            f"{spent:.{2 - (spent >= 1) - (spent >= 10)}f}s eta {left}")


def all_of(m):
    """Every metric of a step, by its name in metrics.jsonl, for --verbose."""
    return wrapped("  ".join(f"{k} {v:.3g}" for k, v in m.items()), " " * 4, " " * 4)


def mean(history, key):
    return float(np.mean([float(m[key]) for m in history]))


def diagnose(history):
    """What is off, in plain words, from the metrics of the steps so far: a list of (topic,
    sentence)."""
    last, found = history[-5:], {}
    if len(last) < 5:
        return []
    accuracy = mean(last, "accuracy")
    if all(m["frac_zero_std"] > 0.8 for m in last):
        found["signal"] = (
            f"in {last[-1]['frac_zero_std']:.0%} of the groups all answers have the same reward, which teaches "
            "nothing; " + (
                "nearly everything is solved: done, or time for harder problems (--digits)" if accuracy > 0.9
                else "nearly nothing is solved: easier problems (--digits), a better base (--base-steps) or "
                "more answers (--group)" if accuracy < 0.1
                else "some problems are always solved and the others never: problems between (--keep 0.2 0.8) "
                "or more answers (--group)"))
    curve = [float(m["accuracy"]) for m in history]
    best = np.convolve(curve, np.full(5, 0.2), "valid").max()
    if accuracy < best - 0.2:
        found["falls"] = (
            f"accuracy has fallen from {best:.2f} to {accuracy:.2f} (means of 5 steps). If you changed the "
            "loss or the advantage, look at the sign first; else try a lower --lr, and look at the gap")
    skipped = last[-1]["skipped_steps"] - last[0]["skipped_steps"]
    if skipped >= 3:
        found["skips"] = (f"the loss scaler skipped {skipped} updates in the last 4 steps: gradients "
                          "overflow; a few at the start are normal, else lower --init-scale or --lr")
    if all(m["truncated"] > 0.1 for m in last):
        found["truncated"] = (f"{last[-1]['truncated']:.0%} of the answers were cut off before their stop "
                              "token and count as wrong")
    kl = mean(last, "kl_k3")
    if len(history) >= 30:
        early, middle, late = (mean(part, "logp_gap_mean")
                               for part in (history[:10], history[-20:-10], history[-10:]))
        if late > 3 * early and late > middle > early and late > 1e-3:
            found["mismatch"] = (
                f"the mismatch rises: mean gap {early:.1e} at first, {late:.1e} now. In the paper this "
                "comes before a collapse; try --precision fp16 on both sides")
    if "mismatch" not in found and kl > 1e-3:
        found["mismatch"] = (
            f"rollout and training disagree by a KL of {kl:.1e} nats a token, as much as two engines in BF16 do "
            "in the paper. With one format on both sides this program has 1e-4 or less: if you changed "
            "something, rollout and training no longer compute the same; else try --precision fp16")
    if last[-1]["ratio_outliers"] > 0.05:
        found["outliers"] = (f"{last[-1]['ratio_outliers']:.1%} of the tokens have pi/mu outside "
                             "[0.9, 1.1] before any update")
    return list(found.items())


def notes(history, told):
    """What is off and worth a line now: each topic once in 25 steps. told: topic -> the step in which
    it was."""
    step = history[-1]["step"]
    for topic, sentence in diagnose(history):
        if step - told.get(topic, -25) >= 25:
            told[topic] = step
            yield sentence
