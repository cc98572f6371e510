"""HQLT layers on a GPU: the operation against float64, training against the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "kernels")]

from inputs import relative_error
from test_train_gpu import losses

from hola_kernels import PackedDocuments
from hola_kernels.hqlt import BLENDS, MIXINGS, hqlt_attention

CUTS = [0, 0, 1, 300, 1000, 1601, 1601]
MODEL = {"pattern": "hqlt, gdn", "hqlt": {"window": 100}}


def inputs(mixing: str, width: int, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
    g = torch.Generator().manual_seed(0)
    made = {n: torch.randn(1, CUTS[-1], 2, width, generator=g) for n in "qkv"}
    made["beta"] = torch.rand(1, CUTS[-1], 2, generator=g)
    size = {"scalar": 2, "vector": width}.get(mixing)
    made["mix"] = None if size is None else torch.randn(1, CUTS[-1], 2, size, generator=g)
    return {n: x if x is None else x.to(torch.float32 if n == "beta" else dtype).cuda().requires_grad_()
            for n, x in made.items()}


def gradients(y: torch.Tensor, x: dict[str, torch.Tensor | None]) -> list[torch.Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(y.dtype)
    return torch.autograd.grad(y, [value for value in x.values() if value is not None], dy)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize(("dtype", "width", "limit"), [
    (torch.bfloat16, 64, 2e-2), (torch.bfloat16, 128, 2e-2), (torch.bfloat16, 256, 2e-2), (torch.float32, 64, 1e-4)],
    ids=str)
def test_against_float64_with_every_gradient(dtype, width, limit, blend, mixing):
    """16 bits: the window by flash attention; 32: in bands. The state's limits are those of `verify`."""
    given, how = inputs(mixing, width, dtype), {"blend": blend, "mixing": mixing, "window": 64}
    exact = {n: x if x is None else x.detach().double().requires_grad_() for n, x in given.items()}
    want = hqlt_attention(**exact, **how, cu_seqlens=torch.tensor(CUTS), backend="torch")
    found = hqlt_attention(**given, **how, cu_seqlens=torch.tensor(CUTS), backend="triton")
    assert found.dtype == dtype and relative_error(found, want) < limit
    for have, expected in zip(gradients(found, given), gradients(want, exact), strict=True):
        assert relative_error(have, expected) < limit


@pytest.mark.parametrize("blend", BLENDS)
def test_nothing_waits_for_the_gpu(blend):
    x = inputs("vector", 128, torch.bfloat16)
    for cuts in ([0, 700, 1601], [0, 1, 64, 1601]):
        documents = PackedDocuments(torch.tensor(cuts, device="cuda"), 1601)
        how = {"blend": blend, "cu_seqlens": documents, "max_seqlen": 1601}
        gradients(hqlt_attention(**x, **how), x)  # compiled
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            gradients(hqlt_attention(**x, **how), x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("blend", BLENDS)
def test_training_in_float32_is_that_on_the_cpu(blend):
    model = {**MODEL, "hqlt": {**MODEL["hqlt"], "blend": blend}}
    on_cpu, on_gpu = losses("cpu", backend="torch", **model), losses("cuda", **model)
    for (loss, norm), (expected, expected_norm) in zip(on_gpu, on_cpu, strict=True):
        assert loss == pytest.approx(expected, rel=1e-4) and norm == pytest.approx(expected_norm, rel=1e-3)
