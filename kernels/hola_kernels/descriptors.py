"""Tensor descriptors: a kernel's view of a tensor as a matrix of which it takes whole tiles.

On Hopper a tile of a descriptor is moved by the copy engine: one thread issues it and no registers hold
addresses, which is what lets the kernels keep a state of 128 x 256 numbers in registers. A tile always comes whole:
rows after a segment's end belong to the next one (or are zero after the tensor's end), so a kernel that
takes them must give them no effect.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 16  # bytes, of a descriptor's address and of its rows
# (dtype, rows, columns) -> what a descriptor has besides its matrix, once Triton has found such tiles possible
_known: dict[tuple[torch.dtype, int, int], dict[str, Any]] = {}


def tiles_of(x: Tensor, width: int, rows: int, columns: int) -> TensorDescriptor:
    """x, contiguous, as a matrix of `width` columns, to be taken in tiles of [rows, columns]."""
    return _descriptor(x.view(-1, width), rows, columns)


def token_tiles(x_MHD: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x [M, H, D], each token's H * D numbers contiguous (they may lie in a wider matrix), as [M, H * D]."""
    return _descriptor(x_MHD.flatten(1), rows, columns)


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    size = matrix.element_size()
    if not matrix.shape[0]:
        matrix = matrix.new_zeros(1, matrix.shape[1])  # nothing will be taken from it
    elif matrix.data_ptr() % ALIGNMENT or matrix.stride(0) * size % ALIGNMENT:
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    kind = (matrix.dtype, rows, columns)
    if kind not in _known:
        _known[kind] = {**vars(TensorDescriptor.from_tensor(matrix, [rows, columns])), "base": None}
    made = object.__new__(TensorDescriptor)  # not checked again: 5 us of the host's time for each of fifty in a layer
    made.__dict__.update(_known[kind], base=matrix, shape=matrix.shape, strides=matrix.stride())
    return made
