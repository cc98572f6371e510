"""A bf16 model with float32 decay and gates: checkpoints hold each parameter's own state and resume bit for bit."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers import checkpoint_tensors, run_ranks, write_recipe

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(("ranks", "parallel"), [
    (2, {"distributed_optimizer": True}), (1, {"distributed_optimizer": True}), (1, {"distributed_optimizer": False})],
    ids=["dp2_dist_opt", "alone_dist_opt", "alone"])
def test_a_bf16_run_resumes_bit_for_bit(ranks, parallel, text_data, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", text_data / "train", run_dir=str(tmp_path / "run"), parallel=parallel,
                          train__precision="bf16", train__steps=4, checkpoint={"every": 2, "keep": 3})
    command = [str(recipe)]
    done = run_ranks(command, tmp_path / "log.txt", ranks=ranks)
    assert done.code == 0, done.output[-3000:]
    checkpoints = tmp_path / "run" / "checkpoints"
    whole = {kind: checkpoint_tensors(checkpoints / "step_00000004", kind) for kind in ("weight", "exp_avg_sq")}
    assert all(x.abs().max() > 0 for kind in whole.values() for name, x in kind.items() if not name.endswith("sink"))
    # decay starts between log 1e-4 and log 16 and hardly moves: another parameter's values would show
    decay = torch.cat([x for name, x in whole["weight"].items() if name.endswith("A_log")])
    norms = torch.cat([x for name, x in whole["weight"].items() if name.endswith("norm.weight")])
    assert decay.min() > -9.3 and decay.max() < 2.8 and decay.std() > 0.1 and (norms - 1).abs().max() < 0.1
    shutil.rmtree(checkpoints / "step_00000004")
    done = run_ranks(command, tmp_path / "log.txt", ranks=ranks)
    assert done.code == 0 and "resuming at step 2" in done.output, done.output[-3000:]
    for kind, tensors in whole.items():
        again = checkpoint_tensors(checkpoints / "step_00000004", kind)
        assert all(torch.equal(again[name], x) for name, x in tensors.items()), kind
