"""hola_attention: a compressed memory and a bounded exact one, read together.

    o = o_state + sigmoid(gate) * o_cache        (or another merge of the two: `merge`)
o_state is the gated delta rule; o_cache a sharp softmax over the w tokens of earlier
blocks that changed the state most, the token's local part, and a sink. The cache's
choice comes from the state's own residual, so the two parts share one pass.
`exact_attention` is o_cache alone, without a state.
Source: arXiv 2607.02303.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hola_kernels.backend import choose_backend
from hola_kernels.checks import (
    check_floating,
    check_layer_memory,
    check_read_parameters,
    check_tokens,
    per_value_head,
    segments_of,
)
from hola_kernels.errors import KernelError
from hola_kernels.exact_cache import block_refusal, exact_read, exact_read_only, fused_refusal
from hola_kernels.exact_cache.read_configs import read_refusal
from hola_kernels.gated_delta import gated_delta_rule, triton_refusal
from hola_kernels.gated_delta.residual import gated_delta_residual
from hola_kernels.kept_attention.controller import cosine_score
from hola_kernels.memo import memoise
from hola_kernels.merge import check_gate, merge_outputs
from hola_kernels.norms import compute_dtype
from hola_kernels.operation import operation
from hola_kernels.options import POSITION_SCORES, STATE_SCORES, STATELESS_SCORES, CacheOptions
from hola_kernels.packed import PackedDocuments, check_max_seqlen, documents_of
from hola_kernels.positions import check_positions, token_positions, with_positions
from hola_kernels.segments import rows_as_segments
from hola_kernels.state import HolaState
from hola_kernels.state_delay import shifted
from hola_kernels.state_delay_memory import delayed_delta_onward


@operation
def hola_attention(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma_q: Tensor,
                   gamma_k: Tensor, gate: Tensor, sink: Tensor | None, block: int = CacheOptions.block,
                   slots: int = CacheOptions.slots, score: str = CacheOptions.score,
                   read_norm: str = CacheOptions.read_norm, local: str = CacheOptions.local, window: int | None = None,
                   rope_theta: float | None = None, merge: str = CacheOptions.merge,
                   state_delay: int = CacheOptions.state_delay, route: Tensor | None = None,
                   cu_seqlens: Tensor | PackedDocuments | None = None, max_seqlen: int | None = None,
                   state: HolaState | None = None, scale: float | None = None, return_state: bool = False,
                   backend: str = "auto") -> Tensor | tuple[Tensor, HolaState]:
    """The HOLA token mixer after the projections, before the output norm.

    q, k [B, T, H, K], v [B, T, H, V]: after convolution and SiLU, not normalised (both norms happen here). q and k may
    have fewer heads, of which H is a multiple: each then serves several heads of v, one after the other.
    scale: of the state's output, None is K^-1/2 (the cache attention always has that). With a scale the state and the
    cache attention are two operations.
    log_decay [B, T, H] = log alpha <= 0; beta [B, T, H] in (0, 1); gamma_q, gamma_k [K];
    gate: what the merge's sigmoids take, [H] with "add" (its sigmoid weighs the cache attention), [B, T, H, V] with
    "convex", [B, T, H, 2] with "two"; sink [H] a logit, or None for no sink.
    route [B, T, H]: logits of the score "learned", which is r = sigmoid(route). The choice of tokens has no gradient; r
    has that of a factor of the values that are read, dr = <dv, v> (straight-through).
    cu_seqlens [N + 1]: packed documents, B = 1; on the CPU, or as PackedDocuments (`packed` says what each costs).
    state: the memory of N sequences (N = B without cu_seqlens).
    max_seqlen: no document is longer. With it the Triton backend makes its tables on the GPU, where cu_seqlens is, as
    long as the shapes can ask for. A CUDA graph of the call, recorded within `recording` after a call like it, then
    serves any cu_seqlens of N documents, the last of which may be empty (not with state, return_state, state_delay, or
    the scores recency and random, which look at the memory's or the tokens' numbers). A value too low costs speed,
    nothing else.
    block, slots, score, read_norm, local, window, rope_theta, merge, state_delay: as in `CacheOptions`. Rotary
    positions need an even K; a state holds the keys of the read, normalised and rotated then.

    Returns o [B, T, H, V] in v's dtype, and with return_state the memory after the last token.
    Raises KernelError naming the argument that does not fit.
    """
    options = CacheOptions(block, slots, score, read_norm, local, window, rope_theta, merge, state_delay)
    q, k = per_value_head(q, k, v)
    check_tokens(q, k, v, log_decay=log_decay, beta=beta)
    check_read_parameters(q, gamma_q, gamma_k, sink)
    check_gate(gate, v, merge)
    check_positions(q, options)
    check_route(route, q.shape[:3], options)
    check_max_seqlen(max_seqlen, cu_seqlens)
    documents = documents_of(q, cu_seqlens, max_seqlen=max_seqlen)
    device_cu_seqlens = segments_of(q, documents)
    if state is None and not return_state and scale is None and is_fused(backend, options, q, k, v):
        return _fused(q, k, v, log_decay, beta, gamma_q, gamma_k, gate, sink, options, documents, device_cu_seqlens,
                      max_seqlen)
    sequences = device_cu_seqlens.numel() - 1
    memory = check_layer_memory(state, sequences, k, v, options) if return_state or state is not None else None
    o_state, written, after_state = _read_state(
        {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta}, memory, state_delay, device_cu_seqlens,
        cu_seqlens=documents, scale=scale, backend=backend, max_seqlen=max_seqlen)
    length = device_cu_seqlens.new_zeros(sequences) if memory is None else memory.length
    residual = None
    if score == "cosine":
        residual = gated_delta_residual(k=k, v=v, log_decay=log_decay, beta=beta, cu_seqlens=documents, backend=backend,
                                        initial_state=None if memory is None else memory.state)
    rank = rank_tokens(score, written, v, beta, device_cu_seqlens, length, residual=residual, route=route)
    read = {**options.of_the_read, **with_positions(q, k, gamma_q, gamma_k, options, device_cu_seqlens, length),
            "v": routed_values(v, route), "score": rank, "sink": sink, "cu_seqlens": documents, "backend": backend}
    if memory is None:
        return merge_outputs(o_state, exact_read_only(**read), gate, merge, backend)
    o_cache, after = exact_read(**read, memory=memory)
    o = merge_outputs(o_state, o_cache, gate, merge, backend)
    return (o, replace(after, **after_state, rope_theta=rope_theta)) if return_state else o


def _read_state(tokens: dict[str, Tensor], memory: HolaState | None, delay: int, bounds: Tensor, *,
                max_seqlen: int | None, **how: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """o_state [B, T, H, V], beta * |residual| [B, T, H], and what the memory holds afterwards, by name.

    With a delay only the outputs are late. From a memory the rule runs twice: the delayed state is a second one.
    """
    if memory is None:
        moved = tokens | ({"q": shifted(tokens["q"], bounds, -delay)} if delay else {})
        o, written, _ = gated_delta_rule(**moved, **how, max_seqlen=max_seqlen)
        return shifted(o, bounds, delay) if delay else o, written, {}
    o, written, state = gated_delta_rule(**tokens, **how, max_seqlen=max_seqlen, initial_state=memory.state)
    late = None
    if delay:
        o, late = delayed_delta_onward(**tokens, **how, memory=memory.late, delay=delay, mode="stream")
    return o, written, {"state": state, "late": late}


def is_fused(backend: str, options: CacheOptions, q: Tensor, k: Tensor, v: Tensor, *,
             over_ranks: bool = False) -> bool:
    """Whether the whole operation runs as one Triton function: both parts would run on Triton anyway.

    over_ranks: over context ranks, where fewer options have one.
    """
    if options.score not in (*STATE_SCORES, *POSITION_SCORES) or not v.numel():
        return False
    if block_refusal(options) if over_ranks else fused_refusal(options):
        return False
    return choose_backend(backend, q.device, triton_refusal(q, k, v) or read_refusal(k, v)) == "triton"


def _fused(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma_q: Tensor, gamma_k: Tensor,
           gate: Tensor, sink: Tensor | None, options: CacheOptions, documents: PackedDocuments | None,
           device_cu_seqlens: Tensor, max_seqlen: int | None) -> Tensor:
    from hola_kernels.triton_attention import hola_attention_triton  # on first use: triton may be missing

    equal_length = documents is None
    max_seqlen = None if equal_length else max_seqlen or documents.max_seqlen
    host_cu_seqlens = rows_as_segments(q.shape[0], q.shape[1], torch.device("cpu")) if equal_length else None
    if not equal_length and max_seqlen is None:
        host_cu_seqlens = documents.host()
    rank = None
    if options.score in POSITION_SCORES and options.slots:
        # of the documents alone: made once for all layers
        rank = memoise(device_cu_seqlens, (options.score, *beta.shape), lambda: rank_tokens(
            options.score, beta.detach().float(), v, beta, device_cu_seqlens,
            torch.zeros_like(device_cu_seqlens[1:])).flatten(0, 1).contiguous())
    o = hola_attention_triton(
        q_MHK=q.flatten(0, 1), k_MHK=k.flatten(0, 1), v_MHV=v.flatten(0, 1), log_decay_MH=log_decay.flatten(0, 1),
        beta_MH=beta.flatten(0, 1), gamma_q=gamma_q, gamma_k=gamma_k, gate_H=gate, sink_H=sink, options=options,
        host_cu_seqlens=host_cu_seqlens, device_cu_seqlens=device_cu_seqlens, equal_length=equal_length,
        max_seqlen=max_seqlen, rank_MH=rank)
    return o.view(v.shape)


@operation
def exact_attention(*, q: Tensor, k: Tensor, v: Tensor, gamma_q: Tensor, gamma_k: Tensor, sink: Tensor | None,
                    block: int = CacheOptions.block, slots: int = CacheOptions.slots, score: str = "recency",
                    read_norm: str = CacheOptions.read_norm, local: str = CacheOptions.local, window: int | None = None,
                    rope_theta: float | None = None, route: Tensor | None = None,
                    cu_seqlens: Tensor | PackedDocuments | None = None, state: HolaState | None = None,
                    return_state: bool = False, backend: str = "auto") -> Tensor | tuple[Tensor, HolaState]:
    """The exact part of `hola_attention` as all there is: slots, local part and sink, no recurrent state, no merge.

    The arguments are those of hola_attention. score: "recency", "random", "learned", or "betav", which is norm(v) here:
    nothing is written, so there is no write strength. Without slots nothing is ranked, and any score is taken.
    state: a memory that this operation has returned, or one made with `HolaState.empty(..., recurrent=False)`.

    Returns o [B, T, H, V] in v's dtype, and with return_state the memory after the last token.
    Raises KernelError naming the argument that does not fit.
    """
    options = CacheOptions(block, slots, score, read_norm, local, window, rope_theta)
    q, k = per_value_head(q, k, v)
    check_tokens(q, k, v)
    check_read_parameters(q, gamma_q, gamma_k, sink)
    check_positions(q, options)
    check_route(route, q.shape[:3], options)
    documents = documents_of(q, cu_seqlens, read=False)
    bounds = segments_of(q, documents)
    sequences = bounds.numel() - 1
    memory = None
    if return_state or state is not None:
        memory = check_layer_memory(state, sequences, k, v, options, recurrent=False)
    length = bounds.new_zeros(sequences) if memory is None else memory.length
    read = {**options.of_the_read, **with_positions(q, k, gamma_q, gamma_k, options, bounds, length),
            "v": routed_values(v, route), "score": rank_without_state(v, options, bounds, length, route=route),
            "sink": sink, "cu_seqlens": documents, "backend": backend}
    if memory is None:
        return exact_read_only(**read)
    o, after = exact_read(**read, memory=memory)
    return (o, replace(after, rope_theta=rope_theta)) if return_state else o


def rank_without_state(v: Tensor, options: CacheOptions, cu_seqlens: Tensor, length: Tensor, *,
                       route: Tensor | None = None) -> Tensor:
    """`rank_tokens` where there is no state: v [B, T, H, V] -> [B, T, H]."""
    one = torch.ones(v.shape[:3], dtype=compute_dtype(v), device=v.device)
    return rank_tokens(stateless_score(options), one, v, one, cu_seqlens, length, route=route)


def stateless_score(options: CacheOptions) -> str:
    """The score that ranks tokens where there is no state; KernelError for one that is made from a state."""
    if not options.slots:
        return "recency"  # nothing is ranked
    if options.score not in STATELESS_SCORES:
        raise KernelError(f"score: {options.score!r} is of a recurrent state; without one it is one of "
                          f"{', '.join(STATELESS_SCORES)}, or slots is 0")
    return options.score


@torch.no_grad()
def rank_tokens(score: str, written: Tensor, v: Tensor, beta: Tensor, cu_seqlens: Tensor, length: Tensor, *,
                residual: Tensor | None = None, route: Tensor | None = None) -> Tensor:
    """What the cache ranks by, [B, T, H]; `written` is beta * |residual|; length [N]: tokens of each segment so far.

    residual [B, T, H, V]: of "cosine", from `gated_delta_residual`; route [B, T, H]: logits of "learned".
    """
    if score == "cosine":
        return cosine_score(v, v - residual).to(written.dtype)
    if score == "learned":
        # the order of its sigmoid, which is one for all large logits; selection takes scores of at least 0
        return F.softplus(route.to(written.dtype))
    if score == "betae":
        return written
    if score == "e":
        return written / beta.to(written.dtype).clamp_min(torch.finfo(written.dtype).tiny)
    if score == "betav":
        return beta.to(written.dtype) * v.to(written.dtype).norm(dim=-1)
    position = token_positions(cu_seqlens, written.shape[0] * written.shape[1], length)
    rank = position if score == "recency" else _scramble(position)
    return rank.to(written.dtype).view(written.shape[0], written.shape[1], 1).expand_as(written)


@torch.no_grad()
def rank_token(score: str, written: Tensor, v: Tensor, beta: Tensor, length: Tensor, *,
               residual: Tensor | None = None, route: Tensor | None = None) -> Tensor:
    """The same for one token of each of N sequences, [N, H]; v [N, H, V]; length [N] without it."""
    if score in ("cosine", "learned"):
        return rank_tokens(score, written, v, beta, length, length, residual=residual, route=route)
    if score in ("recency", "random"):
        rank = length if score == "recency" else _scramble(length)
        return rank.to(written.dtype)[:, None].expand_as(written)
    one = torch.arange(v.shape[0] + 1, device=v.device)
    return rank_tokens(score, written[:, None], v[:, None], beta[:, None], one, length)[:, 0]


def routed_values(v: Tensor, route: Tensor | None) -> Tensor:
    """v, through whose gradient the learned score r = sigmoid(route) gets dr = <dv, v>."""
    if route is None or not route.requires_grad:
        return v
    r = route.to(compute_dtype(v)).sigmoid()
    return v * (1 + (r - r.detach())).to(v.dtype)[..., None]


def check_route(route: Tensor | None, shape: torch.Size, options: CacheOptions) -> None:
    """KernelError where logits of the score "learned" are missing, not asked for, or not of this shape."""
    if (route is None) == (options.score == "learned"):
        raise KernelError(f"route: {'missing' if route is None else 'given'}, and score is {options.score!r}; it goes "
                          "with 'learned' alone")
    check_floating(route=route)
    if route is not None and route.shape != shape:
        raise KernelError(f"route {tuple(route.shape)} must be {list(shape)}")


def _scramble(position: Tensor) -> Tensor:
    """A fixed pseudo-random number in [0, 2^23) of the position alone: the same however a sequence is cut."""
    x = position
    for multiplier in (0x2C1B3C6D, 0x297A2D39):
        x = ((x ^ (x >> 15)) * multiplier) & 0xFFFFFFFF
    return (x ^ (x >> 16)) & 0x7FFFFF
