"""Tokens that forget everything: right for any log decay down to -inf, before and after, gradients as well."""

from __future__ import annotations

import pytest
import torch
from inputs import relative_error
from interpreted import INTERPRETED
from torch import Tensor

from hola_kernels import entering_gradient, gated_delta_rule, hola_attention, state_map
from hola_kernels.gated_delta.torch_chunked import CHUNK, cumulative_decay
from hola_kernels.verify_cases import attention_inputs

BACKEND = "triton" if INTERPRETED else "torch"
FORGET = (-40.0, -104.0, -1e3, -1e4, -1e9, -3e38, float("-inf"))
WHERE = {"one": (70,), "first of a chunk": (64,), "last of a chunk": (63,), "neighbours": (65, 66, 67),
         "many": range(3, 128, 5)}


def inputs_with(forget: float, where, rows: int = 1) -> dict[str, Tensor]:
    made = attention_inputs(rows, 140, 1, 64, 64, torch.float32, 1, "cpu")
    made = {n: made[n].detach() for n in ("q", "k", "v", "log_decay", "beta")}
    made["log_decay"] = made["log_decay"].clamp(max=-1e-3)
    made["log_decay"][:, list(where)] = forget
    return made


def run(inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    o, score, last = gated_delta_rule(**leaves, backend=backend)
    g = torch.Generator().manual_seed(2)
    weights = [torch.randn(x.shape, generator=g).to(x) for x in (o, last)]
    gradients = torch.autograd.grad([o, last], list(leaves.values()), weights)
    return {"o": o, "score": score, "last": last, **dict(zip(leaves, gradients, strict=True))}


def in_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: x.double() for n, x in inputs.items()}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("forget", FORGET if not INTERPRETED else FORGET[::3], ids=str)
def test_within_the_contract(forget, where):
    inputs = inputs_with(forget, WHERE[where])
    expected, found = run(in_float64(inputs), "reference"), run(inputs, BACKEND)
    for name, want in expected.items():
        assert relative_error(found[name], want) < (1e-5 if name in ("o", "score", "last") else 1e-4), name
    after = slice(max(WHERE[where]) + 1, None)  # by itself: what is forgotten may be larger
    assert relative_error(found["o"][:, after], expected["o"][:, after]) < 1e-5
    # a rate of decay multiplies its gradient by as much, so nothing but zero will do
    zero = inputs["log_decay"] < -200
    assert not found["log_decay"][zero].any()


@pytest.mark.parametrize("forget", [-1e4, float("-inf")])
def test_pieces(forget):
    inputs = inputs_with(forget, WHERE["neighbours"], rows=2)
    x = in_float64(inputs)
    names = ("k", "v", "log_decay", "beta")
    pairs = list(zip(state_map(**{n: inputs[n] for n in names}, backend=BACKEND),
                     state_map(**{n: x[n] for n in names}, backend="reference"), strict=True))
    names = ("q", "k", "log_decay", "beta")
    pairs.append((entering_gradient(**{n: inputs[n] for n in names}, do=inputs["v"], backend=BACKEND),
                  entering_gradient(**{n: x[n] for n in names}, do=x["v"], backend="reference")))
    assert all(relative_error(a, b) < 1e-5 for a, b in pairs)


if INTERPRETED:
    def test_in_spans(monkeypatch):
        from hola_kernels.gated_delta import triton_rule

        monkeypatch.setattr(triton_rule, "span_chunks", lambda *_: 1)
        test_within_the_contract(-1e9, "many")
else:
    @pytest.mark.parametrize("forget", [-1e4, float("-inf")])
    def test_float64_and_the_whole_operation(forget):
        inputs = {n: x.detach() for n, x in attention_inputs(1, 140, 1, 16, 16, torch.float64, 0, "cpu").items()}
        inputs["log_decay"] = inputs["log_decay"].double()
        inputs["log_decay"][:, 70] = forget
        found, want = (hola_attention(**inputs, block=32, slots=8, backend=name) for name in ("torch", "reference"))
        assert relative_error(found, want) < 1e-9

    def test_ordinary_decays_are_the_plain_sums():
        decay = -torch.rand(3, 2, CHUNK, generator=torch.Generator().manual_seed(0)) / 2.1
        g, low = cumulative_decay(decay)
        assert torch.equal(g, decay.cumsum(-1)) and not low.any()

    def test_sums_of_hard_decays_keep_their_digits():
        g = torch.Generator().manual_seed(0)
        rare, size = (torch.rand(50, 1, CHUNK, generator=g) for _ in range(2))
        decay = torch.where(rare < 0.2, -999.0, -0.1) * size
        high, low = cumulative_decay(decay)
        exact = decay.double().cumsum(-1)
        between = (high[..., 1:] - high[..., :-1]) + (low[..., 1:] - low[..., :-1])
        near = exact.diff() > -1
        assert (between.double() - exact.diff())[near].abs().max() < 1e-6

    def test_missing_numbers_are_not_covered_up():
        inputs = inputs_with(float("nan"), (70,))
        o = gated_delta_rule(**inputs, backend="torch")[0]
        assert o[:, 71:].isnan().all() and o[:, :64].isfinite().all()
