"""Which labels count."""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.errors import KernelError

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's


def check_labels(labels_M: Tensor, weight_M: Tensor | None, columns: int) -> None:
    """KernelError for a label on the CPU that is neither in [0, columns) nor IGNORE_INDEX, in a row that counts."""
    if labels_M.is_cuda:
        return
    wrong = _outside(labels_M, columns)
    if weight_M is not None:
        wrong &= weight_M != 0
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise KernelError(f"labels[{row}] = {int(labels_M[row])} must be in [0, V = {columns}), "
                          f"or {IGNORE_INDEX} for no label")


def marked(losses_M: Tensor, labels_M: Tensor, columns: int) -> Tensor:
    """Losses over the whole vocabulary: 0 where there is no label, NaN where it is outside."""
    losses_M = losses_M.masked_fill(labels_M == IGNORE_INDEX, 0.0)
    return losses_M.masked_fill(_outside(labels_M, columns), torch.nan)


def counted(weight_M: Tensor, labels_M: Tensor) -> Tensor:
    """The weights, 0 where there is no label."""
    return weight_M.masked_fill(labels_M == IGNORE_INDEX, 0.0)


def _outside(labels_M: Tensor, columns: int) -> Tensor:
    return ((labels_M < 0) | (labels_M >= columns)) & (labels_M != IGNORE_INDEX)
