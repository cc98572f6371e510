"""A sliding window as local part: which tiles of keys a tile of queries sees, and which tokens of them.

Offsets count from the block's first token; those of earlier blocks of the document are negative. `Window` has the
numbers that kernels take as constants. A kernel with WINDOW = 0 reads the token's block.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from hola_kernels.options import CacheOptions


@dataclass(frozen=True)
class Window:
    """tokens: of the window, the token itself included; 0: the local part is the block. block: C. back: P C."""

    tokens: int = 0
    block: int = 0
    back: int = 0

    @classmethod
    def of(cls, options: CacheOptions) -> Window:
        if options.reach is None:
            return cls()
        return cls(options.reach, options.block, options.window_blocks * options.block)

    @property
    def constants(self) -> dict[str, int]:
        """The kernels' arguments."""
        return {"WINDOW": self.tokens, "BLOCK": self.block, "BACK": self.back}


@triton.jit
def first_window_tile(tile, index, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr,
                      BLOCK: tl.constexpr, BACK: tl.constexpr):
    """The first tile of COLUMNS keys that queries tile * ROWS ... of block `index` see, counted from the block's start.

    COLUMNS divides BLOCK and BACK. BACK is added first: division rounds towards zero.
    """
    first = tl.maximum(tile * ROWS - WINDOW + 1, -tl.minimum(index * BLOCK, BACK))
    return (first + BACK) // COLUMNS - BACK // COLUMNS


@triton.jit
def in_reach(cached, row_C, row_R, WINDOW: tl.constexpr):
    """Cached tokens before the window, local ones inside it. A cached row after the query is one that came in with the
    segment: those lie before every window."""
    distance = row_R - row_C
    return tl.where(cached, (distance >= WINDOW) | (distance < 0), distance < WINDOW)
