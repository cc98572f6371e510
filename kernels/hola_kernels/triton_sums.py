"""Sums of what a backward pass's programs leave, [parts, N] -> [N]: one launch, always in the same order.

A program owns a strip of so few columns that most multiprocessors have one; the result is cast in the same
launch. torch's sum over the first axis took some 13 us in a training step, and the cast came on top.
For 512 parts of 4,096 numbers: 8.4 MB, just written and so mostly read from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.integers import cdiv, next_power_of_2

PROGRAMS = 264  # wanted: two for each of an H200's 132 multiprocessors
NUMBERS = 4096  # of a tile, 128 threads: 32 loads under way in each
LEAST, MOST = 8, 32  # columns: a sector of memory, a whole line


@triton.jit
def _sum_kernel(part_ptr, out_ptr, parts, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out [N] of part [parts, N] float32; [ROWS, COLUMNS] sums in registers, over rows once, at the end."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, parts, ROWS):
        row = first + tl.arange(0, ROWS)
        at = part_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
        total += tl.load(at, mask=(row < parts)[:, None] & (column < N)[None, :], other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=column < N)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous float32 [parts, ...] -> their sum [...] in float32, then in dtype."""
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    columns = min(MOST, max(LEAST, next_power_of_2(cdiv(out.numel(), PROGRAMS))))
    _sum_kernel[(cdiv(out.numel(), columns),)](
        parts, out, parts.shape[0], out.numel(), ROWS=NUMBERS // columns, COLUMNS=columns, num_warps=4)
    return out
