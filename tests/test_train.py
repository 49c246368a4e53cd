"""Advantages, losses and the step, against worked numbers, finite differences and a plain autograd loss."""
import dataclasses
import math

import pytest
import torch
from conftest import tiny
from test_sample import PROMPTS, sampler_of

import operators.code
import train_rl
from algorithms import ALGORITHMS, Tokens, batch_baseline, policy_loss
from data import Problem, Task, draw_problems, load_problems, stream
from data.env import Env
from data.tasks import make_task
from data.tokenizer import PAD, STOP, decode
from precision import InputError, Numerics, make_scaler
from run import checks
from run.base import demonstrations, find_base, gpt_config, load_task
from run.checks import first_bad_layer
from run.flags import PAPER
from run.folder import State
from run.lines import all_of, diagnose, step_line
from run.meter import Meter
from run.problems import choose_problems, perfectible, problems_of_step
from sample import Rollout, Sampler, solve
from train_rl import Batch, Config, act, agree, learn, learning_rate, parse_config, score, update

# --- the schedule


def test_learning_rate_rises_then_falls_to_zero(monkeypatch):
    monkeypatch.setattr(train_rl, "WARMUP", 2)
    cfg = Config(steps=10, lr=1.0)
    rates = [round(learning_rate(cfg, u), 6) for u in range(11)]
    assert rates == [0.333333, 0.666667, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    constant = dataclasses.replace(cfg, lr_schedule="constant")
    assert learning_rate(constant, 9) == 1.0 and learning_rate(constant, 0) == pytest.approx(1 / 3)
    assert learning_rate(dataclasses.replace(cfg, updates_per_batch=4), 20) == 0.5          # of 40 updates
    assert learning_rate(dataclasses.replace(constant, model="a checkpoint"), 0) == 1.0     # no rise


# --- the step

CFG = Config(micro_batch=7)
ROOM = 20


def case(fmt="fp32"):
    """A model, a batch of 16 answers of it on ragged prompts, and advantages of which two groups have none."""
    model, sampler = sampler_of(fmt=fmt)
    out = sampler.generate(PROMPTS, 4, ROOM, seed=3)
    assert 3 < out.stopped.sum() < 16
    a = torch.tensor([[1.0, -1, 0.5, -0.5], [0, 0, 0, 0], [0.3, 0.3, -0.3, -0.3], [0, 0, 0, 0]]).flatten()
    return model, Batch(out, advantage=a)


def spoil(out, size=0.5, each=0.0):
    """A mismatch: as if the answers had come from another policy. each: of whole answers."""
    g = torch.Generator().manual_seed(5)
    noise = size * torch.randn(out.logp.shape, generator=g) + each * torch.randn(len(out.logp), 1, generator=g)
    out.logp = out.logp + noise * out.is_answer


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def close(got, want):
    for n, g in got.items():
        assert torch.allclose(g, want[n], atol=1e-6 + 1e-4 * float(want[n].abs().max())), n


def learned(model, batch, cfg, scaler=None, rows=None):
    """One pass of the trainer -> its loss, its Meter."""
    meter = Meter(batch)
    return learn(model, batch, cfg, scaler or make_scaler(model.num), ROOM, meter, rows), meter


@pytest.mark.parametrize("algo", [*ALGORITHMS, *PAPER])
def test_micro_batches_and_skipped_groups_leave_the_gradient_alone(algo):
    """One loss over every token of every answer, written out plainly, against the trainer's micro-batches, which send
    answers without advantage forward only, and divide by what the correction keeps."""
    model, batch = case()
    out = batch.rollout
    spoil(out)
    named = PAPER.get(algo, dict(algo=algo))
    cap = dict(correction="seq-mis:1.5") if "mis" in algo else {}
    cfg = dataclasses.replace(CFG, **{**ALGORITHMS[named["algo"]].settings, **named, **cap})
    where, (flat, entropy) = out.is_answer, model.token_logprobs(out.tokens, out.is_answer)
    logp = torch.zeros_like(out.logp).masked_scatter(where, flat)
    entropy = torch.zeros_like(out.logp).masked_scatter(where, entropy)
    old = out.logp if cfg.old_policy == "rollout" else None
    t = Tokens(where, logp, entropy, out.logp, old, batch.advantage, None, cfg.clip, ROOM)
    total, stats = policy_loss(cfg, t)
    kept = where
    if "mis" in algo:
        kept = where & (((logp.detach() - out.logp) * where).sum(1, keepdim=True).exp() <= 1.5)
    loss = total / ALGORITHMS[cfg.algo].average(kept, ROOM)[1].sum()
    loss.backward()
    assert ("mis" in algo) == bool(stats["kept"] < stats["tokens"]) and stats["kept"] == kept.sum()
    want = gradients(model)
    for size in (1, 7, 64):
        model.zero_grad()
        got, meter = learned(model, batch, dataclasses.replace(cfg, micro_batch=size))
        assert got == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
        assert torch.allclose(meter.logp[where], logp[where].detach(), atol=1e-5) and (meter.logp[~where] == 0).all()
        assert torch.allclose(meter.entropy, entropy.detach(), atol=1e-4) and (meter.entropy[where] > 0).all()
        sums = {k: float(v) for k, v in meter.sums.items()}
        assert sums == pytest.approx({k: float(v) for k, v in stats.items()}, rel=1e-4)
        close(gradients(model), want)


def plain(algo, A, logp, old):
    ratio = (logp - old).exp()
    return -A * logp if algo == "pg" else -torch.minimum(A * ratio, A * ratio.clamp(0.8, 1.2))


@pytest.mark.parametrize("algo, given", [("pg", False), ("dr-grpo", False), ("dr-grpo", True), ("dapo", True)],
                         ids=["pg", "dr-grpo at its first update", "dr-grpo at a later one", "dapo at a later one"])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_what_is_rejected_is_known_before_the_backward_pass(algo, given, size, monkeypatch):
    """Token-mis: the gradients are those of a loss over the tokens whose pi/mu (or pi_old/mu) lies within 0.5 and 5,
    divided by the answers of which a token is kept (dapo: by the tokens), however small the micro-batches. They are so
    as soon as the last backward pass is over: nothing is put right afterwards."""
    model, batch = case()
    out, where, A = batch.rollout, batch.rollout.is_answer, batch.advantage[:, None]
    spoil(out, each=3.0)
    cfg = dataclasses.replace(CFG, algo=algo, correction="token-mis", old_policy="recomputed", micro_batch=size)
    logp = torch.zeros_like(out.logp).masked_scatter(where, model.token_logprobs(out.tokens, where)[0])
    old = logp.detach()
    if given:                                                       # pi has moved since
        old = old + (0.3 + 0.2 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1))) * where
        batch.logp_old = old
    rho = ((old if given else logp.detach()) - out.logp).exp()
    kept, by_pi = (where & (x >= 0.5) & (x <= 5.0) for x in (rho, (logp.detach() - out.logp).exp()))
    answers = int(kept.any(1).sum())
    assert given == (kept.sum() != by_pi.sum())
    assert 0 < answers < 16 and kept.sum() < where[kept.any(1)].sum()       # whole answers and parts of answers go
    loss = (rho * plain(algo, A, logp, old))[kept].sum() / (kept.sum() if algo == "dapo" else ROOM * answers)
    loss.backward()
    want = gradients(model)
    model.zero_grad(set_to_none=True)

    recorded, backward = [], torch.Tensor.backward

    def record(self, *args, **kw):
        backward(self, *args, **kw)
        recorded.append(gradients(model))
    monkeypatch.setattr(torch.Tensor, "backward", record)
    got, meter = learned(model, batch, cfg)
    assert got == pytest.approx(loss.item(), rel=1e-4) and float(meter.sums["kept"]) == kept.sum()
    assert len(recorded) == math.ceil(8 / size), "a backward pass for each micro-batch of the 8 answers with advantage"
    close(gradients(model), want)
    assert all(torch.equal(g, recorded[-1][n]) for n, g in gradients(model).items())


