"""hola_attention: a compressed memory and a bounded exact one, read together.

    o = o_state + sigmoid(gate) * o_cache
o_state is the gated delta rule; o_cache a sharp softmax over the w tokens of earlier
blocks that changed the state most, the token's own block, and a sink. The cache's
choice comes from the state's own residual, so the two parts share one pass.
Source: arXiv 2607.02303.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hola_kernels.backend import choose_backend
from hola_kernels.checks import check_max_seqlen, check_memory, check_tokens, segments_of
from hola_kernels.errors import KernelError
from hola_kernels.exact_cache import exact_read
from hola_kernels.exact_cache.read_configs import read_refusal
from hola_kernels.gated_delta import gated_delta_rule, triton_refusal
from hola_kernels.norms import compute_dtype
from hola_kernels.segments import rows_as_segments
from hola_kernels.state import HolaState

SCORES = ("betae", "e", "betav", "recency", "random")
READ_NORMS = ("rms", "l2")


def hola_attention(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma_q: Tensor,
                   gamma_k: Tensor, gate: Tensor, sink: Tensor | None, block: int = 256, slots: int = 64,
                   score: str = "betae", read_norm: str = "rms", cu_seqlens: Tensor | None = None,
                   max_seqlen: int | None = None, state: HolaState | None = None,
                   return_state: bool = False, backend: str = "auto") -> Tensor | tuple[Tensor, HolaState]:
    """The HOLA token mixer after the projections, before the output norm.

    q, k [B, T, H, K], v [B, T, H, V]: after convolution and SiLU, not normalised (both norms happen here).
    log_decay [B, T, H] = log alpha <= 0; beta [B, T, H] in (0, 1); gamma_q, gamma_k [K];
    gate [H] (its sigmoid weighs the exact read); sink [H] a logit, or None for no sink.
    cu_seqlens [N + 1]: packed documents, B = 1. state: the memory of N sequences (N = B without cu_seqlens).
    max_seqlen: no document is longer. With it the Triton backend makes its tables on the GPU, where cu_seqlens lies, as
    long as the shapes can ask for. A CUDA graph of the call, recorded within `recording` after a call like it, then
    serves any cuts of N documents, the last of which may be empty (not with state, return_state, or the scores recency
    and random, which look at the memory's or the tokens' numbers). A value too low costs speed, nothing else.
    score: what the cache ranks by, "betae" (the paper's) or an ablation; read_norm: "rms" sharp, "l2" flat.

    Returns o [B, T, H, V] in v's dtype, and with return_state the memory after the last token.
    Raises KernelError naming the argument that does not fit.
    """
    check_tokens(q, k, v, log_decay, beta, cu_seqlens)
    check_max_seqlen(max_seqlen, cu_seqlens)
    check_choices(score, read_norm)
    cuts = segments_of(q, cu_seqlens)
    if state is None and not return_state and is_fused(backend, score, q, k, v):
        return _fused(q, k, v, log_decay, beta, gamma_q, gamma_k, gate, sink, block, slots, score, read_norm,
                      cu_seqlens, cuts, max_seqlen)
    memory = check_memory(state, cuts.numel() - 1, k, v, block, slots)
    o_state, written, final_state = gated_delta_rule(
        q=q, k=k, v=v, log_decay=log_decay, beta=beta, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
        initial_state=memory.state, backend=backend)
    rank = rank_tokens(score, written, v, beta, cuts, memory.length)
    o_cache, after = exact_read(
        q=q, k=k, v=v, score=rank, gamma_q=gamma_q, gamma_k=gamma_k, sink=sink, block=block, slots=slots,
        read_norm=read_norm, cu_seqlens=cu_seqlens, memory=memory, backend=backend)
    o = combine(o_state, o_cache, gate)
    return (o, replace(after, state=final_state)) if return_state else o


def combine(o_state: Tensor, o_cache: Tensor, gate: Tensor) -> Tensor:
    """o_state + sigmoid(gate) o_cache [B, T, H, V], summed in float32 (float64) and returned in their dtype."""
    wide = compute_dtype(o_state)
    return (o_state.to(wide) + gate.to(wide).sigmoid()[:, None] * o_cache.to(wide)).to(o_state.dtype)


def is_fused(backend: str, score: str, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the whole operation runs as one Triton function: both parts would run on Triton anyway."""
    if score in ("recency", "random"):
        return False
    return choose_backend(backend, q.device, triton_refusal(q, k, v) or read_refusal(k, v)) == "triton"


def _fused(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma_q: Tensor, gamma_k: Tensor,
           gate: Tensor, sink: Tensor | None, block: int, slots: int, score: str, read_norm: str,
           cu_seqlens: Tensor | None, cuts: Tensor, max_seqlen: int | None) -> Tensor:
    from hola_kernels.triton_attention import hola_attention_triton  # on first use: triton may be missing

    if block < 1 or slots < 1:
        raise KernelError(f"block = {block} and slots = {slots} must be at least 1")
    dense = cu_seqlens is None
    host = rows_as_segments(q.shape[0], q.shape[1], torch.device("cpu")) if dense else cu_seqlens
    o = hola_attention_triton(
        q_MHK=q.flatten(0, 1), k_MHK=k.flatten(0, 1), v_MHV=v.flatten(0, 1), log_decay_MH=log_decay.flatten(0, 1),
        beta_MH=beta.flatten(0, 1), gamma_q=gamma_q, gamma_k=gamma_k, gate_H=gate, sink_H=sink, block=block,
        slots=slots, score=score, read_norm=read_norm, cu_seqlens=host, cuts=cuts, dense=dense,
        max_seqlen=max_seqlen)
    return o.view(v.shape)


def check_choices(score: str, read_norm: str) -> None:
    """KernelError for a name that is none."""
    if score not in SCORES:
        raise KernelError(f"score: {score!r} is not one of {', '.join(SCORES)}")
    if read_norm not in READ_NORMS:
        raise KernelError(f"read_norm: {read_norm!r} is not one of {', '.join(READ_NORMS)}")


@torch.no_grad()
def rank_tokens(score: str, written: Tensor, v: Tensor, beta: Tensor, cuts: Tensor, length: Tensor) -> Tensor:
    """What the cache ranks by, [B, T, H]; `written` is beta * |residual|; length [N]: tokens of each segment so far."""
    if score == "betae":
        return written
    if score == "e":
        return written / beta.to(written.dtype).clamp_min(torch.finfo(written.dtype).tiny)
    if score == "betav":
        return beta.to(written.dtype) * v.to(written.dtype).norm(dim=-1)
    flat = torch.arange(int(cuts[-1]), device=v.device)
    segment = torch.searchsorted(cuts, flat, right=True) - 1
    position = flat - cuts[segment] + length[segment]
    rank = position if score == "recency" else _scramble(position)
    return rank.to(written.dtype).view(written.shape[0], written.shape[1], 1).expand_as(written)


@torch.no_grad()
def rank_token(score: str, written: Tensor, v: Tensor, beta: Tensor, length: Tensor) -> Tensor:
    """The same for one token of each of N sequences, [N, H]; v [N, H, V]; length [N] without it."""
    if score in ("recency", "random"):
        rank = length if score == "recency" else _scramble(length)
        return rank.to(written.dtype)[:, None].expand_as(written)
    one = torch.arange(v.shape[0] + 1, device=v.device)
    return rank_tokens(score, written[:, None], v[:, None], beta[:, None], one, length)[:, 0]


def _scramble(position: Tensor) -> Tensor:
    """A fixed pseudo-random number in [0, 2^23) of the position alone: the same however a sequence is cut."""
    x = position
    for multiplier in (0x2C1B3C6D, 0x297A2D39):
        x = ((x ^ (x >> 15)) * multiplier) & 0xFFFFFFFF
    return (x ^ (x >> 16)) & 0x7FFFFF
