"""Every parallel layout against one process: losses, gradient norms, every parameter after 5 steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import checkpoint_tensors, metric_rows, run_ranks, write_recipe

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "tp2": (2, {"tensor": 2}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "pp2_vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "dp2": (2, {"distributed_optimizer": False, "overlap": False}),
    "dp2_dist_opt": (2, {"distributed_optimizer": True, "overlap": False}),
    "dp2_dist_opt_overlap": (2, {"distributed_optimizer": True, "overlap": True}),
    "tp2_pp2": (4, {"tensor": 2, "pipeline": 2}),
    "tp2_sp_dp2_overlap": (4, {"tensor": 2, "sequence": True}),
}


def train(folder: Path, data: Path, ranks: int, parallel: dict, **changes) -> Path:
    """Five steps of the micro recipe; returns the run folder."""
    recipe = write_recipe(folder / "recipe.yaml", data / "train", parallel=parallel, run_dir=str(folder / "run"),
                          **changes)
    done = run_ranks([str(recipe)], folder / "log.txt", ranks=ranks)
    assert done.code == 0, done.output[-4000:]
    return folder / "run"


@pytest.fixture(scope="session")
def alone(tmp_path_factory, text_data) -> Path:
    return train(tmp_path_factory.mktemp("alone"), text_data, 1, {"distributed_optimizer": False})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout, alone, text_data, tmp_path):
    ranks, parallel = LAYOUTS[layout]
    run = train(tmp_path, text_data, ranks, parallel)
    assert_same_run(run, alone, 5)


def assert_same_run(run: Path, alone: Path, steps: int) -> None:
    expected, found = metric_rows(alone), metric_rows(run)
    assert len(expected) == len(found) == steps
    for want, have in zip(expected, found, strict=True):
        assert have["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert have["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
        assert have["loss_tokens"] == want["loss_tokens"]
    last = f"checkpoints/step_{steps:08d}"
    want, have = checkpoint_tensors(alone / last), checkpoint_tensors(run / last)
    assert want.keys() == have.keys()
    start = 0.0
    for name, tensor in want.items():
        error = float((have[name] - tensor).norm() / tensor.norm().clamp_min(1e-3))
        start = max(start, error)
        assert error < 1e-4, (name, error)
    assert start < 1e-4


def test_an_interleaved_pipeline_validates_and_writes_text(tmp_path, text_data):
    losses, texts = [], []
    for ranks, parallel in ((1, {}), (2, {"pipeline": 2, "virtual_pipeline": 2})):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        run = train(folder, text_data, ranks, parallel, train__steps=2, data__valid=str(text_data / "valid"),
                    valid={"every": 2, "samples": 6}, log__sample_every=2, log__sample_tokens=4)
        losses.append(metric_rows(run, "valid")[0]["loss"])
        texts.append(metric_rows(run, "sample")[0]["text"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and texts[0] == texts[1]


def test_bf16_trains_at_every_kind_of_layer(tmp_path, text_data):
    run = train(tmp_path, text_data, 2, {"tensor": 2, "sequence": True}, train__precision="bf16",
                train__recompute="full", train__steps=8)
    losses = [row["loss"] for row in metric_rows(run)]
    assert losses[-1] < losses[0] - 0.3


def test_recompute_changes_nothing(tmp_path, text_data, alone):
    run = train(tmp_path, text_data, 1, {"distributed_optimizer": False}, train__recompute="full")
    assert_same_run(run, alone, 5)


def test_joined_documents_train_in_a_pipeline(tmp_path, text_data):
    run = train(tmp_path, text_data, 2, {"pipeline": 2}, data__documents="joined", train__steps=2)
    rows = metric_rows(run)
    assert [row["loss_tokens"] for row in rows] == [8 * 64] * 2
