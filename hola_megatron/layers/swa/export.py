"""The sliding-window attention layer of exported models. Travels with exported weights.

Shapes: B (or N) rows, T columns of a call, M tokens that are not padding, H heads, G key heads, K width of a head, D
width, W tokens of the window.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from hola_megatron.layers.attention.export import ExportedAttention, attend
from hola_megatron.layers.exported.kind_hola import ExportedKind
from hola_megatron.layers.exported.memory_hola import LayerMemory
from hola_megatron.layers.exported.packing_hola import Packing

LEAST_RUN = 128  # queries that are read together at least


class WindowMemory(LayerMemory):
    """The last W tokens of every row, a constant number of bytes: token t lies in place t mod W.

    keys (rotated), values [N, G, W, K]; length [N] int64: tokens seen.
    """

    fields = ("keys", "values", "length")

    def start(self, rows: int, like_NGMK: Tensor, window: int) -> None:
        """Make room for `rows` rows, of the first tokens' kind."""
        shape = (rows, like_NGMK.shape[1], window, like_NGMK.shape[3])
        self.keys, self.values = like_NGMK.new_zeros(shape), like_NGMK.new_zeros(shape)
        self.length = torch.zeros(rows, dtype=torch.int64, device=like_NGMK.device)


class ExportedWindowAttention(ExportedAttention):
    """Softmax attention to the last W tokens ; padding takes no position and no place of the window."""

    @property
    def window(self) -> int:
        return self.config.attention_window

    def forward(self, hidden_BTD: Tensor, packing: Packing | None, memory: WindowMemory | None) -> Tensor:
        """[B, T, D] -> [B, T, D]; `memory` is read and brought up to date."""
        rows, columns = hidden_BTD.shape[:2]
        if packing is not None and (packing.position is not None or memory is None):
            return packing.unpack(self._documents(packing.pack(hidden_BTD), _with_positions(packing)))
        if memory is None:
            place = torch.arange(columns, device=hidden_BTD.device)
            return self._out(self._read(*self._tokens(hidden_BTD, place.expand(rows, -1))))
        if columns == 1 and packing is None and memory.is_initialized and not torch.is_grad_enabled():
            return self._step(hidden_BTD, memory)
        if packing is not None:
            return packing.unpack(self._go_on(packing.pack(hidden_BTD), packing.cu_seqlens.tolist(), memory))
        bounds = list(range(0, rows * columns + 1, columns))
        return self._go_on(hidden_BTD.reshape(1, rows * columns, -1), bounds, memory).view_as(hidden_BTD)

    def _read(self, q_NHTK: Tensor, k_NGSK: Tensor, v_NGSK: Tensor) -> Tensor:
        """What the queries read, of which the last sees the last key: run by run, so that few scores are in vain."""
        queries, keys = q_NHTK.shape[2], k_NGSK.shape[2]
        run, earlier, parts = max(self.window, LEAST_RUN), keys - queries, []
        for start, end in pairwise([*range(0, queries, run), queries]):
            first, last = max(earlier + start - self.window + 1, 0), earlier + end
            query = torch.arange(earlier + start, earlier + end, device=q_NHTK.device)[:, None]
            key = torch.arange(first, last, device=q_NHTK.device)
            seen = (key <= query) & (key > query - self.window)
            parts.append(attend(q_NHTK[:, :, start:end], k_NGSK[:, :, first:last], v_NGSK[:, :, first:last],
                                attn_mask=seen))
        return torch.cat(parts, 2) if parts else q_NHTK

    def _go_on(self, x_1MD: Tensor, bounds: list[int], memory: WindowMemory) -> Tensor:
        """Tokens of all rows, row n from bounds[n] to bounds[n + 1], after those in memory: [1, M, D] -> [1, M, D]."""
        rows, window = len(bounds) - 1, self.window
        seen = memory.length.tolist() if memory.is_initialized else [0] * rows
        position = torch.cat([torch.arange(n, n + end - start) for n, (start, end) in
                              zip(seen, pairwise(bounds), strict=True)]).to(x_1MD.device)
        q, k, v = self._tokens(x_1MD, position[None])
        if not memory.is_initialized:
            memory.start(rows, k, window)
        held_k, held_v, mixed = memory.keys.clone(), memory.values.clone(), []
        for n, (start, end) in enumerate(pairwise(bounds)):
            if start == end:
                continue
            places = torch.arange(max(seen[n] - window + 1, 0), seen[n], device=k.device) % window
            everything = [torch.cat([held[n: n + 1, :, places], x[:, :, start:end]], 2)
                          for held, x in ((held_k, k), (held_v, v))]
            mixed.append(self._read(q[:, :, start:end], *everything))
            kept = slice(max(start, end - window), end)
            for held, x in ((held_k, k), (held_v, v)):
                held[n, :, position[kept] % window] = x[0, :, kept].detach()
        memory.keys, memory.values = held_k, held_v
        memory.length = memory.length + torch.tensor(bounds, device=k.device).diff()
        return self._out(torch.cat(mixed, 2) if mixed else q)

    def _step(self, hidden_N1D: Tensor, memory: WindowMemory) -> Tensor:
        """One more token of every row. Memory is written to in its place, and nothing is read on the host: a CUDA
        graph can record it."""
        q, k, v = self._tokens(hidden_N1D, memory.length[:, None])
        place = (memory.length % self.window)[:, None, None, None].expand_as(k)
        memory.keys.scatter_(2, place, k.to(memory.keys.dtype))
        memory.values.scatter_(2, place, v.to(memory.values.dtype))
        memory.length += 1
        filled = torch.arange(self.window, device=k.device) < memory.length[:, None]
        return self._out(attend(q, memory.keys, memory.values, attn_mask=filled[:, None, None]))


def _with_positions(packing: Packing) -> Packing:
    """Of padded rows as well: places within the rows."""
    if packing.position is not None:
        return packing
    counts = packing.cu_seqlens.diff().to(packing.index.device)
    starts = packing.cu_seqlens[:-1].to(packing.index.device).repeat_interleave(counts)
    place = torch.arange(packing.index.numel(), device=packing.index.device) - starts
    return Packing(packing.valid, packing.index, packing.documents, place)


KIND = ExportedKind("swa", "W", ExportedWindowAttention, WindowMemory)
