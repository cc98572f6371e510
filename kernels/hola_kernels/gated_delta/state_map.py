"""What a piece of a sequence does to the state that enters it: S_out = M S_in + E.

A piece is known to its neighbours by (M, E) alone, and pieces compose by

    (M2, E2) after (M1, E1)  =  (M2 M1, M2 E1 + E2)

so the state entering any piece follows from the maps of those before it, without their tokens.
The gradient goes back through the same M: dS_in = M^T dS_out + d, where d is what the piece's
own outputs ask of the state that entered it. This file makes M, E and d; `parallel` sends them.
None of them keeps an autograd graph: with the true S_in given, the ordinary rule's own backward
is exact, and only dS_out has to come from elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.backend import choose_backend
from hola_kernels.checks import check_tokens
from hola_kernels.gated_delta import triton_refusal
from hola_kernels.gated_delta.reference import gated_delta_reference
from hola_kernels.gated_delta.torch_chunked import chunk_factors, pad_chunks
from hola_kernels.memo import by_shape, mark_constant
from hola_kernels.norms import compute_dtype
from hola_kernels.operation import operation
from hola_kernels.segments import dense_cu_seqlens


@operation
@torch.no_grad()
def state_map(*, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The map of B pieces of T tokens: M [B, H, K, K] and E [B, H, K, V], float32 (float64 in float64 calls).

    k [B, T, H, K], v [B, T, H, V], log_decay and beta [B, T, H] as in gated_delta_rule. Raises KernelError.
    """
    check_tokens(k, k, v, log_decay=log_decay, beta=beta)
    name = choose_backend(backend, k.device, triton_refusal(k, k, v))
    run = {"reference": _map_reference, "torch": _map_torch, "triton": _map_triton if v.numel() else _map_torch}[name]
    both = run(*(x.flatten(0, 1) for x in (k, v, log_decay, beta)), k.shape[0])
    addition, matrix = both.split([v.shape[-1], k.shape[-1]], -1)
    return matrix, addition


@operation
@torch.no_grad()
def entering_gradient(*, q: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor, do: Tensor,
                      backend: str = "auto") -> Tensor:
    """d [B, H, K, V]: the gradient of sum(o * do) with respect to the state entering B pieces of T tokens.

    q, k [B, T, H, K], do [B, T, H, V], log_decay and beta [B, T, H]. float32 (float64 in float64 calls).
    """
    check_tokens(q, k, do, log_decay=log_decay, beta=beta)
    name = choose_backend(backend, q.device, triton_refusal(q, k, do))
    run = {"reference": _gradient_reference, "torch": _gradient_torch,
           "triton": _gradient_triton if do.numel() else _gradient_torch}[name]
    return run(*(x.flatten(0, 1) for x in (q, k, log_decay, beta, do)), q.shape[0])


def _dense_cu_seqlens(tokens: int, pieces: int, device: torch.device) -> Tensor:
    return dense_cu_seqlens(pieces, tokens // max(pieces, 1), device)


def _start(k: Tensor, value_dim: int, pieces: int) -> Tensor:
    """[0 | I] [B, H, K, V + K]: columns of a state are independent, so E and M are columns of one state."""
    heads, key_dim = k.shape[1:]
    identity = torch.eye(key_dim, dtype=compute_dtype(k), device=k.device)
    return torch.cat([identity.new_zeros(key_dim, value_dim), identity], -1).expand(pieces, heads, -1, -1)


def _map_reference(k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, pieces: int) -> Tensor:
    """The definition: the rule itself on [v | 0], from [0 | I]."""
    values = torch.cat([v, torch.zeros_like(k).to(v)], -1)
    cu_seqlens = _dense_cu_seqlens(k.shape[0], pieces, k.device)
    return gated_delta_reference(k, k, values, log_decay, beta, cu_seqlens, _start(k, v.shape[-1], pieces))[2]


def _map_torch(k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, pieces: int) -> Tensor:
    factors = chunk_factors(k, v, log_decay, beta, _dense_cu_seqlens(k.shape[0], pieces, k.device))
    state = _start(k, v.shape[-1], pieces)
    for rows in factors.chunks.blocks_by_index:  # one chunk of every piece, in order of the pieces
        x = -(factors.from_keys[rows] @ state)
        x[..., : v.shape[-1]] += factors.from_values[rows]
        state = factors.decay_all[rows] * state + factors.k_to_end[rows].mT @ x
    return state


def _gradient_reference(q: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor, do: Tensor, pieces: int) -> Tensor:
    """The definition: autograd through the rule."""
    compute = compute_dtype(do)
    with torch.enable_grad():
        state = torch.zeros(pieces, *k.shape[1:], do.shape[-1], dtype=compute, device=k.device, requires_grad=True)
        detached = [x.detach() for x in (q, k, torch.zeros_like(do), log_decay, beta)]
        o, _, _ = gated_delta_reference(*detached, _dense_cu_seqlens(k.shape[0], pieces, k.device), state)
        if not o.requires_grad:  # no tokens
            return torch.zeros_like(state)
        return torch.autograd.grad(o, state, do.to(compute))[0]


def _gradient_torch(q: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor, do: Tensor, pieces: int) -> Tensor:
    factors = chunk_factors(k, k[..., :0], log_decay, beta, _dense_cu_seqlens(k.shape[0], pieces, k.device))
    q_decayed, attention = factors.attend(q)
    compute = compute_dtype(do)
    do_UHcV = pad_chunks(factors.chunks, do.to(compute))
    gradient = torch.zeros(pieces, *k.shape[1:], do.shape[-1], dtype=compute, device=k.device)
    for rows in reversed(factors.chunks.blocks_by_index):
        dx = attention[rows].mT @ do_UHcV[rows] + factors.k_to_end[rows] @ gradient
        gradient = (factors.decay_all[rows] * gradient + q_decayed[rows].mT @ do_UHcV[rows]
                    - factors.from_keys[rows].mT @ dx)
    return gradient


@by_shape
def _host_cu_seqlens(tokens: int, pieces: int) -> Tensor:
    """On the CPU and the same tensor every time: the kernels keep one layout for it, and nothing waits."""
    return mark_constant(_dense_cu_seqlens(tokens, pieces, torch.device("cpu")))


def _map_triton(k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, pieces: int) -> Tensor:
    from hola_kernels.gated_delta.triton_phases import piece_maps  # on first use: triton may be missing

    return piece_maps(k, v, log_decay, beta, _host_cu_seqlens(k.shape[0], pieces))


def _gradient_triton(q: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor, do: Tensor, pieces: int) -> Tensor:
    from hola_kernels.gated_delta.triton_phases import piece_gradient

    return piece_gradient(q, k, log_decay, beta, do, _host_cu_seqlens(k.shape[0], pieces))


__all__ = ["entering_gradient", "state_map"]
