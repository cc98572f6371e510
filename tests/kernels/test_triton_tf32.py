"""Rounding to what a tf32 product keeps, under Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    def test_under_the_interpreter(interpreted):
        interpreted(__file__)
else:
    import triton
    import triton.language as tl

    from hola_kernels.triton_tf32 import nearest_tf32

    @triton.jit
    def _round_kernel(x, y, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(y + at, nearest_tf32(tl.load(x + at)))

    def rounded(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        _round_kernel[(1,)](x, y, N=x.numel())
        return y

    def test_ten_bits_of_mantissa_stay_and_the_nearest_number_is_taken():
        x = torch.randn(1024, generator=torch.Generator().manual_seed(0)) * 1e3
        y = rounded(x)
        assert not (y.view(torch.int32) & 0x1FFF).any()
        assert torch.equal(rounded(y), y)
        mantissa, exponent = torch.frexp(x.double())
        assert torch.equal(y.double(), torch.ldexp((mantissa * 2**11).round(), exponent - 11))

    @pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001])
    def test_what_is_no_number_stays_none(bits):
        assert rounded(torch.tensor([bits] * 4, dtype=torch.int32).view(torch.float32)).isnan().all()

    def test_zeros_and_infinities_stay():
        x = torch.tensor([0.0, -0.0, float("inf"), float("-inf")])
        assert torch.equal(rounded(x), x)
