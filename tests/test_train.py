"""Advantages, losses and the step, against worked numbers, finite differences and a plain autograd loss."""
import dataclasses
import math

import pytest
import torch
from conftest import tiny
from test_sample import PROMPTS, sampler_of

import train_rl
from data import Problem, draw_problems, load_problems, make_task, stream
from precision import InputError, Numerics, make_scaler
from train_rl import (
    Config,
    accumulate_gradient,
    advantages,
    apply_gradient,
    batch_of,
    diagnose,
    first_bad_layer,
    learning_rate,
    parse_config,
    policy_loss,
    token_weights,
)

# --- advantages and losses


def test_advantages_worked_by_hand():
    r = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    assert torch.allclose(
        advantages(r, "dr-grpo"), torch.tensor([[0.5, 0.5, -0.5, -0.5], [0, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]])
    )
    s = math.sqrt(3) / 4                                                        # population std of 1, 0, 0, 0
    want = torch.tensor([[1, 1, -1, -1], [0, 0, 0, 0], [0.75 / s, -0.25 / s, -0.25 / s, -0.25 / s]])
    assert torch.allclose(advantages(r, "grpo"), want, atol=1e-5)
    assert torch.allclose(advantages(r, "reinforce"), r - 7 / 12)


@pytest.mark.parametrize(
    "ratio, a, want", [(1.0, 2.0, -2.0), (1.5, 1.0, -1.2), (0.5, 1.0, -0.5), (0.5, -1.0, 0.8), (1.5, -1.0, 1.5)]
)
def test_clipped_loss_worked_by_hand(ratio, a, want):
    """Clip 0.2: a gain is capped at ratio 1.2, a loss never; and the other way round below 0.8."""
    logp = torch.tensor([math.log(ratio) - 3.0])
    assert policy_loss(logp, torch.tensor([-3.0]), torch.tensor([a]), "dr-grpo", 0.2, 0.2).item() == pytest.approx(
        want, rel=1e-5
    )


@pytest.mark.parametrize("algo", ["dr-grpo", "grpo", "reinforce"])
def test_loss_gradient_by_finite_differences(algo):
    g = torch.Generator().manual_seed(0)
    mu, a = -torch.rand(30, generator=g).double() - 0.1, torch.randn(30, generator=g).double()
    pi = (mu + 0.5 * torch.randn(30, generator=g)).requires_grad_()
    loss = policy_loss(pi, mu, a, algo, 0.2, 0.3).sum()
    loss.backward()
    for i in range(30):
        hi, lo = pi.detach().clone(), pi.detach().clone()
        hi[i] += 1e-6
        lo[i] -= 1e-6
        slope = (policy_loss(hi, mu, a, algo, 0.2, 0.3).sum() - policy_loss(lo, mu, a, algo, 0.2, 0.3).sum()) / 2e-6
        assert pi.grad[i] == pytest.approx(slope.item(), abs=1e-5)


def test_token_weights():
    n = torch.tensor([2, 5])
    assert token_weights(n, "dr-grpo", 10).tolist() == pytest.approx([0.05, 0.05])    # 1 / (10 tokens * 2 answers)
    assert token_weights(n, "grpo", 10).tolist() == pytest.approx([0.25, 0.1])        # each answer weighs 1/2 in all


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


@pytest.mark.parametrize("algo", ["dr-grpo", "grpo", "reinforce"])
def test_micro_batches_and_skipped_groups_leave_the_gradient_alone(algo):
    """One loss over every token of every answer, written out plainly, against the trainer's micro-batches, which send
    answers without advantage forward only."""
    model, out, a = case()
    where = out.is_answer
    logp, _ = model.token_logprobs(out.tokens, where)
    row = torch.arange(16)[:, None].expand_as(where)[where]
    weight = token_weights(out.length - out.prompt_length, algo, 20)
    loss = (policy_loss(logp, out.logp[where], a[row], algo, 0.2, 0.2) * weight[row]).sum()
    loss.backward()
    want = gradients(model)
    for size in (1, 7, 64):
        model.zero_grad()
        cfg = dataclasses.replace(CFG, micro_batch=size, algo=algo)
        total, logp_train, entropy = accumulate_gradient(model, out, a, cfg, make_scaler(model.num), 20)
        assert total == pytest.approx(loss.item(), abs=1e-6)
        assert (
            torch.allclose(logp_train[where], logp.detach(), atol=1e-5) and (logp_train[~where] == 0).all()
        )  # all rows measured
        assert (entropy[where] > 0).all()
        for n, g in gradients(model).items():
            assert torch.allclose(g, want[n], atol=1e-6 + 1e-4 * float(want[n].abs().max())), n


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
    _, logp_train, _ = accumulate_gradient(model, out, a, CFG, make_scaler(model.num), 20)
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
    drawn = [p.prompt for s in range(5) for p in batch_of(problems, s, cfg)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == sorted(p.prompt for p in problems) and drawn[:10] != drawn[10:]
    assert batch_of(problems, 3, cfg) == batch_of(problems, 3, cfg)       # a function of the step: nothing to save for a resume


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
