"""Tables made once: from a tensor that nobody writes into any more, or from a shape.

All layers of a model have the same documents: the tables made from cu_seqlens for the first layer serve the others, and
a copy to the device happens once. A caller's tensor may be filled again at any time (by a broadcast, through numpy or
`.data`), and no version number tells. So tables belong to tensors of this package, which are marked with
`mark_constant`: copies of what a caller gave (`packed.PackedDocuments`), or made from shapes.

A CUDA graph is another matter. What is made while it is recorded has no numbers until it is replayed. So such tables
belong to what was made in the same recording, and a recording holds on to every other table it meets, whose memory it
will read again at every replay.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MOST_SHAPES = 64  # results held of a function of sizes
_recording: Recording | None = None


@dataclass
class _Tables:
    """What was made from a tensor. captured: the tensor itself was made while a CUDA graph was recorded."""

    captured: bool
    made: dict[Hashable, Any] = field(default_factory=dict)


class Recording:
    """What a graph reads besides its inputs; to be held as long as the graph is replayed."""

    def __init__(self) -> None:
        self.tables: dict[tuple[int, Hashable], Any] = {}
        self.held: list[Any] = []


@contextmanager
def recording() -> Iterator[Recording]:
    """Around the recording of a CUDA graph of these operations: its tables are made once, and held.

    Without it a graph makes the tables of its documents again in every call, and those of rows without documents are
    not held for it.
    """
    global _recording
    before, _recording = _recording, Recording()
    try:
        yield _recording
    finally:
        _recording = before


def is_capturing() -> bool:
    """Whether a CUDA graph is being recorded."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def mark_constant(tensor: Tensor) -> Tensor:
    """The tensor, marked as one that nobody writes into from here on: what is made from it is stored with it."""
    if getattr(tensor, "_hola_tables", None) is None:
        tensor._hola_tables = _Tables(is_capturing())
    return tensor


def is_constant(tensor: Tensor) -> bool:
    return getattr(tensor, "_hola_tables", None) is not None


def memoise(tensor: Tensor, key: Hashable, make: Callable[[], Any]) -> Any:
    """make() for this tensor and key: once where the tensor is constant, every time where it is not."""
    tables: _Tables | None = getattr(tensor, "_hola_tables", None)
    if tables is None:
        return make()
    if key not in tables.made:
        if is_capturing() and not tables.captured:
            return _of_recording(tensor, key, make)
        tables.made[key] = _plain(make)
    return hold(tables.made[key])


def by_shape(make: Callable[..., Any]) -> Callable[..., Any]:
    """A function of sizes whose last results are held: functools.lru_cache, known to recordings."""
    results: OrderedDict[Hashable, Any] = OrderedDict()

    @functools.wraps(make)
    def found(*arguments: Hashable, **options: Hashable) -> Any:
        key = (arguments, tuple(sorted(options.items())))
        if key not in results:
            made = _plain(lambda: make(*arguments, **options))
            if is_capturing():  # without numbers until the graph is replayed: not for anybody else
                return hold(made)
            results[key] = made
            while len(results) > MOST_SHAPES:
                results.popitem(last=False)
        results.move_to_end(key)
        return hold(results[key])

    found.cache_clear = results.clear
    return found


def hold(made: Any) -> Any:
    """What a recording under way must hold."""
    if _recording is not None:
        _recording.held.append(made)
    return made


def _plain(make: Callable[[], Any]) -> Any:
    """make() outside of inference mode: its tensors serve training as well."""
    with torch.inference_mode(False), torch.no_grad():
        return make()


def _of_recording(tensor: Tensor, key: Hashable, make: Callable[[], Any]) -> Any:
    if _recording is None:
        return _plain(make)
    entry = (id(tensor), key)
    if entry not in _recording.tables:
        _recording.held.append(tensor)  # its number is its own as long as it lives
        _recording.tables[entry] = _plain(make)
    return _recording.tables[entry]
