"""The definition: one masked softmax over all keys of the row.

    o_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j      over the keys j of i's document with i - W < j <= i

Query head h reads key head h // (H / G). In float32, of float64 numbers in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.norms import compute_dtype


def visible(queries: int, cu_seqlens: Tensor | None, earlier: int, window: int | None) -> Tensor:
    """[S, earlier + S] bool: which keys a query sees; the first `earlier` keys lie before the first document's tokens.

    cu_seqlens [N + 1] on the CPU, or None: one document.
    """
    key = torch.arange(-earlier, queries)
    query = torch.arange(queries)[:, None]
    seen = key <= query
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens[1:].contiguous(), key.clamp_min(0), right=True)
        seen = seen & (document == document[earlier:, None])
    return seen if window is None else seen & (key > query - window)


def softmax_attention_reference(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, cu_seqlens: Tensor | None,
                                earlier: int, window: int | None) -> Tensor:
    """o [B, S, H, V] in v's dtype; T = earlier + S."""
    compute, group = compute_dtype(q_BSHK), q_BSHK.shape[2] // k_BTGK.shape[2]
    q, k, v = (x.to(compute).transpose(1, 2) for x in (q_BSHK, k_BTGK, v_BTGV))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = visible(q.shape[2], cu_seqlens, earlier, window).to(q.device)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).to(v_BTGV.dtype)
