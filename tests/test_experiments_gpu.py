"""experiments.gpu without a GPU: all of it at toy sizes, its command on made-up parts, and what it asks of a device on
tensors in half precision."""
import importlib.util
import json
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from conftest import Native

from experiments import command, gpu, probe
from operators.code import ROOT
from precision import InputError

# Parts whose rows do well, raise, hang with a process of their own, die, lack a package
FAKE = '''
import os, pathlib, subprocess, sys, time
from experiments import gpu

def good(row, quick):
    gpu.note(figures={"row": row, "stamp": str(time.time()), "all of it": {"a": 1}})

def bad(row, quick):
    gpu.note(figures={"before": 1.0})
    if row == "lacks":
        import no_such_package
    if row == "hangs":
        subprocess.run([sys.executable, "-c", "import time\\nwhile 1: open('ticks', 'a').write('.'); time.sleep(0.05)"])
    if row == "dies":
        os.kill(os.getpid(), 11)
    with gpu.trying("a piece"):
        raise RuntimeError("an illegal memory access")
    gpu.note(figures={"after": 2.0})
    raise ValueError("no good")

gpu.PARTS = {"first": (good, dict(one=60, two=60)), "bad": (bad, dict(raises=60, hangs=15, dies=60, lacks=60)),
             "last": (good, dict(three=60))}
gpu.CHILD = [sys.executable, __file__, "--row"]
if __name__ == "__main__":
    gpu.main()
'''


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A machine with a GPU, as far as the command asks, and the parts above -> a run of it."""
    for name in ("PARTS", "CHILD"):
        monkeypatch.setattr(gpu, name, getattr(gpu, name))                     # put back afterwards
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Toy GPU 3-000")
    monkeypatch.setattr(command, "machine", lambda: dict(machine="a toy"))
    monkeypatch.setattr(command, "picture", lambda path, draw, *what: None)
    (tmp_path / "fake.py").write_text(FAKE)
    spec = importlib.util.spec_from_file_location("fake", tmp_path / "fake.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))

    def again(*flags):
        status = gpu.main([*flags, "--out", str(tmp_path)])
        return status, json.loads((tmp_path / "gpu-Toy-GPU-3-000.json").read_text())["result"]
    return again


def test_a_failure_hides_nothing_of_the_others(toy, tmp_path, capsys):
    """What raises, hangs, dies or lacks something says so, in the file and in the table; what it had found is kept;
    and what it had started is stopped."""
    begin = time.time()
    status, parts = toy()
    said = capsys.readouterr().out
    assert status == 1 and time.time() - begin < 60
    assert [parts["first"][r]["figures"]["row"] for r in ("one", "two")] == ["one", "two"]
    assert parts["last"]["three"]["figures"]["row"] == "three" and not parts["last"]["three"]["failed"]
    raises, hangs, dies, lacks = (parts["bad"][r] for r in ("raises", "hangs", "dies", "lacks"))
    assert raises["figures"] == dict(before=1, after=2) and set(raises["failed"]) == {"a piece", "raises"}
    assert raises["failed"]["a piece"][-1] == "RuntimeError: an illegal memory access"
    assert "ValueError: no good" in said and "RuntimeError: an illegal memory access" in said
    assert hangs["failed"]["the process"][0] == "stopped after 15 seconds" and hangs["figures"] == dict(before=1)
    assert 15 <= hangs["seconds"] < 30 and "stopped after 15 seconds" in said
    assert dies["failed"]["the process"][0] == "exit status -11" and dies["figures"] == dict(before=1)
    assert not lacks["failed"] and "no_such_package" in lacks["lacks"]["lacks"]
    assert "bad, lacks: left out: lacks: No module named 'no_such_package'" in said
    ticks = tmp_path / "runs" / "bad-hangs" / "ticks"
    size = ticks.stat().st_size
    time.sleep(0.5)
    assert 0 < size == ticks.stat().st_size                                    # what it had started is gone
    assert "stamp" in said and "all of it" not in said and "left: " not in said
    log = (tmp_path / "runs" / "bad-raises" / "log.txt").read_text()
    assert [line[:9] for line in log.splitlines()].count("Traceback") == 2


def stamps(parts):
    return {row: r["figures"]["stamp"] for part in ("first", "last") for row, r in parts[part].items()}


def test_what_is_done_is_not_done_again(toy, monkeypatch, capsys):
    status, before = toy("--only", "first")
    assert status == 0 and before["bad"] == before["last"] == {}
    _, after = toy("--only", "first", "last")
    assert stamps(before).items() < stamps(after).items() and set(stamps(after)) == {"one", "two", "three"}
    assert stamps(toy("--only", "first", "last")[1]) == stamps(after)
    monkeypatch.setattr(gpu, "SOURCES", "others")
    capsys.readouterr()
    _, others = toy("--only", "last")
    said = capsys.readouterr().out
    assert "first, one: of other sources than these" in said and "last, three: of other" not in said
    changed = {row for row in stamps(others) if stamps(others)[row] != stamps(after)[row]}
    assert changed == {"three"}


def test_what_failed_is_tried_again_after_all_others(toy, monkeypatch):
    ran = []

    def run(part, row, limit, folder, quick):
        ran.append(row)
        failed = {"x": ["y"]} if row == "one" else {}
        return dict(figures={} if row == "lacks" else {"a": 1}, failed=failed, lacks={}, seconds=1.0, sources=gpu.SOURCES)
    monkeypatch.setattr(gpu, "run", run)
    toy("--only", "first", "bad")
    assert ran == ["one", "two", "raises", "hangs", "dies", "lacks"]
    ran.clear()
    toy()
    assert ran == ["three", "one", "lacks"]


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_three_times_nine_minutes_hold_all(share, monkeypatch, tmp_path, capsys):
    """Even if each row takes all that it may. A row that would not end in time does not begin, a shorter one does."""
    now, ran = [0.0], []

    def run(part, row, limit, folder, quick):
        now[0] += share * limit + 0.5
        ran.append((part, row))
        return dict(figures={"a": 1}, failed={}, lacks={}, seconds=1.0, sources=gpu.SOURCES)
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu.time, "time", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Toy")
    monkeypatch.setattr(command, "machine", dict)
    monkeypatch.setattr(command, "picture", lambda *_: None)
    every = [(part, row) for part, (_, rows) in gpu.PARTS.items() for row in rows]
    for _ in range(3):
        begin = now[0]
        gpu.main(["--minutes", "9", "--out", str(tmp_path)])
        said = capsys.readouterr().out
        assert now[0] - begin <= 9 * 60 + 20
        left = [f"{part} {row}" for part, row in every if (part, row) not in ran]
        assert ("left: " in said) == bool(left) and all(x in said.split("left: ")[-1] for x in left)
    assert sorted(ran) == sorted(every) and ran[:2] == every[:2]
    if share == 0.5:
        assert ran == every                                        # most valuable first
    monkeypatch.setattr(gpu, "SOURCES", "others")
    gpu.main(["--minutes", "0", "--out", str(tmp_path)])
    assert len(ran) == len(every) and all(f"{part} {row}" in capsys.readouterr().out for part, row in every[:1])


def test_no_gpu_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no GPU; --quick") as e:
        gpu.main([])
    assert "\n" not in str(e.value)


def test_without_tiktoken_the_probe_runs_and_the_others_say_it(monkeypatch, tmp_path, capsys):
    code = "import sys; sys.modules['tiktoken'] = None; from experiments import gpu; gpu.main(sys.argv[1:])"

    def row(part, name):
        done = subprocess.run([sys.executable, "-c", code, "--row", part, name, "--quick"], cwd=ROOT,
                              capture_output=True, text=True, check=True)
        return gpu.noted(done.stdout)
    found = row("probe", "products")
    assert found["figures"]["fp32: error of transposed mm"] < 1e-6 and "lacks" not in found
    for part, name in (("tests", "pytest"), ("job", "default"), ("promises", "exact"), ("mismatch", "8 layers, random"),
                       ("speed", "0.9M"), ("memory", "0.5B")):
        assert "tiktoken" in row(part, name)["lacks"][name]


def test_all_parts_at_toy_sizes(tmp_path, capsys):
    """Every part runs, in the order of its worth, and leaves figures, the table and a picture; then all is done."""
    for package in ("safetensors", "transformers", "trl"):
        pytest.importorskip(package)
    assert gpu.main(["--quick", "--out", str(tmp_path)]) == 0, capsys.readouterr().out[-3000:]
    (path,) = tmp_path.glob("gpu-*.json")                              # its name is the device's
    said, text = capsys.readouterr().out, path.read_text()
    report = json.loads(text)
    assert {"command", "torch", "machine", "git", "date"} < set(report) and "NaN" not in text
    rows = [(part, row, r) for part, rs in report["result"].items() for row, r in rs.items()]
    assert [part for part, _, _ in rows] == [p for p in gpu.PARTS for _ in gpu.FEW.get(p, gpu.PARTS[p][1])]
    assert not [r for r in rows if r[2]["failed"] or r[2]["lacks"] or not r[2]["figures"]]
    of = {row: r["figures"] for _, row, r in rows}
    assert of["attention"]["fp32: same bits, of 20"] == 20 and 0 < of["products"]["fp32: error of cut mm"] < 1e-6
    assert of["pytest"]["passed"] > 4 and not of["pytest"]["failed"]
    assert of["default"]["steps"] == 3 and of["default"]["imitation, s"] >= 0 and "passed" in of["default"]
    assert [of["exact"][f"largest gap, {f}"] for f in ("fp16", "bf16", "fp32")] == [0, 0, 0]
    assert set(of["resume"]) > {"at once", "resumed"} and of["experts"]["experts"]["route_flips"] == 0
    assert of["8 layers, random"]["KL, bf16/fp32"] > 10 * of["8 layers, random"]["KL, fp16/fp32"] > 0
    assert of["8 layers, trained"]["KL, fp16/fp16 exact"] == 0
    assert 0 < of["0.9M"]["8 rows: share of bandwidth"] and of["0.9M"]["TRL's step over ours"] > 0
    assert of["1.5B, LoRA"]["peak, MiB"] > 100 and of["0.5B"]["tokens"] == 32 * 24 and of["0.5B"]["grad_norm"] > 0
    for line in ("copy, GB/s", "KL, fp16/fp16", "share of matrix peak", "peak, MiB"):
        assert line in said
    assert path.with_suffix(".png").stat().st_size > 5_000
    assert gpu.main(["--quick", "--out", str(tmp_path)]) == 0 and path.read_text() == text


def test_a_log_that_was_cut_short():
    """The process was stopped as it wrote: what stands there whole is read."""
    log = 'loss 1.0\n:: {"figures": {"a": 1}}\n:: {"figures": {"b": 2}, "failed": {"x": ["y"]}}\n:: {"figures": {"c'
    assert gpu.noted(log) == dict(figures=dict(a=1, b=2), failed=dict(x=["y"]))


# --- what it asks of a device


@pytest.mark.parametrize("fmt", ["fp16", "bf16", "fp32"])
def test_products_are_held_against_fp64(fmt, monkeypatch):
    found = probe.products(Native(fmt))
    assert set(found) == {"plain", "transposed", "cut"} and all(0 < e < 1e-6 for e in found.values())
    monkeypatch.setattr(probe, "mm32", lambda a, b: (a.float() @ b.float()).half())
    assert all(e > 1e-4 for e in probe.products(Native(fmt)).values())


def test_which_kernel_is_told(monkeypatch):
    """The kernel that torch takes for the step's own tensors; another one inside deterministic mode is seen."""
    small, asked, inside = probe.Probe(Native("fp16"), 4, 20), [], []

    @contextmanager
    def deterministic(device):
        inside.append(device)
        yield
        inside.pop()

    def choice(q, k, v, mask=None, is_causal=False, enable_gqa=False):
        asked.append((tuple(q.shape), tuple(k.shape), mask is None, is_causal, enable_gqa))
        return 1 if inside else 3
    monkeypatch.setattr(probe, "reproducible", deterministic)
    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    assert small.kernels(small.learning) == "cudnn" and len(asked) == 2
    asked.clear()
    assert small.kernels(small.recomputing) == "cudnn, flash" and len(asked) == 4
    assert asked[0] == ((4, 4, 19, 64), (4, 2, 19, 64), True, True, True)
    assert small.kernels(small.decoding) == "cudnn" and len(asked) == 8
    assert asked[-1] == ((4, 2, 2, 64), (4, 2, 21, 64), False, False, False)
    assert not small.model.recompute


