"""The Triton gated delta rule on the GPU: every launch configuration, determinism, splitting, no waiting."""

from __future__ import annotations

import pytest
import torch

from hola_kernels import gated_delta_rule
from hola_kernels.backend import triton_problem

if not torch.cuda.is_available() or triton_problem("cuda"):
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)

from hola_kernels.gated_delta.verify_cases import cases, limit, measure

pytestmark = pytest.mark.gpu
CASES = cases()


@pytest.mark.parametrize(("name", "run"), CASES, ids=[name for name, _ in CASES])
def test_every_configuration_is_within_the_contract(name, run):
    errors = run()
    assert not {output: error for output, error in errors.items() if not error <= limit(name, output)}


@pytest.mark.parametrize("length", [1, 63, 64, 65, 255, 256, 257, 500, 1000])
def test_lengths(length):
    errors = measure(dtype=torch.bfloat16, key=128, value=128, cu_seqlens=(0, length), decay=0.01, device="cuda")
    name = "gated_delta bfloat16"
    assert not {output: error for output, error in errors.items() if not error <= limit(name, output)}


def inputs(batch=4, length=1000, heads=4, dim=256):
    g = torch.Generator("cuda").manual_seed(0)
    made = {n: torch.randn(batch, length, heads, dim, generator=g, device="cuda").bfloat16() for n in "qkv"}
    made["log_decay"] = -torch.rand(batch, length, heads, generator=g, device="cuda")
    made["beta"] = torch.rand(batch, length, heads, generator=g, device="cuda")
    return {n: x.requires_grad_() for n, x in made.items()}


def everything(given):
    o, score, state = gated_delta_rule(**given, backend="triton")
    return o, score, state, *torch.autograd.grad(o.float().square().sum() + state.sum(), list(given.values()))


@pytest.mark.parametrize("shape", [{}, {"batch": 1, "length": 9000}, {"dim": 128}, {"dim": 64}])
def test_two_runs_agree_to_the_last_bit(shape):
    given = inputs(**shape)
    first = everything(given)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(given), strict=True))


def test_a_dense_call_does_not_wait_for_the_device():
    given = inputs(length=128)
    everything(given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
