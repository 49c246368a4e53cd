"""fast/cpu.py: compiles cpu.c with the C compiler that is here, and puts its functions where precision.py has torch's.

`CPUNumerics` is Numerics: the same operators, formats and roundings, each operator one pass over memory in place of three to
ten, the rounding done in registers at the end of each product. You can skip this folder: it adds nothing but speed, and
without a compiler, or with --no-fast, nothing of it is used.
"""
import ctypes
import functools
import hashlib
import inspect
import os
import pathlib
import platform
import re
import shutil
import subprocess
import tempfile

import torch
import torch.nn.functional as F

import precision
from precision import FORMATS, NO_GRADIENT, Numerics

SOURCE = pathlib.Path(__file__).with_name("cpu.c")


def build(cache):
    """Compile cpu.c into the folder `cache`, once per source, compiler and processor (a second or two). Returns (library,
    "") or (None, why not)."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return None, "no C compiler found"
    try:                                              # the file holds instructions of this very processor
        info = pathlib.Path("/proc/cpuinfo").read_text()
        cpu = sorted({x for x in info.splitlines() if x.startswith(("model name", "flags", "Features"))})
    except OSError:
        cpu = [platform.processor()]
    source = SOURCE.read_text()
    key = "\n".join([source, platform.platform(), torch.__version__, str(torch.__file__), compiler, *cpu])
    path = pathlib.Path(cache) / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:12]}.so"
    try:
        if not path.exists():
            _compile(compiler, path)
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as e:
        return None, str(e).splitlines()[0]
    for kind, name, parameters in re.findall(r"^(void|long) (\w+)\(([^)]*)\)", source, re.M):
        function = getattr(library, name)
        function.restype = {"void": None, "long": ctypes.c_long}[kind]
        function.argtypes = [ctypes.c_void_p if "*" in p else ctypes.c_float if p.startswith("float") else ctypes.c_long
                             for p in map(str.strip, parameters.split(",")) if p != "void"]
    return library, ""


def _compile(compiler, path):
    # the very OpenMP library that torch has loaded: two of them would fight over the cores
    openmp = next(iter(sorted((pathlib.Path(torch.__file__).parent / "lib").glob("lib[gi]*omp*"))), None)
    threads = ["-fopenmp", str(openmp), f"-Wl,-rpath,{openmp.parent}"] if openmp else []
    path.parent.mkdir(parents=True, exist_ok=True)
    message = ""
    for native in ("-march=native", "-mcpu=native"):                    # x86 says it one way, ARM the other
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            out = pathlib.Path(folder) / path.name
            flags = ["-O3", native, "-fno-math-errno", "-shared", "-fPIC"]
            command = [compiler, *flags, str(SOURCE), "-o", str(out), *threads, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if done.returncode == 0:
                os.replace(out, path)                                   # two runs may compile at the same time
                return
            message = message or (done.stderr.strip().splitlines() or ["no message"])[0]
    raise OSError(f"{compiler} failed: {message}")


def keep_memory():
    """Let malloc keep what is freed. By default glibc hands large tensors back to the system at once, and each new one costs
    a page fault per 4 KiB: a tenth of a rollout's time."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):                        # not glibc
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3          # malloc.h
    mallopt(m_mmap_threshold, 1 << 30) or mallopt(m_mmap_threshold, 32 << 20)        # older ones take no more than 32 MiB
    mallopt(m_trim_threshold, 2 ** 31 - 1)
    mallopt(m_top_pad, 64 << 20)


class _Format(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("cut", ctypes.c_int32), ("tiny", ctypes.c_float), ("big", ctypes.c_float),
                ("max", ctypes.c_float)]


def _c_format(fmt):
    kind = 0 if fmt.name == "fp32" else 1 if fmt.name == "fp16" else 2 if fmt.exp == 8 else 3
    return ctypes.byref(_Format(kind, 23 - fmt.man, fmt.tiny, 2.0 ** 23 * fmt.smallest, fmt.max))


FP32 = _c_format(FORMATS["fp32"])


class _Shape(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("B", "H", "KV", "Tq", "Tk", "D", "causal")] + [
        (n, ctypes.c_int64 * 3) for n in ("q", "k", "v", "o", "dout", "dq", "dk", "dv")] + [("mask", ctypes.c_int64 * 2)]


