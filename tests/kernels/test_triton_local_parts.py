"""The Triton cache attention with a sliding window, the token alone, no slots or no norm, under the interpreter."""

from __future__ import annotations

import pytest
import torch
from inputs import gradients, make_inputs, relative_error
from interpreted import only_interpreted

only_interpreted()

from hola_kernels import exact_attention, exact_read, hola_attention
from hola_kernels.exact_cache.verify_cases import limit, measure_read

TINY = {"heads": 1, "block": 16, "slots": 4, "device": "cpu", "dtype": torch.float32, "key": 16, "value": 16}
LOCAL = {"a block": {"local": "window", "window": 16}, "less": {"local": "window", "window": 7},
         "two blocks": {"local": "window", "window": 33}, "odd": {"local": "window", "window": 29},
         "itself": {"local": "none"}}


def check(errors: dict[str, float]) -> None:
    assert all(error < limit("float32", name) for name, error in errors.items()), errors


@pytest.mark.parametrize("local", LOCAL)
def test_a_window_beside_slots(local):
    check(measure_read(**TINY, lengths=[70], **LOCAL[local]))


def test_a_window_in_packed_documents_of_two_heads():
    check(measure_read(**TINY | {"heads": 2, "value": 32}, cu_seqlens=(0, 0, 1, 40, 57, 57, 110), **LOCAL["odd"]))


@pytest.mark.parametrize("options", [{}, LOCAL["two blocks"], LOCAL["itself"]], ids=str)
def test_without_slots(options):
    check(measure_read(**TINY | {"slots": 0}, cu_seqlens=(0, 37, 75), **options))


@pytest.mark.parametrize("options", [{}, LOCAL["odd"]], ids=str)
def test_without_a_norm(options):
    check(measure_read(**TINY, lengths=[40], read_norm="none", **options))


def test_no_query_reads_tiles_that_were_not_written():
    """Blocks of several tiles and a window shorter than one: most tiles of pairs are left as they are, NaN."""
    check(measure_read(**TINY | {"block": 48}, lengths=[130], local="window", window=5))


@pytest.mark.parametrize("options", [
    LOCAL["odd"], LOCAL["less"], {"slots": 0}, LOCAL["odd"] | {"slots": 0}], ids=str)
def test_pieces_equal_the_whole(options):
    inputs = {n: x for n, x in make_inputs(1, 75, heads=1, dtype=torch.float32).items()
              if n in ("q", "k", "v", "gamma_q", "gamma_k", "sink")}
    score = torch.rand(1, 75, 1, generator=torch.Generator().manual_seed(3))
    options = {"block": 16, "slots": 4, **options}
    whole, _ = exact_read(**inputs, score=score, **options, backend="torch")
    want, memory, parts = gradients(whole, inputs), None, []
    for a, b in ((0, 20), (20, 50), (50, 75)):
        piece = {n: x[:, a:b] if x.ndim > 2 else x for n, x in inputs.items()}
        part, memory = exact_read(**piece, score=score[:, a:b], memory=memory, **options, backend="triton")
        parts.append(part)
    found = torch.cat(parts, 1)
    have = gradients(found, inputs)
    assert relative_error(found, whole) < 1e-5
    assert all(relative_error(have[n], want[n]) < 1e-4 for n in want), {
        n: relative_error(have[n], want[n]) for n in want}


def test_a_state_that_is_read_late():
    """Packed and in pieces: the two operations on Triton kernels, against those of torch."""
    inputs = make_inputs(1, 75, heads=1, key=64, value=64, dtype=torch.float32)
    options = {"block": 16, "slots": 4, "local": "window", "window": 19, "state_delay": 19}
    bounds = torch.tensor([0, 0, 1, 30, 75])
    want, have = (hola_attention(**inputs, **options, cu_seqlens=bounds, backend=name) for name in ("torch", "triton"))
    assert relative_error(have, want) < 1e-5
    want, have = gradients(want, inputs), gradients(have, inputs)
    assert all(relative_error(have[n], want[n]) < 1e-4 for n in want)
    whole, memory, parts = hola_attention(**inputs, **options, backend="torch"), None, []
    for a, b in ((0, 20), (20, 50), (50, 75)):
        piece = {n: x[:, a:b] if x.ndim > 2 else x for n, x in inputs.items()}
        part, memory = hola_attention(**piece, **options, state=memory, return_state=True, backend="triton")
        parts.append(part)
    assert relative_error(torch.cat(parts, 1), whole) < 1e-5


@pytest.mark.parametrize("options", [
    {"score": "recency"}, {"score": "random", "rope_theta": 300.0, **LOCAL["odd"]},
    {"score": "betav", **LOCAL["itself"]}, {"score": "learned"}, {"slots": 0, **LOCAL["odd"]}], ids=str)
def test_the_exact_part_without_a_state(options):
    """Packed and in pieces, Triton kernels against torch in float64."""
    made = make_inputs(1, 75, heads=2)
    inputs = {name: made[name] for name in ("q", "k", "v", "gamma_q", "gamma_k", "sink")}
    if options.get("score") == "learned":
        inputs["route"] = torch.randn(1, 75, 2, generator=torch.Generator().manual_seed(3)).double().requires_grad_()
    options, bounds = {"block": 16, "slots": 4, **options}, torch.tensor([0, 0, 1, 30, 75])
    single = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
    want = exact_attention(**inputs, **options, cu_seqlens=bounds, backend="torch")
    have = exact_attention(**single, **options, cu_seqlens=bounds, backend="triton")
    assert relative_error(have, want) < 1e-5
    want, have = gradients(want, inputs), gradients(have, single)
    assert all(relative_error(have[n], want[n]) < 1e-4 for n in want)
    whole, memory, parts = exact_attention(**inputs, **options, backend="torch"), None, []
    for a, b in ((0, 20), (20, 50), (50, 75)):
        piece = {n: x[:, a:b] if x.ndim > 2 else x for n, x in single.items()}
        part, memory = exact_attention(**piece, **options, state=memory, return_state=True, backend="triton")
        parts.append(part)
    assert relative_error(torch.cat(parts, 1), whole) < 1e-5 and not memory.recurrent
