"""Advantages, losses, averages and corrections: against numbers worked by hand, finite differences, and TRL's loss."""
import dataclasses
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from algorithms import (
    ALGORITHMS,
    CORRECTIONS,
    batch_baseline,
    centred,
    clipped,
    clipped_weight,
    constant,
    correct,
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
from precision import InputError
from train_rl import Config, parse_config

log = math.log


def settings(algo, **kw):
    return Config(**{**dict(algo=algo), **ALGORITHMS[algo].settings, **kw})


def row(*x):
    return torch.tensor([x], dtype=torch.float64)


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
    for k in range(1, 100):                                        # a group that agrees, on a fraction whose mean is off by a bit
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
    assert clipped(row(log(ratio) - 3), row(-3), row(a), row(1) > 0, 0.2, 0.2).item() == pytest.approx(want)


def test_one_ratio_for_an_answer():
    """Tokens moved by factors 4 and 1/9 and a padded one by e^5: s = (4/9)^(1/2) = 2/3. Within the clip (0.5 to 1.5) each token's
    loss is -A 2/3, and its gradient too; above it the loss is the clip's and the gradient nothing."""
    old, mask = row(-2, -3, -1), torch.tensor([[True, True, False]])
    logp = (old + row(log(4), -log(9), 5)).requires_grad_()
    loss = sequence_clipped(logp, old, row(2), mask, 0.5, 0.5)
    assert loss[mask].tolist() == pytest.approx([-4 / 3] * 2)
    loss[mask].sum().backward()
    assert logp.grad[0].tolist() == pytest.approx([-4 / 3, -4 / 3, 0])
    logp = (old + row(log(4), 0, 0)).requires_grad_()
    loss = sequence_clipped(logp, old, row(2), mask, 0.5, 0.5)                  # s = 2
    loss[mask].sum().backward()
    assert loss[mask].tolist() == pytest.approx([-3, -3]) and logp.grad.abs().max() == 0


def test_a_cut_weight_keeps_its_gradient():
    old = row(-1, -1)
    logp = (old + row(log(0.5), log(8))).requires_grad_()
    loss = clipped_weight(logp, old, row(1), row(1, 1) > 0, 0.2, 4.0)
    loss.sum().backward()
    assert logp.grad[0].tolist() == pytest.approx([-0.5, -5])                   # not 8: cut at 1 + 4
    assert loss[0].tolist() == pytest.approx([0.5 * (1 - log(0.5)), 5 * (1 - log(8))])


def test_policy_gradient_and_k3():
    assert policy_gradient(row(-0.5, -2), None, row(3), None, 0, 0)[0].tolist() == [1.5, 6]
    assert k3(row(-1), row(-1 + log(2))).item() == pytest.approx(2 - 1 - log(2))
    assert k3(row(-1), row(-1)).item() == 0


MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])
RHO = torch.tensor([[2.0, 4.0, 0.25, 1.0], [8.0, 0.5, 99.0, 99.0]])            # products 2 and 4, geometric means 2^(1/4) and 2


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
    weight, kept = correct("geometric", RHO.log(), MASK, 0.9, 1.2)
    assert weight.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]] and kept.tolist() == [[True] * 4, [False] * 4]
    assert correct("token-tis", RHO.log(), MASK, high=3.0)[0].max() == 3
    assert correct("seq-mis", RHO.log(), MASK, high=10.0)[1].equal(MASK)
    far = torch.full((1, 50), 3.0)                                              # a product of e^150 is a large number and not inf
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
    # MASK's six tokens with rho = RHO and pi = pi_old, advantages 1 and -1, each token's loss is -A * weight (* pi/pi_old = 1)
    ("grpo", "token-mis", (-(2 + 4 + 1) / 3 + 0.5) / 2),                        # kept: three of four, one of two
    ("dr-grpo", "token-mis", (-0.7 + 0.05) / 2),
    ("dapo", "token-mis", (-7 + 0.5) / 4),
    ("grpo", "seq-mis", -2.0),                                                  # the second answer is out, of the denominator too
    ("dr-grpo", "seq-mis", -0.8),
    ("dapo", "seq-mis", -2.0),
    ("dapo", "none", (-4 + 2) / 6),
    ("dr-grpo", "none", (-0.4 + 0.2) / 2),
])
def test_rejected_tokens_leave_the_denominator(algo, correction, want):
    cfg = settings(algo, correction=correction, old_policy="recomputed")
    old = torch.full((2, 4), -2.0)
    total, units, stats = policy_loss(ALGORITHMS[algo], cfg, old, old, old - RHO.log(), torch.tensor([1.0, -1.0]), MASK, 10)
    assert (total / units).item() == pytest.approx(want, rel=1e-5)
    assert stats["tokens"] == 6 and stats["kept"] == int(correct(correction, RHO.log(), MASK)[1].sum()) and stats["clipped"] == 0


