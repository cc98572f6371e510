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
import torch

from hola_kernels.kept_attention.tiles import NEEDED as KEPT_NEEDED
from hola_kernels.shared_memory import NEEDED, refusal_for

PROGRAM = Path(__file__).parent / "compile_for_hopper.py"
SHARED = 227 * 1024  # bytes a program may have on compute capability 9.0
SPILLED = 600        # bytes of stack a thread: 392 today, of the sums over all blocks that hold a token
# 856 today: the step of a document's last, partial chunk, outside of the pipelined loop (104 in the loop)
SPILLED_BY = {"_backward_kernel": 900}


def compiled(folder, **request):
    """What compile_for_hopper prints of this call."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(PROGRAM), json.dumps(request)], capture_output=True, text=True,
                          timeout=580, check=False, env={**environment, "TRITON_CACHE_DIR": str(folder)})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.parametrize(("operation", "dtype", "width", "kernels"), [
    ("attention", "bfloat16", 64, 17), pytest.param("attention", "bfloat16", 128, 17, marks=pytest.mark.long),
    *(pytest.param("windows", "bfloat16", width, 20, marks=pytest.mark.long) for width in (64, 128, 256)),
    pytest.param("long", "bfloat16", 256, 24, marks=pytest.mark.long),
    pytest.param("ranks", "bfloat16", 128, 15, marks=pytest.mark.long), ("step", "bfloat16", 32, 4),
    pytest.param("step", "bfloat16", 256, 4, marks=pytest.mark.long),
    ("kept", "bfloat16", 128, 5), pytest.param("kept", "bfloat16", 256, 5, marks=pytest.mark.long),
    pytest.param("around", "bfloat16", 256, 15, marks=pytest.mark.long)])
def test_compiles_for_hopper(operation, dtype, width, kernels, tmp_path):
    found = compiled(tmp_path, operation=operation, dtype=dtype, width=width)
    assert len(found) >= kernels, found
    assert all(needs["shared"] <= SHARED for needs in found.values()), found
    assert not {name: needs["stack"] for name, needs in found.items()
                if needs["stack"] > SPILLED_BY.get(name.split()[0], SPILLED)}
    if operation in ("attention", "windows", "long"):
        assert max(needs["shared"] for needs in found.values()) <= NEEDED["9.0"][True, width]
    if operation == "kept":
        assert max(needs["shared"] for needs in found.values()) <= KEPT_NEEDED[True, width]
    products = sum(needs["register products"] for needs in found.values())
    assert products or operation in ("step", "around"), "no product was found in the machine code"
    assert not {name: needs["overwritten"] for name, needs in found.items() if needs["overwritten"]}


@needs_triton
@pytest.mark.long
@pytest.mark.parametrize(("capability", "dtype", "width"), [
    (80, "bfloat16", 256), (80, "bfloat16", 128), (86, "bfloat16", 256), (86, "bfloat16", 128), (120, "bfloat16", 256),
    (120, "bfloat16", 128)])
def test_compiles_for_other_gpus(capability, dtype, width, tmp_path):
    """In the tiles of their shared memory, of which the refusals know the need."""
    found = compiled(tmp_path, operation="long", dtype=dtype, width=width, capability=capability)
    most = max(needs["shared"] for needs in found.values())
    assert most <= NEEDED[f"{capability // 10}.{capability % 10}"][dtype == "bfloat16", width]


@needs_triton
def test_many_tokens_and_sequences_fit_the_grid(tmp_path):
    """Only a grid's first axis has room for more than 65,535 programs."""
    assert max(compiled(tmp_path, operation="far", dtype="bfloat16", width=32)["axes"]) <= 65_535


@pytest.mark.parametrize(("capability", "has", "taken"), [
    (9, 232_448, (64, 128, 256)), (8, 166_912, (64, 128, 256)), (8, 101_376, (64,)), (12, 101_376, (64,))],
    ids=["H100", "A100", "A10 L4 L40S 3090 4090", "5090"])
def test_widths_that_do_not_fit_a_gpu_are_refused_by_name(capability, has, taken):
    for width in (16, 64, 128, 256):
        assert refusal_for(capability, "this GPU", has, torch.bfloat16, width, 64) is None
        refusal = refusal_for(capability, "this GPU", has, torch.float32, width, 64)
        assert (refusal is None) == (max(width, 64) in taken)
        assert refusal is None or (f"K = {width} and V = 64 in float32 need" in refusal and f"has {has:,}" in refusal)


def test_gpus_for_which_triton_does_not_compile_are_refused_by_name():
    refusal = refusal_for(10, "B200", 232_448, torch.bfloat16, 64, 64)
    assert refusal.startswith("B200 has compute capability 10.x") and "does not compile" in refusal
