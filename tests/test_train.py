"""Advantages, losses and the step, against worked numbers, finite differences and a plain autograd loss."""
import dataclasses
import math

import pytest
import torch
from conftest import tiny
from test_sample import PROMPTS, sampler_of

import train_rl
from algorithms import ALGORITHMS, policy_loss
from data import Problem, draw_problems, load_problems, make_task, stream
from data.env import Env
from precision import InputError, Numerics, make_scaler
from sample import Rollout
from train_rl import (
    Config,
    accumulate_gradient,
    apply_gradient,
    batch_of,
    collect_step,
    diagnose,
    first_bad_layer,
    learning_rate,
    parse_config,
    score,
)

# --- the schedule


def test_learning_rate_rises_then_falls_to_zero():
    cfg = Config(steps=10, lr=1.0, lr_warmup=2)
    assert [round(learning_rate(cfg, u), 6) for u in range(11)] == [
        0.333333,
        0.666667,
        0.8,
        0.7,
        0.6,
        0.5,
        0.4,
        0.3,
        0.2,
        0.1,
        0.0,
    ]
    constant = dataclasses.replace(cfg, lr_schedule="constant")
    assert learning_rate(constant, 9) == 1.0
    assert learning_rate(dataclasses.replace(cfg, updates_per_batch=4), 20) == 0.5          # of 40 updates


# --- the step

CFG = Config(micro_batch=7)


def case(fmt="fp32"):
    """A model, 16 answers of it on ragged prompts, and advantages of which two groups have none."""
    model, sampler = sampler_of(fmt=fmt)
    out = sampler.generate(PROMPTS, 4, 20, seed=3)
    assert 3 < out.stopped.sum() < 16
    a = torch.tensor([[1.0, -1, 0.5, -0.5], [0, 0, 0, 0], [0.3, 0.3, -0.3, -0.3], [0, 0, 0, 0]]).flatten()
    return model, out, a


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_micro_batches_and_skipped_groups_leave_the_gradient_alone(algo):
    """One loss over every token of every answer, written out plainly, against the trainer's micro-batches, which send
    answers without advantage forward only, and learn only with the last one how much the correction rejects."""
    model, out, a = case()
    out.logp += 0.5 * torch.randn(out.logp.shape, generator=torch.Generator().manual_seed(5)) * out.is_answer     # a mismatch
    cap = dict(correction_high=1.5) if "mis" in algo else {}
    cfg = dataclasses.replace(CFG, algo=algo, **{**ALGORITHMS[algo].settings, **cap})
    where, logp = out.is_answer, torch.zeros_like(out.logp)
    logp = logp.masked_scatter(where, model.token_logprobs(out.tokens, where)[0])
    old = out.logp if cfg.old_policy == "rollout" else None
    total, units, stats = policy_loss(ALGORITHMS[algo], cfg, logp, old, out.logp, a, where, 20)
    (total / units).backward()
    assert ("mis" in algo) == bool(stats["kept"] < stats["tokens"])
    want = gradients(model)
    for size in (1, 7, 64):
        model.zero_grad()
        got, logp_train, entropy, sums = accumulate_gradient(
            model, out, a, dataclasses.replace(cfg, micro_batch=size), make_scaler(model.num), 20)
        assert got == pytest.approx((total / units).item(), rel=1e-4, abs=1e-6)
        assert torch.allclose(logp_train[where], logp[where].detach(), atol=1e-5) and (logp_train[~where] == 0).all()
        assert (entropy[where] > 0).all() and sums == pytest.approx({k: float(v) for k, v in stats.items()}, rel=1e-4)
        for n, g in gradients(model).items():
            assert torch.allclose(g, want[n], atol=1e-6 + 1e-4 * float(want[n].abs().max())), n


def test_parts_of_a_batch_add_up():
    """The gradients of --updates-per-batch's parts, each over its own answers, average to that of the whole batch."""
    model, out, a = case()
    accumulate_gradient(model, out, a, CFG, make_scaler(model.num), 20)
    want = gradients(model)
    model.zero_grad()
    seen = torch.zeros_like(out.logp)
    for rows in torch.arange(16).chunk(4):
        _, logp, _, sums = accumulate_gradient(model, out, a, CFG, make_scaler(model.num), 20, rows)
        assert sums["tokens"] == out.is_answer[rows].sum() and (logp[[i for i in range(16) if i not in rows]] == 0).all()
        seen += logp
    for n, g in gradients(model).items():
        assert torch.allclose(g / 4, want[n], atol=1e-6 + 1e-4 * float(want[n].abs().max())), n
    assert torch.allclose(seen, score(model, out, CFG), atol=1e-6)


