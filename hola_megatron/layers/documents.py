"""The documents of a micro-batch, in the type that Megatron passes through its layers."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from hola_kernels import PackedDocuments
from hola_megatron.parallel.sequence_shard import SequenceShard


@dataclass
class Documents(PackedSeqParams):
    """The documents of this rank's packed tokens.

    packed: as the operations take them; each makes its tables from this value once for all layers.
    shard: this context-parallel rank's shard of the whole row; None with one context rank.

    Megatron's own fields stay empty: only its attention layers read them.
    """

    packed: PackedDocuments | None = field(default=None)
    shard: SequenceShard | None = field(default=None)

    @classmethod
    def of(cls, packed: PackedDocuments, rank: int = 0, ranks: int = 1) -> Documents:
        """packed: documents of the whole row. rank, ranks: of the context-parallel group, which shards it."""
        if ranks == 1:
            return cls(qkv_format="thd", packed=packed)
        shard = SequenceShard.of_documents(packed, rank, ranks)
        return cls(qkv_format="thd", packed=shard.documents, shard=shard)

    @property
    def cu_seqlens(self) -> Tensor:
        """[N + 1] int64 on the CPU."""
        return self.packed.host()
