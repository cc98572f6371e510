"""Softmax attention by torch's scaled_dot_product_attention: one call a document, in a window one a run of queries.

The plain way, for devices and dtypes that have no attention over documents of varying lengths. The lengths are read on
the host. Memory for a mask is W numbers a token, and none without a window.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from hola_kernels.memo import by_shape

LEAST_RUN = 128  # queries of a run at least: for a small window, runs as short would be many calls


def attend_rows(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, window: int | None) -> Tensor:
    """Rows of one document each, whose last query sees the last key -> o [B, S, H, V]."""
    queries, keys = q_BSHK.shape[1], k_BTGK.shape[1]
    if window is None or keys <= window:
        return _causal(q_BSHK, k_BTGK, v_BTGV)
    run, earlier, parts = max(window, LEAST_RUN), keys - queries, []
    for start, end in pairwise([*range(0, queries, run), queries]):
        first, last = max(earlier + start - window + 1, 0), earlier + end
        mask = _band(earlier + start - first, end - start, window, q_BSHK.device)
        parts.append(_attend(q_BSHK[:, start:end], k_BTGK[:, first:last], v_BTGV[:, first:last], attn_mask=mask))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def attend_documents(q_1SHK: Tensor, k_1TGK: Tensor, v_1TGV: Tensor, cu_seqlens: Tensor, earlier: int,
                     window: int | None) -> Tensor:
    """Packed documents; cu_seqlens [N + 1] on the CPU, `earlier` keys lie before the first document's."""
    bounds = sorted(set(cu_seqlens.tolist()))
    parts = []
    for number, (start, end) in enumerate(pairwise(bounds)):
        first = earlier + start if number else 0
        k, v = (x[:, first: earlier + end] for x in (k_1TGK, v_1TGV))
        parts.append(attend_rows(q_1SHK[:, start:end], k, v, window))
    return torch.cat(parts, 1)


def _causal(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor) -> Tensor:
    if q_BSHK.shape[1] == k_BTGK.shape[1]:
        return _attend(q_BSHK, k_BTGK, v_BTGV, is_causal=True)
    from torch.nn.attention.bias import causal_lower_right  # it imports the compiler, which takes seconds

    return _attend(q_BSHK, k_BTGK, v_BTGV, attn_mask=causal_lower_right(q_BSHK.shape[1], k_BTGK.shape[1]))


def _attend(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, **how: object) -> Tensor:
    if q_BSHK.shape[2] != k_BTGK.shape[2]:
        how["enable_gqa"] = True
    q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BTGK, v_BTGV))
    return F.scaled_dot_product_attention(q, k, v, **how).transpose(1, 2)


@by_shape
def _band(before: int, queries: int, window: int, device: torch.device) -> Tensor:
    """[S, before + S] bool of queries whose first one has `before` keys before its own."""
    query = torch.arange(before, before + queries, device=device)[:, None]
    key = torch.arange(before + queries, device=device)
    return (key <= query) & (key > query - window)
