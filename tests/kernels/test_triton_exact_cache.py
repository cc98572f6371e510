"""The Triton cache attention, selection and short convolution under Triton's interpreter, tiny shapes.

It shows errors of indexing, masks and formulas; miscompiles, rounding of 16-bit products and races are for
`python -m hola_kernels.verify` on a GPU.
"""

from __future__ import annotations

import pytest
import test_short_conv as conv_tests
import torch
from inputs import relative_error
from interpreted import only_interpreted

only_interpreted()

from hola_kernels import exact_read, gated_rms_norm, select_cache, short_conv
from hola_kernels.block_table import BlockTable
from hola_kernels.exact_cache import read_configs, selection_plan, triton_key_gradient, triton_read, triton_split_read
from hola_kernels.exact_cache.verify_cases import limit, measure_pieces, measure_read, measure_split
from hola_kernels.short_conv import triton_strips

TINY = {"heads": 1, "block": 16, "slots": 4, "device": "cpu"}


@pytest.fixture
def small_spans(monkeypatch):
    """Spans of two blocks of 16, so that short sequences take every step of the selection."""
    selection_plan._equal_length_plan.cache_clear()
    monkeypatch.setattr(selection_plan, "CANDIDATES", 20)
    yield
    selection_plan._equal_length_plan.cache_clear()


@pytest.fixture
def two_blocks_a_window(monkeypatch):
    """The gradients of cached tokens are summed over windows of two blocks, then over windows."""
    monkeypatch.setattr(triton_key_gradient, "RUN_WINDOW", 2)


def test_rows_of_two_documents_and_unequal_dimensions():
    check(measure_read(dtype=torch.float32, key=16, value=32, lengths=[37, 37], **TINY))


def test_packed_documents_with_empty_and_one_token_ones():
    check(measure_read(dtype=torch.float32, key=16, value=16, cu_seqlens=(0, 0, 1, 34, 52, 52), **TINY))


def test_blocks_wider_than_a_tile_and_slots_that_fill_none():
    sizes = {**TINY, "block": 24, "slots": 20, "heads": 2}
    check(measure_read(dtype=torch.float32, key=16, value=16, lengths=[60], read_norm="l2", **sizes))


def test_the_tiles_of_gpus_with_little_shared_memory(monkeypatch):
    monkeypatch.setattr(triton_read, "read_config", lambda *_: read_configs.SMALL_TABLE[True, 256])
    check(measure_read(dtype=torch.float16, key=32, value=32, cu_seqlens=(0, 70, 300), **{**TINY, "block": 128}),
          "float16")


@pytest.mark.parametrize("cu_seqlens", [(0, 150), (0, 20, 20, 140, 170)], ids=["one", "packed"])
def test_tokens_that_stay_cached_over_many_windows_of_blocks(cu_seqlens, two_blocks_a_window):
    check(measure_read(dtype=torch.float32, key=16, value=32, cu_seqlens=cu_seqlens, **TINY))


def test_pieces_hand_the_memory_on_over_windows_of_blocks(two_blocks_a_window):
    check(measure_pieces(dtype=torch.float32, bounds=(0, 50, 57, 150), key=16, **TINY))


def test_half_precision():
    check(measure_read(dtype=torch.float16, key=32, value=16, lengths=[40], **TINY), "float16")


def test_pieces_hand_the_memory_on():
    check(measure_pieces(dtype=torch.float32, bounds=(0, 7, 7, 20, 50), key=16, **TINY))


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("late", [0, 5, 16, 23])
def test_in_two_passes_with_tokens_that_come_late(late, sink, monkeypatch):
    """Documents of no, one and many tokens, blocks wider than a tile, slots that fill none, values in two parts."""
    monkeypatch.setattr(triton_split_read, "ALIGNED", 1)
    monkeypatch.setattr(triton_split_read, "VALUE_WIDTH", 16)
    sizes = {**TINY, "block": 24, "slots": 20, "heads": 2}
    check(measure_split(dtype=torch.float32, key=16, value=32, cu_seqlens=(0, 30, 30, 31, 90), late=late, sink=sink,
                        **sizes), outputs=3)


def test_in_two_passes_where_no_block_has_a_past():
    for late in (0, 7):
        check(measure_split(dtype=torch.float32, key=32, value=16, cu_seqlens=(0, 9, 10, 26), late=late, **TINY),
              outputs=3)


def test_in_two_passes_in_half_precision():
    check(measure_split(dtype=torch.float16, key=16, value=16, cu_seqlens=(0, 40, 60), late=3, **TINY), "float16",
          outputs=3)


def test_runs_of_blocks_are_aligned_and_leave_none_out():
    def runs(blocks):
        table = BlockTable(16, torch.zeros(blocks, 5), torch.zeros(2), blocks)
        read = triton_split_read.SplitRead(*[None] * 7, table, *[None] * 8)
        return read.runs((2, 1, 3))

    assert runs(256) == [(0, 84), (84, 128), (128, 256)]
    assert runs(5) == [(0, 0), (0, 0), (0, 5)]
    assert runs(0) == [(0, 0)] * 3


