"""Argument checks shared by the operations, with the same messages."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hola_kernels.errors import KernelError
from hola_kernels.options import CacheOptions
from hola_kernels.packed import PackedDocuments, documents_of
from hola_kernels.segments import rows_as_segments
from hola_kernels.state import HolaState


def check_tokens(q: Tensor, k: Tensor, v: Tensor, **numbers: Tensor) -> None:
    """q, k [B, T, H, K], v [B, T, H, V], and named numbers [B, T, H] (log_decay, beta, score)."""
    if q.ndim != 4 or q.shape != k.shape:
        raise KernelError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must be the same [B, T, H, K]")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise KernelError(f"v {tuple(v.shape)} must be [B, T, H, V] with the B, T, H of q {tuple(q.shape)}")
    _check_sizes(q, v)
    check_floating(q=q, k=k, v=v, **numbers)
    for name, x in numbers.items():
        if x.shape != q.shape[:3]:
            raise KernelError(f"{name} {tuple(x.shape)} must be [B, T, H] = {tuple(q.shape[:3])}")


def per_value_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q and k with as many heads as v: each of H_k heads serves H_v / H_k value heads, one after the other.

    q, k [B, T, H_k, K], v [B, T, H_v, V]. KernelError where H_v is not a multiple of H_k.
    """
    if not all(isinstance(x, Tensor) and x.ndim == 4 for x in (q, k, v)) or q.shape[2] == v.shape[2]:
        return q, k
    heads, value_heads = q.shape[2], v.shape[2]
    if not heads or value_heads % heads or k.shape[2] != heads:
        raise KernelError(f"v has {value_heads} heads, which is not a multiple of the {heads} of q {tuple(q.shape)} "
                          f"and the {k.shape[2]} of k")
    return tuple(x.repeat_interleave(value_heads // heads, dim=2) for x in (q, k))


def check_scale(scale: float | None) -> None:
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, float | int) or not math.isfinite(scale):
        raise KernelError(f"scale = {scale!r} must be a finite number, or None for K^-1/2")


def check_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor) -> None:
    """q, k [N, H, K], v [N, H, V], log_decay and beta [N, H] of one token, state [N, H, K, V]."""
    check_token(q, k, v)
    check_floating(log_decay=log_decay, beta=beta, state=state)
    for name, x in (("log_decay", log_decay), ("beta", beta)):
        if x.shape != q.shape[:2]:
            raise KernelError(f"{name} {tuple(x.shape)} must be [N, H] = {tuple(q.shape[:2])}")
    if state.shape != (*q.shape, v.shape[2]):
        raise KernelError(f"state {tuple(state.shape)} must be [N, H, K, V] = {(*q.shape, v.shape[2])}")
    check_writable(state=state)


