"""Advantages, losses, averages and corrections: against numbers worked by hand, finite differences, and TRL's loss."""
import dataclasses
import math
from collections import defaultdict
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny
from oracle import gpt_logits

from algorithms import (
    ALGORITHMS,
    Tokens,
    batch_baseline,
    centred,
    clipped,
    clipped_weight,
    constant,
    correct,
    decoupled,
    k3,
    leave_one_out,
    mean,
    overlong,
    per_answer,
    per_token,
    policy_gradient,
    policy_loss,
    sequence_clipped,
    standardised,
)
from precision import InputError, make_scaler
from run.flags import PAPER
from sample import Sampler
from train_rl import Batch, Config, learn, parse_config

log = math.log


def settings(algo, **kw):
    """The settings of an algorithm, or of one of the paper's names."""
    named = PAPER.get(algo, dict(algo=algo))
    return Config(**{**ALGORITHMS[named["algo"]].settings, **named, **kw})


def row(*x):
    return torch.tensor([x], dtype=torch.float64)


def tokens(logp, mu, old, a, mask=None, entropy=None, **more):
    """What a loss may look at; every token counts unless a mask says otherwise."""
    every = torch.ones(logp.shape, dtype=torch.bool)
    entropy = torch.zeros_like(logp) if entropy is None else entropy
    return Tokens(every if mask is None else mask, logp, entropy, mu, old, a, **more)


def of(cfg):
    return ALGORITHMS[cfg.algo]


def units(cfg, t):
    """What the loss is divided by: see train_rl.denominator."""
    acted = t.logp_old if decoupled(cfg) else t.logp.detach()
    kept = correct(cfg.correction, acted - t.logp_rollout, t.mask)[1]
    return of(cfg).average(kept, t.room)[1].sum()


# --- worked by hand


def test_advantages():
    r = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    close = torch.allclose
    assert close(centred(r), torch.tensor([[0.5, 0.5, -0.5, -0.5], [0, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]]))
    s = math.sqrt(3) / 4                                                        # population std of 1, 0, 0, 0
    want = torch.tensor([[1, 1, -1, -1], [0, 0, 0, 0], [0.75 / s, -0.25 / s, -0.25 / s, -0.25 / s]])
    assert close(standardised(r), want, atol=1e-5)
    assert close(leave_one_out(r), torch.tensor([[2, 2, -2, -2], [0, 0, 0, 0], [3, -1, -1, -1]]) / 3)
    assert close(batch_baseline(r), r - 7 / 12)
    for k in range(1, 100):                        # a group that agrees, on a fraction whose mean is off by a bit
        for advantage in (centred, standardised, leave_one_out):
            assert (advantage(torch.full((3, 6), k / 100)) == 0).all()


def test_overlong_shaping():
    lengths = torch.tensor([10, 80, 81, 90, 100])
    assert overlong(lengths, 100, 20).tolist() == pytest.approx([0, 0, -0.05, -0.5, -1])
    assert overlong(lengths, 100, 0).tolist() == [0] * 5


@pytest.mark.parametrize(
    "ratio, a, want", [(1.0, 2.0, -2.0), (1.5, 1.0, -1.2), (0.5, 1.0, -0.5), (0.5, -1.0, 0.8), (1.5, -1.0, 1.5)]
)
def test_clipped_ratio(ratio, a, want):
    """Clip 0.2: a gain is capped at ratio 1.2, a loss never; and the other way round below 0.8."""
    t = tokens(row(log(ratio) - 3), row(-3), row(-3), torch.tensor([a]))
    assert t.clip == (0.2, 0.2) and clipped(t).item() == pytest.approx(want)


def test_the_two_ends_of_the_clip_are_apart():
    t = tokens(row(log(3), log(0.1)), row(0, 0), row(0, 0), torch.tensor([1.0]), clip=(0.5, 1.0))
    assert clipped(t)[0].tolist() == pytest.approx([-2, -0.1])
    t = tokens(t.logp, t.logp_old, t.logp_old, torch.tensor([-1.0]), clip=(0.5, 1.0))
    assert clipped(t)[0].tolist() == pytest.approx([3, 0.5])


