"""What a model meets of a task: its problems as tokens, and its judgement of answers."""
import pathlib

from data import draw_problems, load_problems, make_task, stream
from data.guard import Guard
from precision import InputError
from sample import Bytes

POOL = 256              # problems, where a task draws its own without end and --pool 0 asks for all
ANSWER = 512            # tokens of an answer at most, where neither the task nor --max-answer says


class Env:
    """task: see data/__init__.py; tokenizer: sample.Bytes or an HFTokenizer; prompt_length, answer_length: tokens at most, the
    stop token included; system: a system prompt; seconds: what a reward may take before the answer counts 0."""

    def __init__(self, task, tokenizer=Bytes, prompt_length=0, answer_length=0, system="", seconds=5.0, say=print):
        self.task, self.tokenizer, self.system = task, tokenizer, system
        self.prompt_length = prompt_length or getattr(task, "prompt_length", 0)
        self.answer_length = answer_length or getattr(task, "answer_length", ANSWER)
        self.guard = Guard(task, seconds, say=say)

    def text(self, problem):
        """What the model is to read."""
        reads = hasattr(self.task, "load") or getattr(self.tokenizer, "form", "plain") != "plain"       # words, not only signs
        return self.task.prompt(problem.prompt) if reads and hasattr(self.task, "prompt") else problem.prompt

    def tokens(self, problem):
        return self.tokenizer.prompt(self.text(problem), self.system)

    def rewards(self, problems, rollout):
        """R answers, the same number to each problem -> R rewards. An answer that was cut off gets 0."""
        n, texts = len(rollout.length) // len(problems), rollout.texts(self.tokenizer)
        asked = [i for i, stopped in enumerate(rollout.stopped.tolist()) if stopped]
        given = dict(zip(asked, self.guard.rewards([(problems[i // n], texts[i]) for i in asked])))
        return [given.get(i, 0.0) for i in range(len(texts))]


def make_env(cfg, say=print):
    """The task and tokenizer of a run's settings."""
    task, tokenizer = make_task(cfg.task, cfg.digits, cfg.noise), Bytes
    if cfg.model:
        if not (pathlib.Path(cfg.model) / "config.json").exists():
            raise InputError(f"--model {cfg.model}: no checkpoint's folder is there (config.json, *.safetensors, tokenizer.json)")
        from hf.tokenizer import load_tokenizer
        tokenizer = load_tokenizer(cfg.model, cfg.prompt_form)
    elif not hasattr(task, "demonstrate"):
        raise InputError(f"--task {cfg.task} needs a model that can read: --model FOLDER, a checkpoint from the Hugging Face hub")
    return Env(task, tokenizer, 0, cfg.max_answer, cfg.system, cfg.reward_seconds, say)


def choose_problems(cfg, env, say=print):
    """-> (the pool to train on or to choose from, held-out problems), all that a run needs. Sets env.prompt_length for a model
    that reads, to the longest of them."""
    task, rng = env.task, stream(cfg.seed, 4)
    if hasattr(task, "load"):
        rows = task.load(cfg.data)
        rows = [rows[i] for i in rng.permutation(len(rows))]
        spare = cfg.heldout if not cfg.heldout_data else 0
        if spare >= len(rows):
            raise InputError(f"{cfg.data or cfg.task} has {len(rows)} problems, no more than --heldout {cfg.heldout} sets aside")
        heldout, rows = rows[:spare], rows[spare:]
        if cfg.heldout_data:
            heldout = task.load(cfg.heldout_data)
            heldout = [heldout[i] for i in stream(cfg.seed, 5).permutation(len(heldout))[:cfg.heldout]]
        pool = rows[:cfg.pool or None]
    else:
        pool = load_problems(cfg.data) if cfg.data else draw_problems(task, cfg.pool or POOL, rng)
        heldout = draw_problems(task, cfg.heldout, stream(cfg.seed, 5), {p.prompt for p in pool}) if cfg.heldout else []
    if env.tokenizer is Bytes:
        for p in pool:
            for text, room in ((p.prompt, env.prompt_length), (p.answer, env.answer_length - 1)):
                if len(Bytes.encode(text)) > room:
                    raise InputError(f"{text!r} does not fit: {cfg.task} with --digits {cfg.digits} has room for {room} tokens")
        return pool, heldout
    if cfg.max_prompt:
        short = [[p for p in part if len(env.tokens(p)) <= cfg.max_prompt] for part in (pool, heldout)]
        left_out = len(pool) + len(heldout) - len(short[0]) - len(short[1])
        if left_out:
            say(f"left out: {left_out} problems whose prompts are longer than --max-prompt {cfg.max_prompt} tokens")
        pool, heldout = short
        if not pool:
            raise InputError(f"no prompt is as short as --max-prompt {cfg.max_prompt} tokens")
    env.prompt_length = max(len(env.tokens(p)) for p in pool + heldout)
    return pool, heldout
