"""The loop as a whole, in runs of a second in this process: which weights act and learn, what a step remembers of the one
before it, and what a resumed run remembers."""
import json

import pytest
import torch

import train_rl
from data.addition import Addition
from precision import Numerics
from run.checkpoint import load_checkpoint

# A base that has hardly learned anything. Rewards are made up below, so that there is always something to learn.
JOB = ("--digits 1 --noise 0.3 --n-layers 1 --width 32 --base-steps 60 --base-lr 4e-3 --pool 24 --heldout 0 --keep 0 1 "
       "--prompts 6 --group 4 --steps 4 --lr 0.02 --micro-batch 5 --no-fast --device cpu").split()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


@pytest.fixture
def run(base, tmp_path, monkeypatch):
    """run(name, *flags): a run of the job -> the metrics of its steps, without times."""
    monkeypatch.setattr("run.base.CACHE", base)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Addition, "reward", lambda self, problem, text: float(sum(map(ord, text)) % 2))

    def go(name, *flags, resume=False):
        where = ("--resume", name) if resume else (*JOB, "--out", name)
        assert train_rl.main([*where, *flags]) == 0
        rows = [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        times = "t_rollout", "t_train", "tokens_per_s"
        return [{k: v for k, v in r.items() if k not in times} for r in rows if "step" in r]
    return go


@pytest.fixture
def steps(monkeypatch):
    """A list that grows with each step: its Batch, after it was learned from."""
    seen, act = [], train_rl.act
    monkeypatch.setattr(train_rl, "act", lambda *args: seen.append(act(*args)) or seen[-1])
    return seen


# --- which weights


TOKENS = torch.randint(0, 258, (3, 12), generator=torch.Generator().manual_seed(0))


def says(model):
    """Log-probs of some tokens under the model as it computes them now."""
    where = torch.ones_like(TOKENS, dtype=torch.bool)
    where[:, 0] = False
    with torch.no_grad():
        return model.token_logprobs(TOKENS, where)[0]


@pytest.mark.parametrize("flags", [(), ("--rollout-precision", "bf16")], ids=["fp16", "two formats"])
def test_both_sides_compute_with_the_newest_weights(run, monkeypatch, flags):
    """Whenever the policy acts or learns, it says what numerics say that have rounded its weights just now."""
    found, act, learn = [], train_rl.act, train_rl.learn

    def look(side, model):
        num, before = model.num, says(model)
        newest = says(model.use(Numerics(num.fmt).hold(model.parameters())))
        model.use(num)
        assert torch.equal(before, newest), f"{side}, {num.fmt.name}: old weights"
        found.append((side, num.fmt.name, before))

    def watched_act(sampler, *args):
        look("acting", sampler.model)
        return act(sampler, *args)

    def watched_learn(model, *args, **kw):
        if "meter" in kw:                                       # not in the rehearsal
            look("learning", model)
        return learn(model, *args, **kw)
    monkeypatch.setattr(train_rl, "act", watched_act)
    monkeypatch.setattr(train_rl, "learn", watched_learn)
    run("newest", "--updates-per-batch", "2", *flags)
    both = "bf16" if flags else "fp16", "fp16"
    assert [f[:2] for f in found] == 4 * [("acting", both[0]), *2 * [("learning", "fp16")]]
    for side in ("acting", "learning"):                         # ... and the policy did change all the time
        said = [x for s, _, x in found if s == side]
        assert not any(torch.equal(a, b) for a, b in zip(said, said[1:]))


@pytest.mark.parametrize("flags", [(), ("--lora-rank", "2")], ids=["all weights", "adapters"])
def test_the_reference_is_the_policy_before_rl(run, flags):
    """KL[pi || reference] is 0 in the first step, but for sums in another order, and not in a later one."""
    first, *later = run("reference", "--kl-beta", "0.01", *flags)
    assert first["kl_reference"] < 1e-9 and all(m["kl_reference"] > 1e-4 for m in later)


def test_the_old_policy_is_the_one_before_the_first_update(run, steps):
    """With a narrow band all that has moved is outside of it: in the second of two updates nearly all tokens, in the
    first one none."""
    flags = "--precision fp32 --old-policy recomputed --clip 1e-5 1e-5".split()
    for m, batch in zip(run("old", *flags, "--updates-per-batch", "2"), steps):
        second = float(batch.rollout.is_answer[12:].sum() / batch.rollout.is_answer.sum())
        assert 0.8 * second < m["clipped_share"] < second + 1e-6
    assert all(m["clipped_share"] == 0 for m in run("one", *flags))


# --- one step


@pytest.mark.parametrize("flags", [("--old-policy", "rollout"), ("--old-policy", "recomputed", "--updates-per-batch", "2")],
                         ids=["rollout", "recomputed"])
def test_a_temperature_counts_on_both_sides(run, flags):
    """In FP32 the log-probs of rollout and training differ by rounding errors, at any temperature; and the answers do
    depend on it."""
    hot, cool = (run(t, "--precision", "fp32", "--temperature", t, "--steps", "2", *flags) for t in ("1.8", "0.6"))
    assert max(m["logp_gap_max"] for m in hot + cool) < 1e-4
    assert all(a["entropy"] > 1.2 * b["entropy"] for a, b in zip(hot, cool))


def test_each_answer_is_learned_from_once_a_step(run, steps):
    for m, batch in zip(run("shares", "--updates-per-batch", "3", "--steps", "3"), steps):
        assert m["kept_share"] == 1 and m["tokens"] == batch.rollout.is_answer.sum()


def test_advantages_are_those_of_each_problems_own_group(run, steps):
    run("groups")
    for batch in steps:
        A, r = batch.advantage.view(6, 4), batch.rewards
        assert torch.equal(A > 0, (r == 1) & (r.mean(1, keepdim=True) < 1)) and A.sum(1).abs().max() < 1e-6
        texts = batch.rollout.texts()
        for i, (text, stopped) in enumerate(zip(texts, batch.rollout.stopped)):
            assert batch.rewards.flatten()[i] == float(stopped) * (sum(map(ord, text)) % 2)


def test_no_two_answers_have_the_same_random_numbers(run, steps):
    """One problem, asked again and again of a policy that stands still: in a group, in chunks of two groups, in place
    of groups that agree, in another step. If two answers shared their numbers they would be the same."""
    run("numbers", "--pool", "1", "--lr", "1e-12", "--rollout-rows", "8", "--dynamic-sampling", "3")
    assert max(len(batch.seen) for batch in steps) > 6                      # some groups were replaced
    texts = [text for batch in steps for text in batch.rollout.texts() if len(text) > 5]
    assert len(set(texts)) == len(texts) > 20


def test_accuracy_counts_every_answer_of_the_step(run, steps):
    """... those of groups that dynamic sampling has replaced as well."""
    rows = run("accuracy", "--dynamic-sampling", "3", "--group", "2")
    for m, batch in zip(rows, steps):
        assert m["accuracy"] == pytest.approx(float((batch.seen == 1).float().mean()))
        assert m["reward"] == pytest.approx(float(batch.rewards.mean()))
    assert any(m["accuracy"] != m["reward"] for m in rows)


def test_a_skipped_update_uses_up_no_learning_rate(run):
    """A scale of 2^26 overflows until it has been halved a few times. The warm-up begins after that."""
    rows = run("skips", "--init-scale", str(2.0 ** 26), "--steps", "9")
    skipped = [0, *(m["skipped_steps"] for m in rows)]
    assert skipped[2] == 2 and skipped[-1] < 7
    cfg = train_rl.Config(steps=9, lr=0.02)
    assert [m["lr"] for m in rows] == [train_rl.learning_rate(cfg, i - n) for i, n in enumerate(skipped[:-1])]


# --- a resumed run


def test_a_resumed_run_is_the_whole_run(run, tmp_path):
    """Six steps at once, and three that are continued: the same log, weights and moments, bit for bit. Everything is
    at work that a run has to remember: a loss scale that has fallen, problems drawn as they were needed, a reference,
    several updates a step."""
    flags = ["--kl-beta", "0.01", "--init-scale", str(2.0 ** 24), "--dynamic-sampling", "2", "--updates-per-batch", "3",
             "--lr-schedule", "constant", "--save-every", "3"]
    whole = run("whole", *flags, "--steps", "6")
    run("parts", *flags, "--steps", "3")
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as f:
        f.write(json.dumps(whole[3] | dict(accuracy=-1)) + '\n{"step": 99, "rew')         # what a killed run leaves
    parts = run("parts", "--steps", "6", resume=True)
    assert whole[2]["skipped_steps"] > 0 and whole[2]["kl_reference"] > 1e-6
    assert parts == whole
    a, b = (load_checkpoint(tmp_path / x) for x in ("whole", "parts"))
    assert all(torch.equal(a["model"][n], b["model"][n]) for n in a["model"])
    a, b = a["optimizer"]["state"], b["optimizer"]["state"]
    assert all(torch.equal(a[i][k], b[i][k]) for i in a for k in a[i])


def test_what_an_edit_draws_is_the_same_after_a_resume(run, monkeypatch):
    """Nothing here draws from torch's own generator. What you add may, dropout for instance: it is
    a function of the step, and a resumed run goes on bit for bit."""
    drawn, act = [], train_rl.act

    def drawing(*args):
        drawn.append(float(torch.rand(1)))
        return act(*args)
    monkeypatch.setattr(train_rl, "act", drawing)
    run("whole")
    run("parts", "--steps", "2")
    run("parts", "--steps", "4", resume=True)
    assert drawn[4:] == drawn[:4] and len(set(drawn)) == 4


def test_a_run_that_is_done_says_so(run, capsys):
    run("done", "--steps", "2")
    assert "training on 24 problems" in capsys.readouterr().out
    run("done", resume=True)
    said = capsys.readouterr().out
    assert "\nall 2 steps are done; to go on: --resume done --steps 4\n" in said
    assert "training on" not in said and "no verdict" in said


def test_choosing_is_shown_to_its_end_in_lines_that_fit(run, capsys):
    """24 problems, 7 at a time: 29 %, 58 %, 88 %, 100 %."""
    run("choosing", "--keep", "0.01", "0.99", "--rollout-rows", "112", "--steps", "1")
    said = capsys.readouterr().out
    shares = [line.split()[1] for line in said.splitlines() if line.startswith("  choosing ")]
    assert shares == ["29%", "58%", "88%", "100%"]
    for begin in ("preset cpu: ", "no verdict: "):
        paragraph = said[said.index(begin):].splitlines()
        assert paragraph[1].startswith("  ") and max(map(len, paragraph[:2])) <= 100
