import os

# pytest runs two processes: threads that spin would slow each other
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest  # noqa: E402
import torch  # noqa: E402

import operators  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from operators.device import pick_device  # noqa: E402
from operators.exact import ExactNumerics  # noqa: E402
from precision import Numerics  # noqa: E402

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ or os.environ.get("OMP_NUM_THREADS") == "1" else 2)
COMPILED = not operators.why_plain("cpu")
DEVICES = ["cpu", "exact", "native"] + ["compiled"] * COMPILED + ["cuda"] * torch.cuda.is_available()
_kind = ["cpu"]

# Files that take longest. They begin first, and the others fill what is left of the two processes.
LONGEST = [f"test_{name}.py" for name in "experiments_gpu lab commands exact silent_bugs compiled sample hf real".split()]


def pytest_configure(config):
    config.option.loadscopereorder = False                  # else xdist begins with the files that have the most tests


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache of base models and compiled operators for all tests that start real commands: the
    small base is made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(params=DEVICES)
def device(request):
    """Every test that takes it runs on the CPU with the plain operators, with the exact ones, in
    half precision through the branches that a GPU takes, with the compiled ones, and on a GPU if
    there is one."""
    _kind[0] = request.param
    yield pick_device("cuda" if request.param == "cuda" else "cpu")
    _kind[0] = "cpu"


def kind():
    """The device fixture's parameter: what the test at hand runs on."""
    return _kind[0]


def fused():
    """Whether attention runs in half precision, and so rounds scores or probabilities as well: the
    bounds of log-probs are wider there."""
    return kind() in ("native", "cuda")


class Native(Numerics):
    """What a GPU runs, on a CPU: tensors in half precision, products, attention and casts of torch in
    that dtype. Slow, and a CPU's sums are not a GPU's; but every branch that asks for `half` or a
    dtype is the GPU's."""
    operators = "native"

    def __init__(self, fmt, device="cpu"):
        super().__init__(fmt, device)
        self.dtype = self.fmt.native or torch.float32
        self.half = self.dtype != torch.float32
        self.emulated = self.fmt.native is None


class NativeExact(Native, ExactNumerics):
    """The same of exact mode."""


# torch has this product, half in and FP32 out, for CUDA alone
PRODUCT = torch.library.Library("aten", "IMPL")
PRODUCT.impl("mm.dtype", lambda a, b, out_dtype: (a.float() @ b.float()).to(out_dtype), "CPU")


def numerics(fmt, device="cpu"):
    """Numerics with the operators that the test is about: what the `device` fixture says."""
    if _kind[0] == "native":
        return Native(fmt, device)
    return operators.numerics(fmt, device, fast=_kind[0] == "compiled", exact=_kind[0] == "exact")


def tiny(device="cpu", fmt="fp32", gain=1.0, seed=0, **kw):
    """A small GPT with random weights, `gain` times as large as at the start of training: a larger
    gain makes sharper, more varied distributions, as trained models have. Heads of 32 features: the
    compiled block takes them on every processor."""
    small = dict(vocab_size=67, n_layers=3, width=48, n_heads=4, n_kv_heads=2, head_dim=32, mlp_width=80, context=48)
    cfg = GPTConfig(**{**small, **kw})
    model = GPT(cfg, device, seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.mul_(10 * gain if name == "head" else gain)
            else:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(7)).to(p) * 0.1)
    return model.use(numerics(fmt, device).hold(model.parameters()))


VARIANTS = {"plain": {}, "one head each": dict(n_kv_heads=4), "qwen2.5": dict(qkv_bias=True, tied_head=True),
            "qwen3": dict(qk_norm=True, head_dim=20)}
