"""Muon over tensor, pipeline and data ranks against one process, and resumed."""

from __future__ import annotations

import shutil

import pytest
import torch
from distributed.test_layouts import assert_same_run, train
from helpers import checkpoint_tensors, metric_rows

pytestmark = pytest.mark.distributed

MUON = {"train__optimizer": "muon"}
KINDS = ("weight", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text_data):
    pytest.importorskip("emerging_optimizers")
    return train(tmp_path_factory.mktemp("alone"), text_data, 1, {"distributed_optimizer": False}, **MUON)


@pytest.mark.parametrize(("ranks", "parallel"), [
    (2, {"tensor": 2}), (2, {"tensor": 2, "sequence": True}), (2, {"pipeline": 2}), (2, {})],
    ids=["tp2", "tp2_sp", "pp2", "dp2"])
def test_layout_equals_one_process(ranks, parallel, alone, text_data, tmp_path):
    run = train(tmp_path, text_data, ranks, {"distributed_optimizer": False, **parallel}, **MUON)
    assert_same_run(run, alone, 5)


def test_it_is_not_adamw(alone, text_data, tmp_path):
    run = train(tmp_path, text_data, 1, {"distributed_optimizer": False})
    assert metric_rows(run)[-1]["loss"] != pytest.approx(metric_rows(alone)[-1]["loss"], rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_tp2_run_resumes_bit_for_bit_and_goes_on_alone(precision, text_data, tmp_path):
    both = {"distributed_optimizer": False, "tensor": 2}
    how = {**MUON, "train__precision": precision, "train__steps": 4, "checkpoint": {"every": 2, "keep": 3}}
    run = train(tmp_path, text_data, 2, both, **how)
    last = run / "checkpoints/step_00000004"
    whole = {kind: checkpoint_tensors(last, kind) for kind in KINDS}
    assert whole["exp_avg"].keys() == whole["weight"].keys() > whole["exp_avg_sq"].keys()
    assert "model.layers.0.mixer.q_proj.weight" not in whole["exp_avg_sq"]
    for ranks, parallel in ((2, both), (1, {"distributed_optimizer": False})):
        shutil.rmtree(last)
        train(tmp_path, text_data, ranks, parallel, **how)
        assert "resuming at step 2" in (tmp_path / "log.txt").read_text()
        for kind, tensors in whole.items():
            again = checkpoint_tensors(last, kind)
            assert again.keys() == tensors.keys()
            for name, tensor in tensors.items():
                if ranks == 2:
                    assert torch.equal(again[name], tensor), (kind, name)
                elif precision == "fp32":
                    assert (again[name] - tensor).norm() < 1e-3 * tensor.norm().clamp_min(1e-6), (kind, name)
