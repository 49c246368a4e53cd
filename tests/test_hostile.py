"""Hostile data: JSON Lines, model folders, tokenizers and task files that are damaged, wrong or meant to harm. Whatever
comes in, the outcome is one clear line or a right result, soon, and nothing is read outside of what was named.

    TENBIT_HOSTILE=10000 pytest -n 0 -s tests/test_hostile.py        # that many cases, other ones each time
"""
import collections
import json
import math
import os
import pickle
import shutil
import signal
import time
import traceback
from contextlib import contextmanager

import pytest
import torch
from conftest import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sample
import train_rl
from data import Problem, draw_problems, load_problems, own, stream
from data.env import Env
from data.tasks import make_task
from hf import weights
from hf.tokenizer import load_tokenizer
from precision import InputError
from run.base import load_task, open_model
from run.problems import choose_problems

st_lib = pytest.importorskip("safetensors.torch")
pytest.importorskip("tokenizers")
LONG = int(os.environ.get("TENBIT_HOSTILE", 0))
CASES = LONG or 600
SECONDS = 20                            # that one case may take on a busy machine
OUTCOMES = collections.Counter()


def share(part):
    """The settings of a property that gets this part of the cases. Without TENBIT_HOSTILE they are always the same."""
    return settings(max_examples=max(10, int(part * CASES)), deadline=None, derandomize=not LONG, database=None,
                    suppress_health_check=list(HealthCheck))


def outcome(kind, call, *args):
    """-> (what `call` gives, None), or (None, what it says) where it refuses: an InputError of one short line. Anything
    else fails the test, and so does what takes long."""
    def late(*_):
        raise TimeoutError(f"{kind}: no end within {SECONDS} s")
    before, begin = signal.signal(signal.SIGALRM, late), time.time()
    signal.alarm(SECONDS)
    try:
        got, said = call(*args), None
    except InputError as e:
        got, said = None, str(e)
        assert 5 < len(said) <= 300 and "\n" not in said and "Traceback" not in said, said[:1000]
    except BaseException as e:                             # told here: pytest would print the hostile objects
        raise AssertionError("".join(traceback.format_tb(e.__traceback__)) + type(e).__name__) from None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert time.time() - begin < SECONDS, said
    OUTCOMES[f"{kind}: {'refused' if said else 'taken'}"] += 1
    return got, said


def refused(words, call, *args):
    """It is refused with these words."""
    _, said = outcome("corpus", call, *args)
    assert said and words in said, said or "taken"


@pytest.fixture(scope="module", autouse=True)
def counted():
    """Peak memory stays small over all cases. With TENBIT_HOSTILE the outcomes are printed."""
    import resource
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    if LONG:
        print(f"\n{sum(OUTCOMES.values())} cases, {grown} MiB more at the peak: {dict(sorted(OUTCOMES.items()))}")
    assert grown < 1500


# --- values and damage

NUMBERS = [0, -1, 1, 2, 2.5, 16.0, 10 ** 5, 10 ** 12, 10 ** 30, -10 ** 30, 1e-300, 1e300, math.nan, math.inf, True, False]
TEXTS = ["", "16", "x", "\ud800", "\0", "x" * 10 ** 5, "../../etc/passwd", "{}", "\n\n", "١٦", "default", "linear"]
DEEP = json.loads("[" * 500 + "]" * 500)
VALUES = st.one_of(st.sampled_from([None, *NUMBERS, *TEXTS, [], {}, [[]], {"a": {}}, [1, "a"], DEEP]),
                   st.integers(-10, 300), st.floats(), st.text(max_size=8))


