"""HAM layers on a GPU: the operation against float64, training against the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "kernels")]

from inputs import gradients, make_inputs, relative_error
from test_train_gpu import losses

from hola_kernels.gated_delta.residual import gated_delta_residual
from hola_kernels.ham import ham_attention

CUTS = [0, 0, 1, 300, 1000, 1601]
MODEL = {"pattern": "ham, gdn, ham, hola", "ham": {"router": "learned", "share": 0.2, "rate": 0.05}}


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("router", ["cosine", "learned"])
def test_float32_is_the_float64_layer_with_every_gradient(router, width):
    exact = {n: x for n, x in make_inputs(1, CUTS[-1], key=width, value=width).items() if n not in ("gate", "sink")}
    g = torch.Generator().manual_seed(4)
    exact["mix"] = torch.randn(1, CUTS[-1], 2, 2, generator=g, dtype=torch.float64).requires_grad_()
    if router == "learned":
        exact["route"] = torch.randn(1, CUTS[-1], 2, generator=g, dtype=torch.float64).requires_grad_()
    given = {"threshold": torch.tensor([{"cosine": 0.9, "learned": 0.5}[router]]), "cu_seqlens": torch.tensor(CUTS)}
    want, keep, score = ham_attention(**exact, **given, backend="torch")
    narrow = {name: x.detach().float().cuda().requires_grad_() for name, x in exact.items()}
    given = {name: x.cuda() for name, x in given.items()}
    found, kept, scored = ham_attention(**narrow, **given, backend="triton")
    assert torch.equal(kept.cpu(), keep) and relative_error(scored.cpu(), score) < 1e-5
    assert relative_error(found.cpu(), want) < 1e-5
    have, expected = gradients(found.cpu(), narrow), gradients(want, exact)
    assert max(relative_error(have[name].cpu(), expected[name]) for name in expected) < 1e-4


@pytest.mark.parametrize("width", [64, 128, 256])
def test_residuals_of_a_long_sequence_in_16_bits(width):
    """One sequence of 40,000 tokens is cut into spans."""
    x = {n: y.detach().float() for n, y in make_inputs(1, 40_000, heads=1, key=width, value=width).items()
         if n in ("k", "v", "log_decay", "beta")}
    x |= {n: x[n].bfloat16() for n in ("k", "v")}
    want = gated_delta_residual(**{n: y.cuda().double() for n, y in x.items()}, backend="torch")
    found = gated_delta_residual(**{n: y.cuda() for n, y in x.items()}, backend="triton")
    assert relative_error(found, want) < 8e-3


def test_training_in_float32_is_that_on_the_cpu():
    on_cpu, on_gpu = losses("cpu", backend="torch", **MODEL), losses("cuda", **MODEL)
    for (loss, norm), (expected, expected_norm) in zip(on_gpu, on_cpu, strict=True):
        assert loss == pytest.approx(expected, rel=1e-4) and norm == pytest.approx(expected_norm, rel=1e-3)
