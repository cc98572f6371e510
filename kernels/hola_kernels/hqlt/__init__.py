"""Hybrid quadratic-linear attention (HQLT, Irie, Yau, Gershman 2025, arXiv 2506.00744).

A delta-rule state without decay and softmax attention to the last W tokens, from the same q, k and v:

    v~ = SiLU(v)    q^, k^ = SiLU(q), SiLU(k) of unit length    beta = write strength
    S_t = S_{t-1} + beta_t k^_t (v~_t - S_{t-1}' k^_t)'         o_state = K^-1/2 S' q^_t
    o_soft = softmax over the visible tokens of (R_t q_t . R_j k_j / sqrt(K)) applied to v~     R: rotary positions

| blend | state that token t reads | tokens that its softmax sees |
| sync | S_t | the last W of its document, itself included |
| delayed_stream | S_{t-W} | the same |
| delayed_chunk | that before its chunk of W tokens | its chunk, up to itself |

| mixing | o |
| sum | o_state + o_soft |
| scalar | a_1 o_state + a_2 o_soft, two sigmoids a head |
| vector | g * o_state + (1 - g) * o_soft, a sigmoid a channel |

A delayed write has the write strength of its own token (the authors' code takes that of the token that reads).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hola_kernels.backend import choose_backend
from hola_kernels.checks import check_floating, check_tokens, segments_of
from hola_kernels.errors import KernelError
from hola_kernels.hqlt.window import Bands, rope_dtype
from hola_kernels.memo import memoise
from hola_kernels.merge import merge_outputs
from hola_kernels.operation import operation
from hola_kernels.packed import PackedDocuments, check_max_seqlen, documents_of
from hola_kernels.state_delay import delayed_delta_rule

BLENDS = ("sync", "delayed_stream", "delayed_chunk")
MIXINGS = ("sum", "scalar", "vector")


@operation
def hqlt_attention(*, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, mix: Tensor | None, blend: str = "sync",
                   mixing: str = "vector", window: int = 64, rope_theta: float = 10000.0,
                   cu_seqlens: Tensor | PackedDocuments | None = None, max_seqlen: int | None = None,
                   backend: str = "auto") -> Tensor:
    """o [B, T, H, V] of whole documents, before the output norm, in v's dtype.

    q, k [B, T, H, K] with an even K and v [B, T, H, V]: as projected (SiLU, norms and positions are applied here).
    beta [B, T, H] in (0, 2). mix: what the mixing's sigmoids take, [B, T, H, 2] for "scalar" (of the state, of the
    softmax), [B, T, H, V] for "vector", None for "sum". window: W, in tokens. rope_theta: base of the rotary positions.
    cu_seqlens, backend: as in `gated_delta_rule`. The Triton backend reads the window by flash attention where that
    takes the dtype and the widths, else, as the others, scaled_dot_product_attention reads bands of it.
    max_seqlen: no document is longer. With cu_seqlens on a GPU a value too low is an error that nobody sees: flash
    attention leaves later tokens out.
    Raises KernelError.
    """
    check_tokens(q, k, v, beta=beta)
    check_hqlt(blend, mixing, window, rope_theta, q, v, mix)
    check_max_seqlen(max_seqlen, cu_seqlens)
    documents = documents_of(q, cu_seqlens, max_seqlen=max_seqlen)
    if not v.numel():
        return v.clone()
    v = F.silu(v)
    delay, mode = delay_of(blend, window)
    o_state, _ = delayed_delta_rule(
        q=F.silu(q), k=F.silu(k), v=v, log_decay=torch.zeros_like(beta), beta=beta, delay=delay, mode=mode,
        cu_seqlens=documents, max_seqlen=max_seqlen, backend=backend)
    o_soft = _read_window(q, k, v, documents, backend, window=window, chunked=blend == "delayed_chunk",
                          rope_theta=rope_theta)
    return mixed(o_state, o_soft, mix, mixing, backend)


def _read_window(q: Tensor, k: Tensor, v: Tensor, documents: PackedDocuments | None, backend: str,
                 **how: Any) -> Tensor:
    """o_soft [B, T, H, V]; how: window, chunked and rope_theta."""
    bounds, tokens = segments_of(q, documents), q.shape[0] * q.shape[1]
    if choose_backend(backend, q.device) == "triton":
        o = _flash_window(q, k, v, documents, bounds, how)
        if o is not None:
            return o
    how |= {"key_dim": q.shape[-1], "dtype": rope_dtype(q)}
    bands = memoise(bounds, ("hqlt", tokens, *how.values()), lambda: _bands(bounds, tokens, how))
    return bands.attend(*(x.flatten(0, 1) for x in (q, k, v))).view(v.shape)


def _flash_window(q: Tensor, k: Tensor, v: Tensor, documents: PackedDocuments | None, bounds: Tensor,
                  how: dict[str, Any]) -> Tensor | None:
    from hola_kernels.hqlt.flash_window import flash_window  # not part of exported models

    return flash_window(q, k, v, documents, bounds, **how)


def check_hqlt(blend: str, mixing: str, window: int, rope_theta: float, q: Tensor, v: Tensor,
               mix: Tensor | None) -> None:
    """KernelError for what does not fit; q [..., H, K], v [..., H, V]."""
    for name, value, allowed in (("blend", blend, BLENDS), ("mixing", mixing, MIXINGS)):
        if value not in allowed:
            raise KernelError(f"{name}: {value!r} is not one of {', '.join(allowed)}")
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise KernelError(f"window = {window!r} must be a whole number of at least 1")
    if not isinstance(rope_theta, float | int) or isinstance(rope_theta, bool) or not rope_theta > 0:
        raise KernelError(f"rope_theta = {rope_theta!r} must be a number above 0")
    if q.shape[-1] % 2:
        raise KernelError(f"q {tuple(q.shape)} must have an even K for its rotary positions")
    check_floating(mix=mix)
    wanted = {"sum": None, "scalar": (*v.shape[:-1], 2), "vector": tuple(v.shape)}[mixing]
    if (None if mix is None else tuple(mix.shape)) != wanted:
        raise KernelError(f"mix {None if mix is None else tuple(mix.shape)} must be {wanted} for mixing {mixing!r}")


def delay_of(blend: str, window: int) -> tuple[int, str]:
    """(delay, mode) of the state, as `delayed_delta_rule` takes them."""
    return (0 if blend == "sync" else window), ("chunk" if blend == "delayed_chunk" else "stream")


def mixed(o_state: Tensor, o_soft: Tensor, mix: Tensor | None, mixing: str, backend: str) -> Tensor:
    """The two reads joined, computed in float32 (float64) and returned in the dtype of o_soft."""
    if mixing == "sum":
        return (o_state + o_soft).to(o_soft.dtype)  # torch adds 16-bit numbers in float32
    return merge_outputs(o_state, o_soft, mix, {"scalar": "two", "vector": "convex"}[mixing], backend)


def _bands(bounds: Tensor, tokens: int, choices: dict) -> Bands:
    index = torch.arange(tokens, device=bounds.device)
    document = torch.searchsorted(bounds, index, right=True) - 1
    return Bands.of(document, index - bounds[document], **choices)


__all__ = ["hqlt_attention"]
