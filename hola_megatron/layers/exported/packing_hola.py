"""Padding and packed documents in a call of an exported model. Copied into every export.

Rows may be padded, and a row may hold several documents one after the other, in the forms of transformers'
DataCollatorWithFlattening and of flash-linear-attention (cu_seqlens). Arguments must be consistent with each other.
Unknown keywords raise an error, since to ignore one would silently give another result.

Shapes: B rows, T columns of a call, M tokens that are not padding, N documents, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from hola_kernels import PackedDocuments
except ImportError:  # the same code, bundled with the export
    from .hola_ops import PackedDocuments

IGNORED = -100  # a label without loss
OFFSETS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
LONGEST = ("max_length_q", "max_length_k")
DOCUMENT_KEYWORDS = ("position_ids", "seq_idx", *OFFSETS, *LONGEST)


def refuse_unknown(keywords: dict[str, Any], seen: int, columns: int) -> None:
    """Check the keywords of a call that the model does not use.

    seen: columns in the cache before this call; columns: T. Raises TypeError for an unknown keyword, ValueError for a
    cache_position that does not continue the cache.
    """
    given = {name: value for name, value in keywords.items() if value is not None}
    if given.pop("output_attentions", False):
        raise TypeError("output_attentions: a HOLA model has no attention matrices to return; leave it out")
    positions = given.pop("cache_position", None)  # transformers 4: indices of the columns of a call
    if positions is not None and (positions.numel() != columns or int(positions.flatten()[0]) != seen):
        raise ValueError(f"cache_position {positions.tolist()[:3]} is of {positions.numel()} columns; the cache holds "
                         f"{seen} columns and this call has {columns}: leave it out")
    if given:
        raise TypeError(f"{', '.join(sorted(given))}: unknown keyword of a HOLA model; leave it out, or give None")


@dataclass
class Packing:
    """The tokens of a call packed into one row.

    valid: [B, T] bool, false for padding.
    index: [M] int64, indices of the tokens in the flattened batch, row by row.
    documents: the N documents of the M tokens; every layer uses this value, with the tables that operations make from
        it. Where every row is one document, N is B.
    position: [M] int64, positions within the documents; None where every row is one document.
    """

    valid: Tensor
    index: Tensor
    documents: PackedDocuments
    position: Tensor | None = None

    @property
    def cu_seqlens(self) -> Tensor:
        """[N + 1] int64 on the CPU, from 0 to M."""
        return self.documents.host()

    @classmethod
    def of(cls, attention_mask: Tensor | None, hidden_BTD: Tensor, documents: dict[str, Any],
           seen: int) -> Packing | None:
        """The packing of a call; None where every row is one document without padding.

        attention_mask: [B, >= T], of which the last T columns are this call's; or None.
        hidden_BTD: the call's input.
        documents: the given ones of DOCUMENT_KEYWORDS.
        seen: columns in the cache before this call.
        Raises ValueError where these contradict each other.
        """
        rows, columns = hidden_BTD.shape[:2]
        padded = _valid(attention_mask, columns)
        given = {name: documents[name] for name in DOCUMENT_KEYWORDS if documents.get(name) is not None}
        if padded is None and not given:
            return None
        valid = hidden_BTD.new_ones((rows, columns), dtype=torch.bool) if padded is None else padded
        index = valid.flatten().nonzero().squeeze(1)
        starts = _row_starts(index, columns)
        several = False  # whether a row holds several documents
        if given:
            before = _tokens_before(attention_mask, rows, columns, seen)
            found = _document_starts(given, valid, index, starts, seen, before)
            several = found is not None and int(found.sum()) > int(starts.sum())
            _check_longest(given, found if several else starts)
        if not several:
            if padded is None:
                return None
            return cls(valid, index, PackedDocuments(F.pad(valid.sum(1).cumsum(0), (1, 0)).cpu()))
        token = torch.arange(index.numel(), device=index.device)
        firsts = token[found]
        packed = PackedDocuments(F.pad(firsts, (0, 1), value=index.numel()).cpu())
        return cls(valid, index, packed, token - firsts[found.cumsum(0) - 1])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packing:
        """The packing on another device, for a model whose layers are on several devices."""
        valid, index = (x.to(device, non_blocking=non_blocking) for x in (self.valid, self.index))
        position = None if self.position is None else self.position.to(device, non_blocking=non_blocking)
        return Packing(valid, index, self.documents, position)

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [1, M, D]."""
        return x.flatten(0, 1).index_select(0, self.index)[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """[1, M, D] -> [B, T, D], zeros at padding."""
        flat = packed.new_zeros(self.valid.numel(), packed.shape[2])
        return flat.index_copy(0, self.index, packed[0]).view(*self.valid.shape, -1)

    def without_first_labels(self, labels_BT: Tensor) -> Tensor:
        """labels [B, T] with the first token of every document ignored: its predecessor is of another document, or
        padding."""
        first = _row_starts(self.index, labels_BT.shape[1]) if self.position is None else self.position == 0
        return labels_BT.flatten().index_fill(0, self.index[first].to(labels_BT.device), IGNORED).view_as(labels_BT)


def _valid(attention_mask: Tensor | None, columns: int) -> Tensor | None:
    """[B, T] bool; None where all columns are tokens."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] < columns:
        raise ValueError(f"attention_mask {tuple(attention_mask.shape)} must be [B, T] with 1 for tokens and 0 for "
                         f"padding, over at least the {columns} columns of this call")
    valid = attention_mask[:, -columns:].bool()
    whole, plain = torch.stack([valid.all(), (attention_mask[:, -columns:] == valid).all()]).tolist()
    if not plain:
        raise ValueError("attention_mask has values other than 1 for tokens and 0 for padding; give documents of a row "
                         "by position_ids, seq_idx or cu_seqlens")
    return None if whole else valid


def _row_starts(index: Tensor, columns: int) -> Tensor:
    """[M] bool: the first token of every row that has tokens."""
    row = index // columns
    return torch.cat([row.new_ones(1, dtype=torch.bool), row.diff() != 0])[: row.numel()]


def _tokens_before(attention_mask: Tensor | None, rows: int, columns: int, seen: int) -> Tensor | None:
    """[B] tokens of every row in the cache; None where the mask does not cover the cache."""
    if attention_mask is None:
        return torch.full((rows,), seen)
    return attention_mask[:, :seen].sum(1).cpu() if attention_mask.shape[1] == seen + columns else None


def _document_starts(given: dict[str, Any], valid: Tensor, index: Tensor, rows: Tensor, seen: int,
                     before: Tensor | None) -> Tensor | None:
    """[M] bool: first tokens of documents, by the keywords given; None where no keyword gives them."""
    starts = {}
    for name in ("position_ids", "seq_idx", *OFFSETS):
        if name not in given:
            continue
        value = _whole_numbers(name, given[name], index.device)
        if name == "position_ids":
            flat = _per_token(name, value, valid, index)
            starts[name] = _restarts(flat, rows, index)
            if seen and flat.numel():
                _check_continued(flat[rows], index[rows] // valid.shape[1], index[rows] % valid.shape[1], seen, before)
        else:
            number = value if name == "seq_idx" else _numbers_of(name, value, valid)
            starts[name] = _changes(name, _per_token(name, number, valid, index), rows)
    for name, start in starts.items():
        first = next(iter(starts))
        if not torch.equal(start, starts[first]):
            at = int(index[(start != starts[first]).nonzero()[0]])
            raise ValueError(f"{first} and {name} contradict each other: only one of them starts a document at row "
                             f"{at // valid.shape[1]}, column {at % valid.shape[1]}; give those of one packing")
    found = next(iter(starts.values()), None)
    if seen and found is not None and not torch.equal(found, rows):
        raise ValueError(f"{next(iter(starts))} starts a document inside a call that continues a cache of {seen} "
                         "columns; documents are packed without a cache")
    return found


def _whole_numbers(name: str, value: Any, device: torch.device) -> Tensor:
    value = torch.as_tensor(value, device=device)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name} is {value.dtype}; it must be an integer tensor")
    return value.long()


def _per_token(name: str, value: Tensor, valid: Tensor, index: Tensor) -> Tensor:
    """[B, T] (or one row for all) -> [M]."""
    if value.ndim == 1:
        value = value[None]
    if value.ndim != 2 or value.shape[1] != valid.shape[1] or value.shape[0] not in (1, valid.shape[0]):
        raise ValueError(f"{name} {tuple(value.shape)} must be [B, T] = {tuple(valid.shape)}, as this call's input")
    return value.expand_as(valid).flatten()[index]


def _restarts(position_M: Tensor, rows_M: Tensor, index_M: Tensor) -> Tensor:
    """[M] bool: where positions increase neither by one nor with the columns (or a row starts).

    All documents after a row's first must start at the same position.
    """
    step, columns = (torch.cat([x.new_ones(1), x.diff()])[: x.numel()] for x in (position_M, index_M))
    starts = ((step != 1) & (step != columns)) | rows_M
    inner = position_M[starts & ~rows_M]
    if not inner.numel():
        return starts
    lowest = position_M[rows_M].min()
    wrong = starts & ~rows_M & ((position_M != inner.min()) | (position_M > lowest) | (position_M < 0))
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(f"position_ids go from {int(position_M[at - 1])} to {int(position_M[at])} at token {at}: they "
                         "must increase by one within a document, and start at one number in every document of a row")
    return starts


def _numbers_of(name: str, cu_seqlens: Tensor, valid: Tensor) -> Tensor:
    """[1, T] the number of every column's document, from cu_seqlens [N + 1]."""
    rows, columns = valid.shape
    cu = cu_seqlens.flatten() if cu_seqlens.ndim == 2 and cu_seqlens.shape[0] == 1 else cu_seqlens
    if rows != 1:
        raise ValueError(f"{name} needs one packed row, and this call has {rows} rows")
    rising = cu.ndim == 1 and cu.numel() >= 2 and bool((cu.diff() >= 0).all())
    if not rising or int(cu[0]) != 0 or int(cu[-1]) != columns:
        raise ValueError(f"{name} {cu.tolist() if cu.numel() < 9 else tuple(cu.shape)} must rise from 0 to the "
                         f"{columns} columns of this call")
    return torch.searchsorted(cu, torch.arange(columns, device=cu.device), right=True)[None]


def _changes(name: str, number_M: Tensor, rows_M: Tensor) -> Tensor:
    """[M] bool: where the number of the document changes (or a row starts); it must not decrease within a row."""
    step = torch.cat([number_M.new_ones(1), number_M.diff()])[: number_M.numel()]
    if bool(((step < 0) & ~rows_M).any()):
        raise ValueError(f"{name} decreases within a row: the documents of a row are numbered in order")
    return (step != 0) | rows_M


def _check_continued(first: Tensor, row: Tensor, column: Tensor, seen: int, before: Tensor | None) -> None:
    """ValueError unless positions continue those in the cache, counted in tokens or in columns.

    first: positions of the first token of every row that has tokens; row, column: their indices in this call.
    """
    first, row, column = (x.cpu() for x in (first, row, column))
    fits = first > 0 if before is None else (first == before[row]) | (first == seen + column)
    if not fits.all():
        raise ValueError(f"position_ids start at {int(first[~fits][0])} in a call that continues a cache of {seen} "
                         "columns; leave them out, or start with a new cache")


def _check_longest(given: dict[str, Any], starts_M: Tensor) -> None:
    """ValueError where max_length_q or max_length_k is less than the longest document."""
    names = [name for name in LONGEST if name in given]
    if not names or not starts_M.numel():
        return
    longest = int(F.pad(starts_M.nonzero().squeeze(1), (0, 1), value=starts_M.numel()).diff().max())
    for name in names:
        if int(given[name]) < longest:
            raise ValueError(f"{name} is {int(given[name])}, and a document has {longest} tokens")