def test_other_bits_are_counted(monkeypatch):
    small, turn = probe.Probe(Native("bf16"), 4, 20), []
    assert small.same_bits(4) == 4
    learn = small.learning

    def noisy():
        found, _ = learn(), turn.append(small.model.recompute)
        found[-1].view(-1)[0] += 1e-3 * (len(turn) == 3)
        return found
    monkeypatch.setattr(small, "learning", noisy)
    assert small.same_bits(6) == 5 and turn == [False, True] * 3


def test_what_is_told_of_pytest(monkeypatch, tmp_path, capfd):
    """Tests that pass, fail, fail in a fixture or are skipped, and a file that cannot be read."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_gpu.py").write_text('''
import pytest

@pytest.fixture
def broken():
    raise OSError("no fixture")

def test_wait_for_it():
    print("said")

def test_refuses():
    assert 1 == 2

def test_refuses_too(broken):
    pass

@pytest.mark.skip
def test_refuses_never():
    pass
''')
    (tmp_path / "tests" / "test_cuda.py").write_text("import no_such_package")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert gpu.tests("pytest", False) != 0
    found = gpu.noted(capfd.readouterr().out)
    assert found["figures"] == dict(passed=1, failed=2, skipped=1)
    failed = {name.rpartition("/")[2]: lines for name, lines in found["failed"].items()}
    assert set(failed) == {"test_cuda.py", "test_gpu.py::test_refuses", "test_gpu.py::test_refuses_too"}
    assert all(len(lines) == 1 for lines in failed.values())
