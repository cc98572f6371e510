"""The cache attention with a block, a sliding window or nothing but the token itself as local part, and any slots."""

from __future__ import annotations

import pytest
import torch
from inputs import gradients, make_inputs, relative_error
from memory_definition import read_document, read_packed

from hola_kernels import exact_read

LOCAL = {"block": {"local": "block"}, "window of 1": {"local": "window", "window": 1},
         "window in a block": {"local": "window", "window": 11}, "window of a block": {"local": "window", "window": 16},
         "window of two blocks": {"local": "window", "window": 33}, "window of all": {"local": "window", "window": 500},
         "none": {"local": "none"}}
READ = ("q", "k", "v", "gamma_q", "gamma_k", "sink")
PACKED = [0, 0, 1, 40, 55, 56, 120]


def read_inputs(length: int, **choices) -> tuple[dict, torch.Tensor]:
    inputs = make_inputs(1, length, key=8, value=8, **choices)
    score = torch.rand(1, length, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    score[:, ::5] = 0.5  # ties
    return {name: inputs[name] for name in READ}, score


@pytest.mark.parametrize("slots", [0, 1, 8, 64])
@pytest.mark.parametrize("local", LOCAL)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_read_is_its_definition(backend, local, slots):
    inputs, score = read_inputs(90)
    options = {"block": 16, "slots": slots, **LOCAL[local]}
    found, _ = exact_read(**inputs, score=score, backend=backend, **options)
    expected = read_document(*(inputs[n][0] for n in "qkv"), score[0], *(inputs[n] for n in READ[3:]), **options)[None]
    assert relative_error(found, expected) < 1e-12
    want, have = gradients(expected, inputs), gradients(found, inputs)
    assert all(relative_error(have[n], want[n]) < 1e-9 for n in want)


@pytest.mark.parametrize("read_norm", ["rms", "l2", "none"])
@pytest.mark.parametrize("local", ["block", "window in a block", "none"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_norms_and_packed_documents(backend, local, read_norm):
    inputs, score = read_inputs(PACKED[-1])
    options = {"block": 16, "slots": 8, "read_norm": read_norm, **LOCAL[local]}
    found, _ = exact_read(**inputs, score=score, backend=backend, cu_seqlens=torch.tensor(PACKED), **options)
    expected = read_packed(*(inputs[n] for n in "qkv"), score, PACKED, **{n: inputs[n] for n in READ[3:]}, **options)
    assert relative_error(found, expected) < 1e-12
    want, have = gradients(expected, inputs), gradients(found, inputs)
    assert all(relative_error(have[n], want[n]) < 1e-9 for n in want)


@pytest.mark.parametrize("local", LOCAL)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_reading_in_pieces_equals_reading_whole(backend, local):
    inputs, score = read_inputs(100)
    options = {"block": 16, "slots": 8, "backend": backend, **LOCAL[local]}
    whole, last = exact_read(**inputs, score=score, **options)
    memory, parts = None, []
    for a, b in ((0, 7), (7, 40), (40, 40), (40, 64), (64, 65), (65, 100)):
        piece = {n: x[:, a:b] if x.ndim > 2 else x for n, x in inputs.items()}
        part, memory = exact_read(**piece, score=score[:, a:b], memory=memory, **options)
        parts.append(part)
    found = torch.cat(parts, 1)
    assert relative_error(found, whole) < 1e-12
    want, have = gradients(whole, inputs), gradients(found, inputs)
    assert all(relative_error(have[n], want[n]) < 1e-9 for n in want)
    for name, expected in last.tensors().items():
        assert torch.allclose(getattr(memory, name).double(), expected.double(), atol=1e-12), name
