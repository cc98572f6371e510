"""Things made from a tensor, kept as long as that very tensor lives and is not changed.

All layers of a model cut their tokens at the same documents: the tables made from
cu_seqlens for the first layer serve the others, and a copy to the device happens once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

_kept: dict[int, tuple[weakref.ref, int, dict[Hashable, Any]]] = {}


def remember(tensor: Tensor, key: Hashable, make: Callable[[], Any]) -> Any:
    """make() for this tensor and key, once."""
    if tensor.is_inference():  # made in inference mode: no version by which a change could be told
        return make()
    number = id(tensor)
    kept = _kept.get(number)
    if kept is None or kept[0]() is not tensor or kept[1] != tensor._version:
        kept = (weakref.ref(tensor, lambda _: _kept.pop(number, None)), tensor._version, {})
        _kept[number] = kept
    if key not in kept[2]:
        kept[2][key] = make()
    return kept[2][key]