def _rows(t):
    """t with its numbers next to each other in memory, as nearly always they are already."""
    return t if t.is_contiguous() else t.contiguous()


def _or_null(t):
    return None if t is None else t.data_ptr()


def _near(t):
    """t with its features next to each other; rows, heads and tokens may lie anywhere."""
    return t if t.stride(-1) == 1 else t.contiguous()


class _Layer(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in (
        "norm1", "qkv", "qkv_bias", "proj", "norm2", "gate_up", "down", "qkv_back", "proj_back", "gate_up_back", "down_back")] + [
        (n, ctypes.c_int64) for n in ("C", "H", "KV", "D", "F", "exact")] + [("eps", ctypes.c_float)]


class _Kept(ctypes.Structure):
    names = ("scale1", "q", "sums", "att", "x2", "scale2", "gate_up")
    _fields_ = [(n, ctypes.c_void_p) for n in names]


# sha256 of model.Block.forward's source, as block and block_back of cpu.c were written after it. Change that method, and its
# lines are run one by one from then on: slower, and what you wrote. Whoever brings cpu.c along brings this number along.
BLOCK = "27b2d0b4aface3a5"


@functools.cache
def _block_is_known():
    from model import Block
    try:
        return hashlib.sha256(inspect.getsource(Block.forward).encode()).hexdigest()[:16] == BLOCK
    except OSError:                                                     # no source at hand
        return False


