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
from helpers import LONG

SCRIPT = Path(__file__).parent / "saved_bytes.py"
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
HQLT_CHUNK = ["model.hqlt.blend=delayed_chunk", "model.hqlt.mixing=sum"]
ALONE = [["model.pattern=H"], ["model.pattern=G"], ["model.pattern=A"], ["model.pattern=H", "model.rule=delta"],
         ["model.pattern=H", "model.rule=none", "model.cache.score=recency"],
         ["model.pattern=H", "model.rule=none", "model.cache.slots=0", "data.documents=joined"],
         ["model.pattern=A", "data.documents=joined"], ["model.pattern=H", "data.documents=joined"],
         ["model.pattern=H", "model.heads=1", "train.micro_batch_size=1"],
         ["model.pattern=A", "model.rope_theta=null"],
         ["model.pattern=A", "model.attention_kv_heads=2"],
         ["model.pattern=A", "model.attention_qk_norm=true", "data.documents=joined"],
         ["model.pattern=W", "model.attention_kv_heads=2", "model.attention_qk_norm=true"],
         ["model.pattern=ham"], ["model.pattern=ham", "data.documents=joined"],
         ["model.pattern=ham", "model.ham.router=cosine"],
         ["model.pattern=H", "model.cache.merge=two"], ["model.pattern=H", "model.cache.merge=convex"],
         ["model.pattern=H", "model.cache.merge=convex", "data.documents=joined"],
         ["model.pattern=H", "model.cache.read_norm=none"],
         *(["model.pattern=hqlt", "train.precision=bf16", *words] for words in (
             [], ["data.documents=joined"], ["model.hqlt.mixing=sum"], ["model.hqlt.mixing=scalar"], HQLT_CHUNK,
             ["model.hqlt.blend=delayed_stream", "model.hqlt.mixing=sum", "data.documents=joined"],
             ["model.hqlt.blend=delayed_chunk", "data.documents=joined"])),
         ["model.pattern=H", "model.moe.experts=8", "model.moe.top_k=2", "model.moe.hidden_size=48"],
         ["model.pattern=A", "model.moe.experts=16", "model.moe.top_k=4", "model.moe.hidden_size=64"]]
TENSOR = [["parallel.tensor=2", "parallel.sequence=true", f"model.pattern={kind}"] for kind in "HA"]
SHOWN = (["model.rule=none", "model.cache.score=recency"], ["data.documents=joined"],
         ["train.precision=bf16", "data.documents=joined"], ["train.precision=bf16", *HQLT_CHUNK],
         ["model.moe.experts=16", "model.moe.top_k=4", "model.moe.hidden_size=64"])
CONTEXT = [["parallel.context=2", "train.micro_batch_size=1", f"model.pattern={kind}"] for kind in "HGA"]
if not LONG:  # a kind of layer each, with joined documents and with experts
    ALONE = [case for case in ALONE if len(case) == 1 or case[1:] in SHOWN]
    TENSOR = TENSOR[:1]
    CONTEXT = CONTEXT[:2]
# one process has those of every second, another those between them: as much work for each
HALVES = [ALONE[::2], ALONE[1::2]]
RANKS = 2
Rows = list[dict[str, float]]


@pytest.fixture(scope="module")
def saved() -> list[Rows]:
    """{"measured", "planned"} of every case of: each half of ALONE; TENSOR and CONTEXT on each rank."""
    pytest.importorskip("triton")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    jobs = [{"cases": half, "where": {}} for half in HALVES]
    jobs += [{"cases": [*TENSOR, *CONTEXT], "where": {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port)}} for rank in range(RANKS)]
    done = subprocess.run([sys.executable, str(SCRIPT), *map(json.dumps, jobs)], text=True, env=ENVIRONMENT,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    result = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(result.removeprefix("RESULT "))


def check(cases: list[list[str]], rows: Rows) -> None:
    """Within 0.1 %: a few cut tables and scalars are not counted."""
    for case, row in zip(cases, rows, strict=True):
        assert row["planned"] == pytest.approx(row["measured"], rel=1e-3), case


def test_one_rank(saved):
    for cases, rows in zip(HALVES, saved[:-RANKS], strict=True):
        check(cases, rows)


@pytest.mark.distributed
def test_over_tensor_ranks(saved):
    check(TENSOR, saved[-RANKS][:len(TENSOR)])


@pytest.mark.distributed
def test_over_context_ranks(saved):
    """The last rank is the one to which others' tokens come; softmax attention there needs a mask, on a CPU."""
    first, last = (rows[len(TENSOR):] for rows in saved[-RANKS:])
    check(CONTEXT, [*last[:2], *first[2:]])
