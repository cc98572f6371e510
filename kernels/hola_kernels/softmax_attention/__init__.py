"""Causal softmax attention within documents, with grouped key heads and, where wanted, in a sliding window.

For training only, so the package does not name it at its top: what it names travels with exported models.
"""

from __future__ import annotations

import functools

from torch import Tensor

from hola_kernels.backend import BACKENDS, logger
from hola_kernels.checks import check_floating
from hola_kernels.errors import KernelError
from hola_kernels.memo import is_capturing
from hola_kernels.operation import operation
from hola_kernels.packed import PackedDocuments, documents_of
from hola_kernels.softmax_attention.flash_documents import attend_flash, flash_refusal
from hola_kernels.softmax_attention.reference import softmax_attention_reference
from hola_kernels.softmax_attention.torch_documents import attend_documents, attend_rows


@operation
def softmax_attention(*, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | PackedDocuments | None = None,
                      max_seqlen: int | None = None, earlier: int = 0, window: int | None = None,
                      backend: str = "auto") -> Tensor:
    """o [B, S, H, V]: every token reads its document up to itself; softmax of q . k / sqrt(K).

    q [B, S, H, K], k [B, T, G, K], v [B, T, G, V] with T = earlier + S, positions applied; G divides H, and query head
    h reads key head h // (H / G).
    cu_seqlens [N + 1]: documents packed into one row (B = 1); max_seqlen: no document has more queries.
    earlier: keys before the first query of the first document that is not empty (without cu_seqlens: of every row).
    window: tokens that a token sees, itself included; None: all.
    backend: "auto" and "triton" take flash attention for rows of documents or in a window, where the device and the
    dtype have it, else, as "torch" always, one scaled_dot_product_attention a document; "reference" is the definition.
    Raises KernelError.
    """
    _check(q, k, v, earlier, window)
    if backend not in ("auto", *BACKENDS):
        raise KernelError(f"backend: {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    documents = documents_of(q, cu_seqlens, max_seqlen=max_seqlen, read=False)
    if window is not None and window >= k.shape[1]:
        window = None
    if backend == "reference" or not q.numel():
        host = None if documents is None else documents.host()
        return softmax_attention_reference(q, k, v, host, earlier, window)
    if documents is None and window is None:
        return attend_rows(q, k, v, None)  # torch chooses a kernel for rows of equal length
    if backend != "torch":
        refusal = flash_refusal(q, v)
        _announce("flash attention" if refusal is None else "one call a document", refusal or "CUDA device")
        if refusal is None:
            return attend_flash(q, k, v, documents, earlier, window)
        if is_capturing():
            raise KernelError(f"softmax attention over documents reads their lengths on the host ({refusal}), which a "
                              "CUDA graph cannot record; take bfloat16 and heads of a multiple of 8 up to 192")
    return attend_rows(q, k, v, window) if documents is None else \
        attend_documents(q, k, v, documents.host(), earlier, window)


def _check(q: Tensor, k: Tensor, v: Tensor, earlier: int, window: int | None) -> None:
    check_floating(q=q, k=k, v=v)
    if q.ndim != 4 or not q.shape[2] or not q.shape[3]:
        raise KernelError(f"q {tuple(q.shape)} must be [B, S, H, K]")
    if not isinstance(earlier, int) or isinstance(earlier, bool) or earlier < 0:
        raise KernelError(f"earlier = {earlier!r} must be a whole number of at least 0")
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise KernelError(f"window = {window!r} must be a whole number of at least 1, or None")
    rows, queries, heads, width = q.shape
    if k.ndim != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (rows, queries + earlier, width):
        raise KernelError(f"k {tuple(k.shape)} must be [B, T, G, K] with the B and K of q {tuple(q.shape)} and "
                          f"T = {queries + earlier}")
    if not k.shape[2] or heads % k.shape[2]:
        raise KernelError(f"k {tuple(k.shape)} has {k.shape[2]} heads, which must divide the {heads} of q")
    if v.ndim != 4 or v.shape[:3] != k.shape[:3] or not v.shape[3]:
        raise KernelError(f"v {tuple(v.shape)} must be [B, T, G, V] with the B, T, G of k {tuple(k.shape)}")


@functools.cache
def _announce(what: str, reason: str) -> None:
    logger.warning("hola_kernels: softmax attention by %s (%s)", what, reason)


__all__ = ["softmax_attention"]