def check_token(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k [N, H, K], v [N, H, V] of one token."""
    if q.ndim != 3 or q.shape != k.shape:
        raise KernelError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must be the same [N, H, K]")
    if v.ndim != 3 or v.shape[:2] != q.shape[:2]:
        raise KernelError(f"v {tuple(v.shape)} must be [N, H, V] with the N, H of q {tuple(q.shape)}")
    _check_sizes(q, v)
    check_floating(q=q, k=k, v=v)


def _check_sizes(q: Tensor, v: Tensor) -> None:
    heads, key_dim, value_dim = *q.shape[-2:], v.shape[-1]
    if not heads * key_dim * value_dim:
        raise KernelError(f"H = {heads}, K = {key_dim} and V = {value_dim} must be at least 1")


def check_floating(**tensors: Tensor | None) -> None:
    """Tensors of real floating-point numbers, or None."""
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise KernelError(f"{name} must be a tensor, not {type(x).__name__}")
        if not x.is_floating_point():
            raise KernelError(f"{name} of {x.dtype} must be floating-point numbers")


def check_writable(**tensors: Tensor) -> None:
    """Tensors that an operation updates in place: no two of their numbers share memory."""
    for name, x in tensors.items():
        if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
            raise KernelError(f"{name} is updated in place and is an expanded view, whose numbers share memory; "
                              "give a copy of it (.clone())")


def check_vectors(**parameters: tuple[Tensor | None, int]) -> None:
    """Vectors (or None) and the number each must hold."""
    check_floating(**{name: x for name, (x, _) in parameters.items()})
    for name, (x, size) in parameters.items():
        if x is not None and x.shape != (size,):
            raise KernelError(f"{name} {tuple(x.shape)} must be [{size}]")


def check_read_parameters(q: Tensor, gamma_q: Tensor, gamma_k: Tensor, sink: Tensor | None,
                          **more: Tensor) -> None:
    """gamma_q, gamma_k [K], sink [H] or None, and more vectors of H numbers; q [..., H, K]."""
    for name, x in (("gamma_q", gamma_q), ("gamma_k", gamma_k), *more.items()):
        if x is None:
            raise KernelError(f"{name} must be a tensor, not None")
    heads, key_dim = q.shape[-2:]
    check_vectors(gamma_q=(gamma_q, key_dim), gamma_k=(gamma_k, key_dim), sink=(sink, heads),
                  **{name: (x, heads) for name, x in more.items()})


def check_state(state: Tensor | None, sequences: int, k: Tensor, v: Tensor) -> None:
    """initial_state [N, H, K, V], or None; k [..., H, K], v [..., H, V]."""
    if state is None:
        return
    check_floating(initial_state=state)
    want = (sequences, *k.shape[-2:], v.shape[-1])
    if state.shape != want:
        raise KernelError(f"initial_state {tuple(state.shape)} must be [N, H, K, V] = {want}")


def check_eps(eps: float) -> None:
    if not isinstance(eps, float | int) or not math.isfinite(eps) or eps < 0:
        raise KernelError(f"eps = {eps} must be a finite number of at least 0")


def segments_of(x: Tensor, cu_seqlens: Tensor | PackedDocuments | None) -> Tensor:
    """cu_seqlens [N + 1] int64 of the flattened tokens x [B, T, ...] on their device: as given, or a segment a row."""
    documents = documents_of(x, cu_seqlens, read=False)
    return rows_as_segments(x.shape[0], x.shape[1], x.device) if documents is None else documents.on(x.device)


def check_is_memory(memory: HolaState) -> None:
    if not isinstance(memory, HolaState):
        raise KernelError(f"state must be a HolaState, not {type(memory).__name__}")


def check_memory(memory: HolaState | None, sequences: int, k: Tensor, v: Tensor, options: CacheOptions) -> HolaState:
    """The memory given, checked against the call, or an empty one."""
    block, slots, window_blocks = options.block, options.slots, options.window_blocks
    if memory is not None:
        check_is_memory(memory)
    heads, key_dim, value_dim = k.shape[-2], k.shape[-1], v.shape[-1]
    if memory is None:
        return HolaState.empty(sequences, heads, key_dim, value_dim, block=block, slots=slots,
                               window_blocks=window_blocks, dtype=v.dtype, device=v.device)
    want = (sequences, heads, slots, key_dim, value_dim, block, window_blocks)
    have = (memory.length.numel(), memory.cache_k.shape[1], memory.slots, memory.cache_k.shape[3],
            memory.cache_v.shape[3], memory.block, memory.window_blocks)
    if have != want:
        names = "sequences, H, slots, K, V, block, window_blocks"
        raise KernelError(f"state has ({names}) = {have}, the call needs {want}")
    open_tokens = (1 + window_blocks) * block
    rows = key_dim if memory.recurrent else 0
    shapes = {"state": (sequences, heads, rows, value_dim), "cache_k": (sequences, heads, slots, key_dim),
              "cache_v": (sequences, heads, slots, value_dim), "cache_score": (sequences, heads, slots),
              "cache_position": (sequences, heads, slots), "open_k": (sequences, open_tokens, heads, key_dim),
              "open_v": (sequences, open_tokens, heads, value_dim), "open_score": (sequences, open_tokens, heads),
              "length": (sequences,)}
    for name, x in memory.tensors().items():
        if name.startswith("late."):
            continue
        whole = name in ("cache_position", "length")
        if x.shape != shapes[name] or x.device != k.device or (x.dtype == torch.int64) != whole:
            raise KernelError(f"state.{name} {x.dtype} {tuple(x.shape)} on {x.device} must be "
                              f"{'int64' if whole else 'floating-point'} {shapes[name]} on {k.device}")
    return memory


def check_layer_memory(memory: HolaState | None, sequences: int, k: Tensor, v: Tensor,
                       options: CacheOptions, *, recurrent: bool = True) -> HolaState:
    """`check_memory` of a layer's whole memory: its keys' positions, and its state, delayed or none, as well."""
    if memory is None:
        return HolaState.empty(sequences, *k.shape[-2:], v.shape[-1], block=options.block, slots=options.slots,
                               window_blocks=options.window_blocks, rope_theta=options.rope_theta,
                               state_delay=options.state_delay, recurrent=recurrent, dtype=v.dtype, device=v.device)
    memory = check_memory(memory, sequences, k, v, options)
    asked = {"recurrent": recurrent, "rope_theta": options.rope_theta, "state_delay": options.state_delay}
    for name, value in asked.items():
        if getattr(memory, name) != value:
            raise KernelError(f"state was written with {name} = {getattr(memory, name)}, the call has {value}; a "
                              "memory goes on as it was begun")
    if memory.late is not None:
        want = HolaState.empty(sequences, *k.shape[-2:], v.shape[-1], block=1, slots=0, dtype=v.dtype, device="meta",
                               state_delay=options.state_delay).late.tensors()
        for name, x in memory.late.tensors().items():
            whole = name == "length"
            if x.shape != want[name].shape or x.device != k.device or (x.dtype == torch.int64) != whole:
                raise KernelError(f"state.late.{name} {x.dtype} {tuple(x.shape)} on {x.device} must be "
                                  f"{'int64' if whole else 'floating-point'} {tuple(want[name].shape)} on {k.device}")
    return memory