def test_the_recomputed_policy_is_the_training_forward():
    """score() before the first update gives, bit for bit, what training computes: the ratio is 1, and nothing is clipped."""
    for fmt in ("fp32", "fp16"):
        model, out, a = case(fmt)
        old = score(model, out, CFG)
        cfg = dataclasses.replace(CFG, old_policy="recomputed", clip_low=0.0, clip_high=0.0)
        _, logp, _, sums = accumulate_gradient(model, out, torch.ones(16), cfg, make_scaler(model.num), 20, logp_old=old)
        assert torch.equal(logp, old) and sums["clipped"] == 0
        by_itself = gradients(model)
        model.zero_grad()
        accumulate_gradient(model, out, torch.ones(16), cfg, make_scaler(model.num), 20)         # None: the same without the pass
        assert all(torch.equal(g, by_itself[n]) for n, g in gradients(model).items())


def test_an_update_of_which_nothing_is_kept_moves_nothing():
    """Not by Adam's momentum either: the gradients are none, not zero."""
    model, out, a = case()
    opt, scaler = torch.optim.AdamW(model.parameters(), fused=True), make_scaler(model.num)
    accumulate_gradient(model, out, a, CFG, scaler, 20)
    apply_gradient(model, opt, scaler, CFG, 1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    cfg = dataclasses.replace(CFG, algo="pg", correction="token-mis", correction_low=50.0, correction_high=60.0)
    loss, *_, sums = accumulate_gradient(model, out, a, cfg, scaler, 20)
    assert loss == 0 and sums["kept"] == 0 and apply_gradient(model, opt, scaler, cfg, 1e-3) == (0.0, False)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_a_penalty_pulls_towards_the_reference():
    """All advantages 0: only KL[pi || reference] acts. At the reference its gradient is 0; away from it a step lowers it."""
    model, out, a = case()
    cfg, nothing = dataclasses.replace(CFG, kl_beta=0.5), torch.zeros(16)
    ref = score(model, out, cfg)
    accumulate_gradient(model, out, nothing, cfg, make_scaler(model.num), 20, logp_ref=ref)
    assert max(float(g.abs().max()) for g in gradients(model).values()) < 1e-6
    with torch.no_grad():
        model.blocks[0].down += 0.02 * torch.randn(model.blocks[0].down.shape, generator=torch.Generator().manual_seed(1))
    model.num.refresh()
    far = []
    for _ in range(2):
        model.zero_grad()
        *_, sums = accumulate_gradient(model, out, nothing, cfg, make_scaler(model.num), 20, logp_ref=ref)
        far.append(sums["kl_ref"])
        with torch.no_grad():
            model.blocks[0].down -= 0.05 * model.blocks[0].down.grad / model.blocks[0].down.grad.norm()
        model.num.refresh()
    assert 0 < far[1] < far[0]


class Scripted:
    """A task whose rewards are known: `right[prompt]` of a group's answers are right."""
    answer_length = 3

    def __init__(self, right):
        self.right, self.asked = right, []

    def reward(self, problem, text):
        self.asked.append(problem.prompt)
        return float((self.asked.count(problem.prompt) - 1) % 4 < self.right[problem.prompt])


def test_dynamic_sampling_replaces_groups_that_agree():
    """Problems a (0 of 4 right), b (2), c (4), d (1), e (3), f (0), two a step: a batch of two with signal is looked for in at
    most three rollouts, in order, and what is thrown away still counts for the accuracy."""
    model, sampler = sampler_of(fmt="fp32")
    sampler.generate = lambda *args: fixed_rollout(len(args[0]) * args[1])
    problems = [Problem(x, "") for x in "abcdef"]
    cfg = Config(prompts=2, group=4, dynamic_sampling=3, seed=0)
    order = [problems[i].prompt for i in stream(0, 3, 0).permutation(6)]
    task = Scripted(dict(a=0, b=2, c=4, d=1, e=3, f=0))
    rollout, batch, rewards, seen, drawn = collect_step(sampler, Env(task), problems, 0, cfg, 1)
    signal = [p for p in order if task.right[p] not in (0, 4)]
    looked = next(n for n in (2, 4, 6) if len([p for p in order[:n] if p in signal]) >= 2 or n == 6)
    assert drawn == looked and len(seen) == looked and task.asked == [p for p in order[:looked] for _ in range(4)]
    assert [p.prompt for p in batch] == signal[:2] and (rewards.std(1) > 0).all() and len(rollout.length) == 8
    assert seen.mean().item() == pytest.approx(sum(task.right[p] for p in order[:looked]) / (4 * looked))
    one = collect_step(sampler, Env(Scripted(task.right)), problems, 0, dataclasses.replace(cfg, dynamic_sampling=1), 1)
    assert [p.prompt for p in one[1]] == order[:2] and one[4] == 2
    # too few with signal: what is missing is filled up with groups that agree, in the order in which they were drawn
    env = Env(Scripted(dict.fromkeys("abcdef", 4) | dict(a=1)))
    _, batch, rewards, _, drawn = collect_step(sampler, env, problems, 0, cfg, 1)
    assert drawn == 6 and {"a", order[0]} >= {p.prompt for p in batch} and sorted(r.std() > 0 for r in rewards) == [False, True]
    assert [p.prompt for p in batch] == sorted((p.prompt for p in batch), key=order.index)


def fixed_rollout(rows):
    length = torch.full((rows,), 3)
    return Rollout(torch.zeros(rows, 3, dtype=torch.int64), torch.zeros(rows, 3), length - 2, length, length > 0)


def test_padding_gets_no_gradient_and_the_stop_token_does():
    model, out, a = case()
    a = a.abs() + 0.1                                                     # every answer is pushed up
    accumulate_gradient(model, out, a, CFG, make_scaler(model.num), 20)
    want = gradients(model)
    model.zero_grad()
    padding = torch.arange(out.tokens.shape[1]) >= out.length[:, None]
    out.tokens = torch.where(padding, 13, out.tokens)                     # other tokens in the padding: nothing may change
    out.logp = torch.where(padding, -5.0, out.logp)
    accumulate_gradient(model, out, a, CFG, make_scaler(model.num), 20)
    for n, g in gradients(model).items():
        assert torch.equal(g, want[n]), n
    # gradient of the head's row of the stop token: one term 1 - p for each answer that stopped, -p elsewhere. If the stop token
    # were masked out, only the -p would be left and a small step up that gradient would lower its log-prob.
    stopped = torch.zeros_like(out.is_answer)
    stopped[torch.arange(16), out.length - 1] = out.stopped
    with torch.no_grad():
        before = model.token_logprobs(out.tokens, stopped)[0].sum()
        for n, p in model.named_parameters():
            p -= 1e-3 * want[n] / max(1e-9, float(sum(g.square().sum() for g in want.values()).sqrt()))
        model.num.refresh()
        assert model.token_logprobs(out.tokens, stopped)[0].sum() > before


def test_prompt_is_never_trained():
    """The loss must not depend on how likely the prompt's own tokens are: their log-probs are not among those scored."""
    model, out, a = case()
    _, logp_train, *_ = accumulate_gradient(model, out, a, CFG, make_scaler(model.num), 20)
    prompt = torch.arange(out.tokens.shape[1]) < out.prompt_length[:, None]
    assert (logp_train[prompt] == 0).all() and (out.logp[prompt] == 0).all()


def test_clipping_sees_unscaled_gradients():
    """With a loss scale of 2^16 the update must be that of scale 1: unscale, then clip, then step."""
    norms, weights = [], []
    for scale in (2.0 ** 4, 2.0 ** 14):
        model, out, a = case("fp16")
        opt = torch.optim.AdamW(model.parameters(), fused=True, weight_decay=0.0)
        scaler = make_scaler(model.num, scale)
        accumulate_gradient(model, out, a, CFG, scaler, 20)
        norm, skipped = apply_gradient(model, opt, scaler, dataclasses.replace(CFG, grad_clip=1e-3), 1e-3)
        assert not skipped
        norms.append(norm)
        weights.append(model.blocks[0].qkv.detach().clone())
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)
    assert (weights[0] - weights[1]).abs().mean() < 1e-4


