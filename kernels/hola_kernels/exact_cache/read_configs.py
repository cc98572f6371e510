"""Launch configurations of cache attention: a small static table, every entry checked on the GPU.

Nothing is tuned at run time. `verify_cases` runs every entry against float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hola_kernels.shared_memory import has_small_blocks, shared_memory_refusal

WINDOW_COLUMNS = 64  # of a window's blocks: no tile of keys reaches over the end of one
WIDTHS = (16, 32, 64, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def read_refusal(k: Tensor, v: Tensor) -> str | None:
    """Why these kernels do not take k and v, or None."""
    if k.shape[-1] not in WIDTHS or v.shape[-1] not in WIDTHS:
        return f"cache attention takes K and V of {', '.join(map(str, WIDTHS))}, not {k.shape[-1]} and {v.shape[-1]}"
    if v.dtype not in DTYPES or k.dtype not in DTYPES:
        return f"cache attention takes float32, float16 and bfloat16, not {v.dtype}"
    return shared_memory_refusal(k, v)


@dataclass(frozen=True)
class Tile:
    """rows, columns: of a tile of queries by keys; registers: the most a thread may take, so that more
    programs share a multiprocessor; staged: scaled queries pass through memory, not registers.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None
    staged: bool = False

    @property
    def launch(self) -> dict[str, int]:
        """Triton's launch options."""
        capped = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **capped}


@dataclass(frozen=True)
class ReadConfig:
    """pair_gradient and query_gradient have the same columns; a pair_gradient's rows are a multiple of
    key_gradient's columns, whose rows are at most its columns: no kernel reads a tile that was not written.
    """

    forward: Tile
    pair_gradient: Tile
    query_gradient: Tile
    key_gradient: Tile

    def __post_init__(self) -> None:
        if (self.pair_gradient.columns != self.query_gradient.columns
                or self.pair_gradient.rows % self.query_gradient.rows
                or self.pair_gradient.rows % self.key_gradient.columns
                or self.key_gradient.rows > self.key_gradient.columns):
            raise ValueError(f"tiles of {self} do not fit each other")


PRODUCT_WIDTH = 128  # columns of K that a program of the product for dq owns

INTERPRETER = ReadConfig(*(Tile(16, 16, 1, 1) for _ in range(4)))

# by (16-bit inputs, wider of K and V); widths below 64 take the entry of 64
TABLE = {
    (True, 256): ReadConfig(Tile(128, 64, 8, 2, staged=True), Tile(64, 64, 4, 3, 128), Tile(64, 64, 4, 3, 168),
                            Tile(64, 64, 4, 2)),
    (True, 128): ReadConfig(Tile(64, 64, 4, 2), Tile(64, 64, 4, 3, 128), Tile(64, 64, 4, 3, 168),
                            Tile(64, 64, 4, 3, 168)),
    (True, 64): ReadConfig(Tile(64, 64, 4, 2), Tile(64, 64, 4, 3, 168), Tile(64, 64, 4, 3, 168),
                           Tile(64, 64, 4, 3, 168)),
    (False, 256): ReadConfig(Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (False, 128): ReadConfig(Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(32, 32, 8, 1)),
    (False, 64): ReadConfig(Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(32, 32, 8, 1)),
}

# the same for GPUs whose blocks have 99 KB of shared memory, where it differs: compiled for compute capability 8.6 and
# 12.0, not run there yet
SMALL_TABLE = {(True, 256): replace(TABLE[True, 256], forward=Tile(64, 32, 4, 2, staged=True))}


def read_config(key_dim: int, value_dim: int, dtype: torch.dtype) -> ReadConfig:
    """The checked configuration for these widths."""
    from hola_kernels.backend import interpreted

    if interpreted():
        return INTERPRETER
    key = dtype != torch.float32, max(64, key_dim, value_dim)
    return SMALL_TABLE.get(key, TABLE[key]) if has_small_blocks() else TABLE[key]
