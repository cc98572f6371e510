"""Rotary positions: backends against complex numbers in float64, the Triton kernel under the interpreter.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from inputs import relative_error
from interpreted import INTERPRETED
from torch import Tensor

from hola_kernels import KernelError, PackedDocuments
from hola_kernels.rotary import rotary_

# Triton's interpreter truncates bfloat16 instead of rounding
LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3}
SHAPES = [(1, 1, 1, 2), (2, 7, 3, 8), (3, 70, 9, 24), (1, 300, 2, 64)]
BOUNDS = (0, 0, 1, 64, 64, 165)
BASE = 100.0  # small, so that every angle turns within a few tokens


def make(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)


def by_complex_numbers(x: Tensor, bounds: tuple[int, ...] | None, before: int) -> Tensor:
    """(a + b i) e^(i angle), document by document."""
    bounds = bounds or (0, x.shape[1])
    position = torch.cat([torch.arange(b - a, dtype=torch.float64) for a, b in pairwise(bounds)])
    first = next(b for b in bounds if b)
    position[:first] += before
    half = x.shape[3] // 2
    angle = position[:, None] * BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x.double().chunk(2, -1)
    rotated = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([rotated.real, rotated.imag], -1)


def check(x: Tensor, backend: str, bounds: tuple[int, ...] | None = None, before: int = 0, room: bool = False) -> None:
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    expected = by_complex_numbers(exact, bounds, before)
    dy = make(*x.shape, dtype=x.dtype)
    want, = torch.autograd.grad(expected, exact, dy.double())
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    memory = torch.full((*x.shape[:3], x.shape[3] + 8), torch.nan, dtype=x.dtype)[..., 3:-5]
    given = leaf.clone()
    y = rotary_(x=given, base=BASE, cu_seqlens=cu_seqlens, before=before, backend=backend,
                dx_buffer=(lambda: memory) if room else None)
    untouched = dy.clone()
    found, = torch.autograd.grad(y, leaf, dy)
    assert y.dtype == found.dtype == x.dtype and torch.equal(dy, untouched)
    assert relative_error(y, expected) < LIMITS[x.dtype] and relative_error(found, want) < LIMITS[x.dtype]
    if backend != "reference":
        assert y.data_ptr() == given.data_ptr()  # in place
        if room:
            assert relative_error(memory, want) < LIMITS[x.dtype]


if not INTERPRETED:
    BACKENDS = ["reference", "torch"]

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_output_and_gradient(shape, dtype, backend):
        check(make(*shape, dtype=dtype), backend)
        check(make(*shape, dtype=dtype), backend, before=5, room=True)

    def test_a_micro_batch_makes_its_tables_once(monkeypatch):
        from hola_kernels import rotary

        made = []
        angles = rotary.angles
        monkeypatch.setattr(rotary, "angles", lambda *given: made.append(1) or angles(*given))
        for bounds in ([0, 100, 165], [0, 100, 165], [0, 20, 165]):
            documents = PackedDocuments(torch.tensor(bounds))
            for _ in range(3):  # layers
                rotary_(x=make(1, 165, 2, 8, dtype=torch.float32), base=10.0, cu_seqlens=documents)
        assert len(made) == 3
        for _ in range(3):
            rotary_(x=make(2, 61, 2, 8, dtype=torch.float32), base=11.0)
        assert len(made) == 4

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
    def test_the_cuts_stay_as_they_are(dtype):
        x, bounds = make(1, 10, 2, 8, dtype=torch.float32), torch.tensor([0, 4, 10], dtype=dtype)
        documents = PackedDocuments(bounds)
        first = rotary_(x=x.clone(), base=1e4, cu_seqlens=documents, before=3)
        assert bounds.tolist() == [0, 4, 10] and documents.host().tolist() == [0, 4, 10]
        assert torch.equal(rotary_(x=x.clone(), base=1e4, cu_seqlens=bounds, before=3), first)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_float64_of_far_positions_is_float64(backend):
        """Angles of float32 would be off by a hundredth at 100,000 tokens."""
        x = make(1, 3, 1, 8, dtype=torch.float64)
        y = rotary_(x=x.clone(), base=1e4, before=100_000, backend=backend)
        rotated = torch.complex(*x.chunk(2, -1)) * torch.polar(
            torch.ones(3, 1, 4, dtype=torch.float64), (torch.arange(3.0, dtype=torch.float64) + 100_000)[:, None, None]
            * 1e4 ** (-torch.arange(4, dtype=torch.float64) / 4))
        torch.testing.assert_close(y, torch.cat([rotated.real, rotated.imag], -1), rtol=1e-9, atol=1e-9)

    def test_bits_are_those_of_the_plain_formula():
        """Runs that began before there was a kernel go on with the same numbers."""
        for dtype in (torch.float32, torch.bfloat16):
            x = make(1, 165, 2, 16, dtype=dtype).requires_grad_()
            position = torch.cat([torch.arange(64), torch.arange(101)])
            frequency = 1e4 ** (-torch.arange(0, 16, 2, dtype=torch.float32) / 16)
            angle = position[:, None].float() * frequency
            cos, sin = angle.cos()[:, None], angle.sin()[:, None]
            a, b = x.float().chunk(2, -1)
            expected = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(dtype)
            y = rotary_(x=x.clone(), base=1e4, cu_seqlens=torch.tensor([0, 64, 165]), backend="torch")
            dy = make(*x.shape, dtype=dtype)
            assert torch.equal(y, expected)
            assert torch.equal(*(torch.autograd.grad(out, x, dy)[0] for out in (y, expected)))

    def test_wrong_arguments_are_named():
        x = torch.ones(1, 3, 2, 8)
        for given, message in (({"x": x[0]}, r"x \(3, 2, 8\) must be \[B, S, H, K\]"), ({"x": x[..., :3]}, "an even K"),
                            ({"x": x.long()}, "floating-point"), ({"base": 0}, "base = 0 must be"),
                            ({"before": -1}, "before = -1 must be"),
                            ({"x": x.expand(4, 3, 2, 8)}, "is updated in place"),
                            ({"cu_seqlens": torch.tensor([0, 2])}, "rising from 0 to T = 3")):
            with pytest.raises(KernelError, match=message):
                rotary_(**{"x": x, "base": 10.0, **given})
else:
    BACKENDS = ["triton"]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
    def test_triton(shape, dtype):
        check(make(*shape, dtype=dtype), "triton", before=5, room=True)

    def test_parts_of_a_projection_and_columns_apart():
        whole = make(2, 30, 5, 40, dtype=torch.float32)
        for x in (whole[..., 8:24], whole.transpose(0, 1)[..., :8], whole[..., ::2][..., :8]):
            want = by_complex_numbers(x, None, 0)
            assert relative_error(rotary_(x=x, base=BASE, backend="triton"), want) < 2e-6
            assert relative_error(x, want) < 2e-6

    def test_float64_is_refused():
        with pytest.raises(KernelError, match="do not take float64"):
            rotary_(x=make(1, 2, 1, 8, dtype=torch.float64), base=10.0, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("before", [0, 7])
def test_documents(before, backend):
    check(make(1, 165, 10, 8, dtype=torch.float32), backend, BOUNDS if not before else BOUNDS[1:], before, room=True)
