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
ALONE = [["model.pattern=H"], ["model.pattern=G"], ["model.pattern=A"], ["model.pattern=H", "model.decay=false"],
         ["model.pattern=H", "data.documents=joined"], ["model.pattern=A", "data.documents=joined"],
         ["model.pattern=H", "model.heads=1", "train.micro_batch_size=1"],
         ["model.pattern=A", "model.rope_theta=null"],
         ["model.pattern=H", "model.moe.experts=8", "model.moe.top_k=2", "model.moe.hidden_size=48"],
         ["model.pattern=A", "model.moe.experts=16", "model.moe.top_k=4", "model.moe.hidden_size=64"]]


def saved(cases: list[list[str]], ranks: int, rank: int) -> list[dict[str, float]]:
    """{"measured", "planned"} of every case, on one rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    programs = []
    for number in range(ranks):
        where = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost",
                 "MASTER_PORT": str(port)} if ranks > 1 else {}
        programs.append(subprocess.Popen(
            [sys.executable, str(SCRIPT), *map(json.dumps, cases)], text=True, env={**ENVIRONMENT, **where},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    said = [program.communicate(timeout=500)[0] for program in programs]
    assert [program.returncode for program in programs] == [0] * ranks, "\n".join(text[-3000:] for text in said)
    result = next(line for line in said[rank].splitlines() if line.startswith("RESULT "))
    return json.loads(result.removeprefix("RESULT "))


def check(cases: list[list[str]], ranks: int = 1, rank: int = 0) -> None:
    """Within 0.1 %: a few cut tables and scalars are not counted."""
    pytest.importorskip("triton")
    for case, row in zip(cases, saved(cases, ranks, rank), strict=True):
        assert row["planned"] == pytest.approx(row["measured"], rel=1e-3), case


def test_one_rank():
    check(ALONE)


@pytest.mark.distributed
def test_over_tensor_ranks():
    check([["parallel.tensor=2", "parallel.sequence=true", f"model.pattern={kind}"] for kind in "HA"], ranks=2)


@pytest.mark.distributed
def test_over_context_ranks():
    """The last rank is the one to which others' tokens come; softmax attention there needs a mask, on a CPU."""
    cases = {kind: ["parallel.context=2", "train.micro_batch_size=1", f"model.pattern={kind}"] for kind in "HGA"}
    check([cases["H"], cases["G"]], ranks=2, rank=1)
    check([cases["A"]], ranks=2)