def test_one_ratio_for_an_answer():
    """Tokens moved by factors 4 and 1/9 and a padded one by e^5: s = (4/9)^(1/2) = 2/3. Within the clip (0.5 to 1.5)
    each token's loss is -A 2/3, and its gradient too; above it the loss is the clip's and the gradient nothing."""
    old, mask, a = row(-2, -3, -1), torch.tensor([[True, True, False]]), torch.tensor([2.0])
    logp = (old + row(log(4), -log(9), 5)).requires_grad_()
    loss = sequence_clipped(tokens(logp, old, old, a, mask, clip=(0.5, 0.5)))
    assert loss[mask].tolist() == pytest.approx([-4 / 3] * 2)
    loss[mask].sum().backward()
    assert logp.grad[0].tolist() == pytest.approx([-4 / 3, -4 / 3, 0])
    logp = (old + row(log(4), 0, 0)).requires_grad_()
    loss = sequence_clipped(tokens(logp, old, old, a, mask, clip=(0.5, 0.5)))               # s = 2
    loss[mask].sum().backward()
    assert loss[mask].tolist() == pytest.approx([-3, -3]) and logp.grad.abs().max() == 0


def test_a_cut_weight_keeps_its_gradient():
    old = row(-1, -1)
    logp = (old + row(log(0.5), log(8))).requires_grad_()
    loss = clipped_weight(tokens(logp, old, old, torch.ones(1), clip=(0.2, 4.0)))
    loss.sum().backward()
    assert logp.grad[0].tolist() == pytest.approx([-0.5, -5])                   # not 8: cut at 1 + 4
    assert loss[0].tolist() == pytest.approx([0.5 * (1 - log(0.5)), 5 * (1 - log(8))])


def test_policy_gradient_and_k3():
    assert policy_gradient(tokens(row(-0.5, -2), row(0, 0), None, torch.tensor([3.0])))[0].tolist() == [1.5, 6]
    assert k3(row(-1), row(-1 + log(2))).item() == pytest.approx(2 - 1 - log(2))
    assert k3(row(-1), row(-1)).item() == 0


MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])
# products 2 and 4, geometric means 2^(1/4) and 2
RHO = torch.tensor([[2.0, 4.0, 0.25, 1.0], [8.0, 0.5, 99.0, 99.0]])


@pytest.mark.parametrize("name, want", [
    ("none", [[1, 1, 1, 1], [1, 1, 0, 0]]),
    ("token-is", [[2, 4, 0.25, 1], [8, 0.5, 0, 0]]),
    ("token-tis", [[2, 2, 0.25, 1], [2, 0.5, 0, 0]]),
    ("token-mis", [[2, 4, 0, 1], [0, 0.5, 0, 0]]),
    ("seq-is", [[2, 2, 2, 2], [4, 4, 0, 0]]),
    ("seq-tis", [[2, 2, 2, 2], [3, 3, 0, 0]]),
    ("seq-mis", [[2, 2, 2, 2], [0, 0, 0, 0]]),
    ("geometric", [[0, 0, 0, 0], [0, 0, 0, 0]]),
])
def test_corrections(name, want):
    weight, kept = correct(name, RHO.log(), MASK)
    assert torch.allclose(weight, torch.tensor(want, dtype=torch.float32))
    rejects = "mis" in name or name == "geometric"
    assert torch.equal(kept, torch.tensor(want) > 0 if rejects else MASK)


def test_bands_can_be_set():
    weight, kept = correct("geometric:0.9:1.2", RHO.log(), MASK)
    assert weight.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]] and kept.tolist() == [[True] * 4, [False] * 4]
    assert correct("token-tis:3", RHO.log(), MASK)[0].max() == 3
    assert correct("token-tis:0.5:3", RHO.log(), MASK)[0][MASK].min() == 0.5
    assert correct("seq-mis:10", RHO.log(), MASK)[1].equal(MASK)
    far = torch.full((1, 50), 3.0)                                  # a product of e^150 is a large number and not inf
    for name, x in (("seq-is", far), ("token-is", 50 * far)):
        assert torch.isfinite(correct(name, x, far > 0)[0]).all()


