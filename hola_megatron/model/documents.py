"""Document boundaries of a micro-batch, in the form Megatron passes through its layers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class Documents(PackedSeqParams):
    """Cuts of a packed row of tokens; `cuts` stays on the CPU so that layouts need no device sync."""

    cuts: Tensor | None = field(default=None)

    @classmethod
    def from_cuts(cls, cu_seqlens: Tensor, device: torch.device) -> Documents:
        """cu_seqlens [N + 1] int32 on the CPU, rising from 0 to the number of tokens."""
        longest = int(cu_seqlens.diff().max())
        on_device = cu_seqlens.to(device, non_blocking=True)
        return cls(qkv_format="thd", cu_seqlens_q=on_device, cu_seqlens_kv=on_device, max_seqlen_q=longest,
                   max_seqlen_kv=longest, cuts=cu_seqlens)
