"""What the operations on rows share: rows whose columns are contiguous, memory for gradients, the rows of a tile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hola_kernels.integers import next_power_of_2

GradBuffer = Callable[[], Tensor]


def contiguous_columns(x: Tensor) -> Tensor:
    """x, copied only if its last axis is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def gradient_rows(buffer: GradBuffer | None, rows: Callable[[Tensor], Tensor], like: Tensor,
                  device: torch.device) -> Tensor:
    """Where a kernel writes the gradient of `like`: rows(buffer()), or new memory of like's shape and dtype.

    rows: gives a tensor the shape that the kernel takes; where it must copy, the buffer is not used.
    """
    wanted = None if buffer is None else buffer()
    if wanted is not None and wanted.dtype == like.dtype and wanted.stride(-1) == 1:
        found = rows(wanted)
        if found.data_ptr() == wanted.data_ptr():
            return found
    return torch.empty(like.shape, dtype=like.dtype, device=device)


def row_tile(width: int, numbers: int) -> dict[str, int]:
    """Rows of `width` columns, padded to a power of 2, that hold so many numbers; one row at least."""
    padded = next_power_of_2(width)
    return {"ROWS": max(1, numbers // padded), "WIDTH": padded}
