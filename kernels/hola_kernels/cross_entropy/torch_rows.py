"""In torch, some rows at a time: never more than a little memory beside the logits themselves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hola_kernels.cross_entropy.labels import counted, marked
from hola_kernels.norms import compute_dtype

NUMBERS = 1 << 22  # of a block that is worked on at once: 16 MiB in float32


def statistics(logits_MV: Tensor, labels_M: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    compute = compute_dtype(logits_MV)
    largest, total, picked = (torch.empty(len(logits_MV), dtype=compute, device=logits_MV.device) for _ in range(3))
    for rows in _blocks(logits_MV):
        x = logits_MV[rows].to(compute)
        largest[rows] = x.max(-1).values
        total[rows] = (x - largest[rows, None]).exp_().sum(-1)
        column, here = _column(x, labels_M[rows], first)
        picked[rows] = torch.where(here, x.gather(1, column[:, None])[:, 0], 0.0)
    return largest, total, picked


def gradient_(logits_MV: Tensor, labels_M: Tensor, log_sum_M: Tensor, weight_M: Tensor, first: int) -> Tensor:
    compute, weight_M = compute_dtype(logits_MV), counted(weight_M, labels_M)
    for rows in _blocks(logits_MV):
        weight = weight_M[rows, None].to(compute)
        found = (logits_MV[rows].to(compute) - log_sum_M[rows, None]).exp_()
        column, here = _column(found, labels_M[rows], first)
        found.scatter_add_(1, column[:, None], -here.to(compute)[:, None])
        logits_MV[rows] = found.mul_(weight).masked_fill_(weight == 0, 0.0).to(logits_MV.dtype)
    return logits_MV


def both_(logits_MV: Tensor, labels_M: Tensor, weight_M: Tensor | None) -> Tensor:
    largest, total, picked = statistics(logits_MV, labels_M, 0)
    if weight_M is not None:
        gradient_(logits_MV, labels_M, largest + total.log(), weight_M, 0)
    # in this order: exact where the label's logit is the largest
    return marked(total.log() - (picked - largest), labels_M, logits_MV.shape[1])


def _blocks(logits_MV: Tensor) -> Iterator[slice]:
    step = max(1, NUMBERS // max(logits_MV.shape[1], 1))
    return (slice(begin, begin + step) for begin in range(0, len(logits_MV), step))


def _column(x: Tensor, labels_M: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """(a column that is there, whether it is the label's) of every row."""
    column = labels_M.long() - first
    here = (column >= 0) & (column < x.shape[1])
    return torch.where(here, column, 0), here
