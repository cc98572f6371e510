"""Sums over parts under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from interpreted import only_interpreted

only_interpreted()

from hola_kernels import triton_sums
from hola_kernels.triton_sums import sum_parts


@pytest.mark.parametrize("parts", [1, 3, 512, 513, 1056])
@pytest.mark.parametrize("shape", [(1,), (2, 4), (96,)], ids=str)
def test_every_part_counts_once(shape, parts):
    """Of whole numbers, whose sums are exact."""
    check(parts, shape)


@pytest.mark.parametrize("parts", [1, 3, 255, 256, 513])
@pytest.mark.parametrize("shape", [(13, 3), (101,)], ids=str)
def test_strips_of_more_columns(shape, parts, monkeypatch):
    """16 and 32 of them, the last strip not full, and tiles of 256 and 128 parts."""
    monkeypatch.setattr(triton_sums, "PROGRAMS", 4)
    check(parts, shape)


def test_as_many_programs_as_a_gpu_has():
    check(2, (9001,))


def check(parts, shape):
    x = torch.randint(-50, 50, (parts, *shape), generator=torch.Generator().manual_seed(2)).float()
    found = sum_parts(x, torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, x.sum(0))


def test_the_sum_is_made_in_float32():
    assert sum_parts(torch.full((1000, 2), 1.0), torch.float16).tolist() == [1000.0, 1000.0]
    assert sum_parts(torch.full((4096, 2), 1.0), torch.float16).tolist() == [4096.0, 4096.0]  # in 16 bits: 2048
