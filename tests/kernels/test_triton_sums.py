"""Sums over parts under Triton's interpreter, in a process of its own: chosen before triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:
    def test_under_the_interpreter():
        pytest.importorskip("triton")
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", __file__],
                              env=environment, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
else:
    from hola_kernels.triton_sums import sum_parts

    @pytest.mark.parametrize("parts", [1, 3, 512, 513, 1056])
    @pytest.mark.parametrize("shape", [(1,), (2, 4), (96,), (520, 3), (9001,)], ids=str)
    def test_every_part_counts_once(shape, parts):
        """Of whole numbers, whose sums are exact."""
        x = torch.randint(-50, 50, (parts, *shape), generator=torch.Generator().manual_seed(2)).float()
        found = sum_parts(x, torch.float32)
        assert found.dtype == torch.float32 and torch.equal(found, x.sum(0))

    def test_the_sum_is_made_in_float32():
        assert sum_parts(torch.full((1000, 2), 1.0), torch.float16).tolist() == [1000.0, 1000.0]
        assert sum_parts(torch.full((4096, 2), 1.0), torch.float16).tolist() == [4096.0, 4096.0]  # in 16 bits: 2048
