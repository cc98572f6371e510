"""Context ranks multiply states in float32, whatever the environment asks torch for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
from hola_megatron.parallel.groups import keep_float32
keep_float32()
print(torch.get_float32_matmul_precision())
"""


@pytest.mark.parametrize(("asked", "lines"), [("1", 1), ("0", 0)])
def test_a_container_that_asks_for_tf32_is_told(asked, lines):
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True,
                          env={**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": asked})
    assert done.stdout.strip() == "highest"
    said = [line for line in done.stderr.splitlines() if "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE" in line]
    assert len(said) == lines
