"""Exports of real runs at every layout: logits of the Megatron model, bits of the checkpoint, and the way back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed.layout_rows import PP, SP, TP, Row, finished, run_rows
from helpers import LONG, checkpoint_tensors, metric_rows, run_ranks
from safetensors.torch import load_file

from hola_megatron.checkpoint.folder import find_checkpoint
from hola_megatron.hf.convert import from_hf, to_hf
from hola_megatron.hf.verify import TOLERANCE, verify

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]  # all rows run in one fixture

# four heads, so that four ranks can share them
HEADS = {"model__heads": 4, "model__key_dim": 8, "model__value_dim": 8, "model__attention_heads": 4}
ROWS = {
    "tp1": Row(1, {}),
    "tp2": Row(2, SP, {"model__pattern": "HGHA"}),
    "tp4": Row(4, {"tensor": 4}, {"model__pattern": "GGHA"}),
    "pp2": Row(2, PP, {"model__pattern": "AAAA"}),
    "tp2_pp2": Row(4, {**TP, **PP}, {"model__pattern": "HHHH"}),
    "pp2_vpp2": Row(2, {**PP, "virtual_pipeline": 2}),
    "dp2": Row(2, {"distributed_optimizer": True}, {"model__pattern": "WAWG"}),
    "to_import": Row(2, TP, {"checkpoint__every": 1, "train__precision": "bf16"}),
}


@pytest.fixture(scope="module")
def runs(text_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    run_rows({name: row for name, row in ROWS.items() if row.ranks <= 2 or LONG}, folder, text_data, **HEADS,
             train__steps=2)
    return folder


@pytest.mark.parametrize("layout", [pytest.param(name, marks=[pytest.mark.long] if row.ranks > 2 else [])
                                    for name, row in ROWS.items() if name != "to_import"])
def test_an_export_of_any_layout_gives_the_megatron_logits(layout, runs, tmp_path):
    run = finished(runs, layout, ROWS[layout])
    proofs = []
    to_hf(run, tmp_path / "out", verify=lambda *given: proofs.append(verify(*given)))
    assert proofs[0].worst <= TOLERANCE and proofs[0].decoded <= TOLERANCE
    held, stored = load_file(tmp_path / "out" / "model.safetensors"), checkpoint_tensors(find_checkpoint(run).path)
    assert held.keys() == stored.keys() and all(torch.equal(held[name], stored[name]) for name in held)


def test_an_import_is_trained_on_at_another_layout(runs, tmp_path):
    """Trained on two tensor ranks, exported, imported, and trained on by two pipeline ranks."""
    run = finished(runs, "to_import", ROWS["to_import"])
    to_hf(run / "checkpoints" / "step_00000001", tmp_path / "out", verify=verify)
    from_hf(tmp_path / "out", tmp_path / "on")
    recipe = tmp_path / "on" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("tensor: 2", "tensor: 1").replace("pipeline: 1", "pipeline: 2", 1))
    done = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=2)
    assert done.code == 0, done.output[-4000:]
    whole, rows = metric_rows(run), metric_rows(tmp_path / "on")
    assert [row["step"] for row in rows] == [2] and rows[0]["loss"] == pytest.approx(whole[1]["loss"], rel=2e-3)
