"""model.py: a modern decoder-only transformer, small enough to read at one sitting.

Pre-norm blocks of RMSNorm, rotary positions, grouped-query attention and SwiGLU, with optional QKV
bias, QK-norm, tied head and experts: the shape of Qwen2.5, Qwen3, Qwen3-MoE and Llama 3. The one
`forward(tokens, cache=None)` serves rollout and training. Every operator is a method of `self.num`
(precision.Numerics), so no number is rounded in this file.

Names: B rows, T tokens, C width, H query heads, KV key/value heads, D head width, F MLP width, V
vocabulary, E experts, K of them per token. Left out: dropout, since RL sees no answer twice.
"""
import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from precision import InputError, Numerics


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    n_layers: int = 4
    width: int = 128
    n_heads: int = 4
    n_kv_heads: int = 2            # fewer: query heads share keys and values, and the cache shrinks
    head_dim: int = 0              # 0: width / n_heads (Qwen3 sets it apart)
    mlp_width: int = 384
    context: int = 64              # the longest sequence, prompt and answer together
    rope_theta: float = 10_000.0
    rope_llama3: tuple = ()        # Llama 3.1's stretch for long contexts: see rope_frequencies
    norm_eps: float = 1e-6
    qkv_bias: bool = False         # Qwen2.5
    qk_norm: bool = False          # Qwen3
    tied_head: bool = False        # the head is the embedding's transpose
    n_experts: int = 0             # Qwen3-MoE: experts per block, 0: a plain MLP of mlp_width
    experts_per_token: int = 0
    expert_width: int = 0
    norm_topk: bool = True         # the weights of the chosen experts are divided by their sum
    dense_layers: tuple = ()       # blocks with a plain MLP all the same

    def __post_init__(self):
        for name in ("rope_llama3", "dense_layers"):               # JSON and checkpoints give lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "head_dim", self.head_dim or self.width // self.n_heads)
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"n_heads {self.n_heads} is no multiple of {self.n_kv_heads}")
        if self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} is odd: rotary positions need pairs")
        if self.n_experts and not 1 <= self.experts_per_token <= self.n_experts:
            raise InputError(f"{self.experts_per_token} of {self.n_experts} experts cannot be")


class KVCache:
    """Preallocated keys and values, (B, KV, capacity, D) a layer, rounded as training rounds them.
    Slot t of a row holds the key of the token at position t. `length` is an int while all rows are
    equally long, else a (B,) int64 tensor; `longest` is an int in both cases. Then forward says,
    once for all layers, where new tokens go: rows `row` (B, 1), slots `at` (B, T)."""

    def __init__(self, cfg, rows, capacity, num):
        shape = (cfg.n_layers, rows, cfg.n_kv_heads, capacity, cfg.head_dim)
        self.k = torch.zeros(shape, dtype=num.dtype, device=num.device)
        self.v = torch.zeros(shape, dtype=num.dtype, device=num.device)
        self.length = self.longest = 0

    def rows(self, index, lengths=None, room=0):
        """A cache of the rows `index` (int64 tensor, repeats allowed) with `room` more slots.
        lengths: where each new row ends, if that is not where all of them end."""
        new = copy.copy(self)
        if lengths is not None:
            new.length = lengths
        elif not isinstance(self.length, int):
            new.length = self.length[index]
        wide = (0, 0, 0, room)
        new.k, new.v = (nn.functional.pad(t[:, index], wide) for t in (self.k, self.v))
        return new

    def part(self, rows, length, longest):
        """The first `rows` rows in the same memory, with (rows,) lengths of their own."""
        new = copy.copy(self)
        new.k, new.v, new.length, new.longest = self.k[:, :rows], self.v[:, :rows], length, longest
        return new

    def append(self, layer, k, v):
        """Write k, v (B, KV, T, D) after what is there -> all up to the longest row's end."""
        T = k.shape[2]
        if isinstance(self.length, int):
            end = self.length + T
            self.k[layer, :, :, self.length:end] = k
            self.v[layer, :, :, self.length:end] = v
        else:
            self.k[layer][self.row, :, self.at] = k.transpose(1, 2)
            self.v[layer][self.row, :, self.at] = v.transpose(1, 2)
            end = self.longest + T
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def rope_frequencies(cfg):
    """Angle per position of each pair of features, (D/2) FP64 (Su et al. 2021). Llama 3.1: pairs
    that turn fewer than `low` times within the old context turn `factor` times slower, those above
    `high` times as ever, between them a blend."""
    f = cfg.rope_theta ** -(torch.arange(0, cfg.head_dim, 2, dtype=torch.float64) / cfg.head_dim)
    if not cfg.rope_llama3:
        return f
    factor, low, high, old_context = cfg.rope_llama3
    turns = old_context * f / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return f * (blend + (1 - blend) / factor)


