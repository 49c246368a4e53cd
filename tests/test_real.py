"""From a folder written by transformers to a trained model loaded back into it, by the commands that a user types."""
import dataclasses
import json
import re
import shutil

import pytest
import torch

import sample
import train_rl
from hf import weights
from precision import InputError
from run.checkpoint import load_checkpoint

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
T = transformers
FLAGS = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(train_rl.Config)}

TASK = '''
def load(path):
    return [(f"Say something short, number {i}.", "") for i in range(12)]

def reward(problem, text):
    return float(len(text) < 14)
'''
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def folder(path, experts=False):
    """A tiny random Qwen with a tokenizer trained here, as transformers writes them."""
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.train_from_iterator(["Say something short, number one, two and three."] * 3, tokenizers.trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    fast = T.PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                     additional_special_tokens=["<|im_start|>"])
    fast.chat_template = CHATML
    fast.save_pretrained(path)
    size = dict(vocab_size=len(fast), hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=64, max_position_embeddings=256, eos_token_id=fast.eos_token_id, bos_token_id=None)
    torch.manual_seed(0)
    if experts:
        config = T.Qwen3MoeConfig(**size, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                                  norm_topk_prob=True)
    else:
        config = T.Qwen2Config(**size, tie_word_embeddings=True)
    T.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("real")
    folder(path / "qwen")
    folder(path / "moe", experts=True)
    (path / "short.py").write_text(TASK)
    return path


@pytest.fixture
def train(home, monkeypatch, tmp_path):
    """train(name, *flags): a run of train_rl.py in a folder of its own -> (its folder, the metrics of its steps)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("run.base.CACHE", tmp_path / "cache")

    def run(name, *flags, model="qwen"):
        args = ["--model", str(home / model), "--task", str(home / "short.py"), "--out", name,
                *"--heldout 4 --prompts 4 --group 16 --max-answer 14 --steps 3".split()]
        if "--resume" in flags:
            args = []
        train_rl.main([*args, *flags])
        rows = [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return tmp_path / name, [r for r in rows if "step" in r]
    return run


def test_it_learns_and_goes_back_to_transformers(train, home, capsys):
    """A random model hardly ever ends its answer within 14 tokens; after 40 steps it nearly always does. What the run
    leaves is a folder that transformers loads, whose answers are this program's."""
    run, steps = train("full", "--steps", "40", "--lr", "2e-3", "--seed", "1")
    first, last = (sum(m["accuracy"] for m in part) / 5 for part in (steps[:5], steps[-5:]))
    assert first < 0.2 and last > 0.8, (first, last)
    said = capsys.readouterr().out
    assert "largest activation on a prompt" in said and f"{run.name}/model/" in said and "no verdict" in said
    theirs = T.AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    tokenizer = T.AutoTokenizer.from_pretrained(run / "model")
    model, ours, _ = sample.open_model(run, "cpu")
    text = "Say something short, number 3."
    chat = [dict(role="user", content=text)]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    tokens = tokenizer(rendered)["input_ids"]
    assert ours.prompt(text) == tokens
    for name, part in weights.tensors(model):                              # the masters, rounded: what was rolled out
        assert torch.equal(part.half().float(), theirs.get_parameter(name)), name
    again, _, _ = sample.open_model(run / "model", "cpu")
    with torch.no_grad():
        want = theirs(torch.tensor([tokens])).logits[0]
        assert (again.logits(again(torch.tensor([tokens]))[0]) - want).abs().max() < 1e-4
    assert (home / "qwen" / "tokenizer.json").read_bytes() == (run / "model" / "tokenizer.json").read_bytes()


def test_lora_from_the_command_line_to_peft(train, home, capsys):
    """Only adapters are trained and kept; the folder is peft's; a resumed run goes on bit for bit; another base is
    refused."""
    peft = pytest.importorskip("peft")
    flags = "--lora-rank 2 --kl-beta 0.01 --lr 5e-3".split()
    run, steps = train("whole", *flags, "--steps", "4", "--save-every", "2")
    assert steps[0]["kl_reference"] == 0 < steps[-1]["kl_reference"]       # the base alone is the reference
    state = load_checkpoint(run)
    assert all("lora" in n for n in state["model"])
    assert len(state["model"]) == 2 * (1 + 3 + 1 + 1 + 1 + 2 + 1 + 1)      # A and B's of qkv, proj, gate_up, down
    train("parts", *flags, "--steps", "2", "--lr-schedule", "constant")
    train("parts", "--resume", "parts", "--steps", "4")
    again = load_checkpoint(run.parent / "parts")
    assert all(torch.equal(t, again["model"][n]) for n, t in state["model"].items())
    base = T.AutoModelForCausalLM.from_pretrained(home / "qwen")
    adapted = peft.PeftModel.from_pretrained(base, run / "adapter")
    model, tokenizer, _ = sample.open_model(run, "cpu")
    tokens = torch.tensor([tokenizer.prompt("Say something short, number 3.")])
    with torch.no_grad():
        got, want = model.logits(model(tokens)[0]), adapted(tokens).logits[0]
        with adapted.disable_adapter():
            assert (adapted(tokens).logits[0] - want).abs().max() > 1e-3   # it has learned something
    assert (got - want).abs().max() < 2e-3                    # the base was kept in fp16 while the adapters learned
    other = run.parent / "other"
    shutil.copytree(home / "qwen", other)
    model = weights.load(other)
    with torch.no_grad():
        model.embedding.add_(0.1)
    weights.save(other, model, like=home / "qwen", replace=True)
    state["config"]["model"] = str(other)
    torch.save(state, run / "checkpoint.pt")
    with pytest.raises(InputError, match="is not the model that"):
        train("whole", "--resume", "whole", "--steps", "5")
    with pytest.raises(InputError, match="is not the model that"):
        sample.open_model(run, "cpu")


