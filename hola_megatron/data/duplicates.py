"""Documents that were there before, told by a 64-bit hash of their text.

Two different texts have the same hash by chance once in 2^64 pairs: with a probability of 0.03 % among 100 million
documents.
"""

from __future__ import annotations

import numpy as np
import xxhash

_RECENT = 1 << 20


class SeenTexts:
    """Hashes of texts; about 8 bytes each, and 100 MB at most besides.

    Args:
        hashes: of the texts that were there before, in their order.
    """

    def __init__(self, hashes: np.ndarray | None = None):
        known = np.empty(0, np.uint64) if hashes is None else hashes
        self._sorted = np.unique(known)
        self._recent: set[int] = set()
        self._new: list[int] = []
        self.count = len(known)

    def add(self, text: bytes) -> bool:
        """Whether this text was there before; it is now."""
        value = xxhash.xxh3_64_intdigest(text)
        self._new.append(value)
        self.count += 1
        if value in self._recent or self._is_sorted(value):
            return True
        self._recent.add(value)
        if len(self._recent) >= _RECENT:
            self._sorted = np.union1d(self._sorted, np.fromiter(self._recent, np.uint64, len(self._recent)))
            self._recent.clear()
        return False

    def take_new(self) -> np.ndarray:
        """Hashes of all texts that were added since the last call, in their order, uint64."""
        found = np.array(self._new, np.uint64)
        self._new = []
        return found

    def _is_sorted(self, value: int) -> bool:
        at = int(np.searchsorted(self._sorted, np.uint64(value)))
        return at < len(self._sorted) and int(self._sorted[at]) == value
