"""The loss in pieces, and Muon, on a GPU: the numbers of the uncut loss, of one process on the CPU."""

from __future__ import annotations

import pytest
import torch
from gpu.test_fp8_gpu import run

from hola_kernels.cross_entropy import verify_cases

CASES = dict(verify_cases.cases())


@pytest.mark.parametrize("name", CASES)
def test_cross_entropy_kernels_match_float64(name):
    for output, error in CASES[name]().items():
        assert error <= verify_cases.limit(name, output), (name, output, error)


@pytest.mark.parametrize("spec", ["local", "te"])
@pytest.mark.parametrize(("precision", "loss", "norm"), [("fp32", 1e-5, 1e-3), ("bf16", 1e-3, 2e-2)])
def test_pieces_give_the_numbers_of_the_uncut_loss(precision, loss, norm, spec, tmp_path):
    if spec == "te":
        pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")
    # 2048 tokens of 264 logits: one piece of all tokens at 2 MB in bf16, and pieces of 64 or 128
    whole, *pieces = (run(tmp_path / str(budget), train={"precision": precision, "logits_budget_gb": budget},
                          model={"layer_spec": spec}) for budget in (None, 2e-3, 1e-4))
    for found in pieces:
        for want, have in zip([*whole["rows"], [whole["valid"], 1.0]], [*found["rows"], [found["valid"], 1.0]],
                              strict=True):
            assert have[0] == pytest.approx(want[0], rel=loss) and have[1] == pytest.approx(want[1], rel=norm)


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"tensor": 2, "sequence": True}], ids=str)
def test_pieces_over_two_gpus(parallel, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    train = {"precision": "fp32", "logits_budget_gb": 1e-4}
    alone, both = (run(tmp_path / str(ranks), train=train, parallel=how, ranks=ranks)
                   for ranks, how in ((1, {}), (2, parallel)))
    for want, have in zip(alone["rows"], both["rows"], strict=True):
        assert have[0] == pytest.approx(want[0], rel=1e-5) and have[1] == pytest.approx(want[1], rel=1e-3)


def test_muon_trains_and_resumes_bit_for_bit(tmp_path):
    pytest.importorskip("emerging_optimizers", reason="emerging-optimizers is not installed")
    how = {"train": {"optimizer": "muon"}, "parallel": {"distributed_optimizer": False}}
    whole = run(tmp_path, save_at=3, **how)
    again = run(tmp_path, **how)
    assert again["begin"] == 3 and again["rows"] == whole["rows"][3:] and again["hash"] == whole["hash"]
    assert whole["rows"][-1][0] < whole["rows"][0][0]


def test_muon_on_two_gpus_is_muon_on_one(tmp_path):
    pytest.importorskip("emerging_optimizers", reason="emerging-optimizers is not installed")
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    how = {"train": {"optimizer": "muon", "precision": "fp32"}}
    alone = run(tmp_path / "1", **how, parallel={"distributed_optimizer": False})
    both = run(tmp_path / "2", **how, parallel={"distributed_optimizer": False, "tensor": 2}, ranks=2)
    for want, have in zip(alone["rows"], both["rows"], strict=True):
        assert have[0] == pytest.approx(want[0], rel=1e-4) and have[1] == pytest.approx(want[1], rel=1e-2)
