"""Gated delta rule with scores: the compressed memory of a HOLA layer."""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.backend import choose_backend
from hola_kernels.checks import check_scale, check_state, check_tokens, per_value_head, segments_of
from hola_kernels.gated_delta.reference import gated_delta_reference
from hola_kernels.gated_delta.torch_chunked import gated_delta_chunked
from hola_kernels.norms import compute_dtype
from hola_kernels.operation import operation
from hola_kernels.packed import PackedDocuments, check_max_seqlen, documents_of
from hola_kernels.segments import rows_as_segments
from hola_kernels.shared_memory import shared_memory_refusal

TRITON_DIMENSIONS = (64, 128, 256)
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _gated_delta_triton(*arguments: Tensor | None, **options: int | None) -> tuple[Tensor, Tensor, Tensor]:
    # imported when first used: importing triton needs neither be possible nor cost time where torch runs
    from hola_kernels.gated_delta.triton_rule import gated_delta_triton

    return gated_delta_triton(*arguments, **options)


IMPLEMENTATIONS = {"reference": gated_delta_reference, "torch": gated_delta_chunked, "triton": _gated_delta_triton}


@operation
def gated_delta_rule(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
                     cu_seqlens: Tensor | PackedDocuments | None = None, max_seqlen: int | None = None,
                     initial_state: Tensor | None = None, scale: float | None = None,
                     backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """o_t = scale S_t^T q_t of the gated delta rule, and the score of every token.

    q, k [B, T, H, K] and v [B, T, H, V] in one dtype (q and k are brought to unit length here); q and k may have fewer
    heads, of which H is a multiple: each then serves several heads of v, one after the other. scale: None is K^-1/2.
    log_decay [B, T, H] <= 0, beta [B, T, H] in (0, 1). With cu_seqlens [N + 1], B is 1 and the
    tokens are N documents that do not see each other. initial_state [N, H, K, V] (N = B without
    cu_seqlens). max_seqlen: see hola_attention.

    Returns o [B, T, H, V] in v's dtype, score [B, T, H] (beta * |residual|, no gradient) and the
    final state [N, H, K, V], both float32 (float64 in float64 calls). Raises KernelError.
    """
    q, k = per_value_head(q, k, v)
    check_tokens(q, k, v, log_decay=log_decay, beta=beta)
    check_scale(scale)
    check_max_seqlen(max_seqlen, cu_seqlens)
    documents = documents_of(q, cu_seqlens, max_seqlen=max_seqlen)
    device_cu_seqlens, options = segments_of(q, documents), {}
    layout_cu_seqlens = device_cu_seqlens
    check_state(initial_state, device_cu_seqlens.numel() - 1, k, v)
    backend = choose_backend(backend, q.device, triton_refusal(q, k, v))
    if backend == "triton" and not v.numel():
        backend = "torch"
    flat = [x.flatten(0, 1) for x in (q, k, v, log_decay, beta)]
    if backend == "triton":
        max_seqlen = max_seqlen or (None if documents is None else documents.max_seqlen)
        if max_seqlen is not None:
            options = {"max_seqlen": max_seqlen}
        elif documents is not None:
            layout_cu_seqlens = documents.host()  # the kernels' layout is made there
        else:
            layout_cu_seqlens = rows_as_segments(*q.shape[:2], torch.device("cpu"))
    elif initial_state is None:
        initial_state = torch.zeros(device_cu_seqlens.numel() - 1, q.shape[2], k.shape[3], v.shape[3],
                                    dtype=compute_dtype(v), device=q.device)
    o, score, state = IMPLEMENTATIONS[backend](*flat, layout_cu_seqlens, initial_state, **options)
    if scale is not None:
        o = o * (scale * k.shape[3] ** 0.5)
    return o.view_as(v).to(v.dtype), score.view_as(beta), state


def triton_refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the Triton kernels do not take these tensors, or None."""
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k, v of different dtypes {q.dtype}, {k.dtype}, {v.dtype}"
    if v.dtype not in TRITON_DTYPES:
        return f"dtype {v.dtype}, the gated delta kernels take bfloat16, float16, float32"
    for name, size in (("K", k.shape[-1]), ("V", v.shape[-1])):
        if size not in TRITON_DIMENSIONS:
            return f"{name} = {size}, the gated delta kernels take {', '.join(map(str, TRITON_DIMENSIONS))}"
    return shared_memory_refusal(k, v)


__all__ = ["gated_delta_rule"]