def test_averages():
    """Two answers of 4 and 2 tokens, room for 10."""
    cases = (per_answer, [1 / 4, 1 / 2], [1, 1]), (constant, [0.1, 0.1], [1, 1]), (per_token, [1, 1], [4, 2])
    for average, weights, units in cases:
        w, u = average(MASK, 10)
        assert w[:, 0].tolist() == pytest.approx(weights) and u.tolist() == units
    none = torch.zeros_like(MASK)
    for average in (per_answer, constant, per_token):
        assert average(none, 10)[1].sum() == 0 and torch.isfinite(average(none, 10)[0]).all()
    assert mean(RHO, MASK)[:, 0].tolist() == pytest.approx([7.25 / 4, 8.5 / 2])


@pytest.mark.parametrize("algo, correction, want", [
    # MASK's six tokens with rho = RHO and pi = pi_old, advantages 1 and -1, each token's loss is -A * weight (the ratio
    # is 1). Of the second answer token-mis keeps one of two tokens, seq-mis nothing: it is out, of the denominator too.
    ("grpo", "token-mis", (-(2 + 4 + 1) / 3 + 0.5) / 2),
    ("dr-grpo", "token-mis", (-0.7 + 0.05) / 2),
    ("dapo", "token-mis", (-7 + 0.5) / 4),
    ("grpo", "seq-mis", -2.0),
    ("dr-grpo", "seq-mis", -0.8),
    ("dapo", "seq-mis", -2.0),
    ("dapo", "none", (-4 + 2) / 6),
    ("dr-grpo", "none", (-0.4 + 0.2) / 2),
])
def test_rejected_tokens_leave_the_denominator(algo, correction, want):
    cfg, old = settings(algo, correction=correction, old_policy="recomputed"), torch.full((2, 4), -2.0)
    t = tokens(old, old - RHO.log(), old, torch.tensor([1.0, -1.0]), MASK, room=10)
    total, stats = policy_loss(cfg, t)
    assert (total / units(cfg, t)).item() == pytest.approx(want, rel=1e-5)
    kept = int(correct(correction, RHO.log(), MASK)[1].sum())
    assert stats["tokens"] == 6 and stats["kept"] == kept and stats["clipped"] == 0


def test_which_ratio_the_weight_is_made_of():
    """pi / mu for losses without a ratio, at every update; pi_old / mu for those whose ratio holds pi / pi_old."""
    mu, old = row(-3), row(-3 + log(1.5))
    logp, a = row(-3 + log(2.5)), torch.ones(1, dtype=torch.float64)
    for algo, want in (("pg-seq-is", 2.5), ("pg-seq-tis", 2.5), ("pg-seq-mis", 2.5), ("pg-token-tis", 2.0),
                       ("grpo-seq-mis", 1.5), ("grpo-token-tis", 1.5), ("pg", 1.0), ("dr-grpo", 1.0)):
        stats = policy_loss(settings(algo), tokens(logp, mu, old, a))[1]
        assert float(stats["weight"]) == pytest.approx(want), algo


def test_no_weight_has_a_gradient():
    """The gradient of a weighted loss is the weight times the gradient of log pi: a gradient through the weight would
    be another estimator (and, for pg-seq-is, a wrong one)."""
    logp = row(-1.0, -2.0).requires_grad_()
    total, _ = policy_loss(settings("pg-seq-is"), tokens(logp, row(-1.5, -2.5), None, torch.tensor([2.0])))
    total.backward()
    assert logp.grad[0].tolist() == pytest.approx([-2 * math.e, -2 * math.e])


