"""operators/compiled.py: a block, the norm, the head's log-probs and the draw of a token, for a
CPU.

`numerics` in operators/__init__.py takes it where there is a C compiler. It is the arithmetic of
precision.py and model.py with their roundings, in block.c, and it adds speed and nothing else: you
can skip this file. What the C code does not know runs plain: adapters, experts, QK-norm, odd head
widths.

What you read is what runs. If precision.py or model.py is not the file that block.c was written
after, or a debugger is at work, nothing of this is used, and the run says so in one line.
"""
import ctypes
import functools
import hashlib
import itertools
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import tempfile

import torch

import model
from operators.code import fingerprint, has_tools
from operators.exact import ExactNumerics
from precision import FORMATS, Numerics

SOURCE = pathlib.Path(__file__).with_name("block.c")

# The code that block.c was written after: file -> `fingerprint` of it. When you change one of these
# files and bring block.c along, bring its number along: `python -m operators.compiled` prints them.
WRITTEN_AFTER = {
    "precision.py": "44d779388093a551",
    "model.py": "a4b58053b20169ab",
    "operators/exact.py": "774a4128f19ee264",
}

# --------------------------------------------------------------------------------------------------
# Is the code that one reads the code that block.c stands for?


def edited():
    """Files that are not what block.c, or operators/exact.py, was written after."""
    return [file for file, known in WRITTEN_AFTER.items() if fingerprint(file) != known]


def why_plain():
    """Why the compiled code may not stand for the plain one, in words; or nothing."""
    for cls in (Numerics, ExactNumerics, model.Block, model.GPT, model.KVCache):
        for name, f in vars(cls).items():                       # replaced while the program runs
            own = cls.__module__, f"{cls.__name__}.{name}"
            if callable(f) and (f.__module__, getattr(f, "__qualname__", "")) != own:
                return f"{cls.__name__}.{name} was replaced"
    try:
        changed = edited()
    except (OSError, SyntaxError):
        return "the source files are not at hand"
    if changed:
        return f"operators/block.c was written after another {' and '.join(changed)}"
    return ""


# --------------------------------------------------------------------------------------------------
# The library: compiled on first use, loaded only if it is whole

# march: x86 says it one way, ARM the other. A product and a sum are contracted to one instruction,
# on all compilers alike. No math-errno: so that sqrtf is an instruction.
FLAGS = "-O3 -ffp-contract=fast -fno-math-errno -shared -fPIC".split()
MARCH = ("-march=native", "-mcpu=native")
TEXT = dict(encoding="utf-8", errors="replace")                         # what a compiler says


@functools.cache
def library(cache):
    """(the compiled block.c, "") or (None, why there is none). Kept in the folder `cache`, one file
    per source, compiler, flags and processor. It takes some seconds the first time."""
    if os.environ.get("TENBIT_FAST") == "0":
        return None, "switched off by TENBIT_FAST=0"
    if os.name == "nt":
        return None, "on Windows the compiled ones have not been tried"
    try:
        compiler = shlex.split(os.environ.get("CC", ""))
        compiler = compiler or [c for c in map(shutil.which, ("cc", "gcc", "clang")) if c][:1]
        if not compiler or not has_tools():
            return None, "no C compiler found"
        asked = subprocess.run([*compiler, "--version"], capture_output=True, timeout=30, **TEXT)
        path = private(cache) / f"block-{key_of(compiler, asked.stdout)}.so"
        seal = path.with_suffix(".sha256")               # a truncated library would end the process
        if not (path.exists() and seal.exists() and seal.read_bytes() == digest(path).encode()):
            compile_c(compiler, path, seal)
        lib = ctypes.CDLL(str(path))
    except (OSError, ValueError, subprocess.SubprocessError) as e:      # ValueError: CC cannot be split
        return None, str(e).splitlines()[0]
    declared = r"^(void|i64) (\w+)\(([^)]*)\)"
    for kind, name, parameters in re.findall(declared, SOURCE.read_text(encoding="utf-8"), re.M):
        f = getattr(lib, name)
        f.restype = {"void": None, "i64": ctypes.c_int64}[kind]
        kinds = dict(float=ctypes.c_float, i64=ctypes.c_int64, format=Format)
        f.argtypes = [ctypes.c_void_p if "*" in p else kinds[p.split()[0]]
                      for p in parameters.split(",") if p != "void"]
    keep_memory()
    return lib, ""


