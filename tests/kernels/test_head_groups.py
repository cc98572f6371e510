"""Fewer heads of q and k than of v, a scale of the state's output, and graph breaks under torch.compile."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from inputs import gradients, make_inputs, relative_error

from hola_kernels import KernelError, gated_delta_rule, hola_attention

TOKENS = ("q", "k", "v", "log_decay", "beta")
SIZES = {"block": 16, "slots": 4}


def grouped(length: int = 70) -> dict[str, torch.Tensor]:
    """Two heads of q and k, six of v."""
    inputs = make_inputs(1, length, heads=6)
    few = make_inputs(1, length, heads=2, seed=4)
    return inputs | {"q": few["q"], "k": few["k"]}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("operation", [gated_delta_rule, hola_attention])
def test_a_head_of_keys_serves_its_group_of_values(operation, backend):
    inputs = grouped()
    options = SIZES if operation is hola_attention else {}
    if operation is gated_delta_rule:
        inputs = {name: inputs[name] for name in TOKENS}

    def first(given):
        found = operation(**given, **options, backend=backend)
        return found if operation is hola_attention else found[0]

    found = first(inputs)
    expected = first(inputs | {n: inputs[n][:, :, [0, 0, 0, 1, 1, 1]] for n in ("q", "k")})
    assert torch.equal(found, expected)
    want, have = gradients(expected, inputs), gradients(found, inputs)
    assert all(torch.equal(have[n], want[n]) for n in want) and have["k"].shape == inputs["k"].shape


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_scale_is_that_of_the_state_alone(backend):
    inputs = make_inputs(1, 60, heads=1)
    tokens = {name: inputs[name] for name in TOKENS}
    plain, scaled = (gated_delta_rule(**tokens, scale=scale, backend=backend) for scale in (None, 0.5))
    assert relative_error(scaled[0], plain[0] * (0.5 * 4)) < 1e-14  # K is 16
    assert torch.equal(scaled[1], plain[1]) and torch.equal(scaled[2], plain[2])
    whole, doubled = (hola_attention(**inputs, **SIZES, scale=scale, backend=backend) for scale in (None, 0.5))
    assert relative_error(doubled - whole, plain[0]) < 1e-12


def test_heads_and_scales_that_are_not_possible_are_named():
    inputs = {name: x for name, x in make_inputs(1, 5, heads=3).items() if name in TOKENS}
    with pytest.raises(KernelError, match="v has 3 heads, which is not a multiple of the 2 of q"):
        gated_delta_rule(**inputs | {n: inputs[n][:, :, :2] for n in ("q", "k")})
    with pytest.raises(KernelError, match="scale = nan must be a finite number"):
        gated_delta_rule(**inputs, scale=float("nan"))


@pytest.mark.long
def test_torch_compile_breaks_once_an_operation_and_for_no_other_reason():
    code = """
import torch
from hola_kernels.modules import HolaAttention
layer = HolaAttention(32, 2, 16, block=16, slots=4)
found = torch._dynamo.explain(torch.nn.Sequential(torch.nn.Linear(32, 32), layer))(torch.randn(2, 40, 32))
for reason in found.break_reasons:
    print("Skip inlining `torch.compiler.disable()`d function" in str(reason.reason))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert 1 <= len(done.stdout.split()) <= 5 and "False" not in done.stdout, done.stdout + done.stderr
