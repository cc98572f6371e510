"""Reading a block's entry of a `BlockTable` in a kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from hola_kernels import block_table

START = tl.constexpr(block_table.START)
COUNT = tl.constexpr(block_table.COUNT)
INDEX = tl.constexpr(block_table.INDEX)
FOLLOWING = tl.constexpr(block_table.FOLLOWING)
SEGMENT = tl.constexpr(block_table.SEGMENT)
FIELDS = tl.constexpr(block_table.FIELDS)


@triton.jit
def block_entry(entries_ptr, block, FIELD: tl.constexpr):
    """One number of a block's row: FIELD is START, COUNT, INDEX, FOLLOWING or SEGMENT."""
    return tl.load(entries_ptr + block * FIELDS + FIELD)
