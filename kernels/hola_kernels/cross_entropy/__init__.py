"""Cross-entropy of logits that are used up: the gradient is written where the logits were.

Three operations over rows of logits [M, V], labels [M]; V may be one rank's part of the vocabulary, from row `first`:
    softmax_statistics        what ranks tell each other: largest logit, sum of exponentials, the label's logit
    cross_entropy_gradient_   logits <- weight * (softmax - one at the label), given the log of the sum over all ranks
    cross_entropy_            both at once where one rank holds the whole vocabulary; also returns the losses

A label of IGNORE_INDEX (-100, as torch has it) is no label: loss and gradient of its row are zero.

For training only, so the package does not name them at its top: what it names travels with exported models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hola_kernels.backend import choose_backend
from hola_kernels.checks import check_floating, check_writable
from hola_kernels.cross_entropy import reference, torch_rows
from hola_kernels.cross_entropy.labels import IGNORE_INDEX, check_labels
from hola_kernels.errors import KernelError
from hola_kernels.operation import operation


@operation
def softmax_statistics(*, logits: Tensor, labels: Tensor, first: int = 0,
                       backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """(largest, total, picked), each [M] in float32 (float64 for such logits).

    logits [M, V], labels [M] int64 counted over the whole vocabulary, of which these are columns from `first` on.
    total: sum of exp(logit - largest); picked: the label's logit, 0 where another rank has it (and on all
    ranks for a label outside of the whole vocabulary, which only the caller can tell). Raises KernelError.
    """
    _check(logits, labels)
    return _implementation(backend, logits, "statistics")(logits, labels, first)


@operation
def cross_entropy_gradient_(*, logits: Tensor, labels: Tensor, log_sum: Tensor, weight: Tensor, first: int = 0,
                            backend: str = "auto") -> Tensor:
    """logits <- weight * (exp(logits - log_sum) - [column is the label]), in place; returns them.

    log_sum [M]: log of the sum of exponentials over the whole vocabulary. weight [M]: of each row's loss; a row of
    weight 0, or whose label is IGNORE_INDEX, becomes zeros whatever its logits are. Raises KernelError.
    """
    _check(logits, labels, log_sum=log_sum, weight=weight)
    check_writable(logits=logits)
    return _implementation(backend, logits, "gradient_")(logits, labels, log_sum, weight, first)


@operation
def cross_entropy_(*, logits: Tensor, labels: Tensor, weight: Tensor | None, backend: str = "auto") -> Tensor:
    """Losses [M] in float32 (float64 for such logits); with weight [M] the logits become the gradient, as above.

    Labels are in [0, V), or IGNORE_INDEX. Raises KernelError for others on the CPU; on a GPU, where looking would wait
    for it, their rows' losses and gradients are NaN. Rows of weight 0 may have any label.
    """
    _check(logits, labels, **({} if weight is None else {"weight": weight}))
    check_labels(labels, weight, logits.shape[1])
    return _implementation(backend, logits, "both_")(logits, labels, weight)


def _check(logits: Tensor, labels: Tensor, **rows: Tensor) -> None:
    check_floating(logits=logits, **rows)
    if labels.dtype not in (torch.int64, torch.int32):
        raise KernelError(f"labels of {labels.dtype} must be int64 or int32")
    if logits.ndim != 2 or not logits.shape[1] or not logits.is_contiguous():
        raise KernelError(f"logits {tuple(logits.shape)} must be [M, V], V of at least 1, in one piece of memory")
    for name, value in {"labels": labels, **rows}.items():
        if value.shape != logits.shape[:1]:
            raise KernelError(f"{name} {tuple(value.shape)} must be [M] with the M of logits {tuple(logits.shape)}")


def _implementation(backend: str, logits: Tensor, name: str) -> Callable[..., Any]:
    refusal = "cross-entropy does not take float64" if logits.dtype == torch.float64 else None
    chosen = choose_backend(backend, logits.device, refusal)
    if chosen == "triton":
        from hola_kernels.cross_entropy import triton_rows  # on first use: triton may be missing

        return getattr(triton_rows, name)
    return getattr(reference if chosen == "reference" else torch_rows, name)


__all__ = ["IGNORE_INDEX", "cross_entropy_", "cross_entropy_gradient_", "softmax_statistics"]
