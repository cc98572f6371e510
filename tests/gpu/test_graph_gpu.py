"""A training step as one CUDA graph: bit for bit the same steps as without capturing them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent

# the same program with and without a graph; `plain` runs on the graph's fixed tensors, captures nothing
PROGRAM = """
import hola_megatron.quiet
import json, sys, torch
from hola_megatron import config
from hola_megatron.config import build_recipe
from hola_megatron.data.stream import Batch
from hola_megatron.engine import step_graph
from hola_megatron.engine.base import build_engine
from hola_megatron.parallel.groups import start, stop

def main():
    config.GRAPH_RANKS = 2  # users are held to what these tests have shown
    recipe, how = build_recipe(json.loads(sys.argv[1])), sys.argv[2]
    if how == "plain":
        step_graph.WARM_STEPS = 10**9
    layout = start(recipe)
    engine = build_engine(recipe, layout)
    if how == "eager":
        engine.leave_graph()
    captured, capture = [], step_graph.StepGraph._capture
    step_graph.StepGraph._capture = lambda self: (captured.append(step), capture(self))
    generator = torch.Generator().manual_seed(5 + layout.data_rank)
    rows = []
    for step in range(recipe.train.steps):
        batches = []
        for _ in range(2):
            tokens = torch.randint(0, 264, (4, 513), generator=generator)
            inner = torch.randperm(2047, generator=generator)[: 40 if step == 6 else step % 4] + 1
            cuts = torch.cat([torch.tensor([0, 512, 1024, 1536, 2048]), inner]).unique().to(torch.int32)
            batches.append(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(4, 512),
                                 cuts if recipe.data.documents == "separate" else None))
        result = engine.train_step(batches, 1e-3, judge=lambda loss, norm: "refused" if step == 4 else None)
        rows.append([result.loss, result.grad_norm])
        if step == 5:
            total, tokens = engine.evaluate(batches[:1])
            rows.append([total / tokens, engine.work_seconds > 0])
    if layout.is_main:
        print("ROWS " + json.dumps([rows, captured]), flush=True)
    stop()

if __name__ == "__main__":
    main()
"""

RECIPE = {
    "name": "gpu",
    "model": {"layers": 3, "hidden_size": 128, "pattern": "HGH", "heads": 2, "key_dim": 64, "value_dim": 64,
              "attention_heads": 2, "mlp_hidden_size": 256, "vocab_size": 264, "cache": {"block": 256, "slots": 64}},
    "data": {"train": "unused", "tokenizer": "bytes"},
    "train": {"sequence_length": 512, "global_batch_size": 8, "micro_batch_size": 4, "steps": 10,
              "learning_rate": 1e-3, "precision": "bf16", "cuda_graph": True},
}


def run(how: str, ranks: int = 1, **changes: dict) -> tuple[list[list[float]], list[int]]:
    values = json.loads(json.dumps(RECIPE))
    for key, change in changes.items():
        values[key] = values.get(key, {}) | change
    program = [sys.executable, "-c", PROGRAM]
    if ranks > 1:
        launch = [sys.executable, "-m", "hola_megatron.launch", "--nproc-per-node", str(ranks), "--no-python"]
        program = [*launch, *program]
    done = subprocess.run([*program, json.dumps(values), how], capture_output=True, text=True, cwd=ROOT, check=False,
                          timeout=240, env={**os.environ, "TORCHDYNAMO_DISABLE": "1"})
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    rows, captured = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("ROWS "))[5:])
    return rows, captured


CASES = {"packed": {}, "joined": {"data": {"documents": "joined"}}, "recomputed": {"train": {"recompute": "full"}},
         "local": {"model": {"layer_spec": "local"}}}


@pytest.mark.parametrize("case", CASES)
def test_a_captured_step_is_the_step(case):
    """Captured anew where documents need more room (step 6); a refused step (4) changes nothing in either."""
    if case == "recomputed":
        pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")
    want, _ = run("plain", **CASES[case])
    have, captured = run("graph", **CASES[case])
    assert have == want
    assert captured == ([2] if case == "joined" else [2, 6])


def test_attention_layers():
    """Flash attention's backward pass does not give the same bits twice."""
    changes = {"data": {"documents": "joined"}, "model": {"pattern": "HA"}}
    for want, have in zip(run("plain", **changes)[0], run("graph", **changes)[0], strict=True):
        assert have == pytest.approx(want, rel=1e-5)


def test_it_is_near_a_step_without_one():
    """Chunks that are none leave no trace; sums over blocks are in another order."""
    for want, have in zip(run("eager")[0], run("graph")[0], strict=True):
        assert have == pytest.approx(want, rel=2e-3)


@pytest.mark.parametrize("parallel", [
    {"tensor": 2, "sequence": True}, {}, {"distributed_optimizer": False}, {"overlap": False}], ids=str)
def test_two_gpus(parallel):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    changes = {"parallel": parallel, "train": {"global_batch_size": 8 if "tensor" in parallel else 16}}
    want, _ = run("plain", 2, **changes)
    have, captured = run("graph", 2, **changes)
    assert have == want and captured == [2, 6]
