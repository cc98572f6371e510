"""Every kernel of a call compiles for Hopper, without a GPU, fits its shared memory, spills few registers, and leaves
alone those that a running product reads."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "compile_for_hopper.py"
SHARED = 227 * 1024  # bytes a program may have on compute capability 9.0
SPILLED = 600        # bytes of stack a thread: 560 today, of the sums over all blocks that hold a token


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("operation", "dtype", "width", "kernels"), [
    ("attention", "bfloat16", 128, 17), ("long", "bfloat16", 256, 24), ("ranks", "bfloat16", 128, 15),
    ("step", "bfloat16", 256, 4), ("around", "bfloat16", 256, 14)])
def test_compiles_for_hopper(operation, dtype, width, kernels, tmp_path):
    asked = json.dumps({"operation": operation, "dtype": dtype, "width": width})
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(PROGRAM), asked], capture_output=True, text=True, timeout=400,
                          check=False, env={**environment, "TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= kernels, found
    assert all(needs["shared"] <= SHARED and needs["stack"] <= SPILLED for needs in found.values()), found
    products = sum(needs["register products"] for needs in found.values())
    assert products or operation in ("step", "around"), "no product was found in the machine code"
    assert not {name: needs["overwritten"] for name, needs in found.items() if needs["overwritten"]}
