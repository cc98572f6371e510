"""HAM layers on the Triton kernels under the interpreter: residuals, both routers, gradients."""

from __future__ import annotations

import pytest
import torch
from inputs import gradients, make_inputs, relative_error
from interpreted import only_interpreted

only_interpreted()

from hola_kernels.gated_delta.residual import gated_delta_residual
from hola_kernels.ham import ham_attention

BOUNDS = [0, 0, 1, 65, 96]


def arguments(router: str) -> dict:
    made = make_inputs(1, BOUNDS[-1], heads=1, key=64, value=64)
    g = torch.Generator().manual_seed(4)
    made = {n: x for n, x in made.items() if n not in ("gate", "sink")}
    made["mix"] = torch.randn(1, BOUNDS[-1], 1, 2, generator=g, dtype=torch.float64).requires_grad_()
    if router == "learned":
        made["route"] = torch.randn(1, BOUNDS[-1], 1, generator=g, dtype=torch.float64).requires_grad_()
    return made


@pytest.mark.parametrize("router", ["cosine", "learned"])
def test_triton_is_the_float64_layer_with_every_gradient(router):
    exact = arguments(router)
    inputs = {name: x.detach().float().requires_grad_() for name, x in exact.items()}
    threshold = torch.tensor([{"cosine": 0.9, "learned": 0.5}[router]])
    given = {"threshold": threshold, "cu_seqlens": torch.tensor(BOUNDS)}
    want, keep, score = ham_attention(**exact, **given, backend="torch")
    found, kept, scored = ham_attention(**inputs, **given, backend="triton")
    assert torch.equal(kept, keep) and 0.1 < keep.float().mean() < 0.9
    assert relative_error(scored, score) < 1e-5 and relative_error(found, want) < 1e-5
    have, expected = gradients(found, inputs), gradients(want, exact)
    assert max(relative_error(have[name], expected[name]) for name in expected) < 1e-4


@pytest.mark.parametrize("width", [64, 128])
def test_residuals_go_on_from_a_state(width):
    x = {n: y.detach() for n, y in make_inputs(1, BOUNDS[-1], heads=1, key=64, value=width).items()
         if n in ("k", "v", "log_decay", "beta")}
    state = torch.randn(len(BOUNDS) - 1, 1, 64, width, generator=torch.Generator().manual_seed(2))
    want = gated_delta_residual(**x, cu_seqlens=torch.tensor(BOUNDS), initial_state=state.double(), backend="torch")
    found = gated_delta_residual(**{n: y.float() for n, y in x.items()}, cu_seqlens=torch.tensor(BOUNDS),
                                 initial_state=state, backend="triton")
    assert relative_error(found, want) < 1e-5
