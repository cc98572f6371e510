"""A second definition of cache attention with every local part and norm, for tests: dense masks, one head at a time.

Written from the formulas alone, and slowly: the operations' own references are tested against it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def visible_set(score_T: Tensor, t: int, *, local: str, block: int, window: int, slots: int) -> list[int]:
    """Tokens that token t of a document reads: its local part, and the `slots` best of all earlier blocks."""
    first = t // block * block
    near = {"block": range(first, t + 1), "window": range(max(0, t - window + 1), t + 1), "none": [t]}[local]
    ranked = sorted(range(first), key=lambda j: (-float(score_T[j]), j))
    return sorted({*near, *ranked[:slots]})


def normalised(x: Tensor, gamma: Tensor, norm: str) -> Tensor:
    if norm == "none":
        return x * gamma
    total = x.square().mean(-1, keepdim=True) if norm == "rms" else x.square().sum(-1, keepdim=True)
    return x / (total + 1e-6).sqrt() * gamma


def at_positions(x: Tensor, theta: float | None) -> Tensor:
    """x [T, H, K] with channel pairs (i, i + K / 2) of token t rotated by t * theta^(-2 i / K), as complex numbers."""
    if theta is None:
        return x
    half = x.shape[-1] // 2
    rate = theta ** (-2 * torch.arange(half, dtype=x.dtype) / x.shape[-1])
    angle = torch.arange(x.shape[0], dtype=x.dtype)[:, None] * rate
    rotated = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([rotated.real, rotated.imag], -1)


def merged(o_state: Tensor, o_exact: Tensor, gate: Tensor, merge: str) -> Tensor:
    """The two outputs [..., H, V] as one."""
    if merge == "add":
        return o_state + torch.sigmoid(gate)[:, None] * o_exact
    if merge == "two":
        first, second = torch.sigmoid(gate).unbind(-1)
        return first[..., None] * o_state + second[..., None] * o_exact
    return torch.lerp(o_exact, o_state, torch.sigmoid(gate))


def read_document(q: Tensor, k: Tensor, v: Tensor, score: Tensor, gamma_q: Tensor, gamma_k: Tensor,
                  sink: Tensor | None, *, read_norm: str = "rms", local: str = "block", block: int = 256,
                  window: int = 256, slots: int = 64, rope_theta: float | None = None) -> Tensor:
    """q, k [T, H, K], v [T, H, V], score [T, H] of one document -> [T, H, V]."""
    out = torch.zeros_like(v)
    q, k = (at_positions(normalised(x, gamma, read_norm), rope_theta) for x, gamma in ((q, gamma_q), (k, gamma_k)))
    for h in range(q.shape[1]):
        for t in range(q.shape[0]):
            seen = visible_set(score[:, h], t, local=local, block=block, window=window, slots=slots)
            logits = k[seen, h] @ q[t, h] * q.shape[-1] ** -0.5
            if sink is not None:
                logits = torch.cat([logits, sink[h:h + 1]])
            out[t, h] = logits.softmax(0)[: len(seen)] @ v[seen, h]
    return out


def read_packed(q: Tensor, k: Tensor, v: Tensor, score: Tensor, cu_seqlens: list[int], **arguments) -> Tensor:
    """The same for documents packed in one row [1, T, ...]."""
    parts = [read_document(q[0, a:b], k[0, a:b], v[0, a:b], score[0, a:b], **arguments)
             for a, b in pairwise(cu_seqlens)]
    return torch.cat(parts)[None]


def late_loop(q, k, v, log_decay, beta, delay, mode, bounds):
    """o and the score, one token after the other; q, k [M, H, K], v [M, H, V], the rest [M, H]."""
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    outputs, scores = [], []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        states = [torch.zeros(*k.shape[1:], v.shape[-1], dtype=v.dtype)]  # states[n]: after n tokens
        for t in range(start, end):
            decayed = log_decay[t].exp()[:, None, None] * states[-1]
            residual = v[t] - torch.einsum("hkv,hk->hv", decayed, k[t])
            states.append(decayed + beta[t][:, None, None] * torch.einsum("hk,hv->hkv", k[t], residual))
            scores.append(beta[t] * residual.norm(dim=-1))
            position = t - start
            known = max(position + 1 - delay, 0) if mode == "stream" else position // delay * delay
            outputs.append(torch.einsum("hkv,hk->hv", states[known], q[t]) * q.shape[-1] ** -0.5)
    return torch.stack(outputs), torch.stack(scores)