def test_which_ratio_the_weight_is_made_of():
    """pi / mu for losses without a ratio, at every update; pi_old / mu for those whose ratio holds pi / pi_old."""
    mu, old = row(-3), row(-3 + log(1.5))
    logp, a, one = row(-3 + log(2.5)), torch.ones(1, dtype=torch.float64), row(1) > 0
    for algo, want in (("pg-seq-is", 2.5), ("pg-seq-tis", 2.5), ("pg-seq-mis", 2.5), ("pg-token-tis", 2.0), ("grpo-seq-mis", 1.5),
                       ("grpo-token-tis", 1.5), ("pg", 1.0), ("dr-grpo", 1.0)):
        stats = policy_loss(ALGORITHMS[algo], settings(algo), logp, old, mu, a, one, 1)[2]
        assert float(stats["weight"]) == pytest.approx(want), algo


def test_no_weight_has_a_gradient():
    """The gradient of a weighted loss is the weight times the gradient of log pi: a gradient through the weight would be another
    estimator (and, for pg-seq-is, a wrong one)."""
    logp = row(-1.0, -2.0).requires_grad_()
    mu = row(-1.5, -2.5)
    algorithm, cfg = ALGORITHMS["pg-seq-is"], settings("pg-seq-is")
    total, _, _ = policy_loss(algorithm, cfg, logp, None, mu, torch.tensor([2.0]), row(1, 1) > 0, 1)
    total.backward()
    assert logp.grad[0].tolist() == pytest.approx([-2 * math.e, -2 * math.e])


def test_importance_weights_remove_the_bias():
    """Sampled from mu, weighted by pi / mu, the expected gradient is that under pi; without weights it is not; truncated weights
    lie between. Exact, by summing over all 27 answers of three tokens of a softmax policy."""
    g = torch.Generator().manual_seed(0)
    pi = torch.randn(3, 3, generator=g, dtype=torch.float64, requires_grad=True)                  # logits, a position a row
    mu = (pi.detach() + torch.randn(3, 3, generator=g, dtype=torch.float64)).log_softmax(1)
    answers = torch.cartesian_prod(*[torch.arange(3)] * 3)                                         # (27, 3)
    reward = torch.randn(27, generator=g, dtype=torch.float64)
    at = torch.arange(3)

    def gradient(algo, behaviour):
        """E_{y ~ behaviour}[gradient], as sampling without end would give: each answer counts its probability."""
        logp, logq = pi.log_softmax(1)[at, answers], behaviour[at, answers]
        p = logq.sum(1).exp()
        every = torch.ones(27, 3, dtype=torch.bool)
        loss, units, _ = policy_loss(ALGORITHMS[algo], settings(algo), logp, None, logq, reward * p * 27, every, 1)
        return torch.autograd.grad(loss / units, pi)[0]
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


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_gradients_by_finite_differences(algo):
    """Where weights and GSPO's ratio are held fixed, as their stop-gradient says, the slope of the loss is its gradient."""
    logp, old, mu, ref, a, mask = case()
    fixed = logp.detach().clone()
    algorithm, cfg = ALGORITHMS[algo], settings(algo, kl_beta=0.1)
    policy_loss(algorithm, cfg, logp, old, mu, a, mask, 9, ref)[0].backward()
    if algo in ("gspo", "cispo") or not algorithm.has_ratio:
        weight, kept = correct(cfg.correction, fixed - mu, mask)
        if algo == "gspo":
            s = mean(fixed - old, mask).exp()
            inside = ~(s * a[:, None] > (s.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * a[:, None]))
            weight = s * inside * mask
        if algo == "cispo":
            weight = (fixed - old).exp().clamp(max=1 + cfg.clip_high) * mask

        def loss(x):
            per, _ = algorithm.average(kept, 9)
            return ((policy_gradient(x, None, a[:, None], None, 0, 0) * weight + 0.1 * k3(x, ref)) * per)[kept].sum()
    else:
        def loss(x):
            return policy_loss(algorithm, cfg, x, old, mu, a, mask, 9, ref)[0]
    for i, t in mask.nonzero().tolist():
        hi, lo = fixed.clone(), fixed.clone()
        hi[i, t] += 1e-6
        lo[i, t] -= 1e-6
        assert logp.grad[i, t] == pytest.approx(((loss(hi) - loss(lo)) / 2e-6).item(), abs=1e-5), (i, t)
    assert (logp.grad[~mask] == 0).all()


