"""run/diary.py: what a run leaves of each step, on the screen and in its folder.

A line of samples.jsonl is one of these:

    {"step", "prompt", "right_answer", "answers": [...]}   a whole group, every --sample-every steps
    {"step", "worst": {...}}                               the token of the largest mismatch, always

An answer has its text, reward, advantage and whether it stopped, and of each token: its text, log
mu (as it was sampled), log pi (of training, before the update) and the entropy in nats.
"""
import dataclasses
import math
import time

import torch

from report import page
from run.lines import all_of, notes, say, step_line
from run.trackers import tracker


class Diary:
    def __init__(self, run, cfg, env, first):
        """first: the step after which this process began."""
        self.run, self.cfg, self.env, self.first = run, cfg, env, first
        self.history, self.told, self.begun = run.history(), {}, time.monotonic()
        self.track, self.due = tracker(cfg.log_to, run.path, dataclasses.asdict(cfg)), 0.0

    def write(self, m, batch, meter):
        """m: the step's metrics."""
        cfg, step = self.cfg, m["step"]
        self.history.append(m)
        self.run.log(m)
        to_go = (time.monotonic() - self.begun) / (step - self.first) * (cfg.steps - step)
        say(step_line(m, cfg.steps, to_go))
        if cfg.verbose:
            say(all_of(m))
        for sentence in notes(self.history, self.told):
            say(f"  note: {sentence}")
        whole = (step - 1) % cfg.sample_every == 0 or step == cfg.steps
        for row in rows(step, batch, meter, self.env, whole):
            self.run.log(row, self.run.samples)
        self.track(step, m)
        if cfg.watch and whole and (begin := time.monotonic()) >= self.due:
            page.write([self.run.path], watch=True)
            self.due = time.monotonic() + 20 * (time.monotonic() - begin)      # a twentieth at most


def rows(step, batch, meter, env, whole):
    """The lines of one step. whole: with groups, the first one and that of the worst token."""
    group, r = batch.rewards.shape[1], batch.rollout
    at = int(meter.gap.abs().masked_fill(~meter.answer, -1).argmax())
    row, column = divmod(at, meter.gap.shape[1])
    tokens, (start, end) = r.tokens[row].tolist(), (int(r.prompt_length[row]), int(r.length[row]))
    decode = env.tokenizer.decode
    yield dict(step=step, worst=dict(
        prompt=batch.problems[row // group].prompt, before=decode(tokens[start:column]),
        token=piece(env, tokens[column]), after=decode(tokens[column + 1:end]),
        mu=number(r.logp[row, column]), pi=number(meter.before[row, column]),
        entropy=number(meter.entropy[row, column])))
    for i in dict.fromkeys((0, row // group)) if whole else ():
        problem, some = batch.problems[i], range(i * group, (i + 1) * group)
        yield dict(step=step, prompt=problem.prompt, right_answer=problem.answer,
                   answers=[answer(batch, meter, env, j) for j in some])


def answer(batch, meter, env, row):
    r = batch.rollout
    span = slice(int(r.prompt_length[row]), int(r.length[row]))
    tokens = r.tokens[row, span].tolist()
    numbers = torch.stack([x[row, span] for x in (r.logp, meter.before, meter.entropy)]).tolist()
    mu, pi, entropy = ([number(x) for x in line] for line in numbers)
    return dict(text=env.tokenizer.decode(tokens), reward=number(batch.rewards.flatten()[row]),
                advantage=number(batch.advantage[row]), stopped=bool(r.stopped[row]),
                tokens=[piece(env, t) for t in tokens], mu=mu, pi=pi, entropy=entropy)


def piece(env, token):
    """A token's text; of the stop token a sign, of a part of a character the token's number."""
    text = env.tokenizer.decode([token]) or "\u25a0"
    return f"<{token}>" if "\ufffd" in text else text


def number(x):
    """With seven digits: FP32 has no more. What is not finite is a text in JSON."""
    x = float(f"{float(x):.7g}")
    return x if math.isfinite(x) else str(x)
