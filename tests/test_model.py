"""The model against an independent FP64 one, the cache against the full forward, checkpoints against accidents."""
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from conftest import VARIANTS, fused, tiny
from oracle import gpt_logits

from model import GPTConfig, KVCache
from precision import InputError, Numerics
from run.checkpoint import FORMAT_VERSION, STALE, load_checkpoint, load_model, save_checkpoint

TOKENS = torch.randint(0, 67, (5, 20), generator=torch.Generator().manual_seed(3))

# How far a cached forward may be from the full one, mean |difference of log-probs| on these random models. Same
# arithmetic, other order of summation: FP32 differs in its last bits, and a 16-bit format now and then rounds the other
# way. Measured on one CPU with heads of 12, the largest of the three ways to cut: fp32 1.5e-6, tf32 and fp16 2.8e-4,
# bf16 and e5m5 0 (nothing happened to flip). Heads of 32, which the compiled block takes, have 2.7 times as many
# numbers that may flip: fp32 2.0e-6, tf32 and fp16 1.4e-3. How many roundings flip differs between processors, so the
# bounds leave room; a wrong position, mask or cast gives 0.1 and more.
BOUND = {"fp32": 1e-5, "tf32": 1e-3, "fp16": 1e-3, "bf16": 8e-3, "e5m5": 3e-2}
HEADS = {12: BOUND, 32: {f: b if f == "fp32" else 3 * b for f, b in BOUND.items()}}


