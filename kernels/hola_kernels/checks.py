"""Argument checks shared by the operations: one place, one wording."""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.errors import KernelError
from hola_kernels.memo import remember
from hola_kernels.segments import rows_as_segments
from hola_kernels.state import HolaState
from hola_kernels.transfer import sent


def check_tokens(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
                 cu_seqlens: Tensor | None) -> None:
    """q, k [B, T, H, K], v [B, T, H, V], log_decay and beta [B, T, H], cu_seqlens [N + 1] with B = 1."""
    if q.ndim != 4 or q.shape != k.shape:
        raise KernelError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must be the same [B, T, H, K]")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise KernelError(f"v {tuple(v.shape)} must be [B, T, H, V] with the B, T, H of q {tuple(q.shape)}")
    for name, x in (("log_decay", log_decay), ("beta", beta)):
        if x.shape != q.shape[:3]:
            raise KernelError(f"{name} {tuple(x.shape)} must be [B, T, H] = {tuple(q.shape[:3])}")
    check_cu_seqlens(q, cu_seqlens)


def check_cu_seqlens(x: Tensor, cu_seqlens: Tensor | None) -> None:
    """cu_seqlens [N + 1] cuts the T tokens of x [1, T, ...], or is None."""
    if cu_seqlens is None:
        return
    if x.shape[0] != 1:
        raise KernelError(f"cu_seqlens needs B = 1 (documents packed in one row), got B = {x.shape[0]}")
    if not remember(cu_seqlens, ("cuts", x.shape[1]), lambda: _are_cuts(cu_seqlens, x.shape[1])):
        raise KernelError(f"cu_seqlens must be integers rising from 0 to T = {x.shape[1]}, at least two")


def check_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor) -> None:
    """q, k [N, H, K], v [N, H, V], log_decay and beta [N, H] of one token, state [N, H, K, V]."""
    if q.ndim != 3 or q.shape != k.shape:
        raise KernelError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must be the same [N, H, K]")
    if v.ndim != 3 or v.shape[:2] != q.shape[:2]:
        raise KernelError(f"v {tuple(v.shape)} must be [N, H, V] with the N, H of q {tuple(q.shape)}")
    for name, x in (("log_decay", log_decay), ("beta", beta)):
        if x.shape != q.shape[:2]:
            raise KernelError(f"{name} {tuple(x.shape)} must be [N, H] = {tuple(q.shape[:2])}")
    if state.shape != (*q.shape, v.shape[2]):
        raise KernelError(f"state {tuple(state.shape)} must be [N, H, K, V] = {(*q.shape, v.shape[2])}")


def check_per_head(**parameters: tuple[Tensor | None, int]) -> None:
    """Vectors (or None) and the number each must hold."""
    for name, (x, size) in parameters.items():
        if x is not None and x.shape != (size,):
            raise KernelError(f"{name} {tuple(x.shape)} must be [{size}]")


def check_max_seqlen(max_seqlen: int | None, cu_seqlens: Tensor | None) -> None:
    if max_seqlen is not None and (cu_seqlens is None or max_seqlen < 1):
        raise KernelError(f"max_seqlen = {max_seqlen} must be at least 1 and comes with cu_seqlens; leave it out")


def _are_cuts(cu_seqlens: Tensor, tokens: int) -> bool:
    if cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point() or cu_seqlens.numel() < 2:
        return False
    if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        return True  # its numbers are those of the replay, which nobody can read here
    return int(cu_seqlens[0]) == 0 and int(cu_seqlens[-1]) == tokens and not bool((cu_seqlens.diff() < 0).any())


def segments_of(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """cu_seqlens of the flattened tokens x [B, T, ...]: as given, or one segment a row."""
    if cu_seqlens is not None:
        if cu_seqlens.dtype == torch.int64 and cu_seqlens.device == x.device:
            return cu_seqlens
        return remember(cu_seqlens, ("on", x.device), lambda: sent(cu_seqlens.to(torch.int64), x.device))
    return rows_as_segments(x.shape[0], x.shape[1], x.device)


def check_memory(memory: HolaState | None, sequences: int, k: Tensor, v: Tensor, block: int, slots: int) -> HolaState:
    """The memory given, checked against the call, or an empty one."""
    if block < 1 or slots < 1:
        raise KernelError(f"block = {block} and slots = {slots} must be at least 1")
    heads, key_dim, value_dim = k.shape[-2], k.shape[-1], v.shape[-1]
    if memory is None:
        return HolaState.empty(sequences, heads, key_dim, value_dim, block=block, slots=slots, dtype=v.dtype,
                               device=v.device)
    want = (sequences, heads, slots, key_dim, value_dim, block)
    have = (memory.length.numel(), memory.cache_k.shape[1], memory.slots, memory.cache_k.shape[3],
            memory.cache_v.shape[3], memory.block)
    if have != want:
        raise KernelError(f"state has (sequences, H, slots, K, V, block) = {have}, the call needs {want}")
    return memory
