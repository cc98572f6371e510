"""Layers with experts: expert-parallel ranks against one process, resumes, the router's bias."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import checkpoint_tensors, metric_rows, run_ranks, write_recipe

pytestmark = pytest.mark.distributed

MOE = {"experts": 4, "top_k": 2, "hidden_size": 32}
LAYOUTS = {
    "ep2": (2, {"expert": 2}),
    "ep2_plain_optimizer": (2, {"expert": 2, "distributed_optimizer": False, "overlap": False}),
    "dp2": (2, {"expert": 1}),
    "ep2_of_tensor_ranks": (2, {"expert": 2, "tensor": 2, "sequence": True}),
}


def train(folder: Path, data: Path, ranks: int, parallel: dict, **changes) -> Path:
    """Five steps of the micro recipe with experts (in the folder of a run: the rest of them)."""
    folder.mkdir(exist_ok=True)
    changes = {"model__moe": MOE, **changes}
    recipe = write_recipe(folder / "recipe.yaml", data / "train", parallel=parallel, run_dir=str(folder / "run"),
                          **changes)
    done = run_ranks([str(recipe)], folder / "log.txt", ranks=ranks)
    assert done.code == 0, done.output[-4000:]
    return folder / "run"


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text_data) -> Path:
    return train(tmp_path_factory.mktemp("experts"), text_data, 1, {"distributed_optimizer": False})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_expert_ranks_equal_one_process(layout, alone, text_data, tmp_path):
    """Losses, gradient norms and every expert after 5 steps; what balances the experts is part of both."""
    ranks, parallel = LAYOUTS[layout]
    run = train(tmp_path, text_data, ranks, parallel)
    expected, found = metric_rows(alone), metric_rows(run)
    for want, have in zip(expected, found, strict=True):
        assert have["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert have["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
    want, have = (checkpoint_tensors(path / "checkpoints/step_00000005") for path in (alone, run))
    assert want.keys() == have.keys() and "model.layers.3.mlp.experts.3.down_proj.weight" in want
    for name, tensor in want.items():
        assert float((have[name] - tensor).norm() / tensor.norm().clamp_min(1e-3)) < 1e-4, name


BY_BIAS = {"model__moe": {**MOE, "balancing": "bias", "bias_rate": 0.01}, "checkpoint": {"every": 3, "keep": 5}}
LAST = "checkpoints/step_00000005"


@pytest.fixture(scope="module")
def shared(tmp_path_factory, text_data) -> Path:
    """Five steps on two expert ranks without a stop, with a checkpoint at 3."""
    return train(tmp_path_factory.mktemp("shared"), text_data, 2, {"expert": 2}, **BY_BIAS)


def gone_on(run: Path, folder: Path, data: Path, ranks: int, parallel: dict) -> Path:
    """A copy of the run, killed after step 3 and started again."""
    shutil.copytree(run, folder / "run")
    shutil.rmtree(folder / "run" / LAST)
    again = train(folder, data, ranks, parallel, **BY_BIAS)
    assert "resuming at step 3" in (folder / "log.txt").read_text()
    return again


@pytest.mark.parametrize(("ranks", "parallel"), [(1, {}), (2, {"expert": 2})], ids=["one", "ep2"])
def test_a_resume_is_bitwise(ranks, parallel, shared, text_data, tmp_path):
    """The router's bias too, which balances without a loss: it is state, and no parameter."""
    whole = shared if ranks == 2 else train(tmp_path / "whole", text_data, ranks, parallel, **BY_BIAS)
    again = gone_on(whole, tmp_path, text_data, ranks, parallel)
    for kind in ("weight", "exp_avg", "exp_avg_sq", "router"):
        want, have = (checkpoint_tensors(path / LAST, kind) for path in (whole, again))
        assert want.keys() == have.keys() and want
        assert all(want[name].equal(have[name]) for name in want), kind
    bias = checkpoint_tensors(whole / LAST, "router")["model.layers.0.mlp.router.expert_bias"]
    assert bias.shape == (4,) and bias.abs().max() > 0.005


def test_a_checkpoint_goes_to_another_number_of_expert_ranks(shared, text_data, tmp_path):
    """Three steps on two ranks, two more on one: the numbers of two ranks throughout."""
    moved = gone_on(shared, tmp_path, text_data, 1, {})
    assert metric_rows(moved)[-1]["loss"] == pytest.approx(metric_rows(shared)[-1]["loss"], rel=1e-5)
    for kind in ("weight", "router"):
        want, have = (checkpoint_tensors(path / LAST, kind) for path in (shared, moved))
        for name, tensor in want.items():
            assert float((have[name] - tensor).norm() / tensor.norm().clamp_min(1e-3)) < 1e-4, name
