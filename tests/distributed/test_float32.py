"""Context ranks multiply states in float32, whatever the environment asks torch for; others as it asks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import log_of, run_on_ranks
from helpers import ROOT

pytestmark = pytest.mark.distributed
WARNED = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"


def start_with_tf32(rank: int, ranks: int, folder: Path) -> None:
    from hola_megatron.config import load_recipe
    from hola_megatron.startup.start import start, stop

    torch.set_float32_matmul_precision("high")
    start(load_recipe(ROOT / "recipes/hola_tiny.yaml", [f"parallel.context={ranks}"]))
    assert torch.get_float32_matmul_precision() == ("highest" if ranks > 1 else "high")
    stop()


@pytest.mark.parametrize("ranks", [1, 2])
def test_only_context_ranks_overrule_it_and_one_of_them_says_so(ranks, tmp_path):
    run_on_ranks(start_with_tf32, ranks, tmp_path)
    said = [log_of(tmp_path, ranks, rank).read_text().count(WARNED) for rank in range(ranks)]
    assert said == ([1, 0] if ranks > 1 else [0])


def test_that_is_what_the_variable_does():
    done = subprocess.run([sys.executable, "-c", "import torch; print(torch.get_float32_matmul_precision())"],
                          capture_output=True, text=True, timeout=120, check=True, env={**os.environ, WARNED: "1"})
    assert done.stdout.strip() == "high"
