"""Independent references that the tests compare with: written for clarity in FP64, sharing no code with what they
check."""
import math

import numpy as np
import torch


def round_to_format(x, exp, man):
    """Round one Python float to a format of `exp` exponent and `man` mantissa bits, by the textbook: scale so that the
    last kept bit is worth 1, round half to even, scale back."""
    if math.isnan(x) or math.isinf(x) or x == 0:
        return x
    bias = 2 ** (exp - 1) - 1
    e = max(math.frexp(x)[1] - 1, 1 - bias)                    # numbers below the smallest normal share its spacing
    spacing = 2.0 ** (e - man)
    y = round(x / spacing) * spacing                            # Python's round: half to even, exact on these sizes
    largest = (2 - 2.0 ** -man) * 2.0 ** bias
    return math.copysign(math.inf, x) if abs(y) > largest else math.copysign(y, x)


def gpt_logits(model, tokens, weight=lambda p: p.detach().double()):
    """Logits of model.GPT in FP64 from plain formulas: tokens (B, T) -> (B, T, V). `weight` says which weights to
    use."""
    c = model.cfg
    B, T = tokens.shape
    H, KV, D = c.n_heads, c.n_kv_heads, c.head_dim

    def norm(x, w):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight(w)

    def rotate(x):                                              # (B, T, heads, D), as complex numbers
        freq = c.rope_theta ** -(torch.arange(0, D, 2).double() / D)
        turn = torch.polar(torch.ones(T, D // 2).double(), torch.arange(T).double()[:, None] * freq)[:, None]
        z = torch.complex(x[..., : D // 2], x[..., D // 2:]) * turn
        return torch.cat((z.real, z.imag), -1)

    x = weight(model.embedding)[tokens]
    for b in model.blocks:
        h = norm(x, b.norm1) @ weight(b.qkv).T
        if b.qkv_bias is not None:
            h = h + weight(b.qkv_bias)
        q, k, v = (t.reshape(B, T, -1, D) for t in h.split((H * D, KV * D, KV * D), -1))
        if b.q_norm is not None:
            q, k = norm(q, b.q_norm), norm(k, b.k_norm)
        q, k = rotate(q), rotate(k)
        out = []
        for head in range(H):                            # one head at a time, with its own copy of the shared keys
            kh, vh = k[:, :, head // (H // KV)], v[:, :, head // (H // KV)]
            s = q[:, :, head] @ kh.transpose(1, 2) / math.sqrt(D)
            s = s + torch.full((T, T), -math.inf).double().triu(1)
            out.append(torch.softmax(s, -1) @ vh)
        x = x + torch.cat(out, -1) @ weight(b.proj).T
        gate, up = (norm(x, b.norm2) @ weight(b.gate_up).T).chunk(2, -1)
        x = x + (gate * torch.sigmoid(gate) * up) @ weight(b.down).T
    return norm(x, model.norm) @ weight(model.head).T


def sample_without_cache(model, prompts, n, new, noise, stop, temperature=1.0):
    """What Sampler.generate must do, the slow and obvious way: a row at a time, the whole sequence again for every
    token. noise (T, R): the number that each token of each answer is drawn with. Returns for each answer its tokens and
    their log-probs."""
    answers = []
    for row in range(len(prompts) * n):
        seq, logps = list(prompts[row // n]), []
        for t in range(new):
            with torch.no_grad():
                logits = model.logits(model(torch.tensor([seq]))[0, -1:])[0]
            logp = torch.log_softmax(logits / temperature, -1)
            token = int(np.searchsorted(np.cumsum(logp.exp().double().numpy()), float(noise[t, row]), side="right"))
            seq.append(token)
            logps.append(float(logp[token]))
            if token == stop:
                break
        answers.append((seq[len(prompts[row // n]):], logps))
    return answers