TRL = {"grpo": dict(loss_type="grpo"), "dr-grpo": dict(loss_type="dr_grpo"), "dapo": dict(loss_type="dapo"),
       "cispo": dict(loss_type="cispo"), "gspo": dict(loss_type="grpo", importance_sampling_level="sequence")}


def trl_loss(algo, cfg, logp, old, weight, ref, a, mask, room):
    """GRPOTrainer's own method on these tensors; what it would ask a model for is handed to it."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    high = 1 + cfg.clip_high if algo == "cispo" else cfg.clip_high              # TRL takes CISPO's cap as it is
    one = SimpleNamespace(num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x)
    fake = SimpleNamespace(
        **{"importance_sampling_level": "token", **TRL[algo]}, epsilon_low=cfg.clip_low, epsilon_high=high, beta=cfg.kl_beta,
        max_completion_length=room, aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        use_vllm=True, vllm_importance_sampling_correction=True, model=SimpleNamespace(training=True), accelerator=one,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None))
    prompt = torch.zeros(len(mask), 1, dtype=torch.int64)
    inputs = dict(
        prompt_ids=prompt, prompt_mask=prompt + 1, completion_ids=mask.long(), completion_mask=mask.long(), advantages=a,
        old_per_token_logps=old, ref_per_token_logps=ref, importance_sampling_ratio=weight, num_items_in_batch=mask.sum())
    return trainer._compute_loss(fake, None, inputs)


@pytest.mark.parametrize("algo", TRL)
@pytest.mark.parametrize("correction", ["none", "token-tis", "seq-tis"])
@pytest.mark.parametrize("seed", range(3))
def test_against_trl(algo, correction, seed):
    """Same loss and same gradient as TRL's, with and without truncated weights and a KL penalty. Ratios reach beyond every clip.
    (Masked weights are not compared: TRL leaves what it rejects in the denominator. Nor GSPO with a weight per token: there each
    token's gradient has that token's weight, with TRL their mean.)"""
    if (algo, correction) == ("gspo", "token-tis"):
        pytest.skip("another definition")
    logp, old, mu, ref, a, mask = case(seed)
    cfg = settings(algo, correction=correction, old_policy="recomputed", kl_beta=0.05 * (seed > 0), correction_high=1.3)
    total, units, _ = policy_loss(ALGORITHMS[algo], cfg, logp, old, mu, a, mask, 9, ref)
    mine, = torch.autograd.grad(total / units, logp)
    level = (old - mu) * mask
    weight = (level.sum(1, keepdim=True) if correction == "seq-tis" else level).exp().clamp(max=1.3)
    theirs = trl_loss(algo, cfg, logp, old, torch.ones_like(weight) if correction == "none" else weight, ref, a, mask, 9)
    grad, = torch.autograd.grad(theirs, logp)
    assert (total / units).item() == pytest.approx(theirs.item(), abs=1e-6)
    assert torch.allclose(mine, grad, atol=1e-6), (mine - grad).abs().max()
    assert float(grad.abs().max()) > 1e-3


# --- settings


def test_algorithms_bring_their_settings_and_flags_win():
    assert parse_config(["--algo", "gspo", "--device", "cpu"])[0].clip_high == 4e-4
    assert parse_config(["--algo", "gspo", "--clip-high", "0.1", "--device", "cpu"])[0].clip_high == 0.1
    cfg = parse_config(["--algo", "grpo-seq-mis", "--device", "cpu"])[0]
    assert (cfg.correction, cfg.correction_high, cfg.old_policy) == ("seq-mis", 10.0, "recomputed")
    assert parse_config(["--algo", "dapo", "--device", "cpu"])[0].dynamic_sampling > 1
    known = {f.name for f in dataclasses.fields(Config)}
    assert all(set(a.settings) <= known for a in ALGORITHMS.values())


@pytest.mark.parametrize("flags, words", [
    (["--correction", "token-tis"], "twice; add --old-policy recomputed"),
    (["--algo", "gspo", "--correction", "seq-mis"], "twice"),
    (["--updates-per-batch", "3"], "multiple of --updates-per-batch"),
    (["--algo", "pg", "--correction", "token-mis", "--correction-high", "0.3"], "from 0.5 to 0.3 keeps nothing"),
])
def test_combinations_that_make_no_sense(flags, words):
    with pytest.raises(InputError, match=words):
        parse_config(["--device", "cpu", *flags])
    parse_config(["--device", "cpu", "--correction", "geometric"])              # rejecting alone counts nothing twice
    assert set(CORRECTIONS) == {"token-is", "token-tis", "token-mis", "seq-is", "seq-tis", "seq-mis", "geometric"}