def test_experts_and_their_routes(train):
    """With a coarse rollout some tokens go to other experts in training. Replayed, they do not: the
    mismatch is smaller. Exact mode is exact with experts too, where the ordinary mode is not."""
    coarse = "--precision", "fp32", "--rollout-precision", "bf16", "--steps", "1"
    _, (free,) = train("free", *coarse, model="moe")
    _, (replayed,) = train("replayed", *coarse, "--replay-routing", model="moe")
    assert 0 < free["route_flips"] < 0.1 and free["expert_balance"] >= 1
    assert free["tokens"] == replayed["tokens"]                            # the same answers
    assert 0 < replayed["kl_k3"] < 0.95 * free["kl_k3"]
    assert replayed["logp_gap_max"] < 0.8 * free["logp_gap_max"]
    _, ordinary = train("ordinary", "--steps", "1", model="moe")
    _, exact = train("exact", "--steps", "2", "--exact", "--updates-per-batch", "2", model="moe")
    assert exact[0]["route_flips"] == 0 == exact[-1]["logp_gap_max"] < ordinary[0]["logp_gap_max"]


def test_problems_of_a_file(train, home, tmp_path, capsys):
    rows = [{"question": f"What is {i} and one?", "answer": f"Well. #### {i + 1}"} for i in range(20)]
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run, steps = train("g", "--task", "gsm8k", "--data", str(tmp_path / "g.jsonl"), "--heldout", "5", "--steps", "1")
    state = load_checkpoint(run)
    asked = {p[0] for p in state["problems"]} | {p[0] for p in state["heldout"]}
    assert len(asked) == 20 == len(state["problems"]) + len(state["heldout"]) and len(state["heldout"]) == 5
    assert all(m["accuracy"] == 0 for m in steps)
    sample.main(["--model", str(run), "--eval", "--n", "2", "--problems", "3", "--data", str(tmp_path / "g.jsonl")])
    assert "gsm8k, 3 problems x 2 tries" in capsys.readouterr().out
    sample.main(["--model", str(home / "qwen"), "--prompt", "Say something.", "--max-new-tokens", "5", "--json"])
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 5
    sample.main(["--model", str(run), "--save", "out", "--save-precision", "bf16"])
    assert T.AutoModelForCausalLM.from_pretrained("out", dtype="auto").dtype == torch.bfloat16


def test_a_problem_that_does_not_fit_the_model_is_refused(train, tmp_path):
    """The longest prompt and the longest answer together are what the model must hold; no problem is left out."""
    rows = [{"question": f"What is {i}?{' really' * (200 if i == 7 else 0)}", "answer": "#### 1"} for i in range(20)]
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(InputError, match="of prompt and answer are more than the 256 that .* lower --max-answer") as e:
        train("g", "--task", "gsm8k", "--data", str(tmp_path / "g.jsonl"), "--heldout", "5", "--steps", "1")
    assert "\n" not in str(e.value) and not (tmp_path / "g").exists()
    assert set(re.findall("--[a-z-]+", str(e.value))) <= FLAGS


@pytest.mark.parametrize("flags, words", [
    ("--task gsm8k", "--task gsm8k needs a model that can read: --model FOLDER"),
    ("--task gsm8k --model qwen", "--data"),
    ("--task gsm9k", "no task 'gsm9k', did you mean gsm8k"),
    ("--model nowhere", "nowhere/config.json is not there: a model is a folder with"),
    ("--model qwen --prompt-form llama3", "llama3"),
    ("--model qwen --replay-routing", "--replay-routing: this model has no experts"),
    ("--model qwen --max-answer 300", "more than the 256 that"),
    ("--replay-routing", "--replay-routing would have no effect: it counts for models with experts"),
    ("--max-answer 20", "--max-answer would have no effect: it counts with --model"),
    ("--model qwen --width 64", "--width would have no effect: it counts without --model"),
    ("--model qwen --noise 0.1", "--noise would have no effect: it counts for the tasks .* without --model"),
    ("--model qwen --task gsm8k --digits 2", "--digits would have no effect: it counts for the tasks addition"),
    ("--n-experts 1", "2 of 1 experts cannot be"),
])
def test_what_cannot_be_is_one_line(flags, words, home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr("data.FETCHED", tmp_path)                                   # no data set was fetched
    with pytest.raises(InputError, match=words) as e:
        train_rl.main([*flags.split(), *"--pool 8 --heldout 0 --prompts 2 --out".split(), str(tmp_path / "run")])
    assert "\n" not in str(e.value) and not (tmp_path / "run").exists()
    assert set(re.findall("--[a-z-]+", str(e.value))) <= FLAGS                      # it speaks of flags that there are


def test_a_plan_for_a_real_model(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    task = "--model", "qwen", "--task", "short.py", "--heldout", "0", "--max-answer", "20"
    totals = []
    for flags in (("--no-recompute",), (), ("--lora-rank", "4")):
        train_rl.main([*task, "--plan", *flags])
        said = capsys.readouterr().out
        totals.append(float(said.split(" MiB  in all")[0].split()[-1]))
    assert totals[1] < totals[0] and "frozen weights" in said
