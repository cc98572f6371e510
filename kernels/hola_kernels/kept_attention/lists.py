"""Kept tokens compacted per head: lists of row numbers, made on the device without waiting for it.

A head's list holds the kept tokens of all documents in order, so that a document's are a run of it. What a token may
read is the part of its document's run before its own index: an entry is compared by its index in the list, and no
position is looked at. Lists have room for everything: how many tokens are kept is known on the device only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hola_kernels.kept_attention.kept_tokens import KeptTokens


@dataclass(frozen=True)
class KeptLists:
    """Entries of a head's list, and the rows that they point to.

    rows      [H, L] int32: row of k and v; the first `first[h, N]` of a head hold one
    before    [H, M] int32: index after the last entry that a token reads
    first     [H, N + 1] int32: index of each document's first entry, and after the last document's
    """

    rows: Tensor
    before: Tensor
    first: Tensor


def kept_lists(keep_MH: Tensor, cu_seqlens: Tensor) -> KeptLists:
    """Lists of M tokens of documents cut at cu_seqlens [N + 1]."""
    row = torch.arange(keep_MH.shape[0], dtype=torch.int32, device=keep_MH.device)
    return _compact(keep_MH.T, row, cu_seqlens)


def continued_lists(keep_BTH: Tensor, state: KeptTokens) -> KeptLists:
    """Lists of B sequences that go on from a state, whose rows come after the B * T tokens."""
    (batch, length, heads), capacity, device = keep_BTH.shape, state.capacity, keep_BTH.device
    filled = torch.arange(capacity, device=device)[None, :, None] < state.count[:, None]
    stream = torch.cat([filled, keep_BTH], 1).flatten(0, 1)
    token = torch.arange(batch * length, dtype=torch.int32, device=device).view(batch, length)
    index = torch.arange(batch * capacity, dtype=torch.int32, device=device).view(batch, capacity) + batch * length
    cu_seqlens = torch.arange(batch + 1, device=device) * (capacity + length)
    lists = _compact(stream.T, torch.cat([index, token], 1).flatten(), cu_seqlens)
    before = lists.before.view(heads, batch, capacity + length)[:, :, capacity:].flatten(1)
    return KeptLists(lists.rows, before.contiguous(), lists.first)


def _compact(keep_HS: Tensor, row_S: Tensor, cu_seqlens: Tensor) -> KeptLists:
    """The lists of a stream of S tokens, whose rows are row_S."""
    kept = keep_HS.to(torch.int32, memory_format=torch.contiguous_format)
    total = kept.cumsum(1, dtype=torch.int32)
    before = total - kept
    heads, stream = kept.shape
    rows = torch.empty(heads, stream + 1, dtype=torch.int32, device=kept.device)  # the last entry takes all others
    rows.scatter_(1, torch.where(kept > 0, before, stream).long(), row_S.expand(heads, -1))
    return KeptLists(rows, before, F.pad(total, (1, 0)).index_select(1, cu_seqlens))


def key_tiles(lists: KeptLists, cu_seqlens: Tensor, size: int) -> Tensor:
    """[H, U, 3] int32: the lists in tiles of `size` entries, none across documents: first index, number of
    entries (0: no such tile), end of the document in tokens. U from shapes alone: tiles after the last are empty."""
    first, documents = lists.first.long(), cu_seqlens.numel() - 1
    heads, most = first.shape[0], lists.before.shape[1] // size + documents
    ends = ((first.diff(dim=1) + size - 1) // size).cumsum(1)
    tile = torch.arange(most, device=first.device).expand(heads, -1).contiguous()
    document = torch.searchsorted(ends, tile, right=True).clamp(max=documents - 1)
    index = tile - F.pad(ends, (1, 0)).gather(1, document)
    start = first.gather(1, document) + index * size
    left = (first.gather(1, document + 1) - start).clamp(max=size)
    columns = [start, torch.where(tile < ends[:, -1:], left, 0), cu_seqlens[document + 1]]
    return torch.stack(columns, -1).to(torch.int32)
