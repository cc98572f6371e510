"""The short convolution: backends against the definition, documents against each alone, pieces against the whole."""

from __future__ import annotations

import pytest
import torch
from inputs import relative_error

from hola_kernels import KernelError, short_conv, short_conv_step

BACKENDS = ["reference", "torch"]
CU_SEQLENS = [0, 0, 1, 3, 40, 40, 77]


def make(batch, length, *, channels=6, width=4, sequences=None, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    shapes = {"x": (batch, length, channels), "weight": (channels, width),
              "tail": (sequences or batch, width - 1, channels)}
    return {n: torch.randn(*s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for n, s in shapes.items()}


def gradients(outputs, inputs):
    g = torch.Generator().manual_seed(5)
    loss = sum((o * torch.randn(o.shape, generator=g, dtype=torch.float64).to(o)).sum() for o in outputs)
    return torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)


def compare(inputs, tolerance, **options):
    expected = short_conv(**inputs, return_tail=True, backend="reference", **options)
    found = short_conv(**inputs, return_tail=True, backend="torch", **options)
    pairs = [*zip(found, expected, strict=True),
             *zip(gradients(found, inputs), gradients(expected, inputs), strict=True)]
    assert max(relative_error(a, b) for a, b in pairs if b.numel()) < tolerance


@pytest.mark.parametrize("length", [1, 2, 3, 4, 65])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_float64_matches_the_definition(length, width):
    compare(make(2, length, width=width), 1e-12)


def test_packed_float64_matches_the_definition():
    cu_seqlens = torch.tensor(CU_SEQLENS, dtype=torch.int32)
    compare(make(1, CU_SEQLENS[-1], sequences=len(CU_SEQLENS) - 1), 1e-12, cu_seqlens=cu_seqlens)


def test_the_definition_is_a_causal_convolution():
    inputs = {n: x.detach() for n, x in make(2, 9).items()}
    joined = torch.cat([inputs["tail"], inputs["x"]], 1).transpose(1, 2)
    expected = torch.nn.functional.silu(torch.conv1d(joined, inputs["weight"][:, None], groups=6)).transpose(1, 2)
    assert relative_error(short_conv(**inputs, backend="reference"), expected) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_packing_equals_running_each_document_alone(backend):
    inputs = make(1, CU_SEQLENS[-1])
    del inputs["tail"]
    packed = short_conv(**inputs, cu_seqlens=torch.tensor(CU_SEQLENS), backend=backend)
    alone = torch.cat([short_conv(x=inputs["x"][:, a:b], weight=inputs["weight"], backend=backend)
                       for a, b in zip(CU_SEQLENS[:-1], CU_SEQLENS[1:], strict=True)], 1)
    assert relative_error(packed, alone) < 1e-12
    for a, b in zip(gradients([packed], inputs), gradients([alone], inputs), strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_with_tails_equal_the_whole(backend):
    inputs = make(2, 20)
    whole = short_conv(**inputs, return_tail=True, backend=backend)
    tail, pieces = inputs["tail"], []
    for start, end in ((0, 1), (1, 3), (3, 3), (3, 15), (15, 20)):
        y, tail = short_conv(x=inputs["x"][:, start:end], weight=inputs["weight"], tail=tail, return_tail=True,
                             backend=backend)
        pieces.append(y)
    found = (torch.cat(pieces, 1), tail)
    for a, b in zip(found, whole, strict=True):
        assert relative_error(a, b) < 1e-12
    for a, b in zip(gradients(found, inputs), gradients(whole, inputs), strict=True):
        assert relative_error(a, b) < 1e-12


def test_steps_equal_the_full_pass():
    inputs = {n: x.detach() for n, x in make(3, 12).items()}
    whole, after = short_conv(**inputs, return_tail=True, backend="torch")
    tail = inputs["tail"].clone()
    for t in range(12):
        y = short_conv_step(x=inputs["x"][:, t], weight=inputs["weight"], tail=tail)
        assert relative_error(y, whole[:, t]) < 1e-12
    assert torch.equal(tail, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_16_bit_inputs_are_computed_in_float32(dtype):
    inputs = make(2, 33, dtype=dtype)
    exact = {n: x.detach().double() for n, x in inputs.items()}
    found = short_conv(**inputs, backend="torch")
    assert found.dtype == dtype
    expected = short_conv(**exact, backend="reference")
    assert relative_error(found, expected) < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sections_are_parts_of_the_whole(backend):
    inputs = make(2, 9)
    whole = short_conv(**inputs, backend=backend)
    sections = short_conv(**inputs, widths=(1, 3, 2), backend=backend)
    assert torch.equal(torch.cat(sections, -1), whole) and all(y.is_contiguous() for y in sections)
    for a, b in zip(gradients([torch.cat(sections, -1)], inputs), gradients([whole], inputs), strict=True):
        assert relative_error(a, b) < 1e-12


def test_wrong_arguments_are_named():
    inputs = {n: x.detach() for n, x in make(2, 5).items()}
    with pytest.raises(KernelError, match="weight .* must be"):
        short_conv(**{**inputs, "weight": inputs["weight"][:3]})
    with pytest.raises(KernelError, match="tail .* must be"):
        short_conv(**{**inputs, "tail": inputs["tail"][:1]})
    with pytest.raises(KernelError, match="x .* must be"):
        short_conv(x=inputs["x"][0], weight=inputs["weight"])
    with pytest.raises(KernelError, match="widths .* must be positive and add up"):
        short_conv(**inputs, widths=(2, 2))
    with pytest.raises(KernelError, match="cu_seqlens needs B = 1"):
        short_conv(**inputs, cu_seqlens=torch.tensor([0, 10]))
