"""Which tokens a context-parallel rank holds, and how its first and last document continue on other ranks.

A row of tokens is sharded into equal contiguous slices, one per rank, independent of document boundaries. Only two
documents of a shard can have tokens on other ranks: the first and the last. All values are Python integers, computed
before the step starts, so layers do not synchronise with the device.

    tokens   | a a a a b b | b b b b b b | b c c d d d |      three ranks
    before     0             2             8                  tokens of the first document on earlier ranks
    first_rank 0             0             0                  rank where the first document starts
    last_rank  2             2             2                  rank where the last document ends
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hola_kernels import PackedDocuments


@dataclass(frozen=True)
class SequenceShard:
    """One rank's shard of a row of tokens.

    rank, ranks    this rank in the context-parallel group, and the group's size
    tokens         tokens per row on this rank
    documents      documents of this shard, the first and the last of them perhaps in part; None: every row is one
    before         tokens of the first document on earlier ranks
    first_rank     rank that holds the first document's first token
    last_rank      rank that holds the last document's last token
    head, tail     tokens of the first and of the last document on this rank
    later          the documents after the first, as those of the tokens after it; None where there are none
    """

    rank: int
    ranks: int
    tokens: int
    before: int
    first_rank: int
    last_rank: int
    head: int
    tail: int
    documents: PackedDocuments | None = None
    later: PackedDocuments | None = field(default=None, repr=False)

    @property
    def continues(self) -> bool:
        """Whether the last document has tokens on later ranks."""
        return self.last_rank > self.rank

    @property
    def is_one_document(self) -> bool:
        """Whether all tokens of the shard belong to one document."""
        return self.head == self.tokens

    def sequences(self, rows: int) -> int:
        """Number of sequences on this rank: `rows`, or the documents of the packed row."""
        return rows if self.documents is None else self.documents.count

    @property
    def start(self) -> int:
        """Index of this shard's first token in the whole row."""
        return self.rank * self.tokens

    @classmethod
    def of_rows(cls, tokens: int, rank: int, ranks: int) -> SequenceShard:
        """Of rows with one document each. tokens: per row on every rank."""
        return cls(rank, ranks, tokens, before=rank * tokens, first_rank=0, last_rank=ranks - 1, head=tokens,
                   tail=tokens)

    @classmethod
    def of_documents(cls, documents: PackedDocuments, rank: int, ranks: int) -> SequenceShard:
        """Of a packed row. documents: of the whole row, on the CPU; ranks divide its length."""
        bounds = documents.host().tolist()
        tokens = bounds[-1] // ranks
        start, end = rank * tokens, (rank + 1) * tokens
        # empty documents repeat a bound; the document of the first token starts at the last bound not after it
        first_start = bounds[bisect_right(bounds, start) - 1]
        last_end = bounds[bisect_left(bounds, end)]
        inside = sorted({b for b in bounds if start < b < end})
        local = [0, *(b - start for b in inside), tokens]
        head = local[1]
        later = PackedDocuments(torch.tensor([b - head for b in local[1:]])) if len(local) > 2 else None
        return cls(rank, ranks, tokens, before=start - first_start, first_rank=first_start // tokens,
                   last_rank=(last_end - 1) // tokens, head=head, tail=tokens - local[-2],
                   documents=PackedDocuments(torch.tensor(local)), later=later)

    def slice(self, x: Tensor, axis: int = 1) -> Tensor:
        """This shard of a tensor x of whole rows, a view."""
        return x.narrow(axis, self.start, self.tokens)
