"""Gradients of the read's few parameters from what its backward pass's programs left: one launch for all four.

    X = sum over tokens of the gradient of gamma_q gamma_k      d gamma_q = gamma_k X      d gamma_k = gamma_q X
    d sink = sum over tokens                                    d gate = sigmoid(-gate) sum, of sigmoid(gate) dy . o

As torch's operations these are ten launches of a microsecond each, of which the host makes 0.1 ms a layer. Always
added in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.integers import cdiv, next_power_of_2

NUMBERS = 4096  # of a tile, 128 threads: 32 loads under way in each
COLUMNS = 8  # a sector of memory


@triton.jit
def _columns_of(part_ptr, parts, N, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums [COLUMNS] of columns of part [parts, N]."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, parts, ROWS):
        row = first + tl.arange(0, ROWS)
        at = part_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
        total += tl.load(at, mask=(row < parts)[:, None] & (column < N)[None, :], other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _parameter_kernel(gamma_part_ptr, head_part_ptr, gamma_q_ptr, gamma_k_ptr, gate_ptr, dgamma_q_ptr, dgamma_k_ptr,
                      dsink_ptr, dgate_ptr, gamma_parts, head_parts, K, H, KEY_PROGRAMS, ROWS: tl.constexpr,
                      COLUMNS: tl.constexpr, SINK: tl.constexpr, GATED: tl.constexpr):
    """The first KEY_PROGRAMS programs: COLUMNS of K each. The others: COLUMNS of the 2 H (sink, gate) of all heads."""
    pid = tl.program_id(0)
    if pid < KEY_PROGRAMS:
        d = pid * COLUMNS + tl.arange(0, COLUMNS)
        x = _columns_of(gamma_part_ptr, gamma_parts, K, d, ROWS, COLUMNS)
        gamma_q = tl.load(gamma_q_ptr + d, mask=d < K, other=0.0).to(tl.float32)
        gamma_k = tl.load(gamma_k_ptr + d, mask=d < K, other=0.0).to(tl.float32)
        tl.store(dgamma_q_ptr + d, (x * gamma_k).to(dgamma_q_ptr.dtype.element_ty), mask=d < K)
        tl.store(dgamma_k_ptr + d, (x * gamma_q).to(dgamma_k_ptr.dtype.element_ty), mask=d < K)
    else:
        column = (pid - KEY_PROGRAMS) * COLUMNS + tl.arange(0, COLUMNS)
        x = _columns_of(head_part_ptr, head_parts, 2 * H, column, ROWS, COLUMNS)
        head, real = column // 2, column < 2 * H
        if SINK:
            tl.store(dsink_ptr + head, x.to(dsink_ptr.dtype.element_ty), mask=real & (column % 2 == 0))
        if GATED:
            gate = tl.load(gate_ptr + head, mask=real, other=0.0).to(tl.float32)
            tl.store(dgate_ptr + head, (x * tl.sigmoid(-gate)).to(dgate_ptr.dtype.element_ty),
                     mask=real & (column % 2 == 1))


def parameter_gradients(*, gamma_part: Tensor, head_part: Tensor, gamma_q: Tensor, gamma_k: Tensor,
                        sink_H: Tensor | None, gate_H: Tensor | None) -> tuple[Tensor | None, ...]:
    """(d gamma_q, d gamma_k, d sink, d gate), typed as the parameters, None where there is none.

    gamma_part [P, K] float32 partial sums of X; head_part [Q, H, 2] of (d sink, d gate / sigmoid(-gate)).
    """
    (key_dim,), heads = gamma_q.shape, head_part.shape[1]
    dgamma_q, dgamma_k = torch.empty_like(gamma_q), torch.empty_like(gamma_k)
    dsink, dgate = (None if x is None else torch.empty_like(x) for x in (sink_H, gate_H))
    key_programs = cdiv(key_dim, COLUMNS)
    most = max(len(gamma_part), len(head_part), 1)
    rows = min(NUMBERS // COLUMNS, next_power_of_2(most))
    _parameter_kernel[(key_programs + cdiv(2 * heads, COLUMNS),)](
        gamma_part, head_part, gamma_q, gamma_k, gamma_q if gate_H is None else gate_H, dgamma_q, dgamma_k,
        dgamma_q if dsink is None else dsink, dgamma_q if dgate is None else dgate, len(gamma_part), len(head_part),
        key_dim, heads, key_programs, ROWS=rows, COLUMNS=COLUMNS, SINK=dsink is not None, GATED=dgate is not None,
        num_warps=4)
    return dgamma_q, dgamma_k, dsink, dgate