def test_importance_weights_remove_the_bias():
    """Sampled from mu, weighted by pi / mu, the expected gradient is that under pi; without weights it is not;
    truncated weights lie between. Exact, by summing over all 27 answers of three tokens of a softmax policy."""
    g = torch.Generator().manual_seed(0)
    pi = torch.randn(3, 3, generator=g, dtype=torch.float64, requires_grad=True)          # logits, a position a row
    mu = (pi.detach() + torch.randn(3, 3, generator=g, dtype=torch.float64)).log_softmax(1)
    answers = torch.cartesian_prod(*[torch.arange(3)] * 3)                                # (27, 3)
    reward = torch.randn(27, generator=g, dtype=torch.float64)
    at = torch.arange(3)

    def gradient(algo, behaviour):
        """E_{y ~ behaviour}[gradient], as sampling without end would give: each answer counts its probability."""
        logp, logq = pi.log_softmax(1)[at, answers], behaviour[at, answers]
        t, cfg = tokens(logp, logq, None, reward * logq.sum(1).exp() * 27), settings(algo)
        return torch.autograd.grad(policy_loss(cfg, t)[0] / units(cfg, t), pi)[0]
    true = gradient("pg", pi.detach().log_softmax(1))

    def off(algo):
        return float((gradient(algo, mu) - true).norm() / true.norm())
    assert off("pg-seq-is") < 1e-6 and off("pg") > 0.5
    assert 1e-3 < off("pg-seq-tis") < off("pg") and 1e-3 < off("pg-token-tis") < off("pg")


# --- gradients and an independent implementation


def case(seed=0, R=6, T=9):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.randint(2, T + 1, (R, 1), generator=g)
    mu = -torch.rand(R, T, generator=g).double() * 2 - 0.1
    old, ref = (mu + 0.3 * torch.randn(R, T, generator=g) for _ in range(2))
    logp = (old + 0.3 * torch.randn(R, T, generator=g)).requires_grad_()
    return logp, old, mu, ref, torch.randn(R, generator=g).double(), mask


@contextmanager
def detached(values, again=False):
    """What .detach() gives is put into `values`; or, again, it is taken from there in the same order: the slope of a
    function is then that of its surrogate, in which what is detached is held fixed."""
    real, kept = torch.Tensor.detach, iter(list(values))

    def detach(x):
        if not again:
            values.append(real(x).clone())
        value = next(kept) if again else values[-1]
        assert value.shape == x.shape
        return value
    torch.Tensor.detach = detach
    try:
        yield
        assert not again or next(kept, None) is None
    finally:
        torch.Tensor.detach = real


def slopes(loss, x, values, hold):
    """d loss / d x by central differences, (R, T). hold: with what it detaches held at `values`."""
    out = torch.zeros_like(x)
    for i in range(x.numel()):
        ends = []
        for step in (1e-6, -1e-6):
            shifted = x.clone()
            shifted.view(-1)[i] += step
            with detached(list(values) if hold else [], again=hold):
                ends.append(loss(shifted))
        out.view(-1)[i] = (ends[0] - ends[1]) / 2e-6
    return out


def bonus(t):
    return clipped(t) - 0.1 * t.entropy


def forgotten_detach(t):
    """CISPO with a gradient through its weight: another estimator, and its own gradient all the same."""
    return -(t.logp - t.logp_old).exp().clamp(max=1 + t.clip[1]) * t.A * t.logp


def half_detached(t):
    """A detached factor in the midst of others that are not."""
    return -t.A * (t.logp - t.logp_old.detach()).exp() * t.logp.detach().square() + t.entropy * t.logp.detach()


OWN = dict(bonus=bonus, forgotten=forgotten_detach, half=half_detached)


@pytest.mark.parametrize("algo", [*ALGORITHMS, *PAPER, *OWN])
def test_gradients_by_finite_differences(algo, monkeypatch):
    """The slope of the loss is its gradient. Weights, GSPO's ratio and whatever else a loss detaches are held fixed,
    as the stop-gradient says: that is done for .detach() itself, so that a loss of your own may be added."""
    for name, loss in OWN.items():
        monkeypatch.setitem(ALGORITHMS, name, dataclasses.replace(ALGORITHMS["dr-grpo"], loss=loss))
    logp, old, mu, ref, a, mask = case()
    cfg, values = settings(algo, kl_beta=0.1), []

    def loss(x):
        entropy = -x * (2 + x).exp()                        # whatever it is, here it follows from x and has a gradient
        return policy_loss(cfg, tokens(x, mu, old, a, mask, entropy, logp_reference=ref, clip=cfg.clip, room=9))[0]
    with detached(values):
        total = loss(logp)
    total.backward()
    assert values, "policy_loss detaches the weights' log-ratio at least"
    fixed = torch.tensor(logp.tolist()).double()
    slope = slopes(loss, fixed, values, hold=True)
    assert torch.allclose(logp.grad, slope, atol=1e-5), (logp.grad - slope).abs().max()
    assert (logp.grad[~mask] == 0).all() and float(slope.abs().max()) > 1e-2
    # ... and holding it fixed matters where something is detached that moves: else this test would not see a detach.
    # (GSPO's own estimator has the slope of its loss: all tokens of an answer share one ratio and one weight.)
    free = slopes(loss, fixed, [], hold=False)
    matters = algo in ("cispo", "half", "pg-seq-is", "pg-seq-tis", "pg-seq-mis", "pg-token-tis")
    assert matters == (float((free - slope).abs().max()) > 1e-3), algo


