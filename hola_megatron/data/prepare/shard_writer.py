"""Samples to MDS shards, each flushed to disk as a whole before it counts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hola_megatron.data.mds import mds_writer
from hola_megatron.data.packing import Sample, to_record
from hola_megatron.data.shards import INDEX_FILE


class ShardWriter:
    """Writes shards into `staging`, an empty folder, and moves each finished one into `data`.

    Args:
        columns: `mds_columns`.
        shard_size: most bytes of a shard.
        entries: index entries of the shards that are in `data` already.
        finished: called with the index entry of each new shard when it lies in `data`.

    Raises:
        RecipeError: `shard_size` cannot hold one sample.
    """

    def __init__(self, staging: Path, data: Path, columns: dict[str, str], shard_size: int, *,
                 entries: Sequence[dict[str, Any]], finished: Callable[[dict[str, Any]], None]):
        self._staging, self._data, self._finished = staging, data, finished
        self._writer = mds_writer(staging, columns, shard_size)
        self._writer.shards = list(entries)
        self.samples = sum(entry["samples"] for entry in entries)

    @property
    def entries(self) -> list[dict[str, Any]]:
        """Index entries of the finished shards."""
        return self._writer.shards

    def write(self, sample: Sample) -> None:
        """Add a sample to the shard that is open; the one before is finished where it has no room."""
        known = len(self._writer.shards)
        self._writer.write(to_record(sample))
        self.samples += 1
        if len(self._writer.shards) > known:
            self._move(self._writer.shards[-1])

    def finish(self) -> bytes:
        """Finish the last shard and write index.json; returns its bytes."""
        known = len(self._writer.shards)
        self._writer.finish()
        if len(self._writer.shards) > known:
            self._move(self._writer.shards[-1])
        index = (self._staging / INDEX_FILE).read_bytes()
        write_whole(self._data / INDEX_FILE, index)
        return index

    def abandon(self) -> None:
        """End the writer's threads; the open shard is lost."""
        self._writer.cancel_future_jobs()

    def _move(self, entry: dict[str, Any]) -> None:
        name = entry["raw_data"]["basename"]
        to_disk(self._staging / name)
        os.replace(self._staging / name, self._data / name)
        to_disk(self._data)
        self._finished(entry)


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file and flush it to disk."""
    path.write_bytes(data)
    to_disk(path)


def to_disk(path: Path) -> None:
    """Flush a file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