@st.composite
def damaged(draw, content):
    """Bytes with an edit or two."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 2))):
        at, junk = draw(st.integers(0, len(content))), draw(st.binary(max_size=4) | st.just(b"[" * 3000))
        kind = draw(st.sampled_from("cut put drop twice".split()))
        if kind == "cut":
            del content[at:]
        elif kind == "put":
            content[at:at + len(junk)] = junk
        elif kind == "drop":
            del content[at:at + 9]
        else:
            content[at:at] = content[:at]
    return bytes(content)


def places(tree, draw):
    """A place in a JSON tree: the list or dict that holds it, and its key."""
    while True:
        key = draw(st.sampled_from(sorted(tree) if isinstance(tree, dict) else range(len(tree))))
        inner = tree[key]
        if not (isinstance(inner, (dict, list)) and inner) or draw(st.integers(0, 3)) == 0:
            return tree, key
        tree = inner


# --- JSON Lines

WORDS = st.text(st.characters(), max_size=12) | st.sampled_from(
    [*TEXTS[:9], "1+2=", "3,4,7=25:", "#### 7", "\\boxed{7}", "0,0=0:", "9999999,1=2:"])
FIELD = WORDS | VALUES | st.recursive(VALUES, lambda x: st.lists(x, max_size=3) | st.dictionaries(WORDS, x, max_size=3))
ROW = FIELD | st.dictionaries(st.sampled_from("question problem prompt answer solution more".split()), FIELD, max_size=5)
GOOD = dict(gsm8k=("q", "#### 7"), math=("q", "\\boxed{7}"), countdown=("3,4,7=25:", "x"), addition=("1+2=", "3"))


@st.composite
def lines_of(draw, name):
    good = json.dumps(dict(zip(("question", "answer"), GOOD[name])))
    rows = [good if draw(st.integers(0, 2)) else json.dumps(draw(ROW)) for _ in range(draw(st.integers(0, 4)))]
    content = draw(st.sampled_from(["\n", "\r\n", "\n\n", "\r"])).join(rows).encode()
    content = draw(st.sampled_from([content, content, b"\xef\xbb\xbf" + content, content.decode().encode("utf-16")]))
    return draw(damaged(content)) if draw(st.integers(0, 2)) == 0 else content


@share(0.35)
@given(st.data())
def test_json_lines(tmp_path_factory, data):
    name = data.draw(st.sampled_from(sorted(GOOD)))
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(data.draw(lines_of(name)))
    problems, _ = outcome("lines", make_task(name, 3, 0.1).load, str(path))
    for p in problems or ():
        assert type(p) is Problem and type(p.prompt) is type(p.answer) is str and p.prompt.strip()
        assert p.prompt.encode() is not None is not p.answer.encode()


def lines(prompts, answer="x"):
    return "".join(json.dumps(dict(prompt=p, answer=answer)) + "\n" for p in prompts).encode()


@pytest.mark.parametrize("content, words", [
    (lines(["a" * (50 << 20 if LONG else 5 << 20)])[:-9], "not JSON"),
    (b'{"prompt": "' + b"[" * 10 ** 6, "not JSON"),
    (b"[" * 10 ** 6, "recursion"),
    (b'{"prompt": NaN, "answer": "x"}', "no text under"),
    (b'{"prompt": "a", "answer": 1e999}', "no text under"),
    (b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}", "line 1"),
    (b'{"prompt": "\\ud800", "answer": "x"}', "surrogates not allowed"),
    (lines(["a"]).decode().encode("utf-16"), "not UTF-8"),
    (lines(["a"]) + b"\xff", "not UTF-8 text after line"),
    (b"\x1f\x8b" + bytes(99), "not UTF-8"),
    (b"", "no problems in it"), (b"\n \n", "no problems in it"), (b"\xef\xbb\xbf", "no problems in it"),
])
def test_lines_that_are_refused(content, words, tmp_path):
    (tmp_path / "p.jsonl").write_bytes(content)
    refused(words, load_problems, tmp_path / "p.jsonl")


def test_lines_that_are_right(tmp_path):
    want = [Problem("a", "x"), Problem("é", "x")]
    text = lines(["a", "é"]).decode()
    for content in (text, "\ufeff" + text, text.replace("\n", "\r\n"), text.strip(), "\n\n" + text,
                    text.replace("prompt", "question")):
        (tmp_path / "p.jsonl").write_bytes(content.encode())
        assert load_problems(tmp_path / "p.jsonl") == want


def unreadable(folder):
    """Names of what is no regular file."""
    os.mkfifo(folder / "fifo.py")
    (folder / "loop.py").symlink_to(folder / "loop.py")
    (folder / "dangling.py").symlink_to(folder / "nowhere")
    (folder / "dir.py").mkdir()
    (folder / "zero.py").symlink_to("/dev/zero")
    return [folder / f"{name}.py" for name in "fifo loop dangling dir zero".split()]


def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in [*unreadable(tmp_path), tmp_path / "nowhere.py", tmp_path / ("n" * 300 + ".py"), tmp_path / "file" / "b.py"]:
        refused("cannot read", load_problems, path)
        refused("cannot be read", make_task, str(path))
    with open(tmp_path / "large", "wb") as f:
        f.truncate(1 << 40)                                             # without a byte on the disk
    refused("larger than", load_problems, tmp_path / "large")


def test_a_countdown_file_holds_countdown_problems(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(lines(["3,4,7=25:", "1+2="]))
    refused(f"{path} line 2: '1+2=' is no countdown problem", make_task("countdown", 3, 0.1).load, path)


def test_many_lines_are_quick(tmp_path):
    """200,000 lines took 72 s once. Twice as many take twice as long."""
    path = tmp_path / "p.jsonl"
    path.write_bytes(lines([f"{i}+{i}=" for i in range(100, 1000)] * 111))
    cfg, begin = train_rl.Config(data=str(path), pool=0, heldout="20"), time.time()
    pool, heldout = choose_problems(cfg, Env(make_task("addition", 3, 0.1)))
    assert len(pool) == 900 * 111 and len(heldout) == 20 and time.time() - begin < SECONDS


def test_the_file_is_named_where_the_others_are_drawn(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(lines([f"{a}+{b}=" for a in range(1, 8) for b in range(1, 8)]))
    cfg = train_rl.Config(data=str(path), digits=1)
    refused(f"49 of {path}", choose_problems, cfg, Env(make_task("addition", 1, 0.1)))
    cfg = train_rl.Config(heldout=str(tmp_path / "none"))
    refused("cannot read", choose_problems, cfg, Env(make_task("addition", 3, 0.1)))


# --- model folders

KINDS = dict(qwen2=dict(qkv_bias=True, tied_head=True), qwen3=dict(qk_norm=True), llama={},
             llama3=dict(rope_llama3=(8.0, 1.0, 4.0, 32), rope_theta=5e5),
             moe=dict(n_experts=3, experts_per_token=2, expert_width=8, qk_norm=True, dense_layers=(1,)))
OTHERS = """rope_scaling rope_parameters rope_theta quantization_config layer_types use_sliding_window attention_bias
    mlp_bias partial_rotary_factor mlp_only_layers decoder_sparse_step num_local_experts hidden_act""".split()
ROPE = st.dictionaries(st.sampled_from("type rope_type factor rope_theta low_freq_factor full_attention".split()),
                       VALUES | st.sampled_from("default llama3 linear dynamic yarn".split()), max_size=4)
TOKENS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> a sound folder of it, and what its model says."""
    made = {}
    for kind, more in KINDS.items():
        path = tmp_path_factory.mktemp("folders") / kind
        small = dict(vocab_size=258, n_layers=2, width=16, n_heads=2, n_kv_heads=1, head_dim=8, mlp_width=24, context=64)
        weights.save(path, tiny(**{**small, **more}))
        model = weights.load(path)
        made[kind] = path, model.cfg, model(TOKENS)
    return made


