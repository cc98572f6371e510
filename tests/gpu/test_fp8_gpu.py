"""fp8 on a GPU: every recipe trains near bf16, resumes bit for bit, and is evaluated without a trace in its scales."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu.test_train_gpu import RECIPE

ROOT = Path(__file__).parent.parent.parent
RECIPES = ["delayed", "current", "blockwise"]
STEPS = 6

PROGRAM = """
import hola_megatron.quiet
import json, sys, torch
from pathlib import Path
from hola_megatron.checkpoint.folder import newest_usable
from hola_megatron.checkpoint.save_load import Saver, TrainerState, load, state_hash
from hola_megatron.config import build_recipe
from hola_megatron.data.stream import Batch
from hola_megatron.engine.megatron import MegatronEngine
from hola_megatron.engine.sampling import next_logits
from hola_megatron.startup.start import start, stop

values, folder, save_at, steps = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
recipe = build_recipe(values)
engine = MegatronEngine(recipe, start(recipe))
state = TrainerState(0, 0)
folder.mkdir(exist_ok=True)
if found := newest_usable(folder)[0]:
    state = load(engine, found)
result, saver = {"begin": state.step, "rows": []}, Saver(engine)

def batch(seed):
    tokens = torch.randint(0, 264, (4, 513), generator=torch.Generator().manual_seed(seed))
    cu_seqlens = torch.tensor([0, 300, 512, 1024, 1030, 2048], dtype=torch.int32)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(4, 512), cu_seqlens)

for step in range(state.step, steps):
    done = engine.train_step([batch(7 * step % 3), batch(step)], 1e-3)  # two micro-batches: weights are cast once
    result["rows"].append([done.loss, done.grad_norm])
    if step + 1 == save_at:
        saver.begin(TrainerState(step + 1, 0), folder, {})
        saver.writer.wait(60)
result["hash"] = state_hash(engine)
result["fp8"] = sorted(engine.fp8_tensors())
before = {name: value.clone() for name, value in engine.fp8_tensors().items()}
engine.train_step([batch(50)], 1e-3, lambda *_: "refused")
result["valid"] = engine.evaluate([batch(99)])[0] / 2048
result["logits"] = next_logits(engine, torch.arange(37)).isfinite().all().item()
result["untouched"] = all(torch.equal(value, before[name]) for name, value in engine.fp8_tensors().items())
if engine.layout.is_main:
    print("RESULT " + json.dumps(result), flush=True)
stop()
"""


def run(folder: Path, *, fp8: dict[str, Any] | None = None, save_at: int = -1, ranks: int = 1,
        **sections: dict) -> dict[str, Any]:
    recipe = json.loads(json.dumps(RECIPE)) | {"fp8": fp8 or {}}
    recipe["model"]["pattern"] = "HGHH"  # no softmax layer: flash attention's backward adds up in no fixed order
    recipe["train"] |= {"precision": "bf16", "global_batch_size": 8}
    for name, values in sections.items():
        recipe[name] = recipe.get(name, {}) | values
    program = [sys.executable, "-c", PROGRAM]
    if ranks > 1:
        launcher = ["-m", "hola_megatron.launch", "--nproc-per-node", str(ranks), "--no-python"]
        program = [sys.executable, *launcher, *program]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    if recipe["train"]["precision"] == "fp32":  # Transformer Engine multiplies float32 in tf32 otherwise
        environment["NVIDIA_TF32_OVERRIDE"] = "0"
    done = subprocess.run([*program, json.dumps(recipe), str(folder), str(save_at), str(STEPS)], capture_output=True,
                          text=True, cwd=ROOT, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


@pytest.fixture(scope="module", autouse=True)
def engine_is_here():
    pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the GPU has no blockwise fp8")


@pytest.fixture(scope="module")
def bf16(tmp_path_factory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("bf16"))


@pytest.fixture(scope="module", params=RECIPES)
def trained(request, tmp_path_factory) -> tuple[str, Path, dict[str, Any]]:
    """(fp8 recipe, folder with a checkpoint after half of the steps, what the whole run gave)."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, run(folder, fp8={"recipe": request.param}, save_at=STEPS // 2)


def test_losses_are_near_bf16_and_not_the_same(trained, bf16):
    _, _, found = trained
    losses, wanted = ([row[0] for row in one["rows"]] for one in (found, bf16))
    assert losses == pytest.approx(wanted, rel=1e-2) and losses != wanted
    assert found["valid"] == pytest.approx(bf16["valid"], rel=1e-2)


def test_a_resume_is_bit_for_bit(trained):
    name, folder, whole = trained
    again = run(folder, fp8={"recipe": name})
    assert again["begin"] == STEPS // 2
    assert again["rows"] == whole["rows"][STEPS // 2:] and again["hash"] == whole["hash"]


def test_only_delayed_scaling_has_a_memory_and_evaluating_or_refusing_leaves_it_alone(trained):
    name, _, found = trained
    assert found["untouched"] and found["logits"]
    # four layers of four linears; scales and histories, forward and backward
    assert len(found["fp8"]) == (4 * 4 * 4 if name == "delayed" else 0)


def test_layers_at_both_ends_stay_bf16_if_asked(bf16, tmp_path):
    all_of_them = run(tmp_path, fp8={"recipe": "current", "first_layers_bf16": 2, "last_layers_bf16": 2})
    assert all_of_them["rows"] == bf16["rows"]
    some = run(tmp_path, fp8={"recipe": "current", "first_layers_bf16": 1, "last_layers_bf16": 1})
    assert some["rows"] != bf16["rows"]


@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_recompute_changes_nothing(recipe, tmp_path):
    plain = run(tmp_path / "a", fp8={"recipe": recipe})
    again = run(tmp_path / "b", fp8={"recipe": recipe}, train={"recompute": "full"})
    for want, have in zip(plain["rows"], again["rows"], strict=True):
        assert have == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("sequence", [False, True])
def test_two_gpus_train_near_one(sequence, trained, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    name, _, alone = trained
    both = run(tmp_path, fp8={"recipe": name}, ranks=2, parallel={"tensor": 2, "sequence": sequence})
    for want, have in zip(alone["rows"], both["rows"], strict=True):
        assert have[0] == pytest.approx(want[0], rel=1e-2)
