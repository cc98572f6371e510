"""The exact read, the short convolution and the gated norm on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch

from hola_kernels import gated_rms_norm, short_conv
from hola_kernels.exact_cache import verify_cases

CASES = dict(verify_cases.cases())


@pytest.mark.parametrize("name", CASES)
def test_exact_read(name):
    errors = CASES[name]()
    wrong = {output: error for output, error in errors.items() if not error < verify_cases.limit(name, output)}
    assert errors and not wrong


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("cuts", [None, [0, 0, 1, 3, 64, 129, 600]])
def test_short_convolution(cuts, dtype, tolerance):
    sequences = 2 if cuts is None else len(cuts) - 1
    shape = (2, 300, 520) if cuts is None else (1, cuts[-1], 520)
    shapes = {"x": shape, "weight": (520, 4), "tail": (sequences, 3, 520)}
    narrow = {n: torch.randn(*s, device="cuda").to(dtype).requires_grad_() for n, s in shapes.items()}
    options = {} if cuts is None else {"cu_seqlens": torch.tensor(cuts, device="cuda")}
    compare(lambda inputs, backend: short_conv(**inputs, **options, return_tail=True, backend=backend), narrow,
            tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("width", [64, 96, 256])
def test_gated_norm(width, dtype, tolerance):
    shapes = {"x": (3, 700, width), "gate": (3, 700, width), "weight": (width,)}
    narrow = {n: torch.randn(*s, device="cuda").to(dtype).requires_grad_() for n, s in shapes.items()}
    compare(lambda inputs, backend: (gated_rms_norm(**inputs, backend=backend),), narrow, tolerance)


def compare(operation, narrow, tolerance):
    wide = {n: x.detach().double().requires_grad_() for n, x in narrow.items()}
    with verify_cases.poisoned():
        found = operation(narrow, "triton")
        weights = [torch.randn_like(o) for o in found]
        have = torch.autograd.grad(found, list(narrow.values()), weights)
    expected = operation(wide, "torch")
    want = torch.autograd.grad(expected, list(wide.values()), [w.double() for w in weights])
    assert all(verify_cases.relative_error(a, b) < tolerance
               for a, b in zip((*found, *have), (*expected, *want), strict=True))
