"""Training on a GPU against training on the CPU: same recipe, same tokens, same losses; then speed-critical choices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent

PROGRAM = """
import hola_megatron.quiet
import json, sys, torch
from hola_megatron.config import build_recipe
from hola_megatron.data.stream import Batch
from hola_megatron.engine.build import build_engine
from hola_megatron.startup.start import start, stop

recipe = build_recipe(json.loads(sys.argv[1]))
layout = start(recipe)
engine = build_engine(recipe, layout)
generator = torch.Generator().manual_seed(5)
rows = []
for step in range(recipe.train.steps):
    tokens = torch.randint(0, 264, (4, 513), generator=generator)
    cu_seqlens = torch.tensor([0, 300, 512, 1024, 1030, 2048], dtype=torch.int32)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(4, 512), cu_seqlens)
    result = engine.train_step([batch], 1e-3)
    rows.append([result.loss, result.grad_norm])
if layout.is_main:  # two ranks may write into one line
    print("ROWS " + json.dumps(rows), flush=True)
stop()
"""

RECIPE = {
    "name": "gpu",
    "model": {"layers": 4, "hidden_size": 128, "pattern": "HGAH", "heads": 2, "key_dim": 64, "value_dim": 64,
              "attention_heads": 2, "mlp_hidden_size": 256, "vocab_size": 264, "cache": {"block": 256, "slots": 64}},
    "data": {"train": "unused", "tokenizer": "bytes"},
    "train": {"sequence_length": 512, "global_batch_size": 4, "micro_batch_size": 4, "steps": 4,
              "learning_rate": 1e-3, "precision": "fp32"},
}


def losses(device: str, *, precision: str = "fp32", parallel: dict | None = None, engine: str = "megatron",
           data_ranks: int = 1, **model: str) -> list[list[float]]:
    """Loss and gradient norm of every step; data ranks see the same tokens."""
    recipe = json.loads(json.dumps(RECIPE)) | {"parallel": parallel or {}, "engine": engine}
    recipe["train"] |= {"precision": precision, "global_batch_size": 4 * data_ranks}
    recipe["model"] |= model
    environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0", "TORCHDYNAMO_DISABLE": "1"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    program = [sys.executable, "-c", PROGRAM]
    if parallel or data_ranks > 1:
        program = [sys.executable, "-m", "hola_megatron.launch", "--nproc-per-node", "2", "--no-python", *program]
    done = subprocess.run([*program, json.dumps(recipe)], capture_output=True, text=True, cwd=ROOT, env=environment,
                          check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("ROWS "))[5:])


@pytest.fixture(scope="module")
def on_cpu() -> list[list[float]]:
    return losses("cpu", backend="torch")


@pytest.mark.parametrize("spec", ["local", "te"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_float32_on_the_gpu_is_float32_on_the_cpu(backend, spec, on_cpu):
    if spec == "te":
        pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")
    for want, have in zip(on_cpu, losses("cuda", backend=backend, layer_spec=spec), strict=True):
        assert have[0] == pytest.approx(want[0], rel=1e-5)
        assert have[1] == pytest.approx(want[1], rel=1e-3)


@pytest.mark.parametrize("spec", ["local", "te"])
def test_bf16_is_near_float32(spec, on_cpu):
    if spec == "te":
        pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")
    for want, have in zip(on_cpu, losses("cuda", precision="bf16", backend="triton", layer_spec=spec), strict=True):
        assert have[0] == pytest.approx(want[0], rel=5e-3)
        assert have[1] == pytest.approx(want[1], rel=5e-2)


@pytest.mark.parametrize("stage", [1, 2])
def test_two_gpus_under_deepspeed(stage, on_cpu):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    found = losses("cuda", engine="deepspeed", parallel={"zero_stage": stage}, data_ranks=2, backend="triton")
    for want, have in zip(on_cpu, found, strict=True):
        assert have[0] == pytest.approx(want[0], rel=1e-5)
        assert have[1] == pytest.approx(want[1], rel=1e-3)


@pytest.mark.parametrize("spec", ["local", "te"])
@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}], ids=str)
def test_two_gpus_train_as_one_does(parallel, spec, on_cpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    if spec == "te":
        pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")
    for want, have in zip(on_cpu, losses("cuda", backend="triton", layer_spec=spec, parallel=parallel), strict=True):
        assert have[0] == pytest.approx(want[0], rel=1e-5)
        assert have[1] == pytest.approx(want[1], rel=1e-3)


def test_hola_layers_without_a_state_train_as_on_the_cpu():
    model = {"rule": "none", "pattern": "H", "cache": {"block": 64, "slots": 32, "score": "recency"}}
    for want, have in zip(losses("cpu", backend="torch", **model), losses("cuda", backend="triton", **model),
                          strict=True):
        assert have[0] == pytest.approx(want[0], rel=1e-5) and have[1] == pytest.approx(want[1], rel=1e-3)
