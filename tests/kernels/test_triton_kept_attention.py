"""The Triton kernels of attention to kept tokens under Triton's interpreter, tiny shapes.

It shows errors of indexing, masks and formulas; miscompiles, rounding and races are for
`python -m hola_kernels.verify` on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from interpreted import only_interpreted

only_interpreted()

from hola_kernels.kept_attention.lists import kept_lists, key_tiles
from hola_kernels.kept_attention.verify_cases import limit, measure, measure_isolated, measure_pieces

SMALL = {"device": "cpu", "key": 16, "value": 16}


@pytest.mark.parametrize("length", [1, 15, 16, 17, 65])
def test_lengths_around_a_tile(length):
    check(measure(dtype=torch.float32, lengths=[length] * 2, **SMALL))


@pytest.mark.parametrize("share", [None, 0.0, 1.0])
def test_packed_documents_with_empty_and_one_token_ones(share):
    check(measure(dtype=torch.float32, cu_seqlens=(0, 0, 1, 34, 52, 52), share=share, heads=3, **SMALL))


def test_without_sink_and_log_weights_and_with_unequal_widths():
    check(measure(dtype=torch.float32, key=16, value=32, lengths=[40], plain=True, device="cpu"), outputs=4)
    check(measure(dtype=torch.float32, key=32, value=16, lengths=[40], device="cpu"))


def test_half_precision():
    check(measure(dtype=torch.float16, key=32, value=16, lengths=[40], device="cpu"), "float16")


def test_a_huge_sink():
    check(measure(dtype=torch.float32, lengths=[20], sink=3e38, **SMALL))


def test_pieces_hand_the_state_on():
    check(measure_pieces(dtype=torch.float32, bounds=(0, 1, 20, 20, 45), **SMALL), outputs=1)


def test_other_documents_are_the_same_bits():
    check(measure_isolated(dtype=torch.float32, width=16, cu_seqlens=(0, 1, 20, 39, 70), device="cpu"), outputs=1)


def test_lists_and_their_tiles():
    """Per head the kept tokens in order; tiles of 4 that hold each of them once and cross no document."""
    g = torch.Generator().manual_seed(0)
    cu_seqlens = torch.tensor([0, 0, 1, 9, 30, 30])
    keep = torch.rand(30, 3, generator=g) < torch.tensor([0.0, 0.4, 1.0])
    lists, end = kept_lists(keep, cu_seqlens), keep.sum(0)
    tiles = key_tiles(lists, cu_seqlens, 4)
    for h in range(3):
        kept = torch.nonzero(keep[:, h]).squeeze(1)
        assert torch.equal(lists.rows[h, : end[h]].long(), kept)
        assert lists.before[h].tolist() == [int((kept < t).sum()) for t in range(30)]
        indices = []
        for first, count, last in tiles[h].tolist():
            rows = lists.rows[h, first:first + count].tolist()
            indices += range(first, first + count)
            document = torch.bucketize(torch.tensor(rows), cu_seqlens[1:], right=True)
            assert not count or (document.unique().numel() == 1 and last == cu_seqlens[document[0] + 1])
        assert indices == list(range(end[h]))


def check(errors, dtype="float32", outputs=6):
    wrong = {output: error for output, error in errors.items() if not error < limit(dtype, output)}
    assert len(errors) >= outputs and not wrong
