"""Layers with experts on a GPU: grouped products against experts one after the other, and against the CPU."""

from __future__ import annotations

import pytest
import torch
from test_train_gpu import losses

MOE = {"experts": 4, "top_k": 2, "hidden_size": 64}


@pytest.fixture(scope="module")
def on_cpu() -> list[list[float]]:
    return losses("cpu", backend="torch", moe=MOE)


@pytest.mark.parametrize("spec", ["local", "te"])
def test_float32_experts_on_the_gpu_are_those_on_the_cpu(spec, on_cpu):
    if spec == "te":
        pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")
    for want, have in zip(on_cpu, losses("cuda", backend="triton", layer_spec=spec, moe=MOE), strict=True):
        assert have[0] == pytest.approx(want[0], rel=1e-5)
        assert have[1] == pytest.approx(want[1], rel=1e-3)


@pytest.mark.parametrize("balancing", ["aux_loss", "bias"])
def test_bf16_grouped_experts_are_near_float32(balancing):
    pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")
    moe = {**MOE, "balancing": balancing}
    found = losses("cuda", precision="bf16", backend="triton", layer_spec="te", moe=moe)
    for want, have in zip(losses("cpu", backend="torch", moe=moe), found, strict=True):
        assert have[0] == pytest.approx(want[0], rel=5e-3)
        assert have[1] == pytest.approx(want[1], rel=5e-2)


@pytest.mark.parametrize("spec", ["local", "te"])
def test_two_expert_ranks_train_as_one(spec, on_cpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    if spec == "te":
        pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")
    parallel = {"expert": 2, "tensor": 2, "sequence": True}
    for want, have in zip(on_cpu, losses("cuda", backend="triton", layer_spec=spec, parallel=parallel, moe=MOE),
                          strict=True):
        assert have[0] == pytest.approx(want[0], rel=1e-5)
        assert have[1] == pytest.approx(want[1], rel=1e-3)
