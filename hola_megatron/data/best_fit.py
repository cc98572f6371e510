"""Packing that keeps documents whole.

A document `[bos] text [eos]` of at most T + 1 tokens lies in one sample, uncut. Of a longer one every full piece of
T + 1 tokens is a sample (consecutive pieces share a token, as in packing.py, so that each token is predicted once). Its
rest is packed like a document. Documents are collected in a window of WINDOW_SAMPLES samples' worth of tokens, and a
window is packed by best-fit decreasing: the longest document first, each into the sample with the least room that still
holds it. What is left over in a sample is padding, which no loss counts.

The result depends on the documents and their order alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hola_megatron.data.packing import Sample

WINDOW_SAMPLES = 1024


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Bins of `room` tokens for items of these lengths (1 .. room): in each the items' numbers, ascending.

    The bins are ordered by their first item. Equal lengths are taken in their order, and of bins with equal room the
    one that has had it for the shortest time.
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> bins
    rooms = 0  # bit r is set where with_room[r] has bins
    for item in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        length = lengths[item]
        fitting = rooms >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            number = with_room[left].pop()
            if not with_room[left]:
                rooms ^= 1 << left
            bins[number].append(item)
        else:
            left, number = room, len(bins)
            bins.append([item])
        left -= length
        with_room.setdefault(left, []).append(number)
        rooms |= 1 << left
    return sorted((sorted(items) for items in bins), key=lambda items: items[0])


class WholePacker:
    """As `Packer`, with documents kept whole; samples come a window at a time.

    Attributes:
        tokens: of all documents so far, bos and eos included.
        padding: places of the samples so far that hold no token.

    Args:
        sequence_length, bos_id, eos_id, dtype: as for `Packer`.
        window: samples' worth of tokens that are packed together; None is WINDOW_SAMPLES.
    """

    def __init__(self, sequence_length: int, bos_id: int | None, eos_id: int, dtype: np.dtype,
                 window: int | None = None):
        self.tokens = self.padding = 0
        self._room = sequence_length + 1
        self._head = np.array([] if bos_id is None else [bos_id], dtype)
        self._tail = np.array([eos_id], dtype)
        self._limit = (window or WINDOW_SAMPLES) * self._room
        self._waiting: list[tuple[np.ndarray, bool]] = []  # what is to be packed, and whether its document begins there
        self._held = 0  # tokens of it

    def add(self, ids: Sequence[int] | np.ndarray) -> list[Sample]:
        """Append one document (ids without special tokens); return the samples of a window that is now full."""
        document = np.concatenate([self._head, np.asarray(ids, self._tail.dtype), self._tail])
        self.tokens += len(document)
        begin = 0
        while begin == 0 or len(document) - begin > 1:  # one token is left: it has been predicted
            piece = document[begin : begin + self._room]
            if len(piece) > 1:  # a document of nothing but eos has nothing to predict
                self._waiting.append((piece, begin == 0))
                self._held += len(piece)
            begin += self._room - 1
        return self._pack() if self._held >= self._limit else []

    def finish(self) -> list[Sample]:
        """The samples of what waits."""
        return self._pack()

    def state(self) -> dict[str, Any] | None:
        """As `Packer.state`; None while documents wait."""
        if self._waiting:
            return None
        return {"tokens": self.tokens, "padding": self.padding, "buffer": np.empty(0, self._tail.dtype), "starts": []}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.tokens, self.padding = state["tokens"], state["padding"]

    def _pack(self) -> list[Sample]:
        pieces = self._waiting
        self._waiting, self._held = [], 0
        return [self._sample([pieces[number] for number in items])
                for items in best_fit([len(piece) for piece, _ in pieces], self._room)]

    def _sample(self, pieces: list[tuple[np.ndarray, bool]]) -> Sample:
        """Pieces one after the other, then eos to the end. The model's state starts anew at each of them."""
        tokens = np.full(self._room, self._tail[0], self._tail.dtype)
        starts, at = [], 0
        for piece, begins in pieces:
            if begins or at:
                starts.append(at)
            tokens[at : at + len(piece)] = piece
            at += len(piece)
        self.padding += self._room - at
        return Sample(tokens, np.array(starts, np.int32), at)
