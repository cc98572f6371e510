"""The input files cut into parts of about equal size: a function of the files, their sizes and the number of parts.

A file is the smallest piece, but for large ones that can be read from the middle: unpacked jsonl is cut between lines,
parquet between row groups. Packed files (.gz, .xz, .zst) and text are not cut.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hola_megatron.data.sources import Source
from hola_megatron.errors import DataError

_PIECES_A_PART = 4  # of one large file: parts differ by a quarter at most


@dataclass(frozen=True)
class Part:
    """Which part a dataset is.

    Attributes:
        number: 1 .. of.
        of: how many there are.
        plan: `plan_of`; parts of one preparation have the same.
    """

    number: int
    of: int
    plan: str

    @property
    def name(self) -> str:
        """The folder's name."""
        return part_name(self.number, self.of)


def part_name(number: int, of: int) -> str:
    return f"part-{number:05}-of-{of:05}"


def plan_of(shape: dict[str, Any], sources: Sequence[Source], parts: int) -> str:
    """sha256 (hex) of everything that decides what each part holds; not where the files lie."""
    files = [[source.path.name, source.size()] for source in sources]
    return hashlib.sha256(json.dumps([shape, files, parts], sort_keys=True).encode()).hexdigest()


def split(sources: Sequence[Source], parts: int) -> list[list[Source]]:
    """The sources of each part, in their order.

    Raises:
        DataError: there are fewer pieces than parts.
    """
    limit = max(sum(source.size() for source in sources) // (parts * _PIECES_A_PART), 1)
    pieces = [piece for source in sources for piece in _pieces(source, limit)]
    if len(pieces) < parts:
        raise DataError(f"--parts {parts}: the input can be cut into {len(pieces)} at most (compressed files and .txt "
                        "are not cut, parquet is between row groups); give that number or less, or more files")
    # the largest first, each to the part that has least
    found: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0, part) for part in range(parts)]
    for number in sorted(range(len(pieces)), key=lambda n: (-pieces[n][1], n)):
        load, part = heapq.heappop(loads)
        found[part].append(number)
        heapq.heappush(loads, (load + pieces[number][1], part))
    return [[pieces[number][0] for number in sorted(numbers)] for numbers in found]


def _pieces(source: Source, limit: int) -> list[tuple[Source, int]]:
    """Ranges of a source with their sizes, of about `limit` bytes where it can be cut."""
    size = source.size()
    count = -(-size // limit)
    if count <= 1:
        return [(source, size)]
    if source.form == "jsonl" and not source.packing:
        total = size
    elif source.form == "parquet":
        total = source.row_groups()
    else:
        return [(source, size)]
    count = min(count, total)
    if count <= 1:
        return [(source, size)]
    bounds = [total * number // count for number in range(count + 1)]
    return [(replace(source, begin=begin, end=end), size * (end - begin) // total)
            for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]