def private(cache):
    """A folder in the cache that only this user can write to: what lies there is loaded as code,
    and others may share the cache."""
    folder = pathlib.Path(cache) / f"compiled-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise OSError(f"{folder} can be written to by others")
    return folder


def key_of(compiler, version):
    try:                                                 # the file holds this very processor's code
        info = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = sorted({x for x in info if x.startswith(("model name", "flags", "Features"))})
    except OSError:
        cpu = [platform.processor()]
    parts = [SOURCE.read_text(encoding="utf-8"), platform.platform(), torch.__version__, torch.__file__,
             version]
    return hashlib.sha256("\n".join(parts + compiler + FLAGS + cpu).encode()).hexdigest()[:12]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compile_c(compiler, path, seal):
    # the very OpenMP library that torch has loaded: two of them would fight over the cores
    libs = pathlib.Path(torch.__file__).parent / "lib"
    openmp = [f for f in sorted(libs.glob("lib*omp*")) if re.match("lib[gi]?omp", f.name)][:1]
    # Apple's clang says it in two words. Without OpenMP one thread runs.
    ways = [[*flag, str(f), f"-Wl,-rpath,{libs}"] for f in openmp
            for flag in (["-fopenmp"], ["-Xclang", "-fopenmp"])]
    message = ""
    for march, threads in itertools.product(MARCH, [*ways, []]):
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            out = pathlib.Path(folder) / path.name
            command = [*compiler, *FLAGS, march, str(SOURCE), "-o", str(out), *threads, "-lm"]
            done = subprocess.run(command, capture_output=True, timeout=120, **TEXT)
            if done.returncode == 0 and out.exists():
                out.with_suffix(".sha256").write_text(digest(out), encoding="utf-8")
                os.replace(out.with_suffix(".sha256"), seal)  # two runs may compile at the same time
                os.replace(out, path)
                return
            message = message or (done.stderr.strip().splitlines() or ["no message"])[0]
    raise OSError(f"{' '.join(compiler)} failed: {message}")


