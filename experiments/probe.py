"""What the program takes for granted of torch's kernels, asked on the device itself. A part of
experiments.gpu; it needs torch alone."""
import time
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from model import GPT, GPTConfig, KVCache
from operators.device import reproducible
from precision import mm32

TOY = GPTConfig(vocab_size=258, n_layers=2, width=64, n_heads=4, n_kv_heads=2, mlp_width=192,
                context=256)


class Probe:
    """A small model with random weights, B rows of T tokens, in the format of `num`."""

    def __init__(self, num, B, T):
        shape = replace(TOY, width=256, head_dim=64)                   # heads of 64, as real ones
        self.num, self.model = num, GPT(shape, num.device)
        self.model.use(num.hold(self.model.parameters()))
        self.tokens = torch.randint(256, (B, T), device=num.device)
        self.scored = (torch.arange(T, device=num.device) > 0).expand(B, T)

    def learning(self):
        """Gradients of one backward pass."""
        self.model.zero_grad()
        logp = self.model.token_logprobs(self.tokens, self.scored)[0].sum()
        with reproducible(self.num.device):
            logp.backward()
        return [p.grad for p in self.model.parameters()]

    def recomputing(self):
        """The same with --recompute, whose second forward pass is in deterministic mode."""
        self.model.recompute = True
        try:
            return self.learning()
        finally:
            self.model.recompute = False

    @torch.no_grad()
    def decoding(self):
        """Prompts, then a token more for rows of different lengths."""
        (B, T), device = self.tokens.shape, self.num.device
        cache, row = KVCache(self.model.cfg, B, T, self.num), torch.arange(B, device=device)
        self.model(self.tokens, cache)
        self.model(self.tokens[:, :1], cache.rows(row, row % T + 1, room=1))

    def kernels(self, step):
        """Which of SDPA's kernels this step takes, in the order of its calls."""
        real, seen = F.scaled_dot_product_attention, []

        def asked(q, k, v, mask=None, **kw):
            choice = SDPBackend(torch._fused_sdp_choice(q, k, v, mask, **kw))
            seen.append(choice.name.partition("_")[0].lower())
            return real(q, k, v, mask, **kw)
        with mock.patch.object(F, "scaled_dot_product_attention", asked):
            step()
        return ", ".join(dict.fromkeys(seen))

    def same_bits(self, n=20):
        """How many of n backward passes give the first one's bits, learning or recomputing."""
        first = self.learning()
        steps = [self.learning, self.recomputing] * (n // 2)
        return 1 + sum(all(map(torch.equal, first, step())) for step in steps[1:])


def products(num):
    """Relative error of mm32 on strided input, beside FP64: near 1e-7 if sums are FP32, 1e-4 and
    more if something is in 16 bits."""
    a, b = (torch.randn(n, 1024).to(num.device, num.dtype) for n in (1024, 4096))
    cases = {"plain": (a, a), "transposed": (b.t(), b), "cut": (b.t()[:512], b[:, 256:])}
    wanted = {k: x.double() @ y.double() for k, (x, y) in cases.items()}
    return {k: float((mm32(*cases[k]).double() - want).norm() / want.norm())
            for k, want in wanted.items()}


def timed(stages, turn, device):
    """The clock: seconds of each stage, a function of the turn's number."""
    marks = []
    for stage in (None, *stages):
        if stage:
            stage(turn)
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
    return np.diff(marks)


def gemm_peak(device, dtype=None):
    """FLOP/s of this machine's own matrix product, FP32 on a CPU, else FP16 if nothing is said: the
    best of a few sizes, each the median of 3."""
    best, cpu = 0.0, device.type == "cpu"
    dtype = dtype or (torch.float32 if cpu else torch.float16)
    for m, k, n in ([(1024, 1024, 1024), (2048, 1024, 1024), (4096, 512, 512)] if cpu else
                    [(8192, 8192, 8192), (16384, 4096, 4096)]):
        a, b = (torch.randn(*size, device=device, dtype=dtype) for size in ((m, k), (k, n)))
        times = timed([lambda _: a @ b] * 4, 0, device)[1:]                         # noqa: B023
        best = max(best, 2 * m * k * n / float(np.median(times)))
    return best


def bandwidth(device, numbers=1 << 28):
    """Bytes/s of a copy within the device's memory, reads and writes counted."""
    a = torch.randn(numbers, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / float(np.median(timed([lambda _: b.copy_(a)] * 6, 0, device)[1:]))