def changed_tensors(draw, path):
    """model.safetensors with a tensor or its header changed."""
    file = path / "model.safetensors"
    how = draw(st.sampled_from("bytes header dtype shape nan missing extra twice pickle zero".split()))
    if how in ("bytes", "header"):
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little") if how == "header" else len(content)
        file.write_bytes(draw(damaged(content[:end])) + content[end:])
        return
    named = st_lib.load_file(file)
    name = draw(st.sampled_from(sorted(named)))
    if how == "dtype":
        kinds = torch.int8, torch.float64, torch.bool, torch.float8_e4m3fn, torch.float16
        named[name] = named[name].to(draw(st.sampled_from(kinds)))
    elif how == "shape":
        named[name] = draw(st.sampled_from([named[name][None], named[name][:-1], named[name].flatten(), named[name][:0]]))
    elif how == "nan":
        named[name].flatten()[draw(st.integers(0, named[name].numel() - 1))] = math.nan
    elif how == "zero":
        named = {n: torch.zeros_like(t) for n, t in named.items()}
    elif how == "extra":
        named[draw(st.sampled_from(["x" * 10 ** 5, "model.layers.7.mlp.down_proj.weight", "\n", ""]))] = torch.zeros(2)
    elif how == "missing":
        del named[name]
    elif how == "pickle":
        file.unlink()
        return (path / "pytorch_model.bin").write_bytes(pickle.dumps(os.system))
    elif how == "twice":
        st_lib.save_file({name: named[name].clone()}, path / "other.safetensors")
    st_lib.save_file({n: t.contiguous() for n, t in named.items()}, file)


