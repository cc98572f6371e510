"""Document boundaries of a micro-batch, in the form Megatron passes through its layers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from hola_kernels.transfer import sent
from hola_megatron.parallel.part import Part


@dataclass
class Documents(PackedSeqParams):
    """Cuts of this rank's packed tokens; `cuts` stays on the CPU so that layouts need no device sync.

    part: where they lie in a row that is cut over context-parallel ranks; None where it is whole.
    longest: no document is longer, and `cuts` lies on the device, where alone it may be read; None: on the CPU.
    """

    cuts: Tensor | None = field(default=None)
    part: Part | None = field(default=None)
    longest: int | None = field(default=None)

    @classmethod
    def from_cuts(cls, cu_seqlens: Tensor, device: torch.device, rank: int = 0, ranks: int = 1) -> Documents:
        """cu_seqlens [N + 1] int32 on the CPU, rising from 0 to the tokens of the whole row, which `ranks` share."""
        part = Part.of_documents(cu_seqlens, rank, ranks) if ranks > 1 else None
        cuts = cu_seqlens if part is None else part.cuts
        longest = int(cuts.diff().max())
        on_device = sent(cuts, device)
        return cls(qkv_format="thd", cu_seqlens_q=on_device, cu_seqlens_kv=on_device, max_seqlen_q=longest,
                   max_seqlen_kv=longest, cuts=cuts, part=part)

    @classmethod
    def bounded(cls, cuts: Tensor, longest: int) -> Documents:
        """cuts [N + 1] int64 on the device, not read here; documents at the end may be empty."""
        return cls(qkv_format="thd", cu_seqlens_q=cuts, cu_seqlens_kv=cuts, max_seqlen_q=longest, max_seqlen_kv=longest,
                   cuts=cuts, longest=longest)
