"""The device as the program sets it up, with a GPU simulated down to torch's own checks."""
from types import SimpleNamespace

import pytest
import torch

from operators.device import pick_device, reproducible
from precision import InputError


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0", "cuda:1"])
def test_a_cuda_device_has_an_index(name, monkeypatch):
    """torch.cuda.set_device refuses torch.device("cuda"): the plain command stopped on every GPU."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device",
                        lambda d: chosen.append(torch.cuda._utils._get_device_index(d)))
    device = pick_device(name)
    assert device.type == "cuda" and [device.index] == chosen == [1 if name == "cuda:1" else 0]
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    assert not torch.backends.cuda.cudnn_sdp_enabled()              # one backend in and out of deterministic mode


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "mps", "gpu0", "x" * 500])
def test_a_missing_device_is_one_clear_line(name):
    with pytest.raises(InputError, match="device") as e:
        pick_device(name)
    assert len(str(e.value)) < 200


@pytest.mark.parametrize("before, warn, fill", [(False, False, True), (True, True, True), (True, False, False)])
def test_the_users_own_determinism_comes_back(before, warn, fill):
    deterministic = torch.utils.deterministic
    try:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        deterministic.fill_uninitialized_memory = fill
        with pytest.raises(KeyError), reproducible(SimpleNamespace(type="cuda")):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert not deterministic.fill_uninitialized_memory
            raise KeyError
        assert torch.are_deterministic_algorithms_enabled() == before
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn
        assert deterministic.fill_uninitialized_memory == fill
    finally:
        torch.use_deterministic_algorithms(False)
        deterministic.fill_uninitialized_memory = True
