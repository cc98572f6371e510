"""Correctness cases of the cross-entropy on the current GPU, against the definition in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hola_kernels.cross_entropy import cross_entropy_, cross_entropy_gradient_, softmax_statistics
from hola_kernels.verify import poisoned, relative_error

LIMITS = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 1e-3}


def cases() -> list[tuple[str, Callable[[], dict[str, float]]]]:
    """(name, run) of every case; the first word of the name is the dtype."""
    return [(f"{str(dtype).removeprefix('torch.')} cross-entropy V={columns} ranks={ranks}",
             lambda d=dtype, v=columns, r=ranks: measure(dtype=d, columns=v, ranks=r))
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
            for columns, ranks in ((264, 1), (5000, 2), (32000, 1), (32000, 4))]


def limit(name: str, output: str) -> float:
    """The largest error of any output that the case `name` may show."""
    return 1e-6 if output == "losses" else LIMITS[name.split()[0]]


def measure(*, dtype: torch.dtype, columns: int, ranks: int) -> dict[str, float]:
    """Errors of losses and gradient; the vocabulary cut into as many parts as there would be ranks."""
    logits = (4 * torch.randn(517, columns, device="cuda")).to(dtype)
    labels = torch.randint(0, columns, (517,), device="cuda")
    weight = torch.rand(517, device="cuda").round(decimals=1)
    want = logits.double()
    losses = cross_entropy_(logits=want, labels=labels, weight=weight.double(), backend="reference")
    parts = [part.contiguous() for part in logits.chunk(ranks, 1)]
    with poisoned():
        if ranks == 1:
            found = cross_entropy_(logits=parts[0], labels=labels, weight=weight, backend="triton")
        else:
            firsts = [rank * columns // ranks for rank in range(ranks)]
            sums = [torch.stack(softmax_statistics(logits=part, labels=labels, first=first, backend="triton"))
                    for part, first in zip(parts, firsts, strict=True)]
            largest = torch.stack([s[0] for s in sums]).amax(0)
            total = sum((s[0] - largest).exp() * s[1] for s in sums)
            log_sum, found = largest + total.log(), total.log() - (sum(s[2] for s in sums) - largest)
            for part, first in zip(parts, firsts, strict=True):
                cross_entropy_gradient_(logits=part, labels=labels, log_sum=log_sum, weight=weight, first=first,
                                        backend="triton")
    return {"losses": relative_error(found, losses), "gradient": relative_error(torch.cat(parts, 1), want)}
