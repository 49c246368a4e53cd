"""sample.py: the KV-cached sampler, and a command line to talk to a model.

    python sample.py --model out/run1 --prompt "187+737="               # answers of a trained model
    python sample.py --model out/run1 --prompt "187+737=" --n 4 --json  # one JSON object an answer
    python sample.py --model out/run1 --eval                            # unbiased pass@k
    python sample.py --model ./Qwen2.5-0.5B-Instruct --prompt "Why is the sky blue?"
    python sample.py --model out/run1 --save out/hf                     # a folder for transformers

The sampler prefills each prompt once, copies its cache to the n answers, and decodes all rows in
one batch. It records the log-prob of every token as it was sampled, from the very distribution that
it was sampled from (Numerics.draw). Training compares with these numbers, not with recomputed ones.
Left out: top-k and top-p, which training would have to mirror exactly.
"""
import argparse
import json
import math
from dataclasses import dataclass

import numpy as np
import torch

from data import draw_problems, stream, uniforms
from data.env import Env
from data.tasks import SCRATCH, make_task
from data.tokenizer import PAD, STOP, Bytes
from hf import weights
from model import KVCache
from operators import numerics
from operators.device import pick_device
from operators.graph import GraphStep
from precision import InputError
from run.base import open_model
from run.console import Parser, ranged, run_main

ROWS = 512                          # answers that are decoded at once


@dataclass
class Rollout:
    """R answers. Rows are right-padded, prompt first: position = slot, in cache and training."""
    tokens: torch.Tensor            # (R, T) int64
    logp: torch.Tensor          # (R, T) FP32, log-prob of each answer token as sampled, 0 elsewhere
    prompt_length: torch.Tensor     # (R,) int64
    length: torch.Tensor            # (R,) int64, prompt and answer, stop token included
    stopped: torch.Tensor           # (R,) bool, False where the answer ran into max_new_tokens
    routes: torch.Tensor | None = None   # (R, T, MoE layers, K) int16: which experts tokens went to

    @property
    def is_answer(self):
        """(R, T) bool: the tokens that were sampled, stop token included. Not the prompt or
        padding."""
        at = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (at >= self.prompt_length[:, None]) & (at < self.length[:, None])

    def rows(self, index):
        """The answers `index` (int64 tensor) alone."""
        return Rollout(*(None if x is None else x[index] for x in vars(self).values()))

    @staticmethod
    def join(parts, pad):
        """Several batches of answers as one."""
        width = max(p.tokens.shape[1] for p in parts)
        fill = dict(tokens=pad, logp=0.0, routes=0)

        def joined(name):
            xs = [getattr(p, name) for p in parts]
            if xs[0] is None or name not in fill:
                return None if xs[0] is None else torch.cat(xs)
            return torch.cat([torch.nn.functional.pad(
                x, (0, 0) * (x.dim() - 2) + (0, width - x.shape[1]), value=fill[name]) for x in xs])
        return parts[0] if len(parts) == 1 else Rollout(*map(joined, vars(parts[0])))

    def texts(self, tokenizer=Bytes):
        spans = zip(self.tokens.tolist(), self.prompt_length.tolist(), self.length.tolist())
        return [tokenizer.decode(tokens[start:end]) for tokens, start, end in spans]


class EagerStep:
    """token (R,), u (R,) -> the next token of each row and its log-prob, one operator after
    another."""

    def __init__(self, model, choose, cache):
        self.model, self.choose, self.cache = model, choose, cache

    def keep(self, index):
        """Go on with these rows alone."""
        self.cache = self.cache.rows(index)

    def __call__(self, token, u):
        return self.choose(self.model(token[:, None], self.cache)[:, 0], u)


