"""Tables made once: from a tensor, kept as long as that very tensor lives and is not changed, or from a shape.

All layers of a model cut their tokens at the same documents: the tables made from
cu_seqlens for the first layer serve the others, and a copy to the device happens once.

A CUDA graph is another matter. What is made while it is recorded has no numbers until it is replayed, and what was made
before keeps the numbers of before. So a recording has tables of its own, and holds on to every other table it
meets, whose memory it will read again at every replay.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_kept: dict[int, tuple[weakref.ref, int, dict[Hashable, Any]]] = {}
_recording: Recording | None = None


class Recording:
    """What a graph reads besides its inputs; to be kept as long as the graph is replayed."""

    def __init__(self) -> None:
        self.tables: dict[tuple[int, Hashable], Any] = {}
        self.held: list[Any] = []


@contextmanager
def recording() -> Iterator[Recording]:
    """Around the recording of a CUDA graph of these operations: its tables are made once, and held.

    Without it a graph makes the tables of its documents again in every call, and those of rows without documents are
    kept by no one for it.
    """
    global _recording
    before, _recording = _recording, Recording()
    try:
        yield _recording
    finally:
        _recording = before


def remember(tensor: Tensor, key: Hashable, make: Callable[[], Any]) -> Any:
    """make() for this tensor and key, once."""
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return _of_recording(tensor, key, make)
    if tensor.is_inference():  # made in inference mode: no version by which a change could be told
        return make()
    number = id(tensor)
    kept = _kept.get(number)
    if kept is None or kept[0]() is not tensor or kept[1] != tensor._version:
        kept = (weakref.ref(tensor, lambda _: _kept.pop(number, None)), tensor._version, {})
        _kept[number] = kept
    if key not in kept[2]:
        kept[2][key] = make()
    return hold(kept[2][key])


def by_shape(make: Callable[..., Any]) -> Callable[..., Any]:
    """A function of sizes whose last results are kept: functools.lru_cache, known to recordings."""
    cached = functools.lru_cache(maxsize=64)(make)

    @functools.wraps(make)
    def found(*arguments: Hashable, **options: Hashable) -> Any:
        return hold(cached(*arguments, **options))

    found.cache_clear = cached.cache_clear
    return found


def hold(made: Any) -> Any:
    """What a recording under way must keep."""
    if _recording is not None:
        _recording.held.append(made)
    return made


def _of_recording(tensor: Tensor, key: Hashable, make: Callable[[], Any]) -> Any:
    if _recording is None:
        return make()
    place = (id(tensor), key)
    if place not in _recording.tables:
        _recording.held.append(tensor)  # its number is its own as long as it lives
        _recording.tables[place] = make()
    return _recording.tables[place]
