"""hola_attention with every merge of state and cache attention, with and without rotary positions in the read."""

from __future__ import annotations

import pytest
import torch
from inputs import gradients, make_inputs, relative_error
from memory_definition import merged, read_packed

from hola_kernels import KernelError, gated_delta_rule, hola_attention, hola_attention_step

PACKED = [0, 0, 1, 40, 55, 56, 120]
MERGES = ("add", "convex", "two")
READS = {"block": {"local": "block"}, "window": {"local": "window", "window": 21, "read_norm": "none"},
         "no cache": {"local": "window", "window": 9, "slots": 0, "read_norm": "l2"}}


def inputs_of(merge: str, rows: int = 1, length: int = PACKED[-1]) -> dict[str, torch.Tensor]:
    inputs = make_inputs(rows, length, key=8, value=6)
    if merge != "add":
        size = {"convex": 6, "two": 2}[merge]
        generator = torch.Generator().manual_seed(9)
        inputs["gate"] = torch.randn(rows, length, 2, size, generator=generator, dtype=torch.float64).requires_grad_()
    return inputs


def definition(inputs: dict[str, torch.Tensor], merge: str, score: str, **options) -> torch.Tensor:
    rule = {name: inputs[name] for name in ("q", "k", "v", "log_decay", "beta")}
    o_state, written, _ = gated_delta_rule(**rule, cu_seqlens=torch.tensor(PACKED), backend="reference")
    rank = written if score == "betae" else torch.arange(PACKED[-1])[None, :, None].expand_as(written).double()
    read = {name: inputs[name] for name in ("gamma_q", "gamma_k", "sink")}
    o_exact = read_packed(*(inputs[name] for name in "qkv"), rank.detach(), PACKED, **read, **options)
    return merged(o_state, o_exact, inputs["gate"], merge)


@pytest.mark.parametrize("rope_theta", [None, 500.0])
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_output_is_its_definition(backend, merge, read, rope_theta):
    inputs, options = inputs_of(merge), {"block": 16, "slots": 8, **READS[read], "rope_theta": rope_theta}
    score = "recency" if read == "no cache" else "betae"
    found = hola_attention(**inputs, **options, merge=merge, score=score, cu_seqlens=torch.tensor(PACKED),
                           backend=backend)
    expected = definition(inputs, merge, score, **options)
    assert relative_error(found, expected) < 1e-9
    want, have = gradients(expected, inputs), gradients(found, inputs)
    assert all(relative_error(have[name], want[name]) < 1e-9 for name in want)
    assert all(want[name].norm() > 0 for name in want)


@pytest.mark.parametrize("rope_theta", [None, 500.0])
@pytest.mark.parametrize("merge", MERGES)
def test_pieces_and_decoded_tokens_equal_the_whole(merge, rope_theta):
    with torch.no_grad():
        inputs = inputs_of(merge, rows=3, length=70)
        options = {"local": "window", "window": 21, "rope_theta": rope_theta, "merge": merge}
        sizes = {"block": 16, "slots": 8}
        whole = hola_attention(**inputs, **options, **sizes)
        by_token = {name for name, x in inputs.items() if x.ndim > 2}

        def piece(a: int, b: int) -> dict[str, torch.Tensor]:
            return {name: x[:, a:b] if name in by_token else x for name, x in inputs.items()}

        parts, state = [], None
        for a, b in ((0, 7), (7, 40), (40, 50)):
            o, state = hola_attention(**piece(a, b), **options, **sizes, state=state, return_state=True)
            parts.append(o)
        for t in range(50, 70):
            one = {name: x[:, 0] if name in by_token else x for name, x in piece(t, t + 1).items()}
            parts.append(hola_attention_step(**one, **options, state=state)[:, None])
        assert relative_error(torch.cat(parts, 1), whole) < 1e-12


def test_what_does_not_fit_is_refused():
    inputs = inputs_of("convex", rows=2, length=20)
    refused = (({"merge": "sum"}, "merge: 'sum' is not one of add, convex, two"),
               ({"merge": "two"}, r"gate \(2, 20, 2, 6\) must be \[2, 20, 2, 2\] for merge 'two'"),
               ({"merge": "add"}, r"gate \(2, 20, 2, 6\) must be \[2\] for merge 'add'"),
               ({"merge": "convex", "rope_theta": 0.0}, "rope_theta = 0.0 must be a finite number above 0"))
    for options, message in refused:
        with pytest.raises(KernelError, match=message):
            hola_attention(**inputs, **options)
    with pytest.raises(KernelError, match="gate must be a tensor"):
        hola_attention(**{**inputs, "gate": None})
    odd = make_inputs(1, 4, key=7, value=6)
    with pytest.raises(KernelError, match="must have an even K"):
        hola_attention(**odd, rope_theta=100.0)
