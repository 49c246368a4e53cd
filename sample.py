"""sample.py: the tokenizer, the KV-cached sampler, and a command line to talk to a model.

    python sample.py --model out/run1 --prompt "187+737="                 # answers of a trained model
    python sample.py --model out/run1 --prompt "187+737=" --n 4 --json    # for scripts: one JSON object an answer
    python sample.py --model out/run1 --eval                              # unbiased pass@k on fresh problems of its task
    python sample.py --model ./Qwen2.5-0.5B-Instruct --prompt "Why is the sky blue?"      # a checkpoint of the hub
    python sample.py --model out/run1 --save out/hf                       # a folder that transformers and others load
    python sample.py --bench                                              # speed over batch sizes, one JSON line last

The sampler prefills each prompt once, copies its cache to the n answers, and decodes all rows in one batch. It records the
log-prob of every token as it was sampled, from the very distribution it was sampled from: training compares with these
numbers and never with recomputed ones. Left out: top-k and top-p. Training would have to mirror them exactly.
"""
import argparse
import dataclasses
import json
import math
import pathlib
import sys
import time
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch

from data import TASKS, draw_problems, load_problems, make_task, stream
from fast import numerics
from model import GPT, GPTConfig, KVCache, load_checkpoint, load_model
from precision import InputError, nearest, pick_device

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer: every byte is a token. Built here, nothing is downloaded. Stop and pad are two tokens: where one id serves as
# both, a mask made by comparing ids takes the stop token for padding and the model never learns to stop.

STOP, PAD = 256, 257
TOKENIZER = tiktoken.Encoding("tenbit-bytes", pat_str=r"(?s:.+)", mergeable_ranks={bytes([i]): i for i in range(256)},
                              special_tokens={"<|stop|>": STOP, "<|pad|>": PAD})


def encode(text):
    """Text -> list of token ids. Text that spells a special token is text like any other."""
    return TOKENIZER.encode(text, disallowed_special=())


def decode(tokens):
    """Token ids -> text, without the stop token at the end; bytes that are no UTF-8 become U+FFFD."""
    tokens = list(tokens)
    return TOKENIZER.decode(tokens[:-1] if tokens and tokens[-1] == STOP else tokens)


class Bytes:
    """The tokenizer of models from scratch; hf.tokenizer.HFTokenizer is the same for the others. `prompt` is how a problem is put
    to the model: here as it is."""
    n_vocab, stop, pad = TOKENIZER.n_vocab, (STOP,), PAD
    encode, decode = staticmethod(encode), staticmethod(decode)

    @staticmethod
    def prompt(text, system=""):
        return encode(system + text)


# ---------------------------------------------------------------------------------------------------------------------
# Sampler


@dataclass
class Rollout:
    """R answers. Rows are right-padded sequences, prompt first: position = slot, in the cache and in training alike."""
    tokens: torch.Tensor       # (R, T) int64
    logp: torch.Tensor         # (R, T) FP32, log-prob of each answer token as it was sampled, 0 elsewhere
    prompt_length: torch.Tensor  # (R,) int64
    length: torch.Tensor       # (R,) int64, prompt and answer, stop token included
    stopped: torch.Tensor      # (R,) bool, False where the answer ran into max_new_tokens
    routes: torch.Tensor | None = None  # (R, T, MoE layers, K) int16: the experts that each token met; None without experts

    @property
    def is_answer(self):
        """(R, T) bool: the tokens that were sampled, stop token included. Prompt and padding are False."""
        at = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (at >= self.prompt_length[:, None]) & (at < self.length[:, None])

    def rows(self, index):
        """The answers `index` (int64 tensor) alone."""
        return Rollout(*(None if x is None else x[index] for x in (getattr(self, f.name) for f in dataclasses.fields(self))))

    @staticmethod
    def join(parts, pad):
        """Several batches of answers as one."""
        width = max(p.tokens.shape[1] for p in parts)

        def wide(x, value):
            return torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, width - x.shape[1]), value=value)
        return Rollout(torch.cat([wide(p.tokens, pad) for p in parts]), torch.cat([wide(p.logp, 0.0) for p in parts]),
                       *(torch.cat([getattr(p, k) for p in parts]) for k in ("prompt_length", "length", "stopped")),
                       None if parts[0].routes is None else torch.cat([wide(p.routes, 0) for p in parts]))

    def texts(self, tokenizer=Bytes):
        tokens, start, end = self.tokens.tolist(), self.prompt_length.tolist(), self.length.tolist()
        return [tokenizer.decode(t[s:e]) for t, s, e in zip(tokens, start, end)]