def used(path):
    """All that a run asks of a model's folder before it learns."""
    model, tokenizer = weights.load(path), load_tokenizer(path)
    assert weights.described(path)[0] == model.cfg and max(*tokenizer.stop, tokenizer.pad) < model.cfg.vocab_size
    assert all(i < model.cfg.vocab_size for i in tokenizer.prompt("1+1"))
    weights.warn_of_overflow(model, TOKENS % model.cfg.vocab_size, lambda text: None)
    return model


@share(0.35)
@given(st.data())
def test_model_folders(folders, data):
    kind = data.draw(st.sampled_from(sorted(folders)))
    sound, cfg, hidden = folders[kind]
    path = sound.parent / "hostile"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(sound, path)
    how = data.draw(st.sampled_from(["config", "config", "rope", "tensors", "tensors", "raw", "tokenizer"]))
    config = json.loads((path / "config.json").read_text())
    if how == "tensors":
        changed_tensors(data.draw, path)
    elif how == "raw":
        (path / "config.json").write_bytes(data.draw(damaged((path / "config.json").read_bytes())))
    else:
        for _ in range(data.draw(st.integers(1, 2))):
            if how == "rope":
                config[data.draw(st.sampled_from(["rope_scaling", "rope_parameters"]))] = data.draw(ROPE)
            elif how == "config":
                config[data.draw(st.sampled_from([*config, *OTHERS]))] = data.draw(VALUES)
            else:
                config[data.draw(st.sampled_from(["eos_token_id", "pad_token_id", "vocab_size"]))] = data.draw(VALUES)
        (path / "config.json").write_text(json.dumps(config))
    model, _ = outcome(f"folder, {how}", used, path)
    if model is not None and how != "tensors" and model.cfg == cfg:
        assert torch.equal(model(TOKENS), hidden)                       # taken, and right


SIZES = "vocab_size num_hidden_layers hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size".split()


@pytest.mark.parametrize("value", [2.5, "16", 16.0, -1, 0, True, [2], {}, 10 ** 5, 10 ** 12, 10 ** 18, 10 ** 30])
def test_sizes_that_are_none(value, folders, tmp_path):
    """Each size, and the number of experts: refused at once, whatever the number is."""
    for kind in ("llama", "moe"):
        config = json.loads((folders[kind][0] / "config.json").read_text())
        for key in SIZES + ["num_experts", "moe_intermediate_size"] * (kind == "moe"):
            shutil.copytree(folders[kind][0], tmp_path / "m")
            (tmp_path / "m" / "config.json").write_text(json.dumps(config | {key: value}))
            begin = time.time()
            refused("/m/", weights.load, tmp_path / "m")
            assert time.time() - begin < 5
            shutil.rmtree(tmp_path / "m")