def test_an_overflow_is_skipped_and_changes_no_weight():
    model, out, a = case("fp16")
    opt = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = make_scaler(model.num, 2.0 ** 30)
    before = [p.detach().clone() for p in model.parameters()]
    accumulate_gradient(model, out, a, CFG, scaler, 20)
    _, skipped = apply_gradient(model, opt, scaler, CFG, 1e-3)
    assert skipped and scaler.get_scale() == 2.0 ** 29
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


# --- what is said when something is off


def test_the_first_bad_layer_is_named():
    def where(model, out, a, scale=1.0):
        return first_bad_layer(model, out, a, CFG, make_scaler(model.num, scale), 20)
    model, out, a = case("fp16")
    with torch.no_grad():
        model.blocks[1].down *= 1e8
    model.num.refresh()
    assert "weights of blocks.1.down, rounded to fp16" in where(model, out, a)
    model, out, a = case("fp16")
    with torch.no_grad():                                                 # finite weights, whose product overflows
        model.blocks[1].gate_up *= 3e3
        model.blocks[1].down *= 3e3
    model.num.refresh()
    assert "forward pass of blocks.1.mlp" in where(model, out, a) and "6.55e+04" in where(model, out, a)
    model, out, a = case("fp16")
    assert "backward pass of head" in where(model, out, a, scale=2.0 ** 30)
    assert "the loss itself" in where(model, out, a * math.nan)
    assert "no layer" in where(model, out, a)
    assert model.num.spy is None and model.head.grad is None