def test_without_a_sink_a_block_without_a_past_reads_itself():
    x = torch.randn(1, 20, 1, 16)
    shared = {"q": x, "k": x, "v": x, "score": x[..., 0].abs(), "gamma_q": torch.ones(16),
              "gamma_k": torch.ones(16), "sink": None, "block": 16, "slots": 4}
    found, expected = (exact_read(**shared, backend=name)[0] for name in ("triton", "torch"))
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("cu_seqlens", [None, [0, 0, 1, 40, 96]])
def test_selection_equals_the_sorted_one_with_ties_over_spans(cu_seqlens, small_spans):
    score = torch.randint(-2, 5, (1, 96, 1), generator=torch.Generator().manual_seed(2)).float()
    options = {"block": 16, "slots": 4, "cu_seqlens": None if cu_seqlens is None else torch.tensor(cu_seqlens)}
    found, expected = (select_cache(score=score, backend=name, **options) for name in ("triton", "torch"))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_short_convolution(width, packed, monkeypatch):
    monkeypatch.setattr(triton_strips, "FORWARD_STRIP", 8)
    monkeypatch.setattr(triton_strips, "BACKWARD_STRIP", 6)
    monkeypatch.setattr(triton_strips, "CHANNELS", 16)
    # 17 and 13 tokens: strips of 8, 8, 1 and 8, 5 forward, of 6, 6, 5 and 6, 6, 1 back
    cu_seqlens = [0, 0, 1, 3, 20, 20, 33] if packed else None
    options = {"cu_seqlens": torch.tensor(cu_seqlens)} if packed else {}
    shape = (1, cu_seqlens[-1]) if packed else (2, 17)
    inputs = conv_tests.make(*shape, channels=20, width=width, sequences=len(cu_seqlens) - 1 if packed else None,
                                  dtype=torch.float32)
    outputs = [short_conv(**inputs, return_tail=True, backend=name, **options) for name in ("triton", "torch")]
    pairs = [*zip(*outputs, strict=True),
             *zip(*(conv_tests.gradients(o, inputs) for o in outputs), strict=True)]
    assert max(relative_error(a, b) for a, b in pairs if b.numel()) < 1e-6


@pytest.mark.parametrize(("widths", "strips"), [((16, 48, 32), "short"), ((32, 16), "long"), ((16, 7, 9), "short")])
def test_short_convolution_in_sections(widths, strips, monkeypatch):
    """Each section a tensor of its own, from a part of a wider row: the same numbers as all at once."""
    monkeypatch.setattr(triton_strips, "LEAST_CHANNELS", 16)
    monkeypatch.setattr(triton_strips, "BACKWARD_STRIP", 6)
    monkeypatch.setattr(triton_strips, "LONG_BACKWARD_STRIP", 8)
    monkeypatch.setattr(triton_strips, "ENOUGH_PROGRAMS", 1 if strips == "long" else 10**6)
    cu_seqlens, columns = [0, 0, 1, 3, 24], sum(widths)
    inputs = conv_tests.make(1, cu_seqlens[-1], channels=columns + 5, sequences=len(cu_seqlens) - 1,
                             dtype=torch.float32)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    options = {"x": leaves["x"][..., 2: 2 + columns], "weight": leaves["weight"][:columns],
               "tail": leaves["tail"][..., :columns], "cu_seqlens": torch.tensor(cu_seqlens), "return_tail": True}
    expected, after = short_conv(**options, backend="torch")
    found, tail = short_conv(**options, widths=widths, backend="triton")
    assert [tuple(y.shape) for y in found] == [(1, cu_seqlens[-1], width) for width in widths]
    assert all(y.is_contiguous() for y in found)
    assert relative_error(torch.cat(found, -1), expected) < 1e-6 and torch.equal(tail, after)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(6))
    wanted = torch.autograd.grad(expected, list(leaves.values()), weights)
    used = weights.split(widths, -1)
    have = torch.autograd.grad(found, list(leaves.values()), used)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(have, wanted, strict=True))
    first = short_conv(**options, widths=widths, backend="triton")[0][0]  # the others' gradients are None
    have = torch.autograd.grad(first, leaves["x"], used[0])[0]
    alone = torch.cat([used[0], torch.zeros_like(weights[..., widths[0]:])], -1)
    wanted = torch.autograd.grad(short_conv(**options, backend="torch")[0], leaves["x"], alone)[0]
    assert relative_error(have, wanted) < 1e-6


def test_gradients_left_in_a_room_of_a_wider_tensor():
    """The convolution's and the norm's gradients, written beside each other, are those made on their own."""
    tokens, heads, width = 11, 2, 16
    projected = torch.randn(1, tokens, 3 * heads * width, generator=torch.Generator().manual_seed(5))
    x, gate, _ = projected.split(heads * width, -1)
    weight, scale = torch.randn(heads * width, 4), torch.randn(width)
    room = torch.full_like(projected, float("nan"))
    dx_buffer, dgate_buffer, untouched = room.split(heads * width, -1)

    def by_head(tensor):
        return tensor.unflatten(-1, (heads, width))

    def gradients(**rooms):
        leaves = [part.detach().requires_grad_() for part in (x, gate)]
        y = short_conv(x=leaves[0], weight=weight, dx_buffer=rooms.get("dx"), backend="triton")
        o = gated_rms_norm(x=by_head(y), gate=by_head(leaves[1]), weight=scale, dgate_buffer=rooms.get("dgate"),
                           backend="triton")
        return torch.autograd.grad(o.square().sum(), leaves)

    expected = gradients()
    found = gradients(dx=lambda: dx_buffer, dgate=lambda: by_head(dgate_buffer))
    for have, want, buffer in zip(found, expected, (dx_buffer, dgate_buffer), strict=True):
        assert torch.equal(have, want)
        assert have.data_ptr() == buffer.data_ptr()
    assert untouched.isnan().all()


def check(errors, dtype="float32", outputs=7):
    wrong = {output: error for output, error in errors.items() if not error < limit(dtype, output)}
    assert len(errors) >= outputs and not wrong
