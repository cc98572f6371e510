"""Tensor descriptors: a kernel's view of a tensor as a matrix of which it takes whole tiles.

On Hopper a tile of a descriptor is moved by the copy engine: one thread asks for it and no registers hold
addresses, which is what lets the kernels keep a state of 128 x 256 numbers in registers. A tile always comes whole:
rows behind a segment's end belong to the next one (or are zero behind the tensor's end), so a kernel that
takes them must give them no effect.
"""

from __future__ import annotations

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 16  # bytes, of a descriptor's address


def tiles_of(x: Tensor, width: int, rows: int, columns: int) -> TensorDescriptor:
    """x, contiguous, as a matrix of `width` columns, to be taken in tiles of [rows, columns]."""
    matrix = x.view(-1, width)
    if not matrix.shape[0]:
        matrix = x.new_zeros(1, width)  # nothing will be taken from it
    elif matrix.data_ptr() % ALIGNMENT:
        matrix = matrix.clone()
    return TensorDescriptor.from_tensor(matrix, [rows, columns])