def test_parts_of_a_batch_add_up():
    """The gradients of --updates-per-batch's parts, each over its own answers, average to that of the whole batch."""
    model, batch = case()
    learned(model, batch, CFG)
    want = gradients(model)
    model.zero_grad()
    seen, together = torch.zeros_like(batch.rollout.logp), Meter(batch)
    for rows in torch.arange(16).chunk(4):
        _, meter = learned(model, batch, CFG, rows=rows)
        others = [i for i in range(16) if i not in rows]
        assert meter.sums["tokens"] == batch.rollout.is_answer[rows].sum() and (meter.logp[others] == 0).all()
        seen += meter.logp
    close({n: g / 4 for n, g in gradients(model).items()}, want)
    assert torch.allclose(seen, score(model, batch, CFG), atol=1e-6)
    for rows in torch.arange(16).chunk(4):                                              # one Meter for all of a step
        learn(model, batch, CFG, make_scaler(model.num), ROOM, together, rows)
    assert torch.equal(together.logp, seen) and together.sums["tokens"] == batch.rollout.is_answer.sum()


def test_the_recomputed_policy_is_the_training_forward():
    """score() before the first update gives the bits that training computes: the ratio is 1, nothing is clipped."""
    for fmt in ("fp32", "fp16"):
        model, batch = case(fmt)
        old = score(model, batch, CFG)
        batch.advantage = torch.ones(16)
        cfg = dataclasses.replace(CFG, old_policy="recomputed", clip=(0.0, 0.0))
        batch.logp_old = old
        _, meter = learned(model, batch, cfg)
        assert torch.equal(meter.logp, old) and meter.sums["clipped"] == 0
        by_itself = gradients(model)
        model.zero_grad()
        batch.logp_old = None                                                           # the same without that pass
        learned(model, batch, cfg)
        assert all(torch.equal(g, by_itself[n]) for n, g in gradients(model).items())


