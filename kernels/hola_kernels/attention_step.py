"""One decoded token of hola_attention: the memory is read, and brought up to date in place.

`backend="triton"` is three launches (triton_attention_step) that depend on no length and read nothing on the host;
"torch" is the same in plain operations, and looks on the host for blocks that are full. exact_attention has the latter
alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hola_kernels.attention import check_route, rank_token, stateless_score
from hola_kernels.backend import choose_backend
from hola_kernels.checks import (
    check_is_memory,
    check_layer_memory,
    check_read_parameters,
    check_step,
    check_token,
    check_writable,
)
from hola_kernels.exact_cache import block_refusal
from hola_kernels.gated_delta.residual import gated_delta_residual
from hola_kernels.gated_delta.step import gated_delta_step, step_refusal
from hola_kernels.merge import check_gate, merge_outputs
from hola_kernels.norms import compute_dtype, read_normalize
from hola_kernels.operation import operation
from hola_kernels.options import CacheOptions
from hola_kernels.positions import check_positions, read_tokens
from hola_kernels.state import HolaState, merged_tokens
from hola_kernels.state_delay_memory import delayed_delta_step


@operation
@torch.no_grad()
def hola_attention_step(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma_q: Tensor,
                        gamma_k: Tensor, gate: Tensor, sink: Tensor | None, state: HolaState,
                        score: str = CacheOptions.score, read_norm: str = CacheOptions.read_norm,
                        local: str = CacheOptions.local, window: int | None = None,
                        rope_theta: float | None = None, merge: str = CacheOptions.merge,
                        route: Tensor | None = None, backend: str = "auto") -> Tensor:
    """One decoded token for each of N sequences; `state` is updated in place.

    q, k [N, H, K], v [N, H, V], log_decay, beta [N, H]; gate [H] with merge "add", [N, H, V] with "convex",
    [N, H, 2] with "two"; the rest as in hola_attention. Returns o [N, H, V] in v's dtype. Raises KernelError.
    """
    check_is_memory(state)
    options = CacheOptions(state.block, state.slots, score, read_norm, local, window, rope_theta, merge,
                           state.state_delay)
    check_step(q, k, v, log_decay, beta, state.state)
    check_layer_memory(state, q.shape[0], k, v, options)
    check_writable(**{f"state.{name}": held for name, held in state.tensors().items()})
    check_read_parameters(q, gamma_q, gamma_k, sink)
    check_gate(gate, v, merge)
    check_positions(q, options)
    check_route(route, q.shape[:2], options)
    refusal = step_refusal(q, k, v) or block_refusal(options) or _state_refusal(state)
    if score == "cosine":
        refusal = refusal or "the score cosine of one token is computed by torch"
    name = choose_backend(backend, q.device, refusal)
    if not q.shape[0]:
        return v.clone()
    run = _step_triton if name == "triton" else _step_torch
    return run(q, k, v, log_decay, beta, gamma_q, gamma_k, gate, sink, state, options, route)


def _step_triton(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma_q: Tensor, gamma_k: Tensor,
                 gate: Tensor, sink: Tensor | None, state: HolaState, options: CacheOptions,
                 route: Tensor | None) -> Tensor:
    from hola_kernels.triton_attention_step import SCORES, attention_step_triton  # on first use: triton may be missing

    rank = None if options.score in SCORES else rank_token(options.score, beta.float(), v, beta, state.length,
                                                                   route=route)
    return attention_step_triton(q=q, k=k, v=v, log_decay=log_decay, beta=beta, gamma_q=gamma_q, gamma_k=gamma_k,
                                 gate=gate, sink=sink, state=state, options=options, rank=rank)


def _step_torch(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma_q: Tensor, gamma_k: Tensor,
                gate: Tensor, sink: Tensor | None, state: HolaState, options: CacheOptions,
                route: Tensor | None) -> Tensor:
    compute, out_dtype = compute_dtype(v), v.dtype
    q, k, v, beta = q.to(compute), k.to(compute), v.to(compute), beta.to(compute)
    residual = None
    if options.score == "cosine":
        residual = gated_delta_residual(k=k[:, None], v=v[:, None], log_decay=log_decay[:, None], beta=beta[:, None],
                                        initial_state=state.state, backend="torch")[:, 0]
    token = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta}
    o_state, written = gated_delta_step(**token, state=state.state)
    if options.state_delay:
        o_state = delayed_delta_step(**token, memory=state.late, delay=options.state_delay, mode="stream",
                                     backend="torch")
    rank = rank_token(options.score, written, v, beta, state.length, residual=residual, route=route)
    o_cache = _exact_step(q, k, v, rank, gamma_q, gamma_k, sink, options, state)
    return merge_outputs(o_state, o_cache, gate, options.merge, "torch").to(out_dtype)


@operation
@torch.no_grad()
def exact_attention_step(*, q: Tensor, k: Tensor, v: Tensor, gamma_q: Tensor, gamma_k: Tensor, sink: Tensor | None,
                         state: HolaState, score: str = "recency", read_norm: str = CacheOptions.read_norm,
                         local: str = CacheOptions.local, window: int | None = None, rope_theta: float | None = None,
                         route: Tensor | None = None, backend: str = "auto") -> Tensor:
    """One decoded token of `exact_attention` for each of N sequences; `state` is updated in place.

    q, k [N, H, K], v [N, H, V], route [N, H]; the rest as in exact_attention. There are no Triton launches for it:
    "auto" takes torch. Returns o [N, H, V] in v's dtype. Raises KernelError.
    """
    check_is_memory(state)
    options = CacheOptions(state.block, state.slots, score, read_norm, local, window, rope_theta)
    check_token(q, k, v)
    check_layer_memory(state, q.shape[0], k, v, options, recurrent=False)
    check_writable(**{f"state.{name}": held for name, held in state.tensors().items()})
    check_read_parameters(q, gamma_q, gamma_k, sink)
    check_positions(q, options)
    check_route(route, q.shape[:2], options)
    choose_backend(backend, q.device, "one token without a state is computed by torch")
    compute = compute_dtype(v)
    one = torch.ones(v.shape[:2], dtype=compute, device=v.device)
    rank = rank_token(stateless_score(options), one, v, one, state.length, route=route)
    if not q.shape[0]:
        return v.clone()
    return _exact_step(q.to(compute), k.to(compute), v.to(compute), rank, gamma_q, gamma_k, sink, options,
                       state).to(v.dtype)


def _exact_step(q: Tensor, k: Tensor, v: Tensor, rank: Tensor, gamma_q: Tensor, gamma_k: Tensor, sink: Tensor | None,
                options: CacheOptions, state: HolaState) -> Tensor:
    """o_cache [N, H, V] of one token, which the memory then has."""
    read = read_tokens(q, k, gamma_q, gamma_k, options, state.length)
    _append(state, read["k"], v, rank)
    options = replace(options, read_norm=read["read_norm"])
    o_cache = _read_step(read["q"], read["gamma_q"], read["gamma_k"], sink, options, state)
    _close_full_blocks(state)
    return o_cache


def _state_refusal(state: HolaState) -> str | None:
    """Why the Triton launches do not take this memory, or None."""
    if state.cache_k.dtype == torch.float64 or state.cache_v.dtype == torch.float64:
        return "a memory of float64"
    scattered = [name for name, held in state.tensors().items() if not held.is_contiguous()]
    return f"a memory whose {scattered[0]} is not contiguous" if scattered else None


def _append(state: HolaState, k: Tensor, v: Tensor, rank: Tensor) -> None:
    row, offset = torch.arange(k.shape[0], device=k.device), state.open_count
    state.open_k[row, offset] = k.to(state.open_k.dtype)
    state.open_v[row, offset] = v.to(state.open_v.dtype)
    state.open_score[row, offset] = rank.to(state.open_score.dtype)
    state.length += 1


def _read_step(q: Tensor, gamma_q: Tensor, gamma_k: Tensor, sink: Tensor | None, options: CacheOptions,
               state: HolaState) -> Tensor:
    """o_cache [N, H, V] of the newest token, which is in the open blocks already."""
    compute = q.dtype
    k = torch.cat([state.cache_k, state.open_k.transpose(1, 2)], 2).to(compute)
    v = torch.cat([state.cache_v, state.open_v.transpose(1, 2)], 2).to(compute)
    key = read_normalize(k, gamma_k, options.read_norm)
    logits = (key * read_normalize(q, gamma_q, options.read_norm)[..., None, :]).sum(-1) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~_visible(state, options), -torch.inf)
    if sink is not None:
        logits = torch.cat([logits, sink.to(compute)[None, :, None].expand(q.shape[0], -1, 1)], -1)
    weights = logits.softmax(-1)[..., : v.shape[2]]
    return (weights[..., None] * v).sum(-2)


def _visible(state: HolaState, options: CacheOptions) -> Tensor:
    """[N, H, w + (1 + P) C] bool: what the newest token reads of the slots and of the open blocks."""
    newest, reach = state.length[:, None] - 1, options.reach
    merged = merged_tokens(newest, state.block, state.window_blocks)
    position = merged + torch.arange(state.open_k.shape[1], device=newest.device)
    first = newest // state.block * state.block
    near = (position <= newest) & (position >= (first if reach is None else newest - reach + 1))
    near = near[:, None].expand(-1, state.cache_score.shape[1], -1)
    if not state.window_blocks:
        cached = state.cache_position >= 0
        if reach is not None:
            cached = cached & (state.cache_position <= (newest - reach)[..., None])
        return torch.cat([cached, near], -1)
    # full blocks that are not merged yet rank with the slots; in order of position, so that ties stay with the earlier
    score = torch.cat([state.cache_score, state.open_score.transpose(1, 2)], -1)
    closed = (position < first)[:, None].expand_as(near)
    candidate = torch.cat([state.cache_position >= 0, closed], -1)
    score = score.masked_fill(~candidate, -torch.inf)
    best = score.sort(dim=-1, descending=True, stable=True).indices[..., : state.slots]
    cached = torch.zeros_like(candidate).scatter(-1, best, True) & candidate
    return cached | torch.cat([torch.zeros_like(state.cache_position, dtype=torch.bool), near], -1)


def _close_full_blocks(state: HolaState) -> None:
    """Merge the oldest open block of every sequence that has just filled one into its cache, if P others stay open."""
    block = state.block
    rows = torch.nonzero((state.length % block == 0) & (state.length > state.window_blocks * block)).squeeze(1)
    if not rows.numel():
        return
    position = merged_tokens(state.length[rows, None] - 1, block, state.window_blocks)
    position = position + torch.arange(block, device=rows.device)
    position = position[:, None].expand(-1, state.cache_score.shape[1], -1)
    new = (state.open_score[rows, :block].transpose(1, 2), position, state.open_k[rows, :block].transpose(1, 2),
           state.open_v[rows, :block].transpose(1, 2))
    cached = (state.cache_score, state.cache_position, state.cache_k, state.cache_v)
    both = [torch.cat([old[rows], fresh.to(old.dtype)], 2) for old, fresh in zip(cached, new, strict=True)]
    best = both[0].sort(dim=-1, descending=True, stable=True).indices[..., : state.slots]
    # by position, empty slots (position -1) last, as a full pass leaves them
    where = both[1].gather(-1, best)
    last = torch.iinfo(torch.int64).max
    best = best.gather(-1, torch.where(where < 0, last, where).sort(dim=-1, stable=True).indices)
    for old, merged in zip(cached, both, strict=True):
        index = best if merged.ndim == 3 else best[..., None].expand(*best.shape, merged.shape[-1])
        old[rows] = merged.gather(2, index)
    for open_blocks in (state.open_k, state.open_v, state.open_score):
        stay = open_blocks[rows, block:]
        open_blocks[rows] = torch.cat([stay, stay.new_zeros(stay.shape[0], block, *stay.shape[2:])], 1)
