"""The softmax window of an HQLT layer by flash attention, where the device and the dtype have it.

A sliding window is flash attention's own. The chunks of delayed_chunk are documents for it: each attends within itself.
Nothing is read on the host. So there is room for as many chunks as documents of any lengths can have, and those after
the last one are empty.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hola_kernels.backend import logger
from hola_kernels.memo import memoise
from hola_kernels.packed import PackedDocuments
from hola_kernels.rotary import rotary_
from hola_kernels.softmax_attention.flash_documents import attend_flash, flash_refusal

MOST_DOCUMENTS = 65535  # of a call: they are the second axis of flash attention's grid
# tokens; its backward pass holds dq in float32 with 128 more rows a document: nine rows a token for chunks of 16
LEAST_CHUNK = 16


def flash_window(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, documents: PackedDocuments | None, bounds: Tensor, *,
                 window: int, chunked: bool, rope_theta: float) -> Tensor | None:
    """o [B, T, H, V] of whole documents, or None where flash attention does not take these tensors.

    bounds [N + 1]: the documents, or the rows of a batch, among the flat tokens. q and k are rotated here, in copies.
    """
    tokens, count = v_BTHV.shape[0] * v_BTHV.shape[1], bounds.numel() - 1
    refusal = flash_refusal(q_BTHK, v_BTHV)
    if chunked and window < LEAST_CHUNK:
        refusal = refusal or f"chunks of fewer than {LEAST_CHUNK} tokens"
    if (count + tokens // window if chunked else count) > MOST_DOCUMENTS:
        refusal = refusal or f"more than {MOST_DOCUMENTS} documents or chunks"
    _announce("flash attention" if refusal is None else "bands of torch", refusal or "CUDA device")
    if refusal is not None:
        return None
    q, k = (rotary_(x=x.clone(memory_format=torch.contiguous_format), base=rope_theta, cu_seqlens=documents)
            for x in (q_BTHK, k_BTHK))
    if not chunked:
        return attend_flash(q, k, v_BTHV, documents, 0, window)
    q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v_BTHV))
    return attend_flash(q, k, v, chunks_of(bounds, tokens, window), 0, None).view(v_BTHV.shape)


def chunks_of(bounds: Tensor, tokens: int, window: int) -> PackedDocuments:
    """The chunks of `window` tokens of documents [N + 1], as documents of their own: tokens // window + N of them."""
    def make() -> PackedDocuments:
        counts = -(-bounds.diff() // window)
        ends = counts.cumsum(0)
        chunk = torch.arange(tokens // window + counts.numel(), device=bounds.device)
        document = torch.searchsorted(ends, chunk, right=True).clamp_max(counts.numel() - 1)
        start = bounds[document] + (chunk - (ends - counts)[document]) * window
        return PackedDocuments(torch.cat([start.clamp_max(tokens), bounds[-1:]]), max_seqlen=window)

    return memoise(bounds, ("hqlt chunks", tokens, window), make)


@functools.cache
def _announce(what: str, reason: str) -> None:
    logger.warning("hola_kernels: softmax window by %s (%s)", what, reason)
