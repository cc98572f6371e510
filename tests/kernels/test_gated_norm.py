"""The gated output norm: backends against the definition, and the definition against its parts."""

from __future__ import annotations

import pytest
import torch
from inputs import relative_error

from hola_kernels import KernelError, gated_rms_norm


def make(*shape, dtype=torch.float64):
    g = torch.Generator().manual_seed(7)
    made = {"x": torch.randn(*shape, generator=g, dtype=torch.float64) * 3,
            "gate": torch.randn(*shape, generator=g, dtype=torch.float64) * 2,
            "weight": 1 + 0.3 * torch.randn(shape[-1], generator=g, dtype=torch.float64)}
    return {n: x.to(dtype).requires_grad_() for n, x in made.items()}


def gradients(y, inputs):
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.autograd.grad((y * weight.to(y)).sum(), list(inputs.values()))


@pytest.mark.parametrize("shape", [(1, 8), (2, 5, 3, 16), (0, 8)], ids=str)
def test_float64_matches_the_definition(shape):
    inputs = make(*shape)
    expected, found = (gated_rms_norm(**inputs, backend=b) for b in ("reference", "torch"))
    assert found.shape == shape and relative_error(found, expected) < 1e-12
    for a, b in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        assert relative_error(a, b) < 1e-12


def test_rows_have_unit_mean_square_before_weight_and_gate():
    x = make(4, 64)["x"]
    gate = torch.full_like(x, 2.0)
    y = gated_rms_norm(x=x, gate=gate, weight=torch.ones(64, dtype=torch.float64), eps=0.0, backend="reference")
    assert torch.allclose(y.square().mean(-1), torch.nn.functional.silu(gate[:, 0]).square())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_inputs_are_computed_in_float32(dtype):
    narrow = make(7, 32, dtype=dtype)
    expected = gated_rms_norm(**{n: x.detach().double() for n, x in narrow.items()}, backend="reference")
    found = gated_rms_norm(**narrow, backend="torch")
    assert found.dtype == dtype and relative_error(found, expected) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_wrong_arguments_are_named():
    inputs = make(3, 8)
    with pytest.raises(KernelError, match="x .* and gate .* must have the same shape"):
        gated_rms_norm(**{**inputs, "gate": inputs["gate"][:2]})
    with pytest.raises(KernelError, match="weight .* must be"):
        gated_rms_norm(**{**inputs, "weight": inputs["weight"][:4]})
