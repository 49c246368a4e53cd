"""run/lines.py: what a run prints. Its banner, a line a step, notes on what is off, the verdict."""
import math

import numpy as np
import torch


def say(text):
    print(text, flush=True)


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def banner(rollout, train, scaler):
    """One line: what is computed in which format, and why."""
    if train.device.type == "cuda":
        where = torch.cuda.get_device_name(train.device)
    else:
        where = f"CPU, {torch.get_num_threads()} threads, {train.operators} operators"
    how = "FP32" if not train.emulated else (
        "FP32 GEMM, result rounded (a CPU's own half GEMM is slow, a GPU has none of this format)")
    how = "FP32 on tensor cores, 16-bit reductions off" if train.half else how
    same = "exact, one order of summation on both sides" if train.exact else "same roundings on both sides"
    same = same if rollout.fmt == train.fmt else "DIFFERENT roundings on the two sides"
    bits = f"{train.fmt.exp} exponent bits"
    scale = (f"loss scale {scaler.get_scale():.0f} ({bits})" if scaler.is_enabled()
             else f"no loss scale ({bits} reach as far as FP32)")
    return (f"{where} | rollout {rollout.fmt.name}, train {train.fmt.name}: {same} | accumulate {how} | "
            f"{scale}")


def step_line(m, cfg, eta):
    exact = math.floor(1000 * m["exact_share"]) / 1000
    line = (f"step {m['step']:4}/{cfg.steps} | acc {m['accuracy']:.3f} len {m['length']:5.1f} "
            f"ent {m['entropy']:.3f} flat {m['frac_zero_std']:4.0%} | gap {m['logp_gap_mean']:.1e} "
            f"max {m['logp_gap_max']:.1e} kl {m['kl_k3']:.1e} exact {exact:.3f} | ")
    if cfg.correction != "none":
        line += f"weight {m['weight_mean']:.3f} kept {m['kept_share']:.3f} | "
    if cfg.kl_beta:
        line += f"kl to base {m['kl_reference']:.1e} | "
    if "route_flips" in m:
        line += f"flips {m['route_flips']:.2%} load {m['expert_balance']:.2f} | "
    return line + (f"loss {m['loss']:+.4f} |g| {m['grad_norm']:8.2e} scale {m['loss_scale']:.0f} "
                   f"lr {m['lr']:.1e} | {m['t_rollout']:.2f}+{m['t_train']:.2f} s "
                   f"{m['tokens_per_s']:6.0f} tok/s | eta {clock(eta)}")


def diagnose(history):
    """What is off, in plain words, from the metrics of the last steps: a list of (topic,
    sentence)."""
    last, found = history[-5:], {}
    if len(last) < 5:
        return []
    if all(m["frac_zero_std"] > 0.8 for m in last):
        found["signal"] = (
            f"{last[-1]['frac_zero_std']:.0%} of the groups agree on their reward and teach nothing; "
            + ("nearly everything is solved: done, or time for harder problems (--digits)"
               if last[-1]["accuracy"] > 0.5 else "nearly nothing is solved: easier problems (--digits), a "
               "better base (--base-steps) or more answers (--group)"))
    skipped = last[-1]["skipped_steps"] - last[0]["skipped_steps"]
    if skipped >= 3:
        found["skips"] = (f"the loss scaler skipped {skipped} updates in the last 4 steps: gradients "
                          "overflow; a few at the start are normal, else lower --init-scale or --lr")
    if all(m["truncated"] > 0.1 for m in last):
        found["truncated"] = (f"{last[-1]['truncated']:.0%} of the answers were cut off before their stop "
                              "token and count as wrong")
    if len(history) >= 30:
        gap = [m["logp_gap_mean"] for m in history]
        early, middle, late = np.mean(gap[:10]), np.mean(gap[-20:-10]), np.mean(gap[-10:])
        if late > 3 * early and late > middle > early and late > 1e-3:
            found["mismatch"] = (
                f"the mismatch rises: mean gap {early:.1e} at first, {late:.1e} now. In the paper this "
                "comes before a collapse; try --precision fp16 on both sides")
    if last[-1]["ratio_outliers"] > 0.05:
        found["outliers"] = (f"{last[-1]['ratio_outliers']:.1%} of the tokens have pi/mu outside "
                             "[0.9, 1.1] before any update")
    return list(found.items())


class Notes:
    """Says what is off, each topic once in 25 steps."""

    def __init__(self):
        self.told = {}

    def say(self, history):
        for topic, sentence in diagnose(history):
            step = history[-1]["step"]
            if step - self.told.get(topic, -100) >= 25:
                self.told[topic] = step
                say(f"  note: {sentence}")


def verdict(cfg, state, accuracy, learned, after, passed, mark):
    """The last lines of a run."""
    if state.before is not None:
        say(f"held-out problems, pass@1 over {cfg.eval_tries} sampled answers each: {state.before:.3f} "
            f"before, {after:.3f} after")
    say(f"training accuracy, sampled at temperature {cfg.temperature:g}, {cfg.eval_tries} answers to each of "
        f"the {len(state.problems)} problems: {accuracy:.3f}")
    if cfg.rollout_format != cfg.train_format:  # the deployment gap: pi has learned, mu is deployed
        say(f"the same answered in {cfg.train_format}, as it was trained: {learned:.3f}")
    if cfg.model:
        say(f"no verdict: that is for the default job; the paper asks {mark:.3f} of a perfectible set "
            "(--keep 0.2 0.8)")
    elif passed is None:
        say("no verdict: changed from the preset: "
            + ", ".join("--" + c.replace("_", "-") for c in state.changed))
    else:
        say(f"{'PASS' if passed else 'FAIL'}: the sanity test asks for {mark:.3f} or more")
