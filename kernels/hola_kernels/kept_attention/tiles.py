"""Launch configurations of attention to kept tokens: a small static table; `verify_cases` runs every entry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hola_kernels.backend import interpreted
from hola_kernels.exact_cache.read_configs import DTYPES, WIDTHS, Tile
from hola_kernels.shared_memory import _limits


@dataclass(frozen=True)
class KeptTiles:
    """forward, query_gradient: rows of queries by columns of list entries; key_gradient: rows of queries by columns of
    the entries whose gradients a program sums."""

    forward: Tile
    query_gradient: Tile
    key_gradient: Tile


INTERPRETER = KeptTiles(*(Tile(16, 16, 1, 1) for _ in range(3)))

# by (16-bit inputs, wider of K and V); widths below 64 take the entry of 64. Compiled for compute capability 9.0, not
# timed yet: in 16 bits no kernel spills more than 56 bytes; in float32 the gradients of keys spill 0.9 to 2.6 KB
TABLE = {
    (True, 256): KeptTiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
    (True, 128): KeptTiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    (True, 64): KeptTiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    (False, 256): KeptTiles(Tile(32, 32, 8, 1), Tile(16, 16, 4, 1), Tile(16, 16, 8, 1)),
    (False, 128): KeptTiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 4, 1)),
    (False, 64): KeptTiles(Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(32, 32, 8, 1)),
}


def tiles_for(key_dim: int, value_dim: int, dtype: torch.dtype) -> KeptTiles:
    """The checked configuration for these widths."""
    return INTERPRETER if interpreted() else TABLE[dtype != torch.float32, max(64, key_dim, value_dim)]


# (16-bit numbers, wider of K and V, at least 64) -> bytes of shared memory of the kernel that needs most, as compiled
# for compute capability 9.0; taken for the others as well
NEEDED = {(True, 64): 66_320, (True, 128): 131_856, (True, 256): 196_864,
          (False, 64): 81_920, (False, 128): 98_304, (False, 256): 98_304}


# with K = 16 dq in float32 is wrong on an H200 with Triton 3.6.0 (verify's case K=16 V=64); under the interpreter it is
# right, and so are 16 bits
LEAST_FLOAT32 = 32


def kept_refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why these kernels do not take q, k and v, or None."""
    if not q.dtype == k.dtype == v.dtype or v.dtype not in DTYPES:
        return ("kept attention takes q, k and v in one of float32, float16 and bfloat16, not "
                f"{q.dtype}, {k.dtype} and {v.dtype}")
    if k.shape[-1] not in WIDTHS or v.shape[-1] not in WIDTHS:
        return f"kept attention takes K and V of {', '.join(map(str, WIDTHS))}, not {k.shape[-1]} and {v.shape[-1]}"
    if not k.is_cuda:
        return None
    if problem := kept_width_refusal(k.shape[-1], v.dtype):
        return problem
    _, name, has = _limits(k.device.index)
    return shared_memory_refusal(name, has, k.dtype, max(64, k.shape[-1], v.shape[-1]))


def kept_width_refusal(key_dim: int, dtype: torch.dtype) -> str | None:
    """Why these kernels do not take keys of this width and dtype on a GPU, or None."""
    if dtype == torch.float32 and key_dim < LEAST_FLOAT32:
        return f"kept attention takes K of {LEAST_FLOAT32} and more in float32, not {key_dim}"
    return None


def shared_memory_refusal(name: str, has: int, dtype: torch.dtype, width: int) -> str | None:
    """The same of a GPU whose blocks may have `has` bytes; width: the wider of K and V, at least 64."""
    needed = NEEDED[dtype != torch.float32, width]
    if needed <= has:
        return None
    return (f"kept attention with K or V = {width} in {str(dtype).removeprefix('torch.')} needs {needed:,} bytes of "
            f"shared memory a block, {name} has {has:,}")
