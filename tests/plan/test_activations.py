"""What a layer is said to keep, against the storages its autograd graph holds: the Triton functions, interpreted.

On one process, over tensor ranks and over context ranks. Only what the interpreter cannot be is left out: where
long sequences are split depends on the GPU.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "saved_bytes.py"
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
# those of every second make one process, those between them another: as much work for each
ALONE = [["model.pattern=H"], ["model.pattern=G"], ["model.pattern=A"], ["model.pattern=H", "model.decay=false"],
         ["model.pattern=A", "data.documents=joined"], ["model.pattern=H", "data.documents=joined"],
         ["model.pattern=H", "model.heads=1", "train.micro_batch_size=1"],
         ["model.pattern=A", "model.rope_theta=null"],
         ["model.pattern=H", "model.moe.experts=8", "model.moe.top_k=2", "model.moe.hidden_size=48"],
         ["model.pattern=A", "model.moe.experts=16", "model.moe.top_k=4", "model.moe.hidden_size=64"]]
TENSOR = [["parallel.tensor=2", "parallel.sequence=true", f"model.pattern={kind}"] for kind in "HA"]
CONTEXT = [["parallel.context=2", "train.micro_batch_size=1", f"model.pattern={kind}"] for kind in "HGA"]


Rows = list[dict[str, float]]


def saved(cases: list[list[str]], ranks: int) -> list[Rows]:
    """For every rank {"measured", "planned"} of every case."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return finished([begun(cases, {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks),
                                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}) for number in range(ranks)])


def begun(cases: list[list[str]], where: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(SCRIPT), *map(json.dumps, cases)], text=True,
                            env={**ENVIRONMENT, **where}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finished(programs: list[subprocess.Popen]) -> list[Rows]:
    said = [program.communicate(timeout=500)[0] for program in programs]
    assert not any(program.returncode for program in programs), "\n".join(text[-3000:] for text in said)
    results = [next(line for line in text.splitlines() if line.startswith("RESULT ")) for text in said]
    return [json.loads(result.removeprefix("RESULT ")) for result in results]


def check(cases: list[list[str]], rows: Rows) -> None:
    """Within 0.1 %: a few cut tables and scalars are not counted."""
    for case, row in zip(cases, rows, strict=True):
        assert row["planned"] == pytest.approx(row["measured"], rel=1e-3), case


def test_one_rank():
    pytest.importorskip("triton")
    halves = ALONE[::2], ALONE[1::2]
    for cases, rows in zip(halves, finished([begun(cases, {}) for cases in halves]), strict=True):
        check(cases, rows)


@pytest.fixture(scope="module")
def over_ranks() -> list[Rows]:
    """TENSOR and CONTEXT on two ranks."""
    pytest.importorskip("triton")
    return saved([*TENSOR, *CONTEXT], 2)


@pytest.mark.distributed
def test_over_tensor_ranks(over_ranks):
    check(TENSOR, over_ranks[0][:len(TENSOR)])


@pytest.mark.distributed
def test_over_context_ranks(over_ranks):
    """The last rank is the one to which others' tokens come; softmax attention there needs a mask, on a CPU."""
    first, last = (rows[len(TENSOR):] for rows in over_ranks)
    check(CONTEXT, [*last[:2], first[2]])