class Sampler:
    """Samples from `model` in the number format that the model uses at the time (model.use). stop:
    the token that ends an answer, or a tuple of such; fast: CUDA graphs on a GPU (not for experts,
    whose shapes depend on where tokens go)."""

    def __init__(self, model, stop=STOP, pad=PAD, fast=True):
        self.model, self.pad = model, pad
        self.stop = stop if isinstance(stop, tuple) else (stop,)
        graphs = fast and model.embedding.is_cuda and not model.cfg.n_experts
        self.graphs = {} if graphs else None

    def ends(self, tokens):
        """Which tokens end an answer: bool, of the same shape."""
        found = tokens == self.stop[0]
        for stop in self.stop[1:]:
            found |= tokens == stop
        return found

    def generate(self, prompts, n=1, max_new_tokens=32, temperature=1.0, seed=0, first=0):
        """n answers to each prompt -> Rollout of len(prompts) * n rows, a prompt's answers
        together.

        prompts: lists of token ids, of any lengths; temperature 0 takes the likeliest token and
        records its log-prob under temperature 1; seed: an int or a tuple of ints; first: the number
        of the first prompt. An answer's random numbers follow from the seed, the number of its
        prompt and its own: the same seed gives the same answers on the same machine, in whatever
        pieces they are asked for."""
        cfg, device = self.model.cfg, self.model.embedding.device
        lengths = [len(p) for p in prompts]
        longest = max(lengths, default=0)
        if min(lengths, default=0) == 0:
            raise InputError("an empty prompt: the model needs at least one token to start from")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}, it must be at least 1")
        if longest + max_new_tokens > cfg.context:
            raise InputError(f"a prompt of {longest} tokens and {max_new_tokens} new ones do not "
                             f"fit the model's context of {cfg.context} tokens")
        rows, width = len(prompts) * n, longest + max_new_tokens
        padded = np.full((len(prompts), longest), self.pad)
        for row, p in zip(padded, prompts):
            row[:len(p)] = p
        padded = torch.from_numpy(padded).to(device)
        start = torch.tensor(lengths, device=device).repeat_interleave(n)
        key = seed if isinstance(seed, tuple) else (seed,)
        numbers = range(first, first + len(prompts))
        noise = torch.from_numpy(uniforms(key, numbers, n, max_new_tokens))
        out = Rollout(torch.full((rows, width), self.pad, device=device),
                      torch.zeros(rows, width, device=device), start, start.clone(),
                      torch.zeros(rows, dtype=torch.bool, device=device))
        out.tokens[:, :longest] = padded.repeat_interleave(n, 0)
        self._decode(out, padded, n, noise.to(device), temperature)
        return out

    @torch.inference_mode()
    def _decode(self, out, padded, n, noise, temperature):
        """Fill in `out`: the prompts padded (P, W) once, then a token at a time for all rows. noise
        (T, R): the uniform number that each token is drawn with."""
        model, device = self.model, padded.device

        def choose(hidden, u):
            """hidden (R, C) -> a token drawn from the policy, and its log-prob under that very
            policy."""
            logits = model.logits(hidden)                                           # (R, V)
            if temperature == 0:
                return model.num.likeliest(logits)
            return model.num.draw(logits, u, temperature)

        cache = KVCache(model.cfg, *padded.shape, model.num)
        hidden = model(padded, cache)                                             # each prompt once
        row = everyone = torch.arange(len(out.tokens), device=device)         # answers in the batch
        routes = self._routes(out, row // n, padded.shape[1], len(noise))
        hidden = hidden[row // n, out.prompt_length - 1]                            # (R, C)
        step = self._step(choose, cache, row // n, out, len(noise), temperature)
        del cache
        tokens = torch.full((len(noise), len(row)), self.pad, device=device)  # (T, R): a step a row
        logps = torch.zeros(tokens.shape, device=device)
        done = torch.zeros(len(row), dtype=torch.bool, device=device)
        token, logp = choose(hidden, noise[0])
        for t in range(len(noise)):
            here = t if row is everyone else (t, row)
            tokens[here], logps[here] = token, logp
            done |= self.ends(token)
            if t + 1 == len(noise):
                break
            if device.type == "cpu" or t % 16 == 15:               # on a GPU, looking means waiting
                alive = len(done) - int(done.sum())
                if alive == 0:
                    break
                if alive <= len(row) // 2:                          # drop finished rows
                    # with graphs by halves, since each number of rows needs one of its own
                    keep = alive if self.graphs is None else len(row) // 2
                    index = torch.argsort(done, stable=True)[:keep]
                    row, token, done = row[index], token[index], done[index]
                    step.keep(index)
            here = t if row is everyone else (t, row)
            token, logp = step(token, noise[t + 1] if row is everyone else noise[t + 1][row])
            if routes is not None:
                routes[here] = model.routes()[:, 0]
        self._write(out, tokens, logps, routes)

    def _write(self, out, tokens, logps, routes):
        """Sampled tokens (T, R) go after the prompts, up to the first stop token. What a finished
        row went on with until it was dropped is thrown away."""
        is_stop = self.ends(tokens)
        live = is_stop.cumsum(0) - is_stop.long() == 0
        out.stopped |= is_stop.any(0)
        out.length += torch.where(out.stopped, live.sum(0), len(tokens))
        steps = torch.arange(len(tokens), device=tokens.device)[:, None]
        row = torch.arange(len(out.tokens), device=tokens.device)
        at = row.expand_as(tokens), out.prompt_length + steps
        out.tokens[at] = torch.where(live, tokens, self.pad)
        out.logp[at] = torch.where(live, logps, 0.0)
        if routes is not None:
            out.routes[at] = routes

    def _routes(self, out, prompt_of, width, steps):
        """With experts: where the prompts' tokens went goes to out.routes. -> room for those of the
        answers, (T, R, MoE layers, K)."""
        routes = self.model.routes()                                             # (P, W, layers, K)
        if routes is None:
            return None
        out.routes = routes.new_zeros(*out.tokens.shape, *routes.shape[2:])
        out.routes[:, :width] = routes[prompt_of]
        return routes.new_zeros(steps, len(prompt_of), *routes.shape[2:])

    def _step(self, choose, cache, prompt_of, out, steps, temperature):
        """What decodes one token after another: a CUDA graph, or one operator after another."""
        if self.graphs is None or steps < 16:                    # recording takes a few steps' time
            ragged = bool((out.prompt_length != out.prompt_length[0]).any())
            lengths = out.prompt_length.clone() if ragged else None
            return EagerStep(self.model, choose, cache.rows(prompt_of, lengths, room=steps - 1))
        rows, width = out.tokens.shape                              # few widths, few recordings
        width = -(-width // (64 if width <= 256 else 256)) * (64 if width <= 256 else 256)
        key = rows, width, temperature, self.model.num
        if key not in self.graphs:
            while len(self.graphs) > 1:                            # each holds a KV cache: keep two
                del self.graphs[next(iter(self.graphs))]
            self.graphs[key] = GraphStep(self.model, choose, rows, width)
        return self.graphs[key].start(cache, prompt_of, out.prompt_length)


def pass_at_k(n, c, k):
    """Probability that at least one of k answers is right, estimated without bias from c right ones
    among n >= k tries: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021). Example: pass_at_k(4, 1, 2) ==
    0.5."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def solve(sampler, env, problems, n, seed, temperature=1.0, rows=ROWS, progress=None):
    """n answers to each problem, `rows` of them at a time -> how many of the n were right, a
    problem each. An answer that was cut off counts as wrong. env: data.env.Env."""
    right, per = [], max(1, rows // n)
    for i in range(0, len(problems), per):
        part = problems[i:i + per]
        out = sampler.generate([*map(env.tokens, part)], n, env.answer_length, temperature, seed, i)
        good = [r == 1.0 for r in env.rewards(part, out)]
        right += [sum(good[j:j + n]) for j in range(0, len(good), n)]
        if progress:
            progress(min(1.0, (i + per) / len(problems)))
    return right


# --------------------------------------------------------------------------------------------------
# Command line


def ask(a, sampler, tokenizer, prompt):
    """Print a.n answers to a prompt, ROWS at a time."""
    tokens, context = tokenizer.prompt(prompt, a.system), sampler.model.cfg.context
    if (room := context - len(tokens)) < 1:
        raise InputError(f"no room for an answer: {len(tokens)} prompt tokens, context {context}")
    gap, most = ("", room) if tokenizer is Bytes else ("\n", 512)
    new = a.max_new_tokens or min(room, most)
    for i in range(0, a.n, ROWS):
        out = sampler.generate([tokens], min(ROWS, a.n - i), new, a.temperature, a.seed, i)
        for r, text in enumerate(out.texts(tokenizer)):
            shown = prompt + gap + text + " [cut off]" * (not out.stopped[r])
            if a.json:
                span = slice(len(tokens), int(out.length[r]))
                drawn = dict(tokens=out.tokens[r, span].tolist(), logp=out.logp[r, span].tolist())
                shown = json.dumps(dict(prompt=prompt, text=text, **drawn))
            print(shown, flush=True)


def evaluate(a, sampler, tokenizer, run):
    """Unbiased pass@k: on fresh problems of a task that draws its own, else on those of --data."""
    name = a.task or run.get("task")
    if not name:
        raise InputError("--eval of what? --task NAME, and for real problems --data FILE")
    task = make_task(name, run.get("digits", 3), run.get("noise", 0.0))
    env = Env(task, tokenizer, a.max_new_tokens or run.get("max_answer", 0))
    n = a.n if a.n > 1 else 16
    if a.data or not task.draws or env.reads and task.loads:
        problems = task.load(a.data)
        problems = [problems[i] for i in stream(a.seed, 9).permutation(len(problems))[:a.problems]]
    else:
        problems = draw_problems(task, a.problems, stream(a.seed, 9))
    right = solve(sampler, env, problems, n, (a.seed, 10), temperature=a.temperature)
    ks = [2 ** i for i in range(9) if 2 ** i <= n]
    scores = {k: float(np.mean([pass_at_k(n, c, k) for c in right])) for k in ks}
    if a.json:
        about = dict(task=name, problems=len(problems), n=n)
        return print(json.dumps(about | {f"pass@{k}": v for k, v in scores.items()}))
    size = f" with {run['digits']} digits" if name in SCRATCH and "digits" in run else ""
    print(f"{name}{size}, {len(problems)} problems x {n} tries, temperature {a.temperature:g}: "
          + "  ".join(f"pass@{k} {v:.3f}" for k, v in scores.items()))


def parse(argv):
    p = Parser(prog="sample.py", description="Sample, or evaluate a model.", allow_abbrev=False)
    add = p.add_argument
    add("--model", help="a run's folder, a checkpoint file, or a Hugging Face checkpoint's folder")
    add("--prompt", action="append", default=[], help="what to answer; may be given several times")
    add("--n", type=ranged(int, 1, 65536), default=1,
        help="answers per prompt (with --eval: tries per problem, default 16)")
    add("--temperature", type=ranged(float, 0, 100), default=1.0,
        help="divides the logits; 0 takes the likeliest token")
    add("--max-new-tokens", type=ranged(int, 1, 10 ** 6),
        help="longest answer, stop token included (default: what the task or the context allows)")
    add("--precision", default="fp16", help="fp32, tf32, bf16, fp16 or eXmY")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--fast", action=argparse.BooleanOptionalAction, default=True, help="compiled code, graphs")
    add("--seed", type=ranged(int, 0, 2 ** 63 - 1), default=0, help="the same, the same answers")
    add("--json", action="store_true", help="one JSON object an answer: prompt, text, tokens, logp")
    add("--eval", action="store_true", help="unbiased pass@k on fresh problems, or on --data")
    add("--problems", type=ranged(int, 1, 10 ** 6), default=256, help="how many --eval takes")
    add("--task", help="for --eval: the task, if it is not the one that the model was trained on")
    add("--data", default="", help="for --eval: a JSON Lines file of problems")
    add("--system", default="", help="a system prompt, for models that know one")
    add("--save", metavar="DIR", help="write a folder for transformers, or an adapter for peft")
    add("--save-precision", default="fp32", choices=("fp32", "fp16", "bf16"), help="of --save")
    return p.parse_args(argv)


def main(argv=None):
    a = parse(argv)
    device = pick_device(a.device)
    num = numerics(a.precision, device, a.fast)
    if not a.model or not (a.prompt or a.eval or a.save):
        raise InputError("which model, and what to do? --model out/RUN, or a Hugging Face "
                         "checkpoint's folder; and --prompt TEXT, --eval or --save DIR")
    model, tokenizer, run = open_model(a.model, device)
    if a.save:
        if model.lora:
            weights.save_adapter(a.save, model, run.get("model", ""))
        else:
            weights.save(a.save, model, a.save_precision, like=run.get("model") or None)
        print(a.save)
    model.use(num.hold(model.parameters()))
    sampler = Sampler(model, tokenizer.stop, tokenizer.pad, a.fast)
    for prompt in a.prompt:
        ask(a, sampler, tokenizer, prompt)
    if a.eval:
        evaluate(a, sampler, tokenizer, run)


if __name__ == "__main__":
    run_main(main)