class CPUNumerics(Numerics):
    """Numerics on a CPU by the functions of cpu.c. Weights are kept a second time, packed in the order in which products read
    them; `refresh` packs them anew, in place.

    exact: as precision.ExactNumerics. Every function of cpu.c adds up in an order that does not depend on the number of rows or
    of positions, but for `decode`, attention of one query, whose order is another than that of `attention`. So it is left out."""

    slab = precision.ExactNumerics.slab                                # for heads that are left to torch's operators

    def __init__(self, fmt, library, exact=False):
        super().__init__(fmt, "cpu")
        self.exact = exact
        self.operators = "compiled exact" if exact else "compiled"
        self.lib, self.c_format, self.lanes = library, _c_format(self.fmt), library.panel_width()
        self._packed = {}                                               # (master, for the way back?) -> panels
        self._layers = {}                                               # model.Block -> its _Layer

    def refresh(self):
        super().refresh()
        for (p, backward), panels in self._packed.items():
            if p.requires_grad:
                self._pack(p, backward, panels)

    def release(self):
        super().release()
        self._packed.clear()
        self._layers.clear()

    @torch.no_grad()
    def _pack(self, p, backward, panels=None):
        w = self.weight(p).t() if backward else self.weight(p)
        N, K = w.shape
        if panels is None:
            panels = w.new_empty(-(-N // self.lanes) * self.lanes * K)
        self.lib.pack(w.data_ptr(), w.stride(0), w.stride(1), panels.data_ptr(), N, K)
        return panels

    def panels(self, p, backward=False):
        """The rounded weight of master p, packed; made on first use."""
        if (p, backward) not in self._packed:
            self._packed[p, backward] = self._pack(p, backward)
        return self._packed[p, backward]

    def product(self, x, p, bias=None, backward=False, fmt=None):
        """x wᵀ + bias, or backward x w, for the rounded weight w of master p; x (..., I) -> (..., O), rounded to the format."""
        panels, x = self.panels(p, backward), _rows(x)
        N, K = p.shape[::-1] if backward else p.shape
        y = x.new_empty(*x.shape[:-1], N)
        if bias is not None and N % self.lanes:
            bias = F.pad(bias, (0, -N % self.lanes))
        self.lib.linear(x.data_ptr(), panels.data_ptr(), _or_null(bias), y.data_ptr(), x.numel() // K, N, K,
                        torch.get_num_threads(), fmt or self.c_format)
        return y

    def affine(self, x, w, b=None):
        return self.product(x, w, None if b is None else self.weight(b))

    def affine_back(self, dy, w):
        return self.product(dy, w, backward=True)

    def logits(self, h, w):
        return self.product(h, w, fmt=FP32)

    # What is left to torch's operators (experts, odd heads), exact if this is
    _slabs = precision.ExactNumerics._slabs

    def _product(self, x, w, b=None):
        return (precision.ExactNumerics if self.exact else Numerics)._product(self, x, w, b)

    def _silu(self, x):
        return (precision.ExactNumerics if self.exact else Numerics)._silu(self, x)

    def _log_softmax(self, x):
        return (precision.ExactNumerics if self.exact else Numerics)._log_softmax(self, x)

    def draw(self, logits, u, temperature=1.0):
        token, logp = torch.empty(len(u), dtype=torch.int64), torch.empty(len(u))
        self.lib.draw(logits.data_ptr(), u.data_ptr(), temperature, token.data_ptr(), logp.data_ptr(), *logits.shape)
        return token, logp

    def likeliest(self, logits):
        token, (logp, entropy) = logits.argmax(-1), torch.empty(2, len(logits))
        self.lib.token_logprobs(logits.data_ptr(), token.data_ptr(), 1.0, logp.data_ptr(), entropy.data_ptr(), *logits.shape)
        return token, logp

    def round_(self, x):
        if not self.emulated or not x.is_contiguous():
            return super().round_(x)
        self.lib.add(x.data_ptr(), None, x.data_ptr(), x.numel(), self.c_format)
        return x

    def rounded(self, x):
        if not self.emulated:
            return x
        x = _rows(x)
        y = torch.empty_like(x)
        self.lib.add(x.data_ptr(), None, y.data_ptr(), x.numel(), self.c_format)
        return y

    def attention(self, q, k, v, mask=None):
        if not self.takes(q.shape[-1]):                                 # odd head widths: torch's operators
            return super()._apply(precision._ExactAttention if self.exact else precision._Attention, q, k, v, mask)
        return super().attention(q, k, v, mask)

    def takes(self, head_dim):
        """Whether the compiled attention can do heads of this width: whole panels, few enough for the registers."""
        return head_dim % self.lanes == 0 and head_dim <= 8 * self.lanes

    def block(self, block, x, cos, sin, mask, cache, layer):
        grad = torch.is_grad_enabled()
        if (self.spy or block.cfg.qk_norm or block.moe or block.lora or not self.takes(block.cfg.head_dim)
                or not _block_is_known()
                or (grad and (cache is not None or mask is not None))):
            return None
        if grad:
            return _Block.apply(x, cos, sin, block, self, *_Block.weights(block))
        return _Block.run(self, block, x, cos, sin, mask, cache, layer)

    def layer(self, block, backward):
        """The _Layer of a model.Block: where its rounded and packed weights are. They stay there, `refresh` fills in place."""
        if (block, backward) not in self._layers:
            c, bias = block.cfg, None if block.qkv_bias is None else self.weight(block.qkv_bias)      # its length: whole panels
            matrices = (block.qkv, block.proj, block.gate_up, block.down)
            back = [self.panels(p, True).data_ptr() if backward else None for p in matrices]
            self._layers[block, backward] = ctypes.byref(_Layer(
                self.weight(block.norm1).data_ptr(), self.panels(block.qkv).data_ptr(), _or_null(bias),
                self.panels(block.proj).data_ptr(), self.weight(block.norm2).data_ptr(), self.panels(block.gate_up).data_ptr(),
                self.panels(block.down).data_ptr(), *back, c.width, c.n_heads, c.n_kv_heads, c.head_dim, c.mlp_width,
                self.exact, c.norm_eps))
        return self._layers[block, backward]

    def _apply(self, op, *args):
        return super()._apply(OPERATORS.get(op, op), *args)

    def seen(self, x, kind="forward", where=None):
        """The end of every operator here: x is rounded already."""
        if self.spy:
            self.spy(where or self.where, kind, x)
        return x


# ---------------------------------------------------------------------------------------------------------------------
# The operators of precision.py, in its order


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, num):
        ctx.save_for_backward(x)
        ctx.num, ctx.where, ctx.w, ctx.bias = num, num.where, w, b is not None
        return num.seen(num.product(x, w, None if b is None else num.weight(b)))

    @staticmethod
    def backward(ctx, dy):
        (x,), num = ctx.saved_tensors, ctx.num
        dx = num.seen(num.product(dy, ctx.w, backward=True), "backward", ctx.where) if ctx.needs_input_grad[0] else None
        dy = dy.reshape(-1, dy.shape[-1])
        dw = dy.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        return dx, dw, dy.sum(0) if ctx.bias and ctx.needs_input_grad[2] else None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, num):
        ctx.num, ctx.where = num, num.where
        x, y = _rows(x), _rows(y)
        z = torch.empty_like(x)
        num.lib.add(x.data_ptr(), y.data_ptr(), z.data_ptr(), x.numel(), num.c_format)
        return num.seen(z)

    @staticmethod
    def backward(ctx, dy):
        dy = ctx.num.seen(ctx.num.rounded(dy), "backward", ctx.where)
        return dy, dy, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, eps, num):
        w, x, C = num.weight(w), _rows(x), x.shape[-1]
        y, scale = torch.empty_like(x), x.new_empty(x.shape[:-1])
        num.lib.rms_norm(x.data_ptr(), w.data_ptr(), eps, y.data_ptr(), scale.data_ptr(), x.numel() // C, C, num.c_format)
        ctx.save_for_backward(x, w, scale)
        ctx.num, ctx.where = num, num.where
        return num.seen(y)

    @staticmethod
    def backward(ctx, dy):
        x, w, scale = ctx.saved_tensors
        num, dy, C, parts = ctx.num, _rows(dy), x.shape[-1], torch.get_num_threads()
        dx, dw = torch.empty_like(x), x.new_empty(parts, C)
        num.lib.rms_norm_back(x.data_ptr(), w.data_ptr(), scale.data_ptr(), dy.data_ptr(), dx.data_ptr(), dw.data_ptr(),
                              x.numel() // C, C, parts, num.c_format)
        return num.seen(dx, "backward", ctx.where), dw.sum(0), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, num):
        x, width = _rows(x), x.shape[-1] // 2
        y = x.new_empty(*x.shape[:-1], width)
        num.lib.swiglu(x.data_ptr(), y.data_ptr(), y.numel() // width, width, num.c_format)
        ctx.save_for_backward(x)
        ctx.num, ctx.where = num, num.where
        return num.seen(y)

    @staticmethod
    def backward(ctx, dy):
        (x,), num, dy, width = ctx.saved_tensors, ctx.num, _rows(dy), dy.shape[-1]
        dx = torch.empty_like(x)
        num.lib.swiglu_back(x.data_ptr(), dy.data_ptr(), dx.data_ptr(), None, dy.numel() // width, width, num.c_format)
        return num.seen(dx, "backward", ctx.where), None


class _Rope(torch.autograd.Function):
    @staticmethod
    def turn(num, x, q, k, v, cos, sin, back):
        B, T, heads, D = x.shape
        strides = (ctypes.c_long * 9)(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        num.lib.rope(x.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(), None, strides, B, T, q.shape[1], k.shape[1], D,
                     cos.data_ptr(), sin.data_ptr(), T * D // 2 if cos.dim() == 3 else 0, back, num.c_format)

    @staticmethod
    def forward(ctx, x, cos, sin, H, KV, num):
        x, cos, sin = _rows(x), _rows(cos), _rows(sin)
        B, T, _, D = x.shape
        q, k, v = x.new_empty(B, H, T, D), x.new_empty(B, KV, T, D), x.new_empty(B, KV, T, D)
        _Rope.turn(num, x, q, k, v, cos, sin, 0)
        ctx.save_for_backward(cos, sin)
        ctx.num, ctx.where = num, num.where
        return num.seen(q), num.seen(k), v

    @staticmethod
    def backward(ctx, dq, dk, dv):
        (cos, sin), num = ctx.saved_tensors, ctx.num
        dq, dk, dv = _near(dq), _near(dk), _near(dv)
        (B, H, T, D), KV = dq.shape, dk.shape[1]
        dx = dq.new_empty(B, T, H + 2 * KV, D)
        _Rope.turn(num, dx, dq, dk, dv, cos, sin, 1)
        return num.seen(dx, "backward", ctx.where), None, None, None, None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def shape(q, k, v, mask, **more):
        (B, H, Tq, D), Tk = q.shape, k.shape[2]
        s = _Shape(B, H, k.shape[1], Tq, Tk, D, mask is None and Tq > 1)
        for name, t in dict(q=q, k=k, v=v, **more).items():
            setattr(s, name, (ctypes.c_int64 * 3)(*t.stride()[:3]))
        if mask is not None:                                            # to (B, 1, Tq, Tk), repeated rows by stride 0
            mask = mask.expand(B, 1, Tq, Tk) if mask.dim() == 4 else mask.expand(B, Tq, Tk)[:, None]
            s.mask[0], s.mask[1] = mask.stride(0), mask.stride(2)
        return ctypes.byref(s)

    @staticmethod
    def forward(ctx, q, k, v, mask, num):
        q, k, v, mask = _near(q), _near(k), _near(v), None if mask is None else _rows(mask)
        B, H, Tq, D = q.shape
        out = q.new_empty(B, Tq, H, D).transpose(1, 2)                  # the layout that the next product wants
        shape = _Attention.shape(q, k, v, mask, o=out)
        at = (q.data_ptr(), k.data_ptr(), v.data_ptr(), _or_null(mask), out.data_ptr())
        if Tq == 1 and ctx is NO_GRADIENT and not num.exact:
            num.lib.decode(*at, shape, num.c_format)
        else:
            sums = q.new_empty(B, H, Tq, 2)
            num.lib.attention(*at, sums.data_ptr(), shape, num.c_format)
            ctx.save_for_backward(q, k, v, mask, sums)
        ctx.num, ctx.where = num, num.where
        return num.seen(out)

    @staticmethod
    def backward(ctx, dy):
        q, k, v, mask, sums = ctx.saved_tensors
        num, dy = ctx.num, _near(dy)
        grads = dq, dk, dv = [t.new_empty(t.shape) for t in (q, k, v)]
        shape = _Attention.shape(q, k, v, mask, dout=dy, dq=dq, dk=dk, dv=dv)
        num.lib.attention_back(q.data_ptr(), k.data_ptr(), v.data_ptr(), _or_null(mask), sums.data_ptr(), dy.data_ptr(),
                               *(d.data_ptr() for d in grads), shape, num.c_format)
        return (*(num.seen(d, "backward", ctx.where) for d in grads), None, None)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def probabilities(num, h, w, targets, temperature):
        """-> probabilities (N, V), log-prob of targets (N), entropy (N)."""
        p = num.logits(h, w)
        logp, entropy = p.new_empty(2, len(p))
        num.lib.token_logprobs(p.data_ptr(), targets.data_ptr(), temperature, logp.data_ptr(), entropy.data_ptr(), *p.shape)
        return p, logp, entropy

    @staticmethod
    def forward(ctx, h, w, targets, rows, temperature, chunk, num):
        ctx.save_for_backward(h, targets, rows)
        ctx.w, ctx.temperature, ctx.chunk, ctx.num, ctx.where, ctx.kept = w, temperature, chunk, num, num.where, None
        out = h.new_empty(2, len(targets))
        for s in range(0, len(targets), chunk):
            s = slice(s, s + chunk)
            hs = h[s] if rows is None else h[rows[s]]
            p, out[0, s], out[1, s] = _TokenLogprobs.probabilities(num, hs, w, targets[s], temperature)
            if len(targets) <= chunk:                            # one chunk is all there is: keep it, and save the way back
                ctx.kept = p
        ctx.mark_non_differentiable(out[1])
        return out[0], out[1]

    @staticmethod
    def backward(ctx, dlogp, _):
        h, targets, rows = ctx.saved_tensors
        num, w, dlogp = ctx.num, ctx.w, _rows(dlogp)
        dh, dw = torch.zeros_like(h), torch.zeros_like(w) if ctx.needs_input_grad[1] else None
        for s in range(0, len(targets), ctx.chunk):
            s = slice(s, s + ctx.chunk)
            hs = h[s] if rows is None else h[rows[s]]
            d = ctx.kept if ctx.kept is not None else _TokenLogprobs.probabilities(num, hs, w, targets[s], ctx.temperature)[0]
            ctx.kept = None
            num.lib.token_logprobs_back(d.data_ptr(), targets[s].data_ptr(), ctx.temperature, dlogp[s].data_ptr(), *d.shape,
                                        num.c_format)
            num.seen(d, "backward", ctx.where)
            if dw is not None:
                dw.addmm_(d.t(), hs)
            d = num.seen(num.product(d, w, backward=True), "backward", ctx.where)
            if rows is None:
                dh[s] = d
            else:
                dh[rows[s]] = d
        return dh, dw, None, None, None, None, None


class _Block(torch.autograd.Function):
    """model.Block: what the operators above do one after another, in one call there and one back."""

    @staticmethod
    def weights(block):
        """In the order of block_back's dw."""
        return block.norm1, block.qkv, block.proj, block.norm2, block.gate_up, block.down, block.qkv_bias

    @staticmethod
    def run(num, block, x, cos, sin, mask=None, cache=None, layer=0, kept=None, kv=None):
        (B, T, _), c, x = x.shape, block.cfg, _rows(x)
        cos, sin = _rows(cos), _rows(sin)
        y, slots, Tk = torch.empty_like(x), None, T
        if cache is None:
            keys, values = kv if kv is not None else x.new_empty(2, B, c.n_kv_heads, T, c.head_dim)
            new = keys.data_ptr(), values.data_ptr()
        else:
            keys, values = cache.k[layer], cache.v[layer]
            new, Tk = (keys.data_ptr(), values.data_ptr()), cache.longest + T
            if isinstance(cache.length, int):
                new = tuple(at + cache.length * t.stride(2) * 4 for at, t in zip(new, (keys, values)))
            else:
                slots = cache.length
        shape = _Shape(B, c.n_heads, c.n_kv_heads, T, Tk, c.head_dim, mask is None and T > 1)
        shape.k, shape.v = ((ctypes.c_int64 * 3)(*t.stride()[:3]) for t in (keys, values))
        if mask is not None:
            mask = _rows(mask)
            wide = mask.expand(B, 1, T, Tk) if mask.dim() == 4 else mask.expand(B, T, Tk)[:, None]
            shape.mask[0], shape.mask[1] = wide.stride(0), wide.stride(2)
        num.lib.block(num.layer(block, kept is not None), x.data_ptr(), y.data_ptr(), kept, *new, _or_null(slots),
                      keys.data_ptr(), values.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos[0].numel() if cos.dim() == 3 else 0,
                      _or_null(mask), ctypes.byref(shape), torch.get_num_threads(), num.c_format)
        return y

    @staticmethod
    def forward(ctx, x, cos, sin, block, num, *weights):
        (B, T, C), c, x = x.shape, block.cfg, _rows(x)
        A, N = c.n_heads * c.head_dim, B * T
        keep = [x.new_empty(N, w) for w in (1, A, 2 * c.n_heads, A, C, 1, 2 * c.mlp_width)]                    # as in _Kept
        kv = x.new_empty(2, B, c.n_kv_heads, T, c.head_dim)
        y = _Block.run(num, block, x, cos, sin, kept=ctypes.byref(_Kept(*(t.data_ptr() for t in keep))), kv=kv)
        ctx.save_for_backward(x, kv, cos, sin, *keep)
        ctx.num, ctx.block = num, block
        return y

    @staticmethod
    def backward(ctx, dy):
        x, kv, cos, sin, *keep = ctx.saved_tensors
        num, block, c, dy, threads = ctx.num, ctx.block, ctx.block.cfg, _rows(dy), torch.get_num_threads()
        B, T, C = x.shape
        shape = _Shape(B, c.n_heads, c.n_kv_heads, T, T, c.head_dim, T > 1)
        shape.k, shape.v = ((ctypes.c_int64 * 3)(*t.stride()[:3]) for t in kv)
        weights = _Block.weights(block)
        dx, dw = torch.empty_like(x), x.new_zeros(threads, sum(w.numel() for w in weights if w is not None))
        kept = _Kept(*(t.data_ptr() for t in keep))
        num.lib.block_back(num.layer(block, True), x.data_ptr(), ctypes.byref(kept), kv[0].data_ptr(), kv[1].data_ptr(),
                           cos.data_ptr(), sin.data_ptr(), dy.data_ptr(), dx.data_ptr(), dw.data_ptr(), ctypes.byref(shape),
                           threads, num.c_format)
        parts = iter(dw.sum(0).split([w.numel() for w in weights if w is not None]))
        return (dx, None, None, None, None, *(None if w is None else next(parts).view(w.shape) for w in weights))


OPERATORS = {getattr(precision, o.__name__): o for o in (_Linear, _Add, _RMSNorm, _SwiGLU, _Rope, _Attention, _TokenLogprobs)}
