"""The definition of the exact cache and of cache attention, token by token.

A token of block n sees A_n (the w tokens of highest score among ALL tokens of earlier
blocks of its sequence, ties to the earlier), its local part (its block, or a sliding window,
up to itself), and a sink whose value is zero. A token that is in both parts is read once.
Selection here sorts the whole past, never a running set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.norms import compute_dtype, read_normalize
from hola_kernels.options import CacheOptions
from hola_kernels.state import HolaState, merged_tokens


def cache_attention_reference(q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, score_MH: Tensor, gamma_q: Tensor,
                         gamma_k: Tensor, sink_H: Tensor | None, options: CacheOptions, cu_seqlens: Tensor,
                         memory: HolaState) -> tuple[Tensor, HolaState]:
    """Same contract as `torch_blocks.cache_attention_blocks`."""
    bounds = cu_seqlens.tolist()
    outputs, finals = [], []
    for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        past = _Past(memory, n, options.reach)
        for t in range(start, end):
            past.append(k_MHK[t], v_MHV[t], score_MH[t])
            outputs.append(_read_one(q_MHK[t], past, gamma_q, gamma_k, sink_H, options.read_norm))
            past.close_block_if_full()
        finals.append(past)
    o_MHV = torch.stack(outputs) if outputs else v_MHV.to(compute_dtype(v_MHV))
    return o_MHV, _to_state(finals, memory)


class _Past:
    """All tokens of one sequence: `merged` (closed blocks, [E, H, ...]) and the open block."""

    def __init__(self, memory: HolaState, n: int, window: int | None):
        self.block, self.slots, self.window = memory.block, memory.slots, window
        self.window_blocks = memory.window_blocks
        self.length = int(memory.length[n])
        open_tokens = int(memory.open_count[n])
        filled = (memory.cache_position[n] >= 0).all(0)  # heads fill together: they have seen the same tokens
        self.merged = [x[n].transpose(0, 1)[filled]
                     for x in (memory.cache_k, memory.cache_v, memory.cache_score, memory.cache_position)]
        position = torch.arange(self.length - open_tokens, self.length, device=memory.length.device)
        position = position[:, None].expand(-1, self.merged[3].shape[1])
        self.open = [*(x[n, :open_tokens] for x in (memory.open_k, memory.open_v, memory.open_score)), position]
        self.cached = self._top(self.length // self.block * self.block)

    def append(self, k: Tensor, v: Tensor, score: Tensor) -> None:
        position = torch.full(score.shape, self.length, device=k.device)[None]
        self.open = [torch.cat([old, new.to(old.dtype)])
                     for old, new in zip(self.open, (k[None], v[None], score[None], position), strict=True)]
        self.length += 1

    def close_block_if_full(self) -> None:
        if self.length % self.block:
            return
        end = int(merged_tokens(torch.tensor(self.length), self.block, self.window_blocks))
        closed = len(self.open[3]) - (self.length - end)
        self.merged = [torch.cat([old, new[:closed]]) for old, new in zip(self.merged, self.open, strict=True)]
        self.open = [x[closed:] for x in self.open]
        self.cached = self._top(self.length)

    def local(self) -> list[Tensor]:
        """k and v of the newest token's local part, [L, H, ...], the token itself last."""
        first = self.length - 1
        first = first // self.block * self.block if self.window is None else max(0, first - self.window + 1)
        count = self.length - first
        return [x[len(x) - count:] for x in self.open[:2]]

    def outside(self) -> Tensor:
        """[E, H] bool: which cached tokens are not in the newest token's local part."""
        position = self.cached[3]
        return position >= 0 if self.window is None else position < self.length - self.window

    def top_of_merged(self) -> list[Tensor]:
        """`_top` of what is not in the open blocks."""
        return _best(self.merged, self.slots)

    def _top(self, before: int) -> list[Tensor]:
        """k, v, score, position of the w best tokens at positions < before, [<= w, H, ...], by position."""
        closed = len(self.open[3]) - (self.length - before)
        return _best([torch.cat([old, new[:closed].to(old.dtype)])
                      for old, new in zip(self.merged, self.open, strict=True)], self.slots)


def _best(tokens: list[Tensor], slots: int) -> list[Tensor]:
    """The `slots` tokens of highest score of k, v, score, position [E, H, ...], which are in order of position."""
    # a stable sort keeps that order among equals
    best = tokens[2].sort(dim=0, descending=True, stable=True).indices[:slots].sort(0).values

    def pick(x: Tensor) -> Tensor:
        return x.gather(0, best.reshape(*best.shape, *[1] * (x.ndim - 2)).expand(-1, *x.shape[1:]))

    return [pick(x) for x in tokens]


def _read_one(q_HK: Tensor, past: _Past, gamma_q: Tensor, gamma_k: Tensor, sink_H: Tensor | None,
              read_norm: str) -> Tensor:
    compute = compute_dtype(q_HK)
    (cached_k, cached_v, _, _), (local_k, local_v) = past.cached, past.local()
    k = torch.cat([cached_k, local_k]).to(compute)
    v = torch.cat([cached_v, local_v]).to(compute)
    q = read_normalize(q_HK.to(compute), gamma_q, read_norm)
    logits = torch.einsum("hk,ehk->he", q, read_normalize(k, gamma_k, read_norm)) * q.shape[-1] ** -0.5
    visible = torch.cat([past.outside(), past.outside().new_ones(len(local_k), k.shape[1])]).T
    logits = logits.masked_fill(~visible, -torch.inf)
    if sink_H is not None:
        logits = torch.cat([logits, sink_H.to(compute)[:, None]], -1)
    weights = logits.softmax(-1)[:, : k.shape[0]]
    return torch.einsum("he,ehv->hv", weights, v)


def _to_state(pasts: list[_Past], like: HolaState) -> HolaState:
    """Pack the sequences' memories; the compressed state is filled in by the caller."""
    if not pasts:
        return like
    cached, open_blocks = [], []
    for past in pasts:
        top = past.top_of_merged()
        gap = past.slots - top[0].shape[0]
        fill = (0.0, 0.0, -torch.inf, -1)
        cached.append([_extend(x, gap, value) for x, value in zip(top, fill, strict=True)])
        open_blocks.append([_extend(x, (1 + past.window_blocks) * past.block - x.shape[0], 0.0) for x in past.open[:3]])
    cache_k, cache_v, score, position = (torch.stack(x).transpose(1, 2) for x in zip(*cached, strict=True))
    open_k, open_v, open_score = (torch.stack(x) for x in zip(*open_blocks, strict=True))
    length = torch.tensor([past.length for past in pasts], device=like.length.device)
    return HolaState(like.state, cache_k, cache_v, score, position, open_k, open_v, open_score, length,
                     like.window_blocks)


def _extend(x: Tensor, rows: int, value: float) -> Tensor:
    return torch.cat([x, x.new_full((rows, *x.shape[1:]), value)])