def test_has_ratio_says_whether_the_loss_looks_at_the_old_policy():
    logp, old, mu, _, a, mask = case()
    for name, algorithm in ALGORITHMS.items():
        one, other = (algorithm.loss(tokens(logp, mu, x, a, mask, clip=(0.2, 0.3)))[mask] for x in (old, old - 0.05))
        assert algorithm.has_ratio == (not torch.equal(one, other)), name


@pytest.mark.parametrize("silent", [(), (1, 3)], ids=["every answer has an advantage", "two groups have none"])
@pytest.mark.parametrize("size", [5, 64])
def test_an_entropy_bonus_is_one_line(monkeypatch, size, silent):
    """A loss with an entropy bonus, through the trainer's own step, against FP64 autograd of the same loss, written out
    plainly through an independent model."""
    monkeypatch.setitem(ALGORITHMS, "bonus", dataclasses.replace(ALGORITHMS["dr-grpo"], loss=bonus))
    model = tiny(gain=2.0)
    out = Sampler(model, stop=tuple(range(0, 66, 11)), pad=66).generate([[1, 2, 3], [4] * 9, [5, 6], [7, 8]], 4, 20)
    assert 3 < out.stopped.sum() < 16
    noise = torch.randn(out.logp.shape, generator=torch.Generator().manual_seed(5))
    out.logp += 0.3 * noise * out.is_answer                                                # a mismatch, beyond the clip
    a = torch.tensor([1.0, -1, 0.5, -0.5]).repeat(4)
    for group in silent:
        a[4 * group:4 * group + 4] = 0
    cfg = Config(algo="bonus", micro_batch=size)
    loss = learn(model, Batch(out, advantage=a), cfg, make_scaler(model.num), 20)

    double = {p: p.detach().double().requires_grad_() for p in model.parameters()}
    pi = gpt_logits(model, out.tokens, lambda p: double[p])[:, :-1].log_softmax(-1)
    logp, where = pi.gather(2, out.tokens[:, 1:, None])[..., 0], out.is_answer[:, 1:]
    ratio, A = (logp - out.logp[:, 1:]).exp(), a[:, None].double()
    per_token = -torch.minimum(A * ratio, A * ratio.clamp(0.8, 1.2)) + 0.1 * (pi.exp() * pi).sum(-1)
    want = per_token[where].sum() / 20 / 16
    want.backward()
    assert loss == pytest.approx(want.item(), rel=1e-4)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad.double(), double[p].grad, atol=1e-4 * float(double[p].grad.abs().max())), name


TRL = {"grpo": dict(loss_type="grpo"), "dr-grpo": dict(loss_type="dr_grpo"), "dapo": dict(loss_type="dapo"),
       "cispo": dict(loss_type="cispo"), "gspo": dict(loss_type="grpo", importance_sampling_level="sequence")}


