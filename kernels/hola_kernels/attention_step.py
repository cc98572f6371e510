"""One decoded token of hola_attention: the memory is read, and brought up to date in place.

`backend="triton"` is three launches (triton_attention_step) that depend on no length and read nothing on the host;
"torch" is the same in plain operations, and looks on the host for blocks that are full.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.attention import check_choices, rank_token
from hola_kernels.backend import choose_backend
from hola_kernels.checks import check_memory, check_per_head, check_step
from hola_kernels.gated_delta.step import gated_delta_step, step_refusal
from hola_kernels.norms import compute_dtype, read_normalize
from hola_kernels.state import HolaState


@torch.no_grad()
def hola_attention_step(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma_q: Tensor,
                        gamma_k: Tensor, gate: Tensor, sink: Tensor | None, state: HolaState, score: str = "betae",
                        read_norm: str = "rms", backend: str = "auto") -> Tensor:
    """One decoded token for each of N sequences; `state` is updated in place.

    q, k [N, H, K], v [N, H, V], log_decay, beta [N, H]; the rest as in hola_attention. Returns o [N, H, V] in v's
    dtype. Raises KernelError.
    """
    check_choices(score, read_norm)
    check_step(q, k, v, log_decay, beta, state.state)
    check_memory(state, q.shape[0], k, v, state.block, state.slots)
    check_per_head(gamma_q=(gamma_q, q.shape[2]), gamma_k=(gamma_k, q.shape[2]), gate=(gate, q.shape[1]),
                   sink=(sink, q.shape[1]))
    refusal = step_refusal(q, k, v) or _state_refusal(state)
    name = choose_backend(backend, q.device, refusal)
    run = _step_triton if name == "triton" else _step_torch
    return run(q, k, v, log_decay, beta, gamma_q, gamma_k, gate, sink, state, score, read_norm)


def _step_triton(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma_q: Tensor, gamma_k: Tensor,
                 gate: Tensor, sink: Tensor | None, state: HolaState, score: str, read_norm: str) -> Tensor:
    from hola_kernels.triton_attention_step import SCORES, attention_step_triton  # on first use: triton may be missing

    rank = None if score in SCORES else rank_token(score, beta.float(), v, beta, state.length)
    return attention_step_triton(q=q, k=k, v=v, log_decay=log_decay, beta=beta, gamma_q=gamma_q, gamma_k=gamma_k,
                                 gate=gate, sink=sink, state=state, score=score, read_norm=read_norm, rank=rank)


def _step_torch(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma_q: Tensor, gamma_k: Tensor,
                gate: Tensor, sink: Tensor | None, state: HolaState, score: str, read_norm: str) -> Tensor:
    wide, out_dtype = compute_dtype(v), v.dtype
    q, k, v, beta = q.to(wide), k.to(wide), v.to(wide), beta.to(wide)
    o_state, written = gated_delta_step(q=q, k=k, v=v, log_decay=log_decay, beta=beta, state=state.state)
    rank = rank_token(score, written, v, beta, state.length)
    _append(state, k, v, rank)
    o_cache = _read_step(q, gamma_q, gamma_k, sink, read_norm, state)
    _close_full_blocks(state)
    return (o_state + gate.to(wide).sigmoid()[:, None] * o_cache).to(out_dtype)


def _state_refusal(state: HolaState) -> str | None:
    """Why the Triton launches do not take this memory, or None."""
    if state.cache_k.dtype == torch.float64 or state.cache_v.dtype == torch.float64:
        return "a memory of float64"
    scattered = [name for name, held in vars(state).items() if not held.is_contiguous()]
    return f"a memory whose {scattered[0]} is not contiguous" if scattered else None


def _append(state: HolaState, k: Tensor, v: Tensor, rank: Tensor) -> None:
    row, place = torch.arange(k.shape[0], device=k.device), state.open_count
    state.open_k[row, place] = k.to(state.open_k.dtype)
    state.open_v[row, place] = v.to(state.open_v.dtype)
    state.open_score[row, place] = rank.to(state.open_score.dtype)
    state.length += 1


def _read_step(q: Tensor, gamma_q: Tensor, gamma_k: Tensor, sink: Tensor | None, read_norm: str,
               state: HolaState) -> Tensor:
    wide = q.dtype
    k = torch.cat([state.cache_k, state.open_k.transpose(1, 2)], 2).to(wide)
    v = torch.cat([state.cache_v, state.open_v.transpose(1, 2)], 2).to(wide)
    key = read_normalize(k, gamma_k, read_norm)
    logits = (key * read_normalize(q, gamma_q, read_norm)[..., None, :]).sum(-1) * q.shape[-1] ** -0.5
    opened = (state.length - 1) % state.block + 1
    in_block = torch.arange(state.block, device=q.device) < opened[:, None]
    visible = torch.cat([state.cache_position >= 0, in_block[:, None].expand(-1, q.shape[1], -1)], -1)
    logits = logits.masked_fill(~visible, -torch.inf)
    if sink is not None:
        logits = torch.cat([logits, sink.to(wide)[None, :, None].expand(q.shape[0], -1, 1)], -1)
    weights = logits.softmax(-1)[..., : v.shape[2]]
    return (weights[..., None] * v).sum(-2)


def _close_full_blocks(state: HolaState) -> None:
    """Merge the open block of every sequence that has just filled it into its cache."""
    rows = torch.nonzero(state.open_count == 0).squeeze(1)
    if not rows.numel():
        return
    position = state.length[rows, None] - state.block + torch.arange(state.block, device=rows.device)
    position = position[:, None].expand(-1, state.cache_score.shape[1], -1)
    new = (state.open_score[rows].transpose(1, 2), position, state.open_k[rows].transpose(1, 2),
           state.open_v[rows].transpose(1, 2))
    kept = (state.cache_score, state.cache_position, state.cache_k, state.cache_v)
    both = [torch.cat([old[rows], fresh.to(old.dtype)], 2) for old, fresh in zip(kept, new, strict=True)]
    best = both[0].sort(dim=-1, descending=True, stable=True).indices[..., : state.slots]
    # by position, empty slots (position -1) last, as a full pass leaves them
    where = both[1].gather(-1, best)
    last = torch.iinfo(torch.int64).max
    best = best.gather(-1, torch.where(where < 0, last, where).sort(dim=-1, stable=True).indices)
    for old, merged in zip(kept, both, strict=True):
        index = best if merged.ndim == 3 else best[..., None].expand(*best.shape, merged.shape[-1])
        old[rows] = merged.gather(2, index)
    for opened in (state.open_k, state.open_v, state.open_score):
        opened[rows] = 0