def test_an_update_of_which_nothing_is_kept_moves_nothing():
    """Not by Adam's momentum either: the gradients are none, not zero."""
    model, batch = case()
    opt, scaler = torch.optim.AdamW(model.parameters(), fused=True), make_scaler(model.num)
    learned(model, batch, CFG, scaler)
    update(model, opt, scaler, 1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    cfg = dataclasses.replace(CFG, algo="pg", correction="token-mis:50:60")
    loss, meter = learned(model, batch, cfg, scaler)
    assert loss == 0 and meter.sums["kept"] == 0 and update(model, opt, scaler, 1e-3) == (0.0, False)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_a_penalty_pulls_towards_the_reference():
    """All advantages 0: only KL[pi || reference] acts. At the reference its gradient is 0; away from it a step lowers
    it."""
    model, batch = case()
    cfg = dataclasses.replace(CFG, kl_beta=0.5)
    batch.advantage, batch.logp_reference = torch.zeros(16), score(model, batch, cfg)
    learned(model, batch, cfg)
    assert max(float(g.abs().max()) for g in gradients(model).values()) < 1e-6
    down = model.blocks[0].down
    with torch.no_grad():
        down += 0.02 * torch.randn(down.shape, generator=torch.Generator().manual_seed(1))
    model.num.refresh()
    far = []
    for _ in range(2):
        model.zero_grad()
        far.append(float(learned(model, batch, cfg)[1].sums["kl_ref"]))
        with torch.no_grad():
            down -= 0.05 * down.grad / down.grad.norm()
        model.num.refresh()
    assert 0 < far[1] < far[0]


# --- groups


def test_a_group_that_agrees_on_a_fraction_teaches_nothing():
    """Six rewards of 0.01 have a mean that is off by a bit in FP32, and a standard deviation above 0 (as torch computes
    it of one group). So neither says whether a group agrees: not for the advantage, not for the metrics."""
    off = []
    for k in range(1, 100):
        for size in range(2, 17):
            group = torch.full((1, size), k / 100)
            assert group.dtype == torch.float32 and agree(group).all()
            for name, algorithm in ALGORITHMS.items():
                if algorithm.advantage is not batch_baseline:
                    assert (algorithm.advantage(group) == 0).all(), name
            off += [(k, size)] * bool((group.std(1, correction=0) > 0).all() and (group != group.mean(1)).all())
    assert (1, 6) in off, "this test shows nothing here: take another of these numbers"
    one, some = torch.full((1, 6), 0.01), torch.tensor([[1.0, 0, 0, 0, 0, 0], [0.01] * 5 + [0.02], [0.01] * 6])
    assert agree(some).tolist() == [False, False, True]
    for rewards, share in ((one, 1.0), (torch.cat((one, some)), 0.5)):
        model, sampler = sampler_of()
        out = sampler.generate(PROMPTS[:len(rewards)], 6, ROOM, seed=3)
        advantage = ALGORITHMS["grpo"].advantage(rewards)
        assert ((advantage == 0).all(1) == agree(rewards)).all() and ((advantage != 0).all(1) == ~agree(rewards)).all()
        batch, scaler = Batch(out, [], rewards, rewards, advantage.flatten()), make_scaler(model.num)
        loss, meter = learned(model, batch, CFG, scaler)
        meter.losses, meter.norms = [loss], [0.0]
        meter.measure(torch.arange(len(out.length)))
        row = meter.row(1, State(), model, scaler, 1e-3, rewards.flatten(), 1.0)
        assert row["frac_zero_std"] == share and row["reward"] == pytest.approx(float(rewards.mean()))
        assert (model.head.grad is None) == (share == 1)


class Odd(Task):
    """A task for random models: an answer is right if its letters' numbers add up to something odd, half of them are.
    Of every third problem none is right."""
    answer_length = 12

    def reward(self, problem, text):
        return float(len(problem.prompt) % 3 > 0 and sum(map(ord, text)) % 2)


def act_once(**kw):
    """act() of a model that says all of 256 bytes, on problems of several lengths -> (Batch, how many were drawn). The
    k-th problem of a step gets the random numbers of number k, whatever the settings."""
    model, numbers = tiny(vocab_size=258, gain=2.0), []
    sampler = Sampler(model, stop=tuple(range(0, 256, 16)), pad=257)
    generate = sampler.generate

    def numbered(prompts, n, length, temperature, seed, first):
        numbers.extend((seed, first + i) for i in range(len(prompts)))
        return generate(prompts, n, length, temperature, seed, first)
    sampler.generate = numbered
    state = State(problems=[Problem("x" * (1 + i % 7) + f"{i}", "") for i in range(50)])
    batch = act(sampler, Env(Odd()), state, Config(**{**dict(prompts=12, group=8, seed=3), **kw}), 5)
    assert numbers == [((3, 7, 5), i) for i in range(state.drawn)]
    return batch, state.drawn


def same_answers(a, b):
    """Two Rollouts with the same tokens. FP32 sums depend a little on the number of rows: log-probs to 1e-4."""
    width = min(a.tokens.shape[1], b.tokens.shape[1])
    for x in (a, b):
        assert (x.tokens[:, width:] == 257).all() and (x.length <= width).all()
    for name in ("prompt_length", "length", "stopped"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(a.tokens[:, :width], b.tokens[:, :width])
    assert torch.allclose(a.logp[:, :width], b.logp[:, :width], atol=1e-4)


def test_answers_do_not_depend_on_how_many_are_decoded_at_once():
    """--rollout-rows is for memory and speed: 1, 8 or all 12 problems at a time."""
    whole, _ = act_once(rollout_rows=10 ** 6)
    lengths = whole.rollout.length - whole.rollout.prompt_length
    assert lengths.unique().numel() > 5 and 0 < whole.rewards.mean() < 1 and not agree(whole.rewards).all()
    full = whole.rollout.tokens[lengths == lengths.max()]
    assert len(full.unique(dim=0)) == len(full) > 20                # every answer has random numbers of its own
    for rows in (8, 64):
        parts, _ = act_once(rollout_rows=rows)
        same_answers(parts.rollout, whole.rollout)
        assert torch.equal(parts.rewards, whole.rewards) and parts.problems == whole.problems


def test_a_score_does_not_depend_on_how_many_are_decoded_at_once():
    """The same for `solve`, of which pass@1 and the perfectible set are made."""
    sampler = Sampler(tiny(vocab_size=258, gain=2.0), stop=tuple(range(0, 256, 16)), pad=257)
    problems = [Problem("xx", "")] * 10                 # one problem, so that noise alone tells its answers apart
    whole = solve(sampler, Env(Odd()), problems, 8, (3, 2))
    assert len(set(whole)) > 2
    for rows in (8, 24):
        assert solve(sampler, Env(Odd()), problems, 8, (3, 2), rows=rows) == whole


@pytest.mark.parametrize("rows", [8, 64, 10 ** 6])
def test_dynamic_sampling_leaves_the_first_answers_alone(rows):
    """The first P problems are answered as ever; only groups that agree are replaced, by answers with other numbers."""
    once, before = act_once(rollout_rows=10 ** 6)
    more, after = act_once(rollout_rows=rows, dynamic_sampling=3)
    signal = ~agree(once.seen)
    assert 0 < signal.sum() < 12 and before == 12 and after in (24, 36)
    assert torch.equal(more.seen[:12], once.seen) and len(more.seen) == after
    n = int(signal.sum())
    assert more.problems[:n] == [p for p, s in zip(once.problems, signal) if s] and not agree(more.rewards).any()
    places = signal.repeat_interleave(8).nonzero()[:, 0]
    same_answers(more.rollout.rows(torch.arange(8 * n)), once.rollout.rows(places))
    assert torch.equal(more.rewards[:n], once.rewards[signal])


class Scripted(Task):
    """A task whose rewards are known: `right[prompt]` of a group's answers are right."""
    answer_length = 3

    def __init__(self, right):
        self.right, self.asked = right, []

    def reward(self, problem, text):
        self.asked.append(problem.prompt)
        return float((self.asked.count(problem.prompt) - 1) % 4 < self.right[problem.prompt])


def test_dynamic_sampling_replaces_groups_that_agree():
    """Problems a (0 of 4 right), b (2), c (4), d (1), e (3), f (0), two a step: a batch of two with signal is looked
    for in at most three rollouts, in order, and what is thrown away still counts for the accuracy."""
    model, sampler = sampler_of(fmt="fp32")
    sampler.generate = lambda prompts, n, *_: fixed_rollout(len(prompts) * n)
    problems = [Problem(x, "") for x in "abcdef"]
    cfg = Config(prompts=2, group=4, dynamic_sampling=3, seed=0)
    order = [problems[i].prompt for i in stream(0, 3, 0).permutation(6)]
    task, state = Scripted(dict(a=0, b=2, c=4, d=1, e=3, f=0)), State(problems=problems)
    batch = act(sampler, Env(task), state, cfg, 1)
    signal = [p for p in order if task.right[p] not in (0, 4)]
    looked = next(n for n in (2, 4, 6) if len([p for p in order[:n] if p in signal]) >= 2 or n == 6)
    assert state.drawn == looked and len(batch.seen) == looked
    assert task.asked == [p for p in order[:looked] for _ in range(4)]
    assert [p.prompt for p in batch.problems] == signal[:2] and (batch.rewards.std(1) > 0).all()
    assert len(batch.rollout.length) == 8
    assert batch.seen.mean().item() == pytest.approx(sum(task.right[p] for p in order[:looked]) / (4 * looked))
    state = State(problems=problems)
    one = act(sampler, Env(Scripted(task.right)), state, dataclasses.replace(cfg, dynamic_sampling=1), 1)
    assert [p.prompt for p in one.problems] == order[:2] and state.drawn == 2
    # too few with signal: what is missing is filled up with groups that agree, in the order in which they were drawn
    env, state = Env(Scripted(dict.fromkeys("abcdef", 4) | dict(a=1))), State(problems=problems)
    batch = act(sampler, env, state, cfg, 1)
    prompts = [p.prompt for p in batch.problems]
    assert state.drawn == 6 and {"a", order[0]} >= set(prompts)
    assert sorted(r.std() > 0 for r in batch.rewards) == [False, True] and prompts == sorted(prompts, key=order.index)


def fixed_rollout(rows):
    length = torch.full((rows,), 3)
    return Rollout(torch.zeros(rows, 3, dtype=torch.int64), torch.zeros(rows, 3), length - 2, length, length > 0)


def test_padding_gets_no_gradient_and_the_stop_token_does():
    model, batch = case()
    out, batch.advantage = batch.rollout, batch.advantage.abs() + 0.1     # every answer is pushed up
    learned(model, batch, CFG)
    want = gradients(model)
    model.zero_grad()
    padding = torch.arange(out.tokens.shape[1]) >= out.length[:, None]
    out.tokens = torch.where(padding, 13, out.tokens)                     # other tokens there: nothing may change
    out.logp = torch.where(padding, -5.0, out.logp)
    learned(model, batch, CFG)
    for n, g in gradients(model).items():
        assert torch.equal(g, want[n]), n
    # gradient of the head's row of the stop token: one term 1 - p for each answer that stopped, -p elsewhere. If the
    # stop token were masked out, only the -p would be left and a small step up that gradient would lower its log-prob.
    stopped = torch.zeros_like(out.is_answer)
    stopped[torch.arange(16), out.length - 1] = out.stopped
    with torch.no_grad():
        before = model.token_logprobs(out.tokens, stopped)[0].sum()
        norm = max(1e-9, float(sum(g.square().sum() for g in want.values()).sqrt()))
        for n, p in model.named_parameters():
            p -= 1e-3 * want[n] / norm
        model.num.refresh()
        assert model.token_logprobs(out.tokens, stopped)[0].sum() > before


def test_prompt_is_never_trained():
    """The loss must not depend on how likely the prompt's own tokens are: their log-probs are not scored."""
    model, batch = case()
    out, (_, meter) = batch.rollout, learned(model, batch, CFG)
    prompt = torch.arange(out.tokens.shape[1]) < out.prompt_length[:, None]
    assert (meter.logp[prompt] == 0).all() and (out.logp[prompt] == 0).all()


@pytest.mark.parametrize("fmt, scale", [("fp32", 1.0), ("fp16", 2.0 ** 4), ("fp16", 2.0 ** 14)])
def test_an_update_is_as_long_as_the_clipped_gradient_whatever_the_loss_scale(fmt, scale, monkeypatch):
    """With plain gradient descent the weights move by learning rate times gradient, and the longest gradient is
    GRAD_CLIP. Adam would hide all of this: it divides by the gradient's size."""
    model, batch = case("fp32")
    learned(model, batch, CFG)
    true = gradients(model)
    length = float(sum(g.square().sum() for g in true.values()).sqrt())
    for clip, factor in ((length / 5, 0.2), (length * 5, 1.0)):
        monkeypatch.setattr(train_rl, "GRAD_CLIP", clip)
        model, _ = case(fmt)                                            # the same weights, and the answers in FP32
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        scaler, opt = make_scaler(model.num, scale), torch.optim.SGD(model.parameters(), lr=9.0)
        learned(model, batch, CFG, scaler)
        norm, skipped = update(model, opt, scaler, 0.5)
        assert norm == pytest.approx(length, rel=0.02) and not skipped
        for n, p in model.named_parameters():
            moved, want = p.detach() - before[n], -0.5 * factor * true[n]
            assert float((moved - want).norm()) < 0.05 * 0.5 * factor * length, n


def test_an_overflow_is_skipped_and_changes_no_weight():
    model, batch = case("fp16")
    opt = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = make_scaler(model.num, 2.0 ** 30)
    before = [p.detach().clone() for p in model.parameters()]
    learned(model, batch, CFG, scaler)
    _, skipped = update(model, opt, scaler, 1e-3)
    assert skipped and scaler.get_scale() == 2.0 ** 29
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_whether_an_answer_learns_can_be_asked_where_there_is_no_gradient():
    with torch.no_grad():
        assert checks.idle(CFG) and not checks.idle(dataclasses.replace(CFG, kl_beta=0.1))


# --- what is said when something is off


def test_the_first_bad_layer_is_named():
    def where(model, batch, scale=1.0):
        return first_bad_layer(model, lambda: learn(model, batch, CFG, make_scaler(model.num, scale), ROOM))
    model, batch = case("fp16")
    with torch.no_grad():
        model.blocks[1].down *= 1e8
    model.num.refresh()
    assert "weights of blocks.1.down, rounded to fp16" in where(model, batch)
    model, batch = case("fp16")
    with torch.no_grad():                                                 # finite weights, whose product overflows
        model.blocks[1].gate_up *= 3e3
        model.blocks[1].down *= 3e3
    model.num.refresh()
    assert "forward pass of blocks.1.mlp" in where(model, batch) and "6.55e+04" in where(model, batch)
    model, batch = case("fp16")
    assert "backward pass of head" in where(model, batch, scale=2.0 ** 30)
    assert "no layer" in where(model, batch)
    batch.advantage = batch.advantage * math.nan
    assert "the loss itself" in where(model, batch)
    assert model.num.spy is None and model.head.grad is None


def metrics(**kw):
    return {**dict(frac_zero_std=0.1, accuracy=0.5, skipped_steps=0, truncated=0.0, logp_gap_mean=1e-4,
                   kl_k3=1e-8, ratio_outliers=0.0), **kw}


def test_diagnosis():
    def topics(history):
        return {t for t, _ in diagnose(history)}
    assert topics([metrics()] * 60) == set()                                                    # calm
    assert topics([metrics(frac_zero_std=1.0)]) == set()                                        # too early to tell
    assert topics([metrics(frac_zero_std=0.9)] * 5) == {"signal"}
    assert topics([metrics(skipped_steps=i) for i in range(5)]) == {"skips"}
    assert topics([metrics(truncated=0.5)] * 5) == {"truncated"}
    assert topics([metrics(ratio_outliers=0.2)] * 5) == {"outliers"}
    assert topics([metrics(logp_gap_mean=1e-3 * 1.1 ** i) for i in range(40)]) == {"mismatch"}
    assert "easier problems" in diagnose([metrics(frac_zero_std=0.9, accuracy=0.0)] * 5)[0][1]
    assert "nearly everything is solved" in diagnose([metrics(frac_zero_std=0.9, accuracy=0.99)] * 5)[0][1]
    assert "some problems are always solved" in diagnose([metrics(frac_zero_std=0.9, accuracy=0.66)] * 5)[0][1]
    # a wrong sign: 0.65 falls to 0.05. A swing of single steps is none
    assert topics([metrics(accuracy=0.65 - 0.06 * i) for i in range(10)]) == {"falls"}
    assert topics([metrics(accuracy=a) for a in (0.6, 0.7, 0.7, 0.6, 0.25, 0.6, 0.7, 0.5, 0.65)]) == set()
    # large from the start, as after an edit of one side
    assert topics([metrics(kl_k3=0.02)] * 5) == {"mismatch"}


def test_the_step_line_fits_100_columns():
    m = dict(step=200, accuracy=0.604, length=512.0, entropy=0.092, logp_gap_mean=9.6e-6, kl_k3=2.6e-10, grad_norm=0.0742,
             loss_scale=2.0 ** 16, t_rollout=12.3, t_train=20.0)
    line = step_line(m, 200, 7300)
    assert len(line) <= 100 and line.split() == (
        "step 200/200 acc 0.604 len 512 ent 0.092 gap 9.6e-6 kl 3e-10 |g| 0.074 scale 2^16 32s eta 122m").split()
    rest = step_line(m | dict(logp_gap_mean=0.0, kl_k3=0.0, grad_norm=math.inf, loss_scale=1.0), 200, 61).split()
    assert rest[8:] == "gap 0 kl 0 |g| inf scale 1 32s eta 1:01".split()
    shown = all_of(m).split()
    assert all(k in shown for k in m) and max(map(len, all_of(m).splitlines())) <= 100


# --- data


def test_batches_are_epochs_in_a_fresh_order():
    problems = [Problem(str(i), "") for i in range(10)]
    cfg = Config(prompts=4, seed=1)
    drawn = [p.prompt for s in range(5) for p in problems_of_step(problems, 4 * s, cfg)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == sorted(p.prompt for p in problems) and drawn[:10] != drawn[10:]
    # a function of the place alone, in whatever steps they are asked: a resume needs no more
    one = dataclasses.replace(cfg, prompts=1)
    assert [problems_of_step(problems, i, one)[0].prompt for i in range(20)] == drawn


def test_the_perfectible_set_leaves_out_what_is_solved_always_or_never(monkeypatch):
    pool = [Problem(str(k), "") for k in range(17)]
    monkeypatch.setattr("run.problems.solved", lambda *_: list(range(17)))             # of 16 tries
    kept = perfectible(None, None, pool, Config(keep=(0.25, 0.75)), ())
    assert [int(p.prompt) for p in kept] == list(range(4, 13))
    with pytest.raises(InputError, match="no problem was kept"):
        perfectible(None, None, pool, Config(keep=(0.26, 0.3)), ())


def test_no_held_out_problem_is_in_the_pool(tmp_path):
    """Drawn ones, those of one file, and those of two."""
    def both(cfg, env):
        pool, heldout = choose_problems(cfg, env)
        a, b = {p.prompt for p in pool}, {p.prompt for p in heldout}
        assert len(a) == len(pool) and len(b) == len(heldout) and not a & b
        return len(pool), len(heldout)
    cfg = Config(digits=1, pool=45, heldout="36")                       # all 81 that there are
    assert both(cfg, load_task(cfg)) == (45, 36)

    class Words:
        form = "chatml"

        def prompt(self, text, system=""):
            return text.split()
    path = tmp_path / "p.jsonl"
    path.write_text("".join(f'{{"question": "{i}", "answer": "#### {i}"}}\n' for i in range(20)))
    env = Env(make_task("gsm8k"), Words())
    assert both(Config(task="gsm8k", data=str(path), heldout="8", pool=0), env) == (12, 8)
    other = tmp_path / "q.jsonl"
    other.write_text("".join(f'{{"question": "{i}", "answer": "#### {i}"}}\n' for i in range(15, 25)))
    assert both(Config(task="gsm8k", data=str(path), heldout=str(other), pool=0), env) == (15, 10)
    with pytest.raises(InputError, match="is held out as well"):
        choose_problems(Config(task="gsm8k", data=str(path), heldout=str(path)), env)
    path.write_text(path.read_text() * 2)                               # every line twice
    pool, heldout = choose_problems(Config(task="gsm8k", data=str(path), heldout="8", pool=0), env)
    assert len(heldout) == 8 and not {p.prompt for p in pool} & {p.prompt for p in heldout} and len(pool) >= 24


def test_demonstrations_are_trained_from_their_first_token_to_the_stop_token():
    tokens, answer = demonstrations(make_task("addition", 2, 0.0), 20, stream(0))
    for row, where in zip(tokens.tolist(), answer.tolist()):
        end = row.index(STOP)
        assert decode(row[:6]).endswith("=") and set(row[end + 1:]) <= {PAD}
        assert where == [6 <= i <= end for i in range(len(row))]


def test_other_code_is_another_base(monkeypatch):
    """What comes from the cache was made by the code that is here now."""
    cfg, real = Config(fast=False), operators.code.fingerprint
    before = find_base(cfg, torch.device("cpu"))[1]
    assert find_base(cfg, torch.device("cpu"))[1] == before
    for file in ("precision.py", "model.py", "operators/exact.py", "data/addition.py", "run/base.py"):
        monkeypatch.setattr("operators.code.fingerprint", lambda f, file=file: real(f) + "edited" * (f == file))
        assert find_base(cfg, torch.device("cpu"))[1] != before, file
    monkeypatch.setattr("operators.code.fingerprint", lambda f: real(f) + "edited" * (f == "run/lines.py"))
    assert find_base(cfg, torch.device("cpu"))[1] == before


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
    two = '{"prompt": "1+1=", "answer": "2"}\n\n{"prompt": "é=", "answer": "x", "more": 1}\n'
    f.write_text(two, encoding="utf-8")
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
    with pytest.raises(SystemExit) as e:
        parse_config(["--help-all"])
    text = capsys.readouterr().out
    assert not e.value.code
    for f in dataclasses.fields(Config):
        name = f.name.replace("_", "-")
        assert f"  --{name} " in text or f"  --no-{name} " in text, name
        assert len(f.metadata["text"]) > 3
        for value in f.metadata["presets"].values():
            assert type(value) is type(f.default), name
    cfg, given = parse_config(["--device", "cpu", "--rollout-precision", "e8m7", "--precision", "fp32"])
    assert (cfg.rollout_format, cfg.train_format, cfg.preset) == ("e8m7", "fp32", "cpu")
    assert set(given) == {"device", "precision", "rollout_precision"}
    assert parse_config(["--device", "cpu", "--preset", "gpu", "--width", "96"])[0].width == 96
    real = ["--model", "x"]
    kinds = dict(gpu=["--preset", "gpu"], model=real, lora=[*real, "--lora-rank", "8"])
    for name, argv in kinds.items():
        cfg = parse_config(["--device", "cpu", *argv])[0]
        presets = {f.name: f.metadata["presets"] for f in dataclasses.fields(Config)}
        own = {field: values[name] for field, values in presets.items() if name in values}
        assert own and {k: getattr(cfg, k) for k in own} == own


@pytest.mark.parametrize("flags, words", [
    (["--precision", "e0m3"], "makes no sense"),
    (["--keep", "0.9", "0.8"], "no problem can be kept"),
    (["--device", "cuda:9"], "not there"),
    (["--algo", "ppo"], "no algorithm 'ppo'"),
])
def test_settings_that_cannot_work(flags, words):
    with pytest.raises(InputError, match=words):
        parse_config(flags)


def test_the_shape_of_a_model_from_scratch():
    """Heads of 64 features, but 4 of them at least, two to a key head; an MLP three times as wide."""
    for width, heads in ((128, 4), (512, 8), (64, 4), (384, 6)):
        cfg = parse_config(["--device", "cpu", "--width", str(width)])[0]
        shape = gpt_config(cfg, load_task(cfg))
        got = shape.width, shape.n_heads, shape.n_kv_heads, shape.mlp_width, shape.head_dim
        assert got == (width, heads, heads // 2, 3 * width, width // heads)
        assert shape.context == 2 * 3 + 2 + 9 * 3 + 6
    for width in ("36", "130", "513", "448"):                   # heads of 9 features, of no whole number, 7 heads
        cfg = parse_config(["--device", "cpu", "--width", width])[0]
        with pytest.raises(InputError, match=f"--width {width}"):
            gpt_config(cfg, load_task(cfg))


@pytest.mark.parametrize("flags, words", [
    (["--stepz", "3"], "did you mean --steps"),
    (["--steps", "0"], "out of range"),
    (["--lr", "fast"], "not a number"),
    (["--steps", "1.5"], "not a whole number"),
    (["--lr", "nan"], "out of range"),
    (["--clip", "0.2"], "expected 2 arguments"),
    (["--keep", "0.2", "1.5"], "out of range"),
    (["--lr-schedule", "cosine"], "invalid choice"),
])
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