def trl_loss(algo, cfg, logp, old, weight, ref, a, mask, room):
    """GRPOTrainer's own method on these tensors; what it would ask a model for is handed to it."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    low, high = cfg.clip
    high = 1 + high if algo == "cispo" else high                        # TRL takes CISPO's cap as it is
    one = SimpleNamespace(num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x,
                          reduce=lambda x, reduction: x)
    fake = SimpleNamespace(
        **{"importance_sampling_level": "token", **TRL[algo]}, epsilon_low=low, epsilon_high=high, beta=cfg.kl_beta,
        max_completion_length=room, aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        use_vllm=True, vllm_importance_sampling_correction=True, model=SimpleNamespace(training=True), accelerator=one,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None))
    prompt = torch.zeros(len(mask), 1, dtype=torch.int64)
    inputs = dict(
        prompt_ids=prompt, prompt_mask=prompt + 1, completion_ids=mask.long(), completion_mask=mask.long(),
        advantages=a, old_per_token_logps=old, ref_per_token_logps=ref, importance_sampling_ratio=weight,
        num_items_in_batch=mask.sum())
    return trainer._compute_loss(fake, None, inputs)


@pytest.mark.parametrize("algo", TRL)
@pytest.mark.parametrize("correction", ["none", "token-tis", "seq-tis"])
@pytest.mark.parametrize("seed", range(3))
def test_against_trl(algo, correction, seed):
    """Same loss and same gradient as TRL's, with and without truncated weights and a KL penalty. Ratios reach beyond
    every clip. (Masked weights are not compared: TRL leaves what it rejects in the denominator. Nor GSPO with a weight
    per token: there each token's gradient has that token's weight, with TRL their mean.)"""
    if (algo, correction) == ("gspo", "token-tis"):
        pytest.skip("another definition")
    logp, old, mu, ref, a, mask = case(seed)
    capped = correction if correction == "none" else f"{correction}:1.3"
    cfg = settings(algo, correction=capped, old_policy="recomputed", kl_beta=0.05 * (seed > 0))
    t = tokens(logp, mu, old, a, mask, logp_reference=ref, clip=cfg.clip, room=9)
    total = policy_loss(cfg, t)[0] / units(cfg, t)
    mine, = torch.autograd.grad(total, logp)
    level = (old - mu) * mask
    weight = (level.sum(1, keepdim=True) if correction == "seq-tis" else level).exp().clamp(max=1.3)
    weight = torch.ones_like(weight) if correction == "none" else weight
    theirs = trl_loss(algo, cfg, logp, old, weight, ref, a, mask, 9)
    grad, = torch.autograd.grad(theirs, logp)
    assert total.item() == pytest.approx(theirs.item(), abs=1e-6)
    assert torch.allclose(mine, grad, atol=1e-6), (mine - grad).abs().max()
    assert float(grad.abs().max()) > 1e-3


# --- settings


def test_algorithms_bring_their_settings_and_flags_win():
    def parsed(*flags):
        return parse_config([*flags, "--device", "cpu"])[0]
    tables = {name: dict(a.settings, algo=name) for name, a in ALGORITHMS.items()} | PAPER
    for name, own in tables.items():
        cfg = parsed("--algo", name)
        assert {k: getattr(cfg, k) for k in own} == own
    assert parsed("--algo", "gspo", "--clip", "0.3", "0.1").clip == (0.3, 0.1)
    assert parsed("--algo", "pg-seq-tis", "--correction", "seq-tis:9").correction == "seq-tis:9"


@pytest.mark.parametrize("flags, words", [
    (["--correction", "token-tis"], "twice; add --old-policy recomputed"),
    (["--algo", "gspo", "--correction", "seq-mis"], "twice"),
    (["--updates-per-batch", "3"], "multiple of --updates-per-batch"),
    (["--algo", "pg", "--correction", "token-mis:0.3"], "from 0.5 to 0.3"),
    (["--algo", "pg", "--correction", "token-mis:5:0.5"], "from 5 to 0.5"),
    (["--algo", "pg", "--correction", "seq-mis:ten"], "after the name stands a cap"),
    (["--algo", "pg", "--correction", "seq-miss"], "did you mean seq-mis"),
    (["--algo", "gpro"], "did you mean grpo"),
])
def test_combinations_that_make_no_sense(flags, words):
    with pytest.raises(InputError, match=words):
        parse_config(["--device", "cpu", *flags])
    parse_config(["--device", "cpu", "--correction", "geometric"])              # rejecting alone counts nothing twice
