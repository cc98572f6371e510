"""Cross-entropy that writes its gradient over the logits: backends against torch's own loss, whole and in parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from inputs import relative_error
from interpreted import INTERPRETED
from torch import Tensor

from hola_kernels import KernelError
from hola_kernels.cross_entropy import cross_entropy_, cross_entropy_gradient_, softmax_statistics, torch_rows


def make(rows: int, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(rows + columns)
    weight = torch.rand(rows, generator=g).round(decimals=1)
    weight[: rows // 4] = 0
    return {"logits": (5 * torch.randn(rows, columns, generator=g)).to(dtype),
            "labels": torch.randint(0, columns, (rows,), generator=g), "weight": weight}


def expected(*, logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(losses, gradient) by torch, float64."""
    x = logits.clone().double().requires_grad_()
    losses = F.cross_entropy(x, labels, reduction="none")
    return losses.detach(), torch.autograd.grad((losses * weight.double()).sum(), x)[0]


def in_parts(ranks: int, backend: str, *, logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(losses, gradient) as ranks that share the vocabulary would find them."""
    width = logits.shape[1] // ranks
    parts = [part.contiguous() for part in logits.split(width, 1)]
    firsts = range(0, logits.shape[1], width)
    sums = [softmax_statistics(logits=p, labels=labels, first=f, backend=backend)
            for p, f in zip(parts, firsts, strict=True)]
    largest = torch.stack([s[0] for s in sums]).amax(0)
    total = torch.stack([(s[0] - largest).exp() * s[1] for s in sums]).sum(0)
    log_sum = largest + total.log()
    for part, first in zip(parts, firsts, strict=True):
        found = cross_entropy_gradient_(logits=part, labels=labels, log_sum=log_sum, weight=weight, first=first,
                                        backend=backend)
        assert found is part
    return total.log() - (sum(s[2] for s in sums) - largest), torch.cat(parts, 1)


def check(shape: tuple[int, int], dtype: torch.dtype, ranks: int, backend: str) -> None:
    inputs = make(*shape, dtype)
    losses, gradient = expected(**inputs)
    assert not gradient[: shape[0] // 4].any()
    if ranks == 1:
        found = cross_entropy_(**inputs, backend=backend)
        have = inputs["logits"]
    else:
        found, have = in_parts(ranks, backend, **inputs)
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3}[dtype]
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and have.dtype == dtype
    # beside 1: a loss near zero is the logarithm of a number near 1, which float32 rounds
    assert (found - losses).abs().max() < min(limit, 1e-6) * (1 + losses.max())
    assert relative_error(have, gradient) < limit


if not INTERPRETED:
    @pytest.mark.parametrize("backend", ["reference", "torch"])
    @pytest.mark.parametrize(("shape", "ranks"), [((1, 8), 1), ((7, 264), 1), ((7, 264), 4), ((33, 1000), 2)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_losses_and_gradient(shape, ranks, dtype, backend, monkeypatch):
        monkeypatch.setattr(torch_rows, "NUMBERS", 3000)  # several blocks of rows
        check(shape, dtype, ranks, backend)

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_without_weight_the_logits_stay(backend):
        inputs = make(5, 40, torch.float32)
        before = inputs["logits"].clone()
        losses = cross_entropy_(**{**inputs, "weight": None}, backend=backend)
        assert torch.equal(inputs["logits"], before) and relative_error(losses, expected(**inputs)[0]) < 1e-6

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_large_logits_do_not_overflow_and_rows_of_no_weight_do_not_spread_nan(backend):
        inputs = make(8, 16, torch.float32)
        inputs["logits"] += 1e4
        inputs["logits"][0] = float("nan")
        losses = cross_entropy_(**inputs, backend=backend)
        assert losses[0].isnan() and losses[1:].isfinite().all() and inputs["logits"].isfinite().all()

    def test_wrong_arguments_are_named():
        inputs = make(4, 8, torch.float32)
        with pytest.raises(KernelError, match="labels .* must be"):
            cross_entropy_(**{**inputs, "labels": inputs["labels"][:2]})
        with pytest.raises(KernelError, match="one piece of memory"):
            cross_entropy_(**{**inputs, "logits": inputs["logits"].t()})
else:
    @pytest.mark.parametrize(("shape", "ranks"), [((1, 8), 1), ((9, 264), 1), ((9, 264), 4), ((5, 9000), 1),
                                                  ((5, 9000), 2)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_triton(shape, ranks, dtype):
        check(shape, dtype, ranks, "triton")

    def test_triton_without_weight_and_with_rows_of_no_weight():
        inputs = make(8, 5000, torch.float32)
        before = inputs["logits"].clone()
        losses = cross_entropy_(**{**inputs, "weight": None}, backend="triton")
        assert torch.equal(inputs["logits"], before) and relative_error(losses, expected(**inputs)[0]) < 1e-6
        inputs["logits"] += 1e4
        inputs["logits"][0] = float("nan")
        losses = cross_entropy_(**inputs, backend="triton")
        assert losses[0].isnan() and losses[1:].isfinite().all() and inputs["logits"].isfinite().all()
