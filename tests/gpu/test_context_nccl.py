"""Context parallelism on NCCL with the Triton kernels against one rank on the same kernels: CP2, and CP4 on four GPUs.

Float32 within the contract; bfloat16 by its tolerances, which are against float64 and hold between two runs as well.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hola_kernels.backend import triton_problem

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
if GPUS < 2 or triton_problem("cuda"):
    pytest.skip(f"needs two CUDA devices and Triton, has {GPUS}", allow_module_level=True)

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent / "distributed"), str(HERE.parent / "kernels")]

from context_compare import check_memory, differences
from context_nccl_ranks import PRECISIONS, cases

WORLD = 4 if GPUS >= 4 else 2
SECONDS = float(os.environ.get("CONTEXT_NCCL_SECONDS", "400"))  # for all ranks to finish
EVERY = [(precision, ranks, name) for precision in PRECISIONS for name, case in cases(precision, 4).items()
         for ranks in [case.ranks]]
WITH_MEMORY = [entry for entry in EVERY if entry[2].endswith(("_plain", "_packed", "betav", "documents", "rows"))]
PLAIN = [entry for entry in EVERY if entry[2].endswith(("_plain", "_packed"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where every rank has stored what it got; all precisions at the same time, most of it is compiling kernels."""
    folder = tmp_path_factory.mktemp("nccl")
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TORCHDYNAMO_DISABLE": "1"}
    programs = [start(folder, precision, environment) for precision in PRECISIONS]
    deadline = time.monotonic() + SECONDS
    try:
        for program in programs:
            with contextlib.suppress(subprocess.TimeoutExpired):  # what is stored by then is looked at
                program.wait(max(deadline - time.monotonic(), 0.1))
    finally:  # also when this test's own time is over: nothing may stay on the GPUs
        for program in programs:
            end(program)
    return folder


def stored(folder: Path, precision: str, name: str) -> Any:
    """One result, or a failure with what went wrong."""
    path = folder / f"{precision}_{name}.pt"
    assert path.exists(), f"no {name}: {log_of(folder, precision).read_text()[-3000:]}"
    result = torch.load(path, weights_only=False)
    assert not (isinstance(result, dict) and "failed" in result), result["failed"]
    return result


def log_of(folder: Path, precision: str) -> Path:
    return folder / f"{precision}.log"


def start(folder: Path, precision: str, environment: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "hola_megatron.launch", "--nproc-per-node", str(WORLD),
               str(HERE / "context_nccl_ranks.py"), str(folder), precision]
    with log_of(folder, precision).open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)


def end(program: subprocess.Popen) -> None:
    """The launcher hands SIGTERM to its ranks, which die of it."""
    if program.poll() is None:
        program.terminate()
        try:
            program.wait(10)
        except subprocess.TimeoutExpired:
            program.kill()


def limit(precision: str, what: str) -> float:
    if precision == "fp32":
        return 1e-4 if what.startswith("d") else 1e-5
    return {"o": 0.005, "score": 0.005, "dq": 0.008, "dk": 0.008, "dv": 0.008, "dx": 0.008}.get(what, 0.02)


@pytest.mark.parametrize(("precision", "ranks", "name"), EVERY, ids=[f"{p}-{n}" for p, _, n in EVERY])
def test_ranks_together_equal_one_rank(precision, ranks, name, folder):
    if ranks > WORLD:
        pytest.skip(f"needs {ranks} GPUs, has {GPUS}")
    together = [stored(folder, precision, f"{name}_{rank}") for rank in range(ranks)]
    measured = differences(together, stored(folder, precision, f"{name}_alone"), cases(precision, WORLD)[name])
    print(precision, name, {what: f"{error:.1e}" for what, error in measured.items()})
    too_far = {what: error for what, error in measured.items() if not error <= limit(precision, what)}
    assert not too_far, measured


@pytest.mark.parametrize(("precision", "ranks", "name"), WITH_MEMORY, ids=[f"{p}-{n}" for p, _, n in WITH_MEMORY])
def test_the_cached_tokens_entering_a_rank_are_those_of_one_rank(precision, ranks, name, folder):
    if ranks > WORLD:
        pytest.skip(f"needs {ranks} GPUs, has {GPUS}")
    for rank in range(ranks):
        found = stored(folder, precision, f"{name}_{rank}")
        have, want = found["memory"], found["want_memory"]
        if precision == "fp32":
            check_memory(have, want, 1e-5)
        else:
            check_overlap(have, want)


def check_overlap(have, want) -> None:
    """Rounded scores may choose otherwise, but only among tokens within rounding of the worst that is kept."""
    assert torch.equal(have.length, want.length)
    for kept, other, score in zip(have.cache_position.flatten(0, 1), want.cache_position.flatten(0, 1),
                                  have.cache_score.flatten(0, 1), strict=True):
        odd = ~torch.isin(kept, other)
        assert int(odd.sum()) <= 2
        assert (score[odd] <= 1.01 * score[score.isfinite()].min()).all() if odd.any() else True


@pytest.mark.parametrize("precision", PRECISIONS)
def test_messages_do_not_grow_with_the_sequence(precision, folder):
    size = PRECISIONS[precision][0].itemsize
    width, heads, block, slots = PRECISIONS[precision][1], 2, 256, 64
    names = [f"cp{WORLD}_{name}" for name in ("plain", "packed", "short_documents")]
    for rank in range(WORLD):
        found = [stored(folder, precision, f"{name}_{rank}") for name in names]
        assert all(other[way] == found[0][way] for other in found[1:] for way in ("forward", "backward"))
    middle = stored(folder, precision, f"{names[0]}_1")
    sizes = [(s.kind, s.what, s.payload) for way in ("forward", "backward") for s in middle[way]]
    last = WORLD == 2  # rank 1 is the last of two: nobody to the right of it
    assert sizes == [
        ("all-gather", "state maps", 4 * heads * width * 2 * width),
        ("shift", "open block", 0 if last else (block - 1) * heads * (size * 2 * width + 4)),
        ("all-gather", "cache shards", heads * slots * (size * 2 * width + 8)),
        ("all-gather", "state gradients", 4 * heads * width * width),
        ("reduce-scatter", "cache shard gradients", 4 * WORLD * heads * slots * 2 * width),
        ("shift", "open block gradients", size * (block - 1) * heads * 2 * width)]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_layer_does_not_wait_for_the_device(precision, folder):
    assert [stored(folder, precision, f"waits_{rank}") for rank in range(WORLD)] == [None] * WORLD