def metrics(**kw):
    return {
        **dict(frac_zero_std=0.1, accuracy=0.5, skipped_steps=0, truncated=0.0, logp_gap_mean=1e-4, ratio_outliers=0.0),
        **kw,
    }


def test_diagnosis():
    def topics(history):
        return {t for t, _ in diagnose(history)}
    assert topics([metrics()] * 60) == set() and topics([metrics(frac_zero_std=1.0)]) == set()      # calm, or too early to tell
    assert topics([metrics(frac_zero_std=0.9)] * 5) == {"signal"}
    assert topics([metrics(skipped_steps=i) for i in range(5)]) == {"skips"}
    assert topics([metrics(truncated=0.5)] * 5) == {"truncated"}
    assert topics([metrics(ratio_outliers=0.2)] * 5) == {"outliers"}
    assert topics([metrics(logp_gap_mean=1e-3 * 1.1 ** i) for i in range(40)]) == {"mismatch"}
    assert "easier problems" in diagnose([metrics(frac_zero_std=0.9, accuracy=0.0)] * 5)[0][1]
    assert "nearly everything is solved" in diagnose([metrics(frac_zero_std=0.9, accuracy=0.99)] * 5)[0][1]


# --- data


def test_batches_are_epochs_in_a_fresh_order():
    problems = [Problem(str(i), "") for i in range(10)]
    cfg = Config(prompts=4, seed=1)
    drawn = [p.prompt for s in range(5) for p in batch_of(problems, 4 * s, cfg)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == sorted(p.prompt for p in problems) and drawn[:10] != drawn[10:]
    assert batch_of(problems, 12, cfg) == batch_of(problems, 12, cfg)     # a function of the place: a resume needs no more


def test_addition_worked_by_hand():
    task = make_task("addition", 3, 0.0)
    p = Problem("187+737=", "924")
    assert task.demonstrate(p, stream(0)) == "7+7+0=14;8+3+1=12;1+7+1=9;#924"
    assert task.reward(p, "7+7+0=14;8+3+1=12;1+7+1=9;#924") == 1.0 and task.reward(p, "#924") == 1.0
    for wrong in ("924", "#925", "#924 ", "#9240", "#", "", "##924", "#924#924"):
        assert task.reward(p, wrong) == 0.0


@pytest.mark.parametrize("name", ["addition", "reverse"])
@pytest.mark.parametrize("digits", [1, 3, 25])
def test_tasks_keep_their_promises(name, digits):
    """A demonstrator without noise is always right, one with noise as often as it says; lengths stay within bounds."""
    rng, clean, noisy = stream(0, digits), make_task(name, digits, 0.0), make_task(name, digits, 0.3)
    right = 0
    for _ in range(300):
        p = clean.problem(rng)
        text = clean.demonstrate(p, rng)
        assert clean.reward(p, text) == 1.0 and len(p.prompt) <= clean.prompt_length
        other = noisy.demonstrate(p, rng)
        assert len(other) < noisy.answer_length and len(text) < clean.answer_length
        right += noisy.reward(p, other)
    if digits == 1 and name == "addition":
        assert abs(right / 300 - 0.7) < 0.12                              # 4.5 standard deviations
    if digits == 25:
        assert right < 30


def test_held_out_problems_are_not_in_the_pool():
    task = make_task("addition", 1, 0.1)
    pool = draw_problems(task, 50, stream(0))
    held = draw_problems(task, 20, stream(1), {p.prompt for p in pool})
    assert not {p.prompt for p in pool} & {p.prompt for p in held} and len({p.prompt for p in pool}) == 50
    with pytest.raises(InputError, match="too few"):
        draw_problems(task, 100, stream(0))


def test_problem_files(tmp_path):
    f = tmp_path / "p.jsonl"
    f.write_text('{"prompt": "1+1=", "answer": "2"}\n\n{"prompt": "é=", "answer": "x", "more": 1}\n', encoding="utf-8")
    assert load_problems(f) == [Problem("1+1=", "2"), Problem("é=", "x")]
    for line, words in (
        ('{"prompt": "a"', "line 2: not JSON"),
        ('{"prompt": "a"}', 'line 2: no text under "answer"'),
        ("[1]", "line 2: no text"),
        ('{"prompt": "", "answer": "a"}', "line 2: the prompt is empty"),
        ('{"prompt": 3, "answer": "a"}', "line 2"),
    ):
        f.write_text('{"prompt": "1+1=", "answer": "2"}\n' + line + "\n")
        with pytest.raises(InputError, match=words):
            load_problems(f)
    for content, words in ((b"", "no problems"), (b"\xff\xfe", "UTF-8")):
        f.write_bytes(content)
        with pytest.raises(InputError, match=words):
            load_problems(f)
    with pytest.raises(InputError, match="cannot read"):
        load_problems(tmp_path / "none.jsonl")


# --- settings


def test_every_field_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    text = capsys.readouterr().out
    for f in dataclasses.fields(Config):
        assert "--" + f.name.replace("_", "-") in text and len(f.metadata["help"]) > 3
    cfg, given = parse_config(["--device", "cpu", "--precision", "e8m7", "--train-precision", "fp32"])
    assert (cfg.rollout_format, cfg.train_format, cfg.preset) == ("e8m7", "fp32", "cpu")
    assert set(given) == {"device", "precision", "train_precision"}
    assert parse_config(["--device", "cpu", "--preset", "gpu", "--digits", "9"])[0].width == 512
    assert set(train_rl.GPU) <= {f.name for f in dataclasses.fields(Config)} and train_rl.FREE <= {
        f.name for f in dataclasses.fields(Config)
    }


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--precision", "e0m3"], "makes no sense"),
        (["--keep-from", "0.9"], "no problem can be kept"),
        (["--n-heads", "3"], "multiple"),
        (["--n-kv-heads", "3"], "multiple"),
        (["--device", "cuda:9"], "not there"),
    ],
)
def test_settings_that_cannot_work(flags, words):
    with pytest.raises(InputError, match=words):
        parse_config(flags)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--stepz", "3"], "did you mean --steps"),
        (["--steps", "0"], "out of range"),
        (["--lr", "fast"], "not a number"),
        (["--steps", "1.5"], "not a whole number"),
        (["--lr", "nan"], "out of range"),
        (["--algo", "ppo"], "invalid choice"),
    ],
)
def test_bad_flags_are_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as e:
        parse_config(flags)
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count("\n") == 1


def test_rollout_and_train_formats_apart():
    """Two Numerics over one set of masters: switching formats switches the rounded weights and nothing else."""
    model = tiny()
    a, b = Numerics("fp16").hold(model.parameters()), Numerics("e8m3").hold(model.parameters())
    tokens = torch.randint(0, 67, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x, y = model.use(a)(tokens), model.use(b)(tokens)
        assert torch.equal(model.use(a)(tokens), x) and not torch.equal(x, y)
