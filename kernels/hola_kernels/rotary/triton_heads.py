"""Rotary positions in one pass over memory.

A program owns a tile of tokens and a run of heads: it reads the tokens' cosines and sines [TOKENS, HALF] once and then
loops over the heads, whose two halves [TOKENS, HALF] it reads, rotates in registers and writes, each number by the
thread that has read it: the result may lie where x does.
For 32,768 tokens of 32 heads of 64 in bf16 (q and k): 0.27 GB and 8 MB of tables each way, 0.065 ms at 4.3 TB/s.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hola_kernels.integers import cdiv, next_power_of_2

NUMBERS, WARPS = 1024, 4  # of a half in a tile; 128 threads
HEADS = 8                 # of a program at most: enough programs for every GPU, and tables read once for eight heads


@triton.jit
def _rotary_kernel(x_ptr, cos_ptr, sin_ptr, y_ptr, rows, length, heads, x_row, x_token, x_head, y_row, y_token, y_head,
                   HALF: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, EACH: tl.constexpr):
    """y of rows * length tokens; x and y may be the same memory. Columns of a head lie together."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, WIDTH)[None, :]
    row, position = token // length, token % length
    mask = (token < rows * length)[:, None] & (column < HALF)
    table = position[:, None] * HALF + column
    cos = tl.load(cos_ptr + table, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + table, mask=mask, other=0.0)
    x_at = x_ptr + (row * x_row + position * x_token)[:, None] + column
    y_at = y_ptr + (row * y_row + position * y_token)[:, None] + column
    first = tl.program_id(1) * EACH
    for head in tl.range(first, tl.minimum(first + EACH, heads)):
        a = tl.load(x_at + head * x_head, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_at + head * x_head + HALF, mask=mask, other=0.0).to(tl.float32)
        out = y_at + head * y_head
        tl.store(out, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(out + HALF, (b * cos + a * sin).to(y_ptr.dtype.element_ty), mask=mask)


def rotate_triton(x_BSHK: Tensor, cos_SF: Tensor, sin_SF: Tensor, into_BSHK: Tensor) -> None:
    """`reference.rotary_reference` of x, written to `into`, whose columns lie together; it may be x."""
    if x_BSHK.stride(3) != 1:
        x_BSHK = x_BSHK.contiguous()
    target = into_BSHK if into_BSHK.stride(3) == 1 else into_BSHK.new_empty(into_BSHK.shape)
    rows, length, heads, width = x_BSHK.shape
    half = width // 2
    columns = next_power_of_2(half)
    tokens = max(1, NUMBERS // columns)
    grid = (cdiv(rows * length, tokens), cdiv(heads, HEADS))
    _rotary_kernel[grid](x_BSHK, cos_SF, sin_SF, target, rows, length, heads, *x_BSHK.stride()[:3],
                         *target.stride()[:3], HALF=half, WIDTH=columns, TOKENS=tokens, EACH=HEADS, num_warps=WARPS)
    if target is not into_BSHK:
        into_BSHK.copy_(target)