class Adapter(nn.Module):
    """LoRA (Hu et al. 2021, eq. 3) for one product: W x + alpha / rank * B A x, W frozen. The parts
    of a fused product (queries, keys, values) have an A and a B each. Kept apart from W in rollout
    as in training: merged, an update of 1e-4 to a weight of 1 would be rounded away."""
    scale = 2.0                                                 # alpha / rank

    def __init__(self, parts, inputs, rank, generator):
        """parts: name -> (first row, rows) of the product that it adds to."""
        super().__init__()
        self.rank, self.parts = rank, parts
        A = torch.rand(len(parts) * rank, inputs, generator=generator) * 2 - 1
        self.A = nn.Parameter(A * inputs ** -0.5)         # PEFT's: Kaiming uniform with a = sqrt(5)
        self.B = nn.ParameterList(torch.zeros(rows, rank) for _, rows in parts.values())

    def forward(self, num, x, y):
        """x (..., I), the frozen product y (..., O) -> y + scale * B A x."""
        a = num.linear(x, self.A).split(self.rank, -1)
        z = [num.linear(part, B) for part, B in zip(a, self.B)]
        return num.add(y, torch.cat(z, -1), self.scale)


class Experts(nn.Module):
    """Experts in an MLP's place (Shazeer et al. 2017; as in Qwen3-MoE): a token goes to the K whose
    router probabilities are largest, and gets their outputs, weighted by these probabilities."""

    def __init__(self, cfg):
        super().__init__()
        E, F, C = cfg.n_experts, cfg.expert_width, cfg.width
        self.K, self.norm_topk = cfg.experts_per_token, cfg.norm_topk
        self.router = nn.Parameter(torch.empty(E, C))
        self.router.keep_fp32 = True                            # see Numerics.router_logits
        self.gate_up = nn.ParameterList(torch.empty(2 * F, C) for _ in range(E))
        self.down = nn.ParameterList(torch.empty(C, F) for _ in range(E))

    def forward(self, num, x, replay=None):
        """x (B, T, C); replay (B, T, K): experts to go to in place of the router's choice. Returns
        (B, T, C) and the router's own choice (B, T, K) int16, most likely first."""
        (B, T, C), K = x.shape, self.K
        x = x.reshape(B * T, C)
        p = num.log_softmax(num.router_logits(x, self.router)).exp()                        # (N, E)
        own = p.topk(K, -1).indices
        chosen = own if replay is None else replay.reshape(-1, K).long()
        weight = p.gather(1, chosen)
        if self.norm_topk:
            weight = weight / weight.sum(-1, keepdim=True)
        place = torch.argsort(chosen.flatten(), stable=True)    # which of the N K places go to whom
        counts = torch.bincount(chosen.flatten(), minlength=len(self.down)).tolist()
        groups = zip(place.split(counts), self.gate_up, self.down)
        out = [num.linear(num.swiglu(num.linear(x[at // K], gate_up)), down)
               for at, gate_up, down in groups if len(at)]
        out = torch.cat(out)[torch.argsort(place)]              # back in the order of the tokens
        return num.mix(out.view(-1, K, C), weight).view(B, T, C), own.view(B, T, K).to(torch.int16)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). The operators are those of Numerics."""

    def __init__(self, cfg, layer=0):
        super().__init__()
        H, KV, D, C = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, cfg.width
        self.cfg, self.layer = cfg, layer
        self.norm1 = nn.Parameter(torch.ones(C))
        self.qkv = nn.Parameter(torch.empty((H + 2 * KV) * D, C))    # queries, keys, values
        self.qkv_bias = nn.Parameter(torch.zeros((H + 2 * KV) * D)) if cfg.qkv_bias else None
        self.q_norm = nn.Parameter(torch.ones(D)) if cfg.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(D)) if cfg.qk_norm else None
        self.proj = nn.Parameter(torch.empty(C, H * D))
        self.norm2 = nn.Parameter(torch.ones(C))
        self.experts = Experts(cfg) if cfg.n_experts and layer not in cfg.dense_layers else None
        if not self.experts:
            self.gate_up = nn.Parameter(torch.empty(2 * cfg.mlp_width, C))    # gate, then value
            self.down = nn.Parameter(torch.empty(C, cfg.mlp_width))
        self.lora, self.adapted = nn.ModuleDict(), True         # name of a product -> its Adapter
        self.routes = None                                      # which experts the last pass chose

    def parts(self):
        """product -> {its name in checkpoints: (first row, rows)}; what LoRA adapts."""
        c = self.cfg
        Q, K, F = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.mlp_width
        attention = dict(qkv=dict(q_proj=(0, Q), k_proj=(Q, K), v_proj=(Q + K, K)),
                         proj=dict(o_proj=(0, c.width)))
        mlp = dict(gate_up=dict(gate_proj=(0, F), up_proj=(F, F)),
                   down=dict(down_proj=(0, c.width)))
        return attention if self.experts else {**attention, **mlp}

    def linear(self, num, x, product, bias=None):
        """One of the block's products, with its adapter if it has one."""
        y = num.linear(x, getattr(self, product), bias)
        return self.lora[product](num, x, y) if product in self.lora and self.adapted else y

    def forward(self, x, cos, sin, mask, num, cache=None, replay=None):
        whole = num.block(self, x, cos, sin, mask, cache)       # these lines in one call, or None
        if whole is not None:
            return whole
        (B, T, _), c, H, KV = x.shape, self.cfg, self.cfg.n_heads, self.cfg.n_kv_heads
        num.where = f"blocks.{self.layer}.attention"
        h = num.rms_norm(x, self.norm1, c.norm_eps)
        h = self.linear(num, h, "qkv", self.qkv_bias).view(B, T, H + 2 * KV, c.head_dim)
        qk, v = h.transpose(1, 2).split((H + KV, KV), 1)                          # (B, heads, T, D)
        if c.qk_norm:
            q, k = qk.split((H, KV), 1)
            qk = torch.cat((num.rms_norm(q, self.q_norm, c.norm_eps),
                            num.rms_norm(k, self.k_norm, c.norm_eps)), 1)
        q, k = num.rope(qk, cos, sin).split((H, KV), 1)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = num.attention(q, k, v, mask).transpose(1, 2).reshape(B, T, H * c.head_dim)
        x = num.add(x, self.linear(num, y, "proj"))
        num.where = f"blocks.{self.layer}.mlp"
        h = num.rms_norm(x, self.norm2, c.norm_eps)
        if self.experts:
            y, self.routes = self.experts(num, h, replay)
        else:
            y = self.linear(num, num.swiglu(self.linear(num, h, "gate_up")), "down")
        return num.add(x, y)


class GPT(nn.Module):
    def __init__(self, cfg, device="cpu", seed=0):
        """FP32 master weights, drawn from `seed` on the CPU so that every device starts from the
        same numbers; seed None: no numbers yet, for a checkpoint to fill in."""
        super().__init__()
        self.cfg = cfg
        with torch.device(device if seed is None else "cpu"):
            self.embedding = nn.Parameter(torch.empty(cfg.vocab_size, cfg.width))
            self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layers))
            self.norm = nn.Parameter(torch.ones(cfg.width))
            own = None if cfg.tied_head else nn.Parameter(torch.empty(cfg.vocab_size, cfg.width))
            self.head = self.embedding if own is None else own
        self.recompute, self.lora = False, None     # activations made again; what `adapt` was given
        if seed is not None:
            self._draw(seed)
        self.to(device)
        # FP64: position times frequency must not be rounded before the cosine. (context, D/2)
        angle = torch.arange(cfg.context, dtype=torch.float64)[:, None] * rope_frequencies(cfg)
        for name, table in (("cos", angle.cos()), ("sin", angle.sin())):
            self.register_buffer(name, table.float().to(device), persistent=False)
        if seed is not None:
            self.use(Numerics("fp32", device).hold(self.parameters()))

    @torch.no_grad()
    def _draw(self, seed):
        cfg, g = self.cfg, torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                # 0.06 at width 128: with GPT-2's 0.02 a small model needs twice the steps. The
                # stream sums 2 n_layers branches: scale what feeds it (Radford et al. 2019).
                std = 0.02 if name == "head" else 0.7 * cfg.width ** -0.5
                feeds = {"proj", "down"} & {*name.split(".")}
                nn.init.normal_(p, 0, std / (2 * cfg.n_layers) ** (0.5 * bool(feeds)), g)

    def use(self, num):
        """Compute in this number format from now on. `num` must hold this model's parameters."""
        self.num = num
        return self

    def adapt(self, rank, seed=0):
        """Freeze all weights; adapters (LoRA) for each projection but the experts'. Then hold."""
        device, g = self.embedding.device, torch.Generator().manual_seed(seed)
        self.requires_grad_(False)
        for block in self.blocks:
            for product, parts in block.parts().items():
                adapter = Adapter(parts, getattr(block, product).shape[1], rank, g)
                block.lora[product] = adapter.to(device)
        self.lora = dict(rank=rank)
        return self

    def adapters(self, on):
        """With or, for a while, without them: the base alone is the policy before training."""
        for block in self.blocks:
            block.adapted = on

    @torch.no_grad()
    def keep_rounded(self, num):
        """Where both sides round alike, a frozen weight needs no FP32 master: keep the rounded
        one."""
        for p in self.parameters():
            if not p.requires_grad and not getattr(p, "keep_fp32", False):
                p.data = num.round(p.data.float())

    def forward(self, tokens, cache=None, replay=None):
        """tokens (B, T) int64 -> hidden states (B, T, C) after the last norm. Without a cache rows
        start at position 0 and attention is causal: right padding is harmless. With one the tokens
        continue each row after cache.length. replay: see token_logprobs."""
        num, T = self.num, tokens.shape[1]
        start = 0 if cache is None else cache.length
        if isinstance(start, int):
            if start + T > self.cfg.context:
                raise InputError(f"{start + T} tokens do not fit the context of {self.cfg.context}")
            cos, sin, mask = self.cos[start:start + T], self.sin[start:start + T], None
            if start and T > 1:                         # a chunk after a cache: shifted causal mask
                mask = torch.ones(T, start + T, dtype=torch.bool, device=tokens.device).tril_(start)
        else:                                           # ragged rows, each at a position of its own
            position = start[:, None] + torch.arange(T, device=tokens.device)              # (B, T)
            cache.at, cache.row = position, torch.arange(len(start), device=tokens.device)[:, None]
            cos, sin = self.cos[position][:, None], self.sin[position][:, None]     # (B, 1, T, D/2)
            keys = torch.arange(cache.longest + T, device=tokens.device)
            mask = (keys <= position[..., None])[:, None]                          # (B, 1, T, keys)
        num.where = "embedding"
        x = num.embed(tokens, self.embedding)
        sparse = iter(range(self.cfg.n_layers))             # which of the layers with experts
        for block in self.blocks:
            here = cos, sin, mask, num, cache
            if replay is not None and block.experts:
                here += (replay[..., next(sparse), :],)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, *here, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, *here)
        if cache is not None:
            cache.length, cache.longest = start + T, cache.longest + T
        num.where = "head"
        return num.rms_norm(x, self.norm, self.cfg.norm_eps)

    def routes(self):
        """Which experts the last forward pass chose: (B, T, MoE layers, K) int16, or None."""
        chosen = [b.routes for b in self.blocks if b.experts]
        return torch.stack(chosen, 2) if chosen else None

    def logits(self, hidden):
        """hidden (N, C) -> FP32 logits (N, V), for decoding; training uses token_logprobs."""
        return self.num.logits(hidden, self.head)

    def token_logprobs(self, tokens, where, temperature=1.0, replay=None):
        """Teacher-forced log-probs of the tokens that `where` marks, as the sampler records them.

        tokens (B, T) int64, right-padded; where (B, T) bool, False in column 0. Returns two FP32
        vectors in row-major order of `where`: log pi(token | what stands left of it) and the
        entropy of that distribution, nats. replay: the rollout's `routes` (B, T - 1 or more, MoE
        layers, K), to send every token to the experts of its rollout."""
        replay = replay if replay is None else replay[:, :tokens.shape[1] - 1]
        hidden = self(tokens[:, :-1], replay=replay).flatten(0, 1)    # t predicts token t + 1
        rows = where[:, 1:].flatten().nonzero()[:, 0]
        targets = tokens[:, 1:].flatten()[rows]
        return self.num.token_logprobs(hidden, self.head, targets, rows, temperature)

    def n_params(self):
        return sum(p.numel() for p in self.parameters())