class EagerStep:
    """token (R,), u (R,) -> the next token of each row and its log-prob, one operator after another."""

    def __init__(self, model, choose, cache):
        self.model, self.choose, self.cache = model, choose, cache

    def keep(self, index):
        """Go on with these rows alone."""
        self.cache = self.cache.rows(index)

    def __call__(self, token, u):
        return self.choose(self.model(token[:, None], self.cache)[:, 0], u)


class Sampler:
    """Samples from `model` in the number format that the model uses at the time (model.use). stop: the token that ends an answer,
    or a tuple of such; fast: CUDA graphs on a GPU (not for experts, whose shapes depend on where tokens go)."""

    def __init__(self, model, stop=STOP, pad=PAD, fast=True):
        self.model, self.stop, self.pad = model, stop if isinstance(stop, tuple) else (stop,), pad
        self.graphs = {} if fast and model.embedding.is_cuda and not model.cfg.n_experts else None

    def ends(self, tokens):
        """Which tokens end an answer: bool, of the same shape."""
        found = tokens == self.stop[0]
        for stop in self.stop[1:]:
            found |= tokens == stop
        return found

    def generate(self, prompts, n=1, max_new_tokens=32, temperature=1.0, seed=0):
        """n answers to each prompt -> Rollout of len(prompts) * n rows, a prompt's answers next to each other.

        prompts: lists of token ids, of any lengths; temperature 0 takes the likeliest token and records its log-prob under
        temperature 1; seed: an int or a tuple of ints. The same seed gives the same answers on the same machine."""
        cfg, device = self.model.cfg, self.model.embedding.device
        lengths = [len(p) for p in prompts]
        if min(lengths, default=0) == 0:
            raise InputError("an empty prompt: the model needs at least one token to start from")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}, it must be at least 1")
        if max(lengths) + max_new_tokens > cfg.context:
            raise InputError(f"a prompt of {max(lengths)} tokens and {max_new_tokens} new ones do not fit the model's context "
                             f"of {cfg.context} tokens")
        rows, width = len(prompts) * n, max(lengths) + max_new_tokens
        padded = np.full((len(prompts), max(lengths)), self.pad)
        for row, p in zip(padded, prompts):
            row[:len(p)] = p
        padded = torch.from_numpy(padded).to(device)
        start = torch.tensor(lengths, device=device).repeat_interleave(n)
        noise = torch.from_numpy(
            stream(*(seed if isinstance(seed, tuple) else (seed,))).random((max_new_tokens, rows), np.float32)
        )
        out = Rollout(torch.full((rows, width), self.pad, device=device), torch.zeros(rows, width, device=device), start,
                      start.clone(), torch.zeros(rows, dtype=torch.bool, device=device))
        out.tokens[:, :max(lengths)] = padded.repeat_interleave(n, 0)
        self._decode(out, padded, n, noise.to(device), temperature)
        return out

    @torch.inference_mode()
    def _decode(self, out, padded, n, noise, temperature):
        model, device = self.model, padded.device

        def choose(hidden, u):
            """hidden (R, C) -> a token drawn from the policy, and its log-prob under this very distribution."""
            logits = model.logits(hidden)                                                    # (R, V)
            if temperature == 0:
                return model.num.likeliest(logits)
            return model.num.draw(logits, u, temperature)

        cache = KVCache(model.cfg, *padded.shape, model.num)
        hidden = model(padded, cache)                                                        # each prompt once
        row = torch.arange(len(out.tokens), device=device)                                   # which answers are in the batch
        routes = model.routes()                                                              # (P, W, layers, K), with experts
        if routes is not None:
            out.routes = routes.new_zeros(*out.tokens.shape, *routes.shape[2:])
            out.routes[:, :padded.shape[1]] = routes[row // n]
            routes = routes.new_zeros(len(noise), len(row), *routes.shape[2:])
        hidden = hidden[row // n, out.prompt_length - 1]                                      # (R, C)
        if self.graphs is not None and len(noise) >= 16:                                     # recording takes a few steps' time
            step = self._graph(choose, out.tokens.shape, temperature).start(cache, row // n, out.prompt_length)
        else:
            ragged = bool((out.prompt_length != out.prompt_length[0]).any())
            step = EagerStep(
                model, choose, cache.rows(row // n, out.prompt_length.clone() if ragged else None, room=len(noise) - 1)
            )
        del cache
        tokens = torch.full((len(noise), len(row)), self.pad, device=device)                 # (T, R): a step a row
        logps = torch.zeros(tokens.shape, device=device)
        done, everyone = torch.zeros(len(row), dtype=torch.bool, device=device), row
        token, logp = choose(hidden, noise[0])
        for t in range(len(noise)):
            here = t if row is everyone else (t, row)
            tokens[here], logps[here] = token, logp
            done |= self.ends(token)
            if t + 1 == len(noise):
                break
            if device.type == "cpu" or t % 16 == 15:                                         # on a GPU, looking means waiting
                alive = len(done) - int(done.sum())
                if alive == 0:
                    break
                if alive <= len(row) // 2:                                                   # drop finished rows
                    index = torch.argsort(done, stable=True)[:alive if self.graphs is None else len(row) // 2]
                    # with graphs by halves, since each number of rows needs one of its own
                    row, token, done = row[index], token[index], done[index]
                    step.keep(index)
            here = t if row is everyone else (t, row)
            token, logp = step(token, noise[t + 1] if row is everyone else noise[t + 1][row])
            if routes is not None:
                routes[here] = model.routes()[:, 0]

        # a row that had finished went on being sampled until it was dropped: what stands behind its stop token is no answer
        is_stop = self.ends(tokens)
        live = is_stop.cumsum(0) - is_stop.long() == 0                                       # up to the first stop token
        out.stopped |= is_stop.any(0)
        out.length += torch.where(out.stopped, live.sum(0), len(noise))
        at = (everyone[None].expand_as(tokens), out.prompt_length + torch.arange(len(noise), device=device)[:, None])
        out.tokens[at], out.logp[at] = torch.where(live, tokens, self.pad), torch.where(live, logps, 0.0)
        if routes is not None:
            out.routes[at] = routes

    def _graph(self, choose, shape, temperature):
        from fast.graph import GraphStep
        rows, width = shape                                              # prompts differ in length: few widths, few recordings
        width = -(-width // (64 if width <= 256 else 256)) * (64 if width <= 256 else 256)
        key = rows, width, temperature, self.model.num
        if key not in self.graphs:
            while len(self.graphs) > 1:                                                      # each holds a KV cache: keep two
                del self.graphs[next(iter(self.graphs))]
            self.graphs[key] = GraphStep(self.model, choose, rows, width)
        return self.graphs[key]


def pass_at_k(n, c, k):
    """Probability that at least one of k answers is right, estimated without bias from c right ones among n >= k tries:
    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, section 2.1). Example: pass_at_k(4, 1, 2) == 0.5."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def solve(sampler, env, problems, n, seed, max_new_tokens=None, temperature=1.0, rows=512, progress=None):
    """n answers to each problem, `rows` of them at a time -> list of how many of the n were right, a problem each.
    An answer that was cut off counts as wrong. env: data.env.Env."""
    right, per = [], max(1, rows // n)
    for i in range(0, len(problems), per):
        part = problems[i:i + per]
        out = sampler.generate([env.tokens(p) for p in part], n, max_new_tokens or env.answer_length, temperature, (*seed, i))
        good = [r == 1.0 for r in env.rewards(part, out)]
        right += [sum(good[j:j + n]) for j in range(0, len(good), n)]
        if progress:
            progress(min(1.0, (i + per) / len(problems)))
    return right


# ---------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the nearest flag for an unknown one."""

    def parse_args(self, args=None, namespace=None):
        ns, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [s for a in self._actions for s in a.option_strings if s.startswith("--")]
            self.error(f"unknown argument {unknown[0]}{nearest(unknown[0].split('=')[0], known)}")
        return ns

    def error(self, message):
        print(f"{self.prog}: {message} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


def number(kind, low, high, text):
    """A number of this kind between low and high from a flag's text; for argparse's `type`."""
    try:
        x = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number' if kind is int else 'a number'}") from None
    if not low <= x <= high:
        raise argparse.ArgumentTypeError(f"{text} is out of range, {low} to {high}")
    return x


def ranged(kind, low, high):
    return lambda text: number(kind, low, high, text)


def peak_memory(device):
    """Peak memory of this process on the device, MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:                                                # getrusage would count what the parent had when it started this process
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 2 ** 10
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:                                                                      # not on Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def bench(model, device, prompt_length, new_tokens, sizes=(1, 4, 16, 64, 256, 1024)):
    """Prefill and decode speed over batch sizes. No row stops early, so that every size does the same work a row."""
    sampler, rows_of = Sampler(model, stop=-1), []
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def timed(prompts, new):
        times = []
        for _ in range(6):
            sync()
            begin = time.perf_counter()
            sampler.generate(prompts, max_new_tokens=new)
            sync()
            times.append(time.perf_counter() - begin)
        return float(np.median(times[1:]))                                                   # the first one warms up
    print(f"{'rows':>5} {'prefill ms':>11} {'ms/step':>8} {'tokens/s':>9} {'peak MiB':>9}   median of 5")
    for rows in sizes:
        prompts = np.random.default_rng(0).integers(0, 256, (rows, prompt_length)).tolist()

        first, full = timed(prompts, 1), timed(prompts, new_tokens)
        ms = 1e3 * (full - first) / (new_tokens - 1)
        row = dict(
            rows=rows,
            prefill_ms=round(1e3 * first, 2),
            ms_per_step=round(ms, 3),
            tokens_per_s=round(rows * new_tokens / full),
            peak_mib=round(peak_memory(device)),
        )
        rows_of.append(row)
        print(f"{rows:5} {row['prefill_ms']:11.2f} {ms:8.3f} {row['tokens_per_s']:9} {row['peak_mib']:9}", flush=True)
    print(
        json.dumps(
            dict(
                bench="sample",
                device=str(device),
                format=model.num.fmt.name,
                params=model.n_params(),
                torch=torch.__version__,
                threads=torch.get_num_threads(),
                prompt_length=prompt_length,
                new_tokens=new_tokens,
                sizes=rows_of,
            )
        )
    )


def open_model(path, device):
    """-> (model, its tokenizer, the settings of the run that made it). path: a run's folder, a checkpoint file, or the folder of
    a Hugging Face checkpoint."""
    path = pathlib.Path(path)
    if (path / "config.json").exists() and not (path / "checkpoint.pt").exists():
        from hf import tokenizer, weights
        return weights.load(path, device), tokenizer.load_tokenizer(path), dict(model=str(path))
    state = load_checkpoint(path, device)
    run, base, tokenizer = state.get("config", {}), None, Bytes
    if run.get("model"):
        from hf import tokenizer as tokenizers
        from hf import weights
        tokenizer = tokenizers.load_tokenizer(run["model"], run["prompt_form"])
        if state["lora"]:
            if weights.fingerprint(run["model"]) != state["base"]:
                raise InputError(f"{run['model']} is not the model that {path} was trained upon")
            base = weights.load(run["model"], device, state["gpt"]["context"])
    return load_model(state, device, base=base), tokenizer, run


def evaluate(a, sampler, tokenizer, run):
    """Unbiased pass@k: on fresh problems of a task that makes its own, else on those of --data."""
    from data.env import Env
    name = a.task or run.get("task")
    if not name:
        raise InputError("--eval of what? --task NAME, and for a task with real problems --data FILE")
    task = make_task(name, run.get("digits", 3), run.get("noise", 0.0))
    env = Env(task, tokenizer, 0, a.max_new_tokens or run.get("max_answer", 0), a.system or run.get("system", ""))
    n = a.n if a.n > 1 else 16
    if hasattr(task, "load"):
        problems = task.load(a.data or run.get("heldout_data") or run.get("data"))
        problems = [problems[i] for i in stream(a.seed, 9).permutation(len(problems))[:a.problems]]
    else:
        problems = load_problems(a.data) if a.data else draw_problems(task, a.problems, stream(a.seed, 9))
    right = solve(sampler, env, problems, n, (a.seed, 10), temperature=a.temperature)
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= n]
    scores = {k: float(np.mean([pass_at_k(n, c, k) for c in right])) for k in ks}
    if a.json:
        print(json.dumps({"task": name, "problems": len(problems), "n": n, **{f"pass@{k}": v for k, v in scores.items()}}))
    else:
        size = f" with {run['digits']} digits" if name in TASKS and "digits" in run else ""
        print(f"{name}{size}, {len(problems)} problems x {n} tries, temperature {a.temperature:g}: "
              + "  ".join(f"pass@{k} {v:.3f}" for k, v in scores.items()))


def main(argv=None):
    p = Parser(prog="sample.py", description="Sample from a model, evaluate it, or time the sampler.", allow_abbrev=False)
    p.add_argument("--model", help="a run's folder, a checkpoint file, or the folder of a Hugging Face checkpoint")
    p.add_argument("--prompt", action="append", default=[], help="what to answer; may be given several times")
    p.add_argument(
        "--n", type=ranged(int, 1, 65536), default=1, help="answers per prompt (with --eval: tries per problem, default 16)"
    )
    p.add_argument(
        "--temperature", type=ranged(float, 0, 100), default=1.0, help="divides the logits; 0 takes the likeliest token"
    )
    p.add_argument(
        "--max-new-tokens",
        type=ranged(int, 1, 10**6),
        help="longest answer, stop token included (default: what the task or the context allows)",
    )
    p.add_argument("--precision", default="fp16", help="fp32, tf32, bf16, fp16 or eXmY")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--fast", action=argparse.BooleanOptionalAction, default=True, help="compiled operators, CUDA graphs")
    p.add_argument("--seed", type=ranged(int, 0, 2 ** 63 - 1), default=0, help="the same seed gives the same answers")
    p.add_argument("--json", action="store_true", help="one JSON object an answer: prompt, text, tokens, logp")
    p.add_argument("--eval", action="store_true", help="unbiased pass@k on fresh problems of the model's task, or on --data")
    p.add_argument("--problems", type=ranged(int, 1, 10 ** 6), default=256, help="how many problems --eval takes")
    p.add_argument("--bench", action="store_true", help="time the sampler over batch sizes (random weights without --model)")
    p.add_argument("--task", help="for --eval: the task, if it is not the one that the model was trained on")
    p.add_argument("--data", help="for --eval: a JSON Lines file of problems")
    p.add_argument("--system", default="", help="a system prompt, for models that know one")
    p.add_argument("--save", metavar="DIR", help="write the model as a folder that transformers loads, or its adapter for peft")
    p.add_argument("--save-precision", default="fp32", choices=("fp32", "fp16", "bf16"), help="how --save stores the weights")
    a = p.parse_args(argv)
    device = pick_device(a.device)
    num = numerics(a.precision, device, a.fast)
    if not (a.prompt or a.eval or a.bench or a.save):
        raise InputError("nothing to do: give --prompt TEXT, --eval, --save DIR or --bench")
    if a.model:
        model, tokenizer, run = open_model(a.model, device)
    elif a.bench:
        model, tokenizer, run = GPT(GPTConfig(vocab_size=TOKENIZER.n_vocab), device), Bytes, {}
    else:
        raise InputError("which model? --model out/RUN, the folder of a run of train_rl.py, or one of a Hugging Face checkpoint")
    if a.save:
        from hf import weights
        if model.lora:
            weights.save_adapter(a.save, model, run.get("model", ""), model.lora["alpha"])
        else:
            weights.save(a.save, model, a.save_precision, like=run.get("model") or None)
        print(a.save)
    model.use(num.hold(model.parameters()))
    sampler = Sampler(model, tokenizer.stop, tokenizer.pad, a.fast)

    for prompt in a.prompt:
        tokens = tokenizer.prompt(prompt, a.system)
        room = model.cfg.context - len(tokens)
        if room < 1:
            raise InputError(
                f"the prompt has {len(tokens)} tokens, the model's context is {model.cfg.context}: no room for an answer"
            )
        new = a.max_new_tokens or (room if tokenizer is Bytes else min(room, 512))
        out = sampler.generate([tokens], a.n, new, a.temperature, a.seed)
        for r, text in enumerate(out.texts(tokenizer)):
            span = slice(len(tokens), int(out.length[r]))
            if a.json:
                print(
                    json.dumps(
                        dict(prompt=prompt, text=text, tokens=out.tokens[r, span].tolist(), logp=out.logp[r, span].tolist())
                    )
                )
            else:
                print(f"{prompt}{'' if tokenizer is Bytes else chr(10)}{text}{'' if out.stopped[r] else ' [cut off]'}")
    if a.eval:
        evaluate(a, sampler, tokenizer, run)
    if a.bench:
        context = model.cfg.context
        bench(model, device, context // 4, context - context // 4)


def run_main(main):
    """Run a command: what the user got wrong is one line and exit status 1, without a stack trace."""
    try:
        sys.exit(main())
    except InputError as e:
        print(f"{sys.argv[0].rsplit('/', 1)[-1]}: {e}", file=sys.stderr)
        sys.exit(1)
    except torch.OutOfMemoryError as e:
        print(f"{sys.argv[0].rsplit('/', 1)[-1]}: the GPU is out of memory; lower --micro-batch (training), --rollout-rows or "
              f"--prompts (sampling), or the model. {str(e).splitlines()[0]}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:                                                                  # `sample.py ... | head`
        sys.stderr.close()
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