def keep_memory():
    """Let malloc keep what is freed. By default glibc hands large tensors back to the system at
    once, and each new one costs a page fault per 4 KiB: a tenth of a rollout's time."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):                # not glibc
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3        # malloc.h
    mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 32 << 20)  # older ones take 32 MiB at most
    mallopt(trim_threshold, 2 ** 31 - 1)
    mallopt(top_pad, 64 << 20)


# --------------------------------------------------------------------------------------------------
# The structures of block.c


class Format(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("cut", ctypes.c_int32), ("tiny", ctypes.c_float),
                ("big", ctypes.c_float), ("max", ctypes.c_float)]

    @classmethod
    def of(cls, fmt):
        kind = 0 if fmt.name == "fp32" else 1 if fmt.name == "fp16" else 2 if fmt.exp == 8 else 3
        return cls(kind, 23 - fmt.man, fmt.tiny, 2.0 ** 23 * fmt.smallest, fmt.max)


FP32 = Format.of(FORMATS["fp32"])
STRIDES = ctypes.c_int64 * 3


class Shape(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("B", "H", "KV", "Tq", "Tk", "D", "causal")] + [
        (n, STRIDES) for n in ("q", "k", "v", "o", "dout", "dq", "dk", "dv")] + [("mask", ctypes.c_int64 * 2)]


class Layer(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in (
        "norm1", "qkv", "qkv_bias", "proj", "norm2", "gate_up", "down", "qkv_back", "proj_back",
        "gate_up_back", "down_back")] + [
        (n, ctypes.c_int64) for n in ("C", "H", "KV", "D", "F", "exact")] + [("eps", ctypes.c_float)]


class Kept(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in
                ("scale1", "q", "sums", "att", "x2", "scale2", "gate_up")]


def packed(t):
    return t if t.is_contiguous() else t.contiguous()


def or_null(t):
    return None if t is None else t.data_ptr()


# --------------------------------------------------------------------------------------------------
# Numerics


class Compiled(Numerics):
    """Numerics whose block, log-probs and draw are functions of block.c. Weights are kept a second
    time, packed in the order in which products read them; `refresh` packs them anew, in place."""

    operators = "compiled"

    def __init__(self, fmt, lib):
        super().__init__(fmt, "cpu")
        self.lib, self.c_format, self.lanes = lib, Format.of(self.fmt), lib.panel_width()
        self.operators += "" if lib.parallel() else ", one-threaded"            # no OpenMP was found
        self._panels = {}                                    # (master, for the way back?) -> packed
        self._layers = {}                                    # (model.Block, way back?) -> its Layer

    def hold(self, parameters):
        self._panels.clear(), self._layers.clear()           # they point to the weights held before
        return super().hold(parameters)

    def refresh(self):
        super().refresh()
        for (p, back), panels in self._panels.items():
            if p.requires_grad:
                self._pack(p, back, panels)

    @torch.no_grad()
    def _pack(self, p, back, panels=None):
        w = self.weight(p).t() if back else self.weight(p)
        N, K = w.shape
        if panels is None:
            panels = w.new_empty(-(-N // self.lanes) * self.lanes * K)
        self.lib.pack(w.data_ptr(), w.stride(0), w.stride(1), panels.data_ptr(), N, K)
        return panels

    def panels(self, p, back=False):
        """The rounded weight of master p, packed; made on first use."""
        if (p, back) not in self._panels:
            self._panels[p, back] = self._pack(p, back)
        return self._panels[p, back]

    # -- the head

    def logits(self, h, w, back=False):
        """h wᵀ, or back: h w. FP32, not rounded."""
        N, K = w.shape[::-1] if back else w.shape
        h, panels = packed(h), self.panels(w, back)
        y = h.new_empty(len(h), N)
        self.lib.linear(h.data_ptr(), panels.data_ptr(), None, y.data_ptr(), len(h), N, K,
                        torch.get_num_threads(), FP32)
        return y

    def probabilities(self, h, w, targets, temperature):
        p = self.logits(h, w)
        logp, entropy = p.new_empty(2, len(p))
        self.lib.token_logprobs(p.data_ptr(), targets.data_ptr(), temperature, logp.data_ptr(),
                                entropy.data_ptr(), *p.shape)
        return p, logp, entropy

    def logits_gradient(self, p, targets, dlogp, dentropy):
        if dentropy is not None:
            return super().logits_gradient(p, targets, dlogp, dentropy)
        self.lib.token_logprobs_back(p.data_ptr(), targets.data_ptr(), 1.0, packed(dlogp).data_ptr(),
                                     *p.shape, self.c_format)
        return p

    def logits_back(self, d, w):
        return self.logits(d, w, back=True)

    def draw(self, logits, u, temperature=1.0):
        u = packed(u)
        token, logp = torch.empty(len(u), dtype=torch.int64), torch.empty(len(u))
        self.lib.draw(logits.data_ptr(), u.data_ptr(), temperature, token.data_ptr(), logp.data_ptr(),
                      *logits.shape)
        return token, logp

    def likeliest(self, logits):
        token, (logp, entropy) = logits.argmax(-1), torch.empty(2, len(logits))
        self.lib.token_logprobs(logits.data_ptr(), token.data_ptr(), 1.0, logp.data_ptr(),
                                entropy.data_ptr(), *logits.shape)
        return token, logp

    # -- the block

    def knows(self, c):
        """Whether block.c knows a block of this GPTConfig: heads of whole vectors, no QK-norm."""
        vector, heads = self.lanes // 2, c.n_heads + 2 * c.n_kv_heads
        whole = c.head_dim % vector == 0 and c.head_dim // vector in (1, 2, 3, *range(4, 17, 2))
        return whole and not c.qk_norm and (not c.qkv_bias or heads * c.head_dim % self.lanes == 0)

    def takes(self, block):
        return self.knows(block.cfg) and not (self.spy or block.experts or block.lora)

    def block(self, block, x, cos, sin, mask, cache):
        grad = torch.is_grad_enabled()
        if not self.takes(block) or grad and (cache is not None or mask is not None):
            return None
        if grad:
            return _Block.apply(x, cos, sin, block, self, *weights(block))
        return run_block(self, block, x, cos, sin, mask, cache)

    def layer(self, block, back):
        """The Layer of a block: where its weights are. They stay there, `refresh` fills in
        place."""
        if (block, back) not in self._layers:
            c, bias = block.cfg, None if block.qkv_bias is None else self.weight(block.qkv_bias)
            matrices = (block.qkv, block.proj, block.gate_up, block.down)
            backs = [self.panels(p, True).data_ptr() if back else None for p in matrices]
            self._layers[block, back] = ctypes.byref(Layer(
                self.weight(block.norm1).data_ptr(), self.panels(block.qkv).data_ptr(), or_null(bias),
                self.panels(block.proj).data_ptr(), self.weight(block.norm2).data_ptr(),
                self.panels(block.gate_up).data_ptr(), self.panels(block.down).data_ptr(), *backs,
                c.width, c.n_heads, c.n_kv_heads, c.head_dim, c.mlp_width, self.exact, c.norm_eps))
        return self._layers[block, back]


class CompiledExact(Compiled, ExactNumerics):
    """Every function of block.c adds up in an order that does not depend on the number of rows or
    of positions, but for `decode`, the attention of one query. `exact` leaves it out."""
    operators = "compiled exact"


def weights(block):
    """In the order of block_back's dw."""
    return (block.norm1, block.qkv, block.proj, block.norm2, block.gate_up, block.down, block.qkv_bias)


