"""Logits made and used up a piece at a time, over all kinds of ranks, against all at once on one process."""

from __future__ import annotations

import pytest
from distributed.test_layouts import assert_same_run, train

pytestmark = pytest.mark.distributed

BUDGET = 1e-5  # GB: 9 tokens' logits of 264 float32 numbers, of 128 tokens; 18 on two tensor ranks


@pytest.fixture(scope="module")
def at_once(tmp_path_factory, text_data):
    return train(tmp_path_factory.mktemp("once"), text_data, 1, {"distributed_optimizer": False},
                 train__logits_budget_gb=None, data__valid=str(text_data / "valid"), valid={"every": 5, "samples": 16})


@pytest.mark.parametrize(("ranks", "parallel", "changes"), [
    (1, {}, {}), (2, {"tensor": 2}, {}), (2, {"tensor": 2, "sequence": True}, {}), (2, {"pipeline": 2}, {}),
    (2, {"context": 2}, {}), (2, {}, {}), (1, {}, {"model__tie_embeddings": False})],
    ids=["alone", "tp2", "tp2_sp", "pp2", "cp2", "dp2_dist_opt", "untied"])
def test_pieces_equal_all_at_once(ranks, parallel, changes, at_once, text_data, tmp_path):
    from helpers import metric_rows

    if changes:
        (tmp_path / "once").mkdir()
        at_once = train(tmp_path / "once", text_data, 1, {"distributed_optimizer": False}, **changes,
                        train__logits_budget_gb=None)
    run = train(tmp_path, text_data, ranks, parallel, train__logits_budget_gb=BUDGET, **changes,
                **({} if changes else {"data__valid": str(text_data / "valid"), "valid": {"every": 5, "samples": 16}}))
    assert_same_run(run, at_once, 5)
    for want, have in zip(metric_rows(at_once, "valid"), metric_rows(run, "valid"), strict=True):
        assert have["loss"] == pytest.approx(want["loss"], rel=1e-5)
