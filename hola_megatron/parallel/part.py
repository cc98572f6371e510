"""Which tokens a context-parallel rank holds, and how its first and last document go on beyond them.

A row of tokens is cut into equal contiguous parts, one a rank, wherever documents begin or end. Only two
documents of a part have anything to do with other ranks: the first, if it began before, and the last, if it
goes on. All of it is plain numbers known before the step starts, so no layer asks the device.

    tokens   | a a a a b b | b b b b b b | b c c d d d |      three ranks
    before     0             2             8                  tokens of the first document on earlier ranks
    first_rank 0             0             0                  where that document begins
    last_rank  2             2             2                  where the last document ends
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """One rank's share of a row of tokens.

    rank, ranks    place in the context-parallel group
    tokens         tokens a row on this rank
    cuts           [n + 1] int32 on the CPU, the documents' parts here, or None: rows of one document each
    before         tokens of the first document on earlier ranks
    first_rank     rank that holds the first document's first token
    last_rank      rank that holds the last document's last token
    head, tail     tokens of the first and of the last document on this rank
    later          cuts of the documents after the first, counted from its end; None where there are none
    """

    rank: int
    ranks: int
    tokens: int
    before: int
    first_rank: int
    last_rank: int
    head: int
    tail: int
    cuts: Tensor | None = None
    later: Tensor | None = field(default=None, repr=False)

    @property
    def goes_on(self) -> bool:
        """Whether the last document has tokens on later ranks."""
        return self.last_rank > self.rank

    @property
    def is_one_document(self) -> bool:
        """Whether all tokens here belong to one document."""
        return self.head == self.tokens

    @property
    def start(self) -> int:
        """Number of this part's first token in the whole row."""
        return self.rank * self.tokens

    @classmethod
    def of_rows(cls, tokens: int, rank: int, ranks: int) -> Part:
        """Rows without cuts (one document each): `tokens` a row on every rank."""
        return cls(rank, ranks, tokens, before=rank * tokens, first_rank=0, last_rank=ranks - 1, head=tokens,
                   tail=tokens)

    @classmethod
    def of_documents(cls, cu_seqlens: Tensor, rank: int, ranks: int) -> Part:
        """cu_seqlens [N + 1] integer on the CPU: documents of the whole row, whose length the ranks divide."""
        bounds = cu_seqlens.tolist()
        tokens = bounds[-1] // ranks
        start, end = rank * tokens, (rank + 1) * tokens
        # empty documents repeat a bound; the one that holds the first token begins at the last bound up to it
        began = bounds[bisect_right(bounds, start) - 1]
        ends = bounds[bisect_left(bounds, end)]
        inside = sorted({b for b in bounds if start < b < end})
        local = [0, *(b - start for b in inside), tokens]
        head = local[1]
        later = torch.tensor([b - head for b in local[1:]], dtype=torch.int32) if len(local) > 2 else None
        return cls(rank, ranks, tokens, before=start - began, first_rank=began // tokens,
                   last_rank=(ends - 1) // tokens, head=head, tail=tokens - local[-2],
                   cuts=torch.tensor(local, dtype=torch.int32), later=later)

    def slice(self, x: Tensor, axis: int = 1) -> Tensor:
        """This part of whole rows x."""
        return x.narrow(axis, self.start, self.tokens)
