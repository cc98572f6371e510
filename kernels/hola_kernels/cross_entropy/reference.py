"""The definition.

    loss = log sum_v exp(x_v) - x_label       d loss / d x_v = exp(x_v) / sum exp - [v is the label]
"""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.cross_entropy.labels import counted, marked
from hola_kernels.norms import compute_dtype


def statistics(logits_MV: Tensor, labels_M: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    x = logits_MV.to(compute_dtype(logits_MV))
    largest = x.max(-1).values
    return largest, (x - largest[:, None]).exp().sum(-1), x.masked_fill(~_here(x, labels_M, first), 0.0).sum(-1)


def gradient_(logits_MV: Tensor, labels_M: Tensor, log_sum_M: Tensor, weight_M: Tensor, first: int) -> Tensor:
    x, weight_M = logits_MV.to(compute_dtype(logits_MV)), counted(weight_M, labels_M)
    found = ((x - log_sum_M[:, None]).exp() - _here(x, labels_M, first).to(x.dtype)) * weight_M[:, None]
    return logits_MV.copy_(found.masked_fill(weight_M[:, None] == 0, 0.0))


def both_(logits_MV: Tensor, labels_M: Tensor, weight_M: Tensor | None) -> Tensor:
    largest, total, picked = statistics(logits_MV, labels_M, 0)
    if weight_M is not None:
        gradient_(logits_MV, labels_M, largest + total.log(), weight_M, 0)
    # in this order: exact where the label's logit is the largest
    return marked(total.log() - (picked - largest), labels_M, logits_MV.shape[1])


def _here(x: Tensor, labels_M: Tensor, first: int) -> Tensor:
    """Where a row's label stands, [M, V]."""
    columns = torch.arange(first, first + x.shape[1], device=x.device)
    return columns == labels_M[:, None]