def logprobs(model, hidden):
    return model.logits(hidden.flatten(0, 1)).log_softmax(-1).view(*hidden.shape[:2], -1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_every_variant_against_fp64(variant, device):
    model = tiny(device, gain=2.0, **VARIANTS[variant])
    with torch.no_grad():
        got = model.logits(model(TOKENS.to(device)).flatten(0, 1)).view(5, 20, -1).cpu().double()
    want = gpt_logits(tiny(gain=2.0, **VARIANTS[variant]), TOKENS)
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("fmt", BOUND)
@pytest.mark.parametrize("pieces", [[20], [1] * 20, [7, 1, 1, 5, 6]], ids=["whole", "one by one", "pieces"])
@pytest.mark.parametrize("head_dim", HEADS)
def test_cached_is_uncached(fmt, pieces, head_dim, device):
    """Prefill in any pieces and decode token by token: the same hidden states as one full causal pass."""
    model = tiny(device, fmt, gain=2.0, head_dim=head_dim, qk_norm=head_dim == 12)
    tokens = TOKENS.to(device)
    with torch.no_grad():
        full = logprobs(model, model(tokens))
        cache = KVCache(model.cfg, 5, 20, model.num)
        parts = [model(part, cache) for part in tokens.split(pieces, 1)]
        gap = (logprobs(model, torch.cat(parts, 1)) - full).abs()
    assert gap.mean() < HEADS[head_dim][fmt] * (4 if fused() else 1), gap.mean()
    assert cache.length == 20 and cache.k.dtype == model.num.dtype


@pytest.mark.parametrize("fmt", ["fp32", "fp16"])
@pytest.mark.parametrize("head_dim", HEADS)
def test_ragged_rows_continue_at_their_own_positions(fmt, head_dim, device):
    """Rows of 3, 9 and 6 tokens, prefilled right-padded, then 4 tokens each: as if each row stood alone."""
    model = tiny(device, fmt, gain=2.0, head_dim=head_dim)
    tokens, lengths = TOKENS[:3].to(device), torch.tensor([3, 9, 6], device=device)
    with torch.no_grad():
        cache = KVCache(model.cfg, 3, 9, model.num)
        real = torch.arange(9, device=device) < lengths[:, None]
        model(torch.where(real, tokens[:, :9], 66), cache)                                  # 66: any padding
        cache = cache.rows(torch.arange(3, device=device), lengths, room=4)
        step = [model(tokens[torch.arange(3, device=device)[:, None], (lengths + t)[:, None]], cache) for t in range(4)]
        for row, n in enumerate(lengths.tolist()):
            alone = logprobs(model, model(tokens[row:row + 1, :n + 4]))[0, n:]
            got = logprobs(model, torch.cat([s[row:row + 1] for s in step], 1))[0]
            assert (got - alone).abs().mean() < 2 * HEADS[head_dim][fmt], row


def test_positions_far_out_are_told_apart():
    """A long sequence against FP64, whose positions are exact: where the tables are not, neighbours blur."""
    kw, tokens = dict(gain=2.0, context=1200, n_layers=1), TOKENS[:1].repeat(1, 60)
    with torch.no_grad():
        got = tiny(**kw)
        got = got.logits(got(tokens)[0]).double()
    want = gpt_logits(tiny(**kw), tokens)[0]
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_an_adapter_adds_its_product():
    """W x + 2 B A x, each projection's own: the logits are those of a model whose weights are W + 2 B A."""
    model, merged, g = tiny(gain=2.0).adapt(3, seed=1), {}, torch.Generator().manual_seed(5)
    for block in model.blocks:
        for product, adapter in block.lora.items():
            parts = []
            for a, B in zip(adapter.A.detach().split(3), adapter.B):
                B.data = torch.randn(B.shape, generator=g) * 0.2
                parts.append(2 * B.detach().double() @ a.double())
            w = getattr(block, product)
            merged[w] = w.detach().double() + torch.cat(parts)
    model.use(Numerics("fp32").hold(model.parameters()))
    with torch.no_grad():
        got = model.logits(model(TOKENS).flatten(0, 1)).view(5, 20, -1).double()
    want = gpt_logits(model, TOKENS, lambda p: merged.get(p, p.detach().double()))
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    assert (gpt_logits(model, TOKENS) - want).abs().max() > 0.1 * want.abs().max()


def test_padding_on_the_right_changes_nothing():
    model = tiny()
    where = torch.zeros(5, 20, dtype=torch.bool)
    where[:, 4:11] = True
    a = model.token_logprobs(TOKENS, where)[0]
    other = TOKENS.clone()
    other[:, 11:] = 5
    assert torch.equal(a, model.token_logprobs(other, where)[0])


def test_too_long_a_sequence_is_refused():
    with pytest.raises(InputError, match="49 tokens do not fit"):
        tiny()(torch.zeros(1, 49, dtype=torch.long))


def test_impossible_shapes_are_refused():
    for kw in (dict(n_heads=4, n_kv_heads=3), dict(head_dim=7)):
        with pytest.raises(InputError):
            GPTConfig(vocab_size=10, **kw)


# --- checkpoints


EXPERTS = dict(n_experts=4, experts_per_token=2, expert_width=12, dense_layers=(1,))


@pytest.mark.parametrize("kw, rank", [(VARIANTS["qwen3"], 0), (EXPERTS, 0), (VARIANTS["qwen2.5"], 3)],
                         ids=["qwen3", "experts", "adapters"])
def test_round_trip(tmp_path, kw, rank):
    model = tiny(**kw)
    if rank:
        model.adapt(rank, seed=5)
    save_checkpoint(tmp_path / "a" / "checkpoint.pt", model, step=3, note={"list": [1, "two"]})
    state = load_checkpoint(tmp_path / "a")
    again = load_model(state, expect=model.cfg)
    assert state["step"] == 3 and state["note"] == {"list": [1, "two"]}
    for (n, p), (m, q) in zip(model.named_parameters(), again.named_parameters()):
        assert n == m and torch.equal(p, q) and q.requires_grad == p.requires_grad and q.dtype == torch.float32
    assert again.lora == (dict(rank=rank) if rank else None)
    model.use(Numerics("fp32").hold(model.parameters()))
    assert torch.equal(model(TOKENS), again(TOKENS))


def test_truncated_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, tiny())
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (whole[:100], whole[:-1], whole[:len(whole) // 2], b"", b"hello", bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(InputError, match="checkpoint|damaged"):
            load_checkpoint(path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="not a checkpoint of this program"):
        load_checkpoint(path)
    torch.save({"tenbit": FORMAT_VERSION - 1}, path)
    with pytest.raises(InputError, match=f"version {FORMAT_VERSION - 1}, this program reads version {FORMAT_VERSION}"):
        load_checkpoint(path)
    with pytest.raises(InputError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "nowhere")


def test_a_pickle_is_never_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    torch.save({"tenbit": FORMAT_VERSION, "x": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_another_shape_is_refused_by_name(tmp_path):
    save_checkpoint(tmp_path / "checkpoint.pt", tiny())
    with pytest.raises(InputError, match="n_layers 3 there, 2 asked for"):
        load_model(load_checkpoint(tmp_path), expect=tiny(n_layers=2).cfg)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, tiny(), step=1)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        save_checkpoint(path, tiny(seed=1), step=2)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder in which nobody can make a file")
def test_a_folder_that_takes_no_file_is_one_line():
    with pytest.raises(InputError, match="cannot write /proc/checkpoint.pt"):
        save_checkpoint("/proc/checkpoint.pt", tiny())


@pytest.mark.skipif(sys.platform != "linux", reason="limits the file size with setrlimit")
def test_a_really_full_disk(tmp_path):
    """The operating system refuses the bytes in the middle of torch's own writing."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, tiny(), step=1)
    before = path.read_bytes()
    code = textwrap.dedent(f"""
        import resource, sys
        sys.path[:0] = [{os.getcwd()!r}, {os.path.dirname(__file__)!r}]
        from conftest import tiny
        from precision import InputError
        from run.checkpoint import save_checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        try:
            save_checkpoint({str(path)!r}, tiny(seed=1), step=2)
        except InputError as e:
            print("refused:", e)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("refused: cannot write"), done.stderr
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")
def test_killed_while_writing(tmp_path):
    """A process that does nothing but write checkpoints is killed eight times, each time in the middle of a write: the
    half file lies there and the checkpoint beside it is the last complete one. What is left must load, be no older than
    the last write that was reported done, and take the next write. Old half files go then; new ones may be somebody
    else's."""
    path = tmp_path / "checkpoint.pt"

    def partial():
        return set(tmp_path.glob("checkpoint.pt.*.partial"))
    code = textwrap.dedent(f"""
        import os, sys
        sys.path[:0] = [{os.getcwd()!r}, {os.path.dirname(__file__)!r}]
        from conftest import tiny
        from run.checkpoint import save_checkpoint
        model = tiny(n_layers=12, width=128, mlp_width=256)
        for i in range(8):
            sys.stdin.readline()
            if os.fork() == 0:                                # the children share one import of torch
                step = 1000 * i
                while True:
                    step += 1
                    save_checkpoint({str(path)!r}, model, step=step)
                    print(os.getpid(), step, flush=True)
            os.wait()
    """)
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              start_new_session=True)
    killed_half_way = 0
    try:
        for i in range(8):
            left = partial()
            parent.stdin.write("next\n")
            parent.stdin.flush()
            pid, done = 0, 0
            while done < 1000 * i + 2 + i % 3:                # lines of the child before may still be in the pipe
                pid, done = map(int, parent.stdout.readline().split())
            while not partial() - left:
                pass
            os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
            killed_half_way += len(partial() - left)
            state = load_checkpoint(path)
            assert state["step"] >= done
            load_model(state)
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()
    assert killed_half_way >= 4
    save_checkpoint(path, tiny(), step=1)
    assert len(partial()) == killed_half_way and load_checkpoint(path)["step"] == 1
    young, *old = partial()
    for p in old:
        os.utime(p, (0, time.time() - STALE - 5))
    save_checkpoint(path, tiny(), step=2)
    assert partial() == {young} and load_checkpoint(path)["step"] == 2
