"""Cross-entropy of logits that are used up: the gradient is written where the logits were.

Three operations over rows of logits [M, V], labels [M]; V may be one rank's part of the vocabulary, from row `first`:
    softmax_statistics        what ranks tell each other: largest logit, sum of exponentials, the label's logit
    cross_entropy_gradient_   logits <- weight * (softmax - one at the label), given the log of the sum over all ranks
    cross_entropy_            both at once where one rank holds the whole vocabulary; also returns the losses

For training only, so the package does not name them at its top: what it names travels with exported models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hola_kernels.backend import choose_backend
from hola_kernels.cross_entropy import reference, torch_rows
from hola_kernels.errors import KernelError


def softmax_statistics(*, logits: Tensor, labels: Tensor, first: int = 0,
                       backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """(largest, total, picked), each [M] in float32 (float64 for such logits).

    logits [M, V], labels [M] int64 counted over the whole vocabulary, of which these are columns from `first` on.
    total: sum of exp(logit - largest); picked: the label's logit, 0 where another rank has it. Raises KernelError.
    """
    _check(logits, labels)
    return _implementation(backend, logits, "statistics")(logits, labels, first)


def cross_entropy_gradient_(*, logits: Tensor, labels: Tensor, log_sum: Tensor, weight: Tensor, first: int = 0,
                            backend: str = "auto") -> Tensor:
    """logits <- weight * (exp(logits - log_sum) - [column is the label]), in place; returns them.

    log_sum [M]: log of the sum of exponentials over the whole vocabulary. weight [M]: of each row's loss; a row of
    weight 0 becomes zeros whatever its logits are. Raises KernelError.
    """
    _check(logits, labels, log_sum=log_sum, weight=weight)
    return _implementation(backend, logits, "gradient_")(logits, labels, log_sum, weight, first)


def cross_entropy_(*, logits: Tensor, labels: Tensor, weight: Tensor | None, backend: str = "auto") -> Tensor:
    """Losses [M] in float32 (float64 for such logits); with weight [M] the logits become the gradient, as above.

    Raises KernelError.
    """
    _check(logits, labels, **({} if weight is None else {"weight": weight}))
    return _implementation(backend, logits, "both_")(logits, labels, weight)


def _check(logits: Tensor, labels: Tensor, **rows: Tensor) -> None:
    if logits.ndim != 2 or not logits.is_contiguous():
        raise KernelError(f"logits {tuple(logits.shape)} must be [M, V] in one piece of memory")
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


__all__ = ["cross_entropy_", "cross_entropy_gradient_", "softmax_statistics"]
