"""The definition of the exact cache and its read, token by token.

A token of block n sees A_n (the w tokens of highest score among ALL tokens of earlier
blocks of its sequence, ties to the earlier), the tokens of its own block up to itself,
and a sink whose value is zero. Selection here sorts the whole past, never a running set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.norms import compute_dtype, read_normalize
from hola_kernels.state import HolaState


def exact_read_reference(q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, score_MH: Tensor, gamma_q: Tensor,
                         gamma_k: Tensor, sink_H: Tensor | None, read_norm: str, cu_seqlens: Tensor,
                         memory: HolaState) -> tuple[Tensor, HolaState]:
    """Same contract as `torch_blocks.exact_read_blocks`."""
    bounds = cu_seqlens.tolist()
    outputs, finals = [], []
    for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        past = _Past(memory, n)
        for t in range(start, end):
            past.append(k_MHK[t], v_MHV[t], score_MH[t])
            outputs.append(_read_one(q_MHK[t], past, gamma_q, gamma_k, sink_H, read_norm))
            past.close_block_if_full()
        finals.append(past)
    o_MHV = torch.stack(outputs) if outputs else v_MHV.to(compute_dtype(v_MHV))
    return o_MHV, _to_state(finals, memory)


class _Past:
    """All tokens of one sequence: `kept` (closed blocks, [E, H, ...]) and the open block."""

    def __init__(self, memory: HolaState, n: int):
        self.block, self.slots = memory.block, memory.slots
        self.length = int(memory.length[n])
        opened = self.length % self.block
        filled = (memory.cache_position[n] >= 0).all(0)  # heads fill together: they have seen the same tokens
        self.kept = [x[n].transpose(0, 1)[filled]
                     for x in (memory.cache_k, memory.cache_v, memory.cache_score, memory.cache_position)]
        self.open = [x[n, :opened] for x in (memory.open_k, memory.open_v, memory.open_score)]
        self.cached = self._top()

    def append(self, k: Tensor, v: Tensor, score: Tensor) -> None:
        self.open = [torch.cat([old, new[None].to(old.dtype)])
                     for old, new in zip(self.open, (k, v, score), strict=True)]
        self.length += 1

    def close_block_if_full(self) -> None:
        if self.length % self.block:
            return
        k, v, score = self.open
        position = torch.arange(self.length - self.block, self.length, device=k.device)
        position = position[:, None].expand_as(score)
        self.kept = [torch.cat(pair) for pair in zip(self.kept, (k, v, score, position), strict=True)]
        self.open = [x[:0] for x in self.open]
        self.cached = self._top()

    def _top(self) -> list[Tensor]:
        """k, v, score, position of the w best of the closed blocks, [<= w, H, ...], by position."""
        k, v, score, position = self.kept
        # kept is in order of position, and a stable sort keeps that order among equals
        best = score.sort(dim=0, descending=True, stable=True).indices[: self.slots].sort(0).values

        def pick(x: Tensor) -> Tensor:
            return x.gather(0, best.reshape(*best.shape, *[1] * (x.ndim - 2)).expand(-1, *x.shape[1:]))

        return [pick(x) for x in (k, v, score, position)]


def _read_one(q_HK: Tensor, past: _Past, gamma_q: Tensor, gamma_k: Tensor, sink_H: Tensor | None,
              read_norm: str) -> Tensor:
    wide = compute_dtype(q_HK)
    cached_k, cached_v, _, _ = past.cached
    k = torch.cat([cached_k, past.open[0]]).to(wide)
    v = torch.cat([cached_v, past.open[1]]).to(wide)
    q = read_normalize(q_HK.to(wide), gamma_q, read_norm)
    logits = torch.einsum("hk,ehk->he", q, read_normalize(k, gamma_k, read_norm)) * q.shape[-1] ** -0.5
    if sink_H is not None:
        logits = torch.cat([logits, sink_H.to(wide)[:, None]], -1)
    weights = logits.softmax(-1)[:, : k.shape[0]]
    return torch.einsum("he,ehv->hv", weights, v)


def _to_state(pasts: list[_Past], like: HolaState) -> HolaState:
    """Pack the sequences' memories; the compressed state is filled in by the caller."""
    cached, opened = [], []
    for past in pasts:
        top = past.cached
        gap = past.slots - top[0].shape[0]
        fill = (0.0, 0.0, -torch.inf, -1)
        cached.append([_extend(x, gap, value) for x, value in zip(top, fill, strict=True)])
        opened.append([_extend(x, past.block - x.shape[0], 0.0) for x in past.open])
    cache_k, cache_v, score, position = (torch.stack(x).transpose(1, 2) for x in zip(*cached, strict=True))
    open_k, open_v, open_score = (torch.stack(x) for x in zip(*opened, strict=True))
    length = torch.tensor([past.length for past in pasts], device=like.length.device)
    return HolaState(like.state, cache_k, cache_v, score, position, open_k, open_v, open_score, length)


def _extend(x: Tensor, rows: int, value: float) -> Tensor:
    return torch.cat([x, x.new_full((rows, *x.shape[1:]), value)])