@pytest.mark.parametrize("change, words", [
    (dict(rope_scaling=dict(type="linear", factor=2.0)), "two values for the rope's rope_type"),
    (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "two values for the rope's rope_type"),
    (dict(rope_parameters=None, rope_scaling=dict(type="linear", factor=2.0)), "rope type 'linear'"),
    (dict(rope_parameters=None, rope_scaling=dict(factor=2.0)), "has no factor"),
    (dict(rope_parameters=dict(full_attention=dict(rope_type="yarn"))), "has no full_attention"),
    (dict(rope_theta=1.0), "two values for the rope's rope_theta"),
    (dict(rope_theta=-1.0, rope_parameters=None), "no usable value for rope_theta"),
    (dict(rope_theta=math.nan, rope_parameters=None), "rope_theta: nan"),
    (dict(rope_parameters=dict(rope_type="llama3", factor=0, low_freq_factor=1, high_freq_factor=4,
                               original_max_position_embeddings=32)), "no usable value for factor"),
    (dict(rope_parameters=dict(rope_type="llama3", factor=8, low_freq_factor=4, high_freq_factor=4,
                               original_max_position_embeddings=32)), "low_freq_factor: it is not below"),
    (dict(rope_scaling="linear"), "config.json: malformed"),
    (dict(rms_norm_eps=math.nan), "no usable value for rms_norm_eps"),
    (dict(rms_norm_eps=0.0), "no usable value for rms_norm_eps"),
    (dict(max_position_embeddings="64"), "no usable value for max_position_embeddings"),
    (dict(quantization_config="gptq"), "config.json: malformed"),
    (dict(layer_types=3), "config.json: malformed"),
    (dict(model_type=["llama"]), "config.json: malformed"),
    (dict(model_type="x" * 10 ** 6), "known: llama"),
    (dict(num_hidden_layers=10 ** 5), "num_hidden_layers is 100000, and only"),
])
def test_configurations_that_are_refused(change, words, folders, tmp_path):
    shutil.copytree(folders["llama"][0], tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | change))
    refused(words, weights.load, tmp_path / "m")
    refused(words, weights.described, tmp_path / "m", 12)              # what --plan and the rehearsal ask first


def test_a_context_of_a_million_millions_takes_no_memory(folders, tmp_path):
    shutil.copytree(folders["llama"][0], tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | dict(max_position_embeddings=10 ** 12)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert torch.equal(weights.load(tmp_path / "m")(TOKENS), folders["llama"][2])


def test_many_layers_that_are_there_are_quick(tmp_path):
    """The names of 3,000 layers are looked up before one is made; the last tensor is missing."""
    weights.save(tmp_path / "m", tiny(vocab_size=258, n_layers=1, width=16, n_heads=2, n_kv_heads=1, head_dim=8, mlp_width=24))
    named = st_lib.load_file(tmp_path / "m" / "model.safetensors")
    for name in [n for n in named if ".layers.0." in n]:
        named |= {name.replace(".0.", f".{i}.", 1): named[name].clone() for i in range(1, 3000)}
    del named["model.layers.2999.mlp.down_proj.weight"]
    st_lib.save_file(named, tmp_path / "m" / "model.safetensors")
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | dict(num_hidden_layers=3000)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    begin = time.time()
    refused("no tensor model.layers.2999.mlp.down_proj.weight", weights.load, tmp_path / "m")
    assert time.time() - begin < SECONDS


def test_an_index_that_points_outside_is_not_followed(folders, tmp_path):
    """The tensor that is missing stands in a file outside. Deep and surrogate-bearing indices are not read either."""
    shutil.copytree(folders["llama"][0], tmp_path / "m")
    named = st_lib.load_file(tmp_path / "m" / "model.safetensors")
    name = "model.norm.weight"
    st_lib.save_file({name: named.pop(name)}, tmp_path / "outside.safetensors")
    st_lib.save_file(named, tmp_path / "m" / "model.safetensors")
    for index in (json.dumps(dict(weight_map={name: "../outside.safetensors"})), "[" * 10 ** 5, '{"weight_map": "\\ud800"}'):
        (tmp_path / "m" / "model.safetensors.index.json").write_text(index)
        refused(f"has no tensor {name}", weights.load, tmp_path / "m")


def test_a_tensor_in_two_files_is_refused(folders, tmp_path):
    """Which one counts would be chance."""
    shutil.copytree(folders["llama"][0], tmp_path / "m")
    st_lib.save_file({"model.norm.weight": torch.ones(16)}, tmp_path / "m" / "another.safetensors")
    refused("model.norm.weight is in another file as well", weights.load, tmp_path / "m")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                                  "generation_config.json"])
