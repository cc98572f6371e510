"""The whole program over two GPUs: losses, the panel of every layer, checkpoints, and going on with one GPU."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers import metric_rows, run_program, write_recipe


@pytest.mark.parametrize("parallel", [{"pipeline": 2}, {"context": 2}, {"tensor": 2, "sequence": True}], ids=str)
def test_two_gpus_and_going_on_with_one_are_one(parallel, text_data, tmp_path):
    """Six steps on one GPU; six on two; and what those kept at step 4, gone on with by one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")

    def train(folder: str, ranks: int, layout: dict) -> list[float]:
        recipe = write_recipe(
            tmp_path / f"{folder}.yaml", text_data / "train", run_dir=str(tmp_path / folder), train__steps=6,
            model__key_dim=64, model__value_dim=64, data__valid=str(text_data / "valid"), parallel=layout,
            valid={"every": 2, "samples": 8}, checkpoint={"every": 2, "keep": 5})
        done = run_program(["-m", "hola_megatron.train", str(recipe)], tmp_path / f"{folder}.log", ranks=ranks,
                           timeout=240, environment={"NVIDIA_TF32_OVERRIDE": "0"})
        assert done.code == 0, done.output[-3000:]
        return [row["loss"] for row in metric_rows(tmp_path / folder)]

    def panel(folder: str, layer: int) -> list[float]:
        rows = metric_rows(tmp_path / folder, f"memory/layer{layer}")
        assert [row["step"] for row in rows] == [2, 4, 6]
        return [row["gate"] for row in rows]

    one, two = train("one", 1, {}), train("two", 2, parallel)
    assert len(one) == 6 and two == pytest.approx(one, rel=1e-4)
    for layer in (1, 3):
        assert panel("two", layer) == pytest.approx(panel("one", layer), rel=1e-3)
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step_00000006")
    assert train("two", 1, {})[-2:] == pytest.approx(one[-2:], rel=1e-4)