def run_block(num, block, x, cos, sin, mask=None, cache=None, kept=None, kv=None):
    """One call of `block`. kept, kv: what the way back needs, where there is one."""
    (B, T, _), c, x = x.shape, block.cfg, packed(x)
    cos, sin = packed(cos), packed(sin)
    y, slots, Tk = torch.empty_like(x), None, T
    if cache is None:
        keys, values = kv if kv is not None else x.new_empty(2, B, c.n_kv_heads, T, c.head_dim)
        new = keys.data_ptr(), values.data_ptr()
    else:
        keys, values = cache.k[block.layer], cache.v[block.layer]
        new, Tk = (keys.data_ptr(), values.data_ptr()), cache.longest + T
        if isinstance(cache.length, int):
            new = tuple(at + cache.length * t.stride(2) * 4 for at, t in zip(new, (keys, values)))
        else:
            slots = cache.length
    shape = Shape(B, c.n_heads, c.n_kv_heads, T, Tk, c.head_dim, mask is None and T > 1)
    shape.k, shape.v = (STRIDES(*t.stride()[:3]) for t in (keys, values))
    if mask is not None:
        mask = packed(mask)
        wide = mask.expand(B, 1, T, Tk) if mask.dim() == 4 else mask.expand(B, T, Tk)[:, None]
        shape.mask[0], shape.mask[1] = wide.stride(0), wide.stride(2)
    num.lib.block(num.layer(block, kept is not None), x.data_ptr(), y.data_ptr(), kept, *new,
                  or_null(slots), keys.data_ptr(), values.data_ptr(), cos.data_ptr(), sin.data_ptr(),
                  cos[0].numel() if cos.dim() == 4 else 0, or_null(mask), ctypes.byref(shape),
                  torch.get_num_threads(), num.c_format)
    return y


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, block, num, *weights):
        (B, T, C), c, x = x.shape, block.cfg, packed(x)
        A, N = c.n_heads * c.head_dim, B * T
        widths = (1, A, 2 * c.n_heads, A, C, 1, 2 * c.mlp_width)              # in the order of Kept
        keep = [x.new_empty(N, w) for w in widths]
        kv = x.new_empty(2, B, c.n_kv_heads, T, c.head_dim)
        kept = ctypes.byref(Kept(*(t.data_ptr() for t in keep)))
        y = run_block(num, block, x, cos, sin, kept=kept, kv=kv)
        ctx.save_for_backward(x, kv, cos, sin, *keep)
        ctx.num, ctx.block = num, block
        return y

    @staticmethod
    def backward(ctx, dy):
        x, kv, cos, sin, *keep = ctx.saved_tensors
        num, block, c, dy, threads = ctx.num, ctx.block, ctx.block.cfg, packed(dy), torch.get_num_threads()
        B, T, C = x.shape
        shape = Shape(B, c.n_heads, c.n_kv_heads, T, T, c.head_dim, T > 1)
        shape.k, shape.v = (STRIDES(*t.stride()[:3]) for t in kv)
        masters = weights(block)
        sizes = [w.numel() for w in masters if w is not None]
        dx, dw = torch.empty_like(x), x.new_zeros(threads, sum(sizes))
        kept = Kept(*(t.data_ptr() for t in keep))
        num.lib.block_back(num.layer(block, True), x.data_ptr(), ctypes.byref(kept), kv[0].data_ptr(),
                           kv[1].data_ptr(), cos.data_ptr(), sin.data_ptr(), dy.data_ptr(),
                           dx.data_ptr(), dw.data_ptr(), ctypes.byref(shape), threads, num.c_format)
        parts = iter(dw.sum(0).split(sizes))
        return dx, None, None, None, None, *(None if w is None else next(parts).view(w.shape)
                                             for w in masters)


if __name__ == "__main__":
    for file in WRITTEN_AFTER:
        print(f'    "{file}": "{fingerprint(file)}",')