def test_only_regular_files_of_a_folder_are_opened(name, folders, tmp_path):
    for i, other in enumerate(unreadable(tmp_path)):
        path = tmp_path / f"m{i}"
        shutil.copytree(folders["llama"][0], path)
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(other)
        refused(name.partition(".")[2] if name.startswith("model.") else name, used, path)
    with open(tmp_path / "large", "wb") as f:
        f.truncate(1 << 40)
    shutil.copytree(folders["llama"][0], tmp_path / "m")
    (tmp_path / "m" / name).unlink(missing_ok=True)
    (tmp_path / "m" / name).symlink_to(tmp_path / "large")
    refused("m", used, tmp_path / "m")


def test_paths_that_cannot_be(folders, tmp_path, monkeypatch):
    """Names of 300 characters, a file where a folder should be: of --model, and of `sample.py --save`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    sound, (model, *_) = str(folders["llama"][0]), open_model(folders["llama"][0], "cpu")
    for path in ("n" * 300, "n" * 5000, "file", "file/below", "a/" * 2000, "/dev/null"):
        refused("is not there: a model is a folder" if len(path) < 250 else "", weights.load, path)
        refused("", load_task, train_rl.Config(model=path))
        refused("exists already" if path in ("file", "/dev/null") else "cannot write", weights.save, path, model)
    monkeypatch.setattr("sys.argv", ["sample.py"])
    refused("cannot write file/below: Not a directory", sample.main, ["--model", sound, "--save", "file/below"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="asks for another user's rights")
def test_folders_without_permission(folders, tmp_path):
    shutil.copytree(folders["llama"][0], tmp_path / "m")
    model = weights.load(tmp_path / "m")
    for name in ("config.json", "tokenizer.json", "model.safetensors", ""):
        other = tmp_path / "m" / name
        mode = other.stat().st_mode
        other.chmod(0)
        with as_nobody(tmp_path):
            refused("m/" + name if name else "is not there", used, tmp_path / "m")
            refused("cannot write", weights.save, tmp_path / "m" / "below" if not name else tmp_path / "new", model)
        other.chmod(mode)


@contextmanager
def as_nobody(folder):
    """Root may read everything: for a while this process is another user, who can come as far as this folder."""
    root = os.geteuid() == 0
    for path in [folder, *folder.parents][:-2]:
        path.chmod(0o755) if root or path == folder else None
    os.seteuid(65534) if root else folder.chmod(0o555)
    try:
        yield
    finally:
        os.seteuid(0) if root else folder.chmod(0o755)


def test_tokens_beyond_the_vocabulary_are_as_if_not_there(folders, tmp_path):
    """Of a chat form, for padding, and before a text: they were an IndexError in the embedding."""
    from test_tokenizer import CHATML, TEMPLATE, N, load, qwen
    tokenizer, _ = load(tmp_path / "a", qwen(), config=dict(eos_token_id=0, vocab_size=N + 1),
                        tokenizer_config=dict(pad_token=CHATML[1]))
    assert tokenizer.pad < N + 1 == tokenizer.n_vocab
    for more, words in ((dict(tokenizer_config=TEMPLATE), "chat template is of no family"),
                        (dict(config=dict(eos_token_id=N + 2, vocab_size=N)), f"the token {N + 2}, which is not"),
                        (dict(config=dict(eos_token_id=0, vocab_size=N // 2)), "its model knows")):
        config = dict(config=dict(eos_token_id=0, vocab_size=N))
        refused(words, lambda c: load(tmp_path / "b", qwen(), **c), config | more)
        shutil.rmtree(tmp_path / "b")


def test_weights_of_zeros_are_said(folders, tmp_path):
    shutil.copytree(folders["llama"][0], tmp_path / "m")
    named = st_lib.load_file(tmp_path / "m" / "model.safetensors")
    st_lib.save_file({n: torch.zeros_like(t) for n, t in named.items()}, tmp_path / "m" / "model.safetensors")
    model, said = weights.load(tmp_path / "m"), []
    from conftest import numerics
    weights.warn_of_overflow(model.use(numerics("fp16").hold(model.parameters())), TOKENS, said.append)
    assert said == ["warning: every activation on a prompt is 0: are there weights in the files?"]


# --- tokenizers


@share(0.12)
@given(st.data())
def test_tokenizers(tmp_path_factory, data):
    from test_tokenizer import FAMILIES, TEMPLATE
    spec = FAMILIES[data.draw(st.sampled_from(sorted(FAMILIES)))]()
    path = tmp_path_factory.getbasetemp() / "tokenizer"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    config = dict(eos_token_id=0, vocab_size=data.draw(st.sampled_from([1000, 950, None, 10])))
    about = data.draw(st.sampled_from([{}, TEMPLATE, dict(pad_token="a")]))
    for _ in range(data.draw(st.integers(0, 3))):
        tree, key = places(data.draw(st.sampled_from([spec, spec, spec, config])), data.draw)
        if data.draw(st.booleans()):
            tree[key] = data.draw(VALUES)
        else:
            del tree[key]
            if not tree:
                break
    for name, part in (("tokenizer", spec), ("config", config), ("tokenizer_config", about)):
        content = json.dumps(part).encode()
        content = data.draw(damaged(content)) if data.draw(st.integers(0, 9)) == 0 else content
        (path / f"{name}.json").write_bytes(content)

    def use():
        tokenizer = load_tokenizer(path)
        ids = [i for text in ("What is 1+1?", "", "<|im_end|>\n", "\ud800é€") for i in tokenizer.prompt(text)]
        size = json.loads((path / "config.json").read_bytes()).get("vocab_size")
        limit = size if type(size) is int else tokenizer.n_vocab
        assert all(0 <= i < limit for i in [*ids, *tokenizer.stop, tokenizer.pad]) and tokenizer.stop
        assert tokenizer.decode(tokenizer.encode_ordinary("x + 1")).strip() == "x + 1"
    outcome("tokenizer", use)


# --- task files

HARM = """pass|return None|return 7|return float('nan')|return ''|return 'q'|return '\\ud800'|return 'q', 'a'|return []
return [()]|return [('q', 'a')]|return [('q', 'a', 'b')]|return [(b'q', 'a')]|return [(None, None)]|return {'q': 'a'}
return [S('q')] * 2|return [(S('q'), S('a'))]|return S('q')|return (S('q'), S('a'))|return ones(3, 2)|return endless()
return Evil()|return [Evil()]|return Problem('q', 'a')|return [Problem(None, 1)]|return 'x' * 10 ** 6
return [('x' * 10 ** 6, 3)]|return [('q', 'a')] * 50|yield 'q', 'a'|yield 1|1/0|raise Bad|raise Evil
raise BaseException('no')|raise GeneratorExit|raise SystemExit(0)|sys.exit(0)|raise SystemExit|exit()|quit(0)
raise StopIteration|raise KeyError('x' * 10 ** 6)|raise ValueError('a\\nb\\ud800')|raise Two(1, 2)|f()|assert False
import nowhere|raise SyntaxError('x')|raise UnicodeDecodeError('a', b'', 0, 1, 'b')|raise MemoryError|raise OSError(5)
raise ExceptionGroup('a', [ValueError()])|raise InputError('a' * 999)|exec('x = (')|eval('(' * 999)|return lambda: 1
compile('\\0', 'f', 'eval')|return type|return open(__file__)|return (x for x in [1/0])|return range(10 ** 12)
""".strip().replace("\n", "|").split("|")
PRELUDE = '''
import sys
from data import Problem
from precision import InputError
class S(str): pass
class Two(Exception):
    def __init__(self, a, b): pass
class Bad(Exception):
    def __str__(self): raise ValueError
class Evil(BaseException):
    def __iter__(self): return self
    def __next__(self): sys.exit(0)
    def __len__(self): return -1
    def __repr__(self): sys.exit(0)
    def __str__(self): sys.exit(0)
def f(*args): return f()
def endless():
    while True: yield "q", "a"
def ones(*shape):
    import torch
    return torch.ones(shape)
'''
SLOTS = {"load": "path", "prompt": "question", "problem": "rng", "demonstrate": "problem, rng"}
PLAIN = dict(load="return [('q', 'a')]", prompt="return question", problem="return f'{rng.integers(99)}', 'a'",
             demonstrate="return 'a'")


def use(path):
    """All that a run asks of a task before it learns, of whatever it has."""
    task, found = make_task(path), []
    if task.loads:
        found += task.load()
        assert all(type(task.prompt(p.prompt)) is str for p in found)
    if task.draws:
        found += draw_problems(task.measure(), 3, stream(0))
        assert type(task.demonstrate(found[-1], stream(0))) is str
    assert found and type(task.system) is str
    assert all(type(p) is Problem and type(p.prompt) is type(p.answer) is str and p.prompt for p in found)
    return found


@share(0.18)
@given(st.data())
def test_task_files(tmp_path_factory, data):
    harmed = data.draw(st.sampled_from([*SLOTS, "module", "system", "lengths", "arguments", "raw"]))
    bodies, arguments, more = dict(PLAIN), dict(SLOTS), ""
    for name in data.draw(st.lists(st.sampled_from(sorted(SLOTS)), max_size=2, unique=True)):
        del bodies[name]
    harm = data.draw(st.sampled_from(HARM))
    if harmed in SLOTS:
        bodies[harmed] = harm
    elif harmed == "module":
        more = harm.replace("return ", "x = ").replace("yield ", "x = ")
    elif harmed in ("system", "lengths"):
        name = data.draw(st.sampled_from(["system"] if harmed == "system" else ["prompt_length", "answer_length"]))
        more = f"def made():\n    {harm}\n{name} = made()"
    elif harmed == "arguments":
        arguments = dict.fromkeys(SLOTS, data.draw(st.sampled_from(["", "a, b, c", "*, a", "*a"])))
    source = PRELUDE + "".join(f"def {n}({arguments[n]}):\n    {b}\n" for n, b in bodies.items()) + more
    source = (source + "\ndef reward(problem, text): return 1\n").encode(errors="surrogatepass")
    path = tmp_path_factory.getbasetemp() / "task.py"
    path.write_bytes(data.draw(damaged(source)) if harmed == "raw" else source)
    before, own.MOST = own.MOST, 300
    try:
        outcome(f"task, {harmed}", use, str(path))
    finally:
        own.MOST = before
