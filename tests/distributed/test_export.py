"""Exports of real runs at every layout: logits of the Megatron model, bits of the checkpoint, and the way back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import checkpoint_tensors, metric_rows, run_ranks, write_recipe
from safetensors.torch import load_file

from hola_megatron.checkpoint.folder import find_checkpoint
from hola_megatron.hf.convert import from_hf, to_hf
from hola_megatron.hf.verify import TOLERANCE, verify

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "tp1": (1, {}), "tp2": (2, {"tensor": 2, "sequence": True}), "tp4": (4, {"tensor": 4}), "pp2": (2, {"pipeline": 2}),
    "tp2_pp2": (4, {"tensor": 2, "pipeline": 2}), "pp2_vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "dp2": (2, {"distributed_optimizer": True}),
}
FAMILIES = {"tp2": "HGHA", "tp4": "GGHA", "pp2": "AAAA", "tp2_pp2": "HHHH"}


def train(folder: Path, data: Path, ranks: int, recipe: Path | None = None, **changes) -> Path:
    """Two steps of the micro recipe (or of `recipe`) with 4 heads; returns the run folder."""
    recipe = recipe or write_recipe(folder / "recipe.yaml", data / "train", run_dir=str(folder / "run"), train__steps=2,
                                    model__heads=4, model__key_dim=8, model__value_dim=8, model__attention_heads=4,
                                    **changes)
    done = run_ranks([str(recipe)], folder / "log.txt", ranks=ranks)
    assert done.code == 0, done.output[-4000:]
    return folder / "run"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_of_any_layout_gives_the_megatron_logits(layout, text_data, tmp_path):
    ranks, parallel = LAYOUTS[layout]
    run = train(tmp_path, text_data, ranks, parallel=parallel, model__pattern=FAMILIES.get(layout, "HGHA"))
    proofs = []
    to_hf(run, tmp_path / "out", verify=lambda *given: proofs.append(verify(*given)))
    assert proofs[0].worst <= TOLERANCE and proofs[0].decoded <= TOLERANCE
    held, stored = load_file(tmp_path / "out" / "model.safetensors"), checkpoint_tensors(find_checkpoint(run).path)
    assert held.keys() == stored.keys() and all(torch.equal(held[name], stored[name]) for name in held)


def test_an_import_is_trained_on_at_another_layout(text_data, tmp_path):
    """Trained on two tensor ranks, exported, imported, and trained on by two pipeline ranks."""
    run = train(tmp_path, text_data, 2, parallel={"tensor": 2}, checkpoint__every=1, train__precision="bf16")
    to_hf(run / "checkpoints" / "step_00000001", tmp_path / "out", verify=verify)
    from_hf(tmp_path / "out", tmp_path / "on")
    recipe = tmp_path / "on" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("tensor: 2", "tensor: 1").replace("pipeline: 1", "pipeline: 2", 1))
    train(tmp_path, text_data, 2, recipe=recipe)
    whole, rows = metric_rows(run), metric_rows(tmp_path / "on")
    assert [row["step"] for row in rows] == [2] and rows[0]["loss"] == pytest.approx(whole[1]["loss"], rel=2e-3)
