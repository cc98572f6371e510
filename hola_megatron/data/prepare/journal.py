"""What is finished of a preparation, so that the same command goes on after a kill.

The work folder of `data/train` is `data/.train.partial`:

    journal.jsonl   a header (the options and the input files), then a line for each finished shard
    texts.u64       a hash of every document, to tell duplicates
    staging/        the shard that is being written
    data/           the finished shards; at the end the two index files; this folder becomes data/train

A line holds the shard's index entry and the point to go on from: the mark of the document that the next sample begins
in, what the packer held before that document, and how many samples had been packed by then. The document is read
and packed again, and the samples that are in finished shards already are left out. So what follows is the same,
whenever the kill came.

A shard is flushed to disk before its line is written, and is verified (size, hash, samples) before a later run builds
on it. Lines are left out from the first one on that is damaged, whose shard is damaged, or whose input has changed.
Files that come after what is packed already may change: one that could not be read is mended and the command repeated.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hola_megatron.data.documents import BEGINNING, Mark
from hola_megatron.data.shard_file import ShardFile, ShardProblem
from hola_megatron.files import FileProblem, parse_json, schemas

JOURNAL_FORMAT = 1
_JOURNAL, _TEXTS, _STAGING, _DATA = "journal.jsonl", "texts.u64", "staging", "data"


@dataclass(frozen=True)
class Point:
    """Where packing can go on: before a document.

    Attributes:
        mark: of the document.
        samples: samples packed of what comes before it.
        packer: `Packer.state()`, or None for an empty packer.
    """

    mark: Mark = BEGINNING
    samples: int = 0
    packer: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        packer = None
        if self.packer is not None:
            buffer = self.packer["buffer"]
            packer = {**self.packer, "buffer": base64.b64encode(buffer.tobytes()).decode("ascii"),
                      "dtype": buffer.dtype.name}
        return {"mark": list(self.mark), "samples": self.samples, "packer": packer}

    @staticmethod
    def from_json(found: dict[str, Any]) -> Point:
        packer = found["packer"]
        if packer is not None:
            buffer = np.frombuffer(base64.b64decode(packer["buffer"]), packer["dtype"])
            packer = {name: value for name, value in packer.items() if name != "dtype"} | {"buffer": buffer}
        return Point(Mark(*found["mark"]), found["samples"], packer)


@dataclass
class Progress:
    """What an earlier run has finished.

    Attributes:
        shards: their index entries.
        point: where to go on.
        sha256: hashes of input files, by number.
        texts: hashes of the documents before the point, uint64.
    """

    shards: list[dict[str, Any]] = field(default_factory=list)
    point: Point = Point()
    sha256: dict[int, str | None] = field(default_factory=dict)
    texts: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))


class Work:
    """The work folder of one dataset; its owner alone uses it.

    Args:
        out: the dataset to make.
        shape: `PrepareOptions.shape`.
        stamps: `Source.stamp` of every input file, in order.
    """

    def __init__(self, out: Path, shape: dict[str, Any], stamps: Sequence[list[Any]]):
        whole = out.absolute()
        self.folder = whole.parent / f".{whole.name}.partial"
        self.data, self.staging = self.folder / _DATA, self.folder / _STAGING
        self._header = {"journal": JOURNAL_FORMAT, "shape": shape, "sources": list(stamps)}
        self._file: BinaryIO | None = None

    def resume(self) -> Progress:
        """What can be kept of an earlier run; everything else is removed, and the journal is open for `append`."""
        lines, unchanged = self._usable()
        texts = self._texts_of(lines)
        if texts is None:
            lines, texts = [], np.empty(0, np.uint64)
        kept = {line["shard"]["raw_data"]["basename"] for line in lines}
        shutil.rmtree(self.staging, ignore_errors=True)
        for folder in (self.staging, self.data):
            folder.mkdir(parents=True, exist_ok=True)
        for path in self.data.iterdir():
            if path.name not in kept:
                path.unlink()
        fresh = self.folder / f"{_JOURNAL}.new"
        with fresh.open("wb") as file:
            for value in (self._header, *lines):
                hashes = value.get("sha256", {})
                known = {number: sha for number, sha in hashes.items() if int(number) < unchanged}
                file.write(_line({**value, "sha256": known} if hashes else value))
            _to_disk(file)
        os.replace(fresh, self.folder / _JOURNAL)
        self._file = (self.folder / _JOURNAL).open("ab")
        with (self.folder / _TEXTS).open("wb") as file:
            file.write(texts.tobytes())
            _to_disk(file)
        found = _progress(lines, unchanged)
        return Progress(found.shards, found.point, found.sha256, texts)

    def append(self, shard: dict[str, Any], point: Point, sha256: dict[int, str | None], ending: bool,
               texts: np.ndarray) -> None:
        """Note that a shard lies in `data`, flushed to disk.

        Args:
            sha256: hashes of sources that are new since the last line.
            ending: whether the input had ended, so that the shard depends on there being no more.
            texts: hashes of the documents that were read since the last line; those before the point among them.
        """
        with (self.folder / _TEXTS).open("ab") as file:
            file.write(texts.tobytes())
            _to_disk(file)
        self._write({"shard": shard, "point": point.to_json(), "ending": ending,
                     "sha256": {str(number): sha for number, sha in sha256.items()}})

    def note_finished(self, dataset_sha256: str) -> None:
        """Note that `data` is complete and about to become the dataset, with this hash of dataset.json."""
        self._write({"finished": dataset_sha256})

    def finished(self) -> str | None:
        """The hash that a run with this header noted which had moved `data` away; None if there is none."""
        lines = list(self._lines())
        if self.data.exists() or not lines or lines[0] != self._header or "finished" not in lines[-1]:
            return None
        return lines[-1]["finished"]

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Remove the work folder, the journal last: it tells of a run that was killed in between."""
        self.close()
        for folder in (self.data, self.staging):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, value: dict[str, Any]) -> None:
        self._file.write(_line(value))
        _to_disk(self._file)

    def _lines(self) -> Iterator[dict[str, Any]]:
        """The values of the journal up to the first line that is damaged or cut short."""
        try:
            with (self.folder / _JOURNAL).open("rb") as file:
                for number, line in enumerate(file):
                    if not line.endswith(b"\n"):
                        return
                    yield parse_json(line, schemas.JOURNAL_LINE if number else schemas.JOURNAL_HEADER)
        except (FileProblem, OSError):
            return

    def _usable(self) -> tuple[list[dict[str, Any]], int]:
        """The lines to build on, and how many sources from the first on are unchanged."""
        header, *lines = [*self._lines()] or [None]
        if header is None or header["journal"] != JOURNAL_FORMAT or header["shape"] != self._header["shape"]:
            return [], 0
        before, now = header["sources"], self._header["sources"]
        same = next((n for n, (old, new) in enumerate(zip(before, now, strict=False)) if old != new),
                    min(len(before), len(now)))
        found: list[dict[str, Any]] = []
        for line in lines:
            if "finished" in line:
                continue
            changed = line["point"]["mark"][0] >= same or (line["ending"] and before != now)
            if changed or not self._whole(line, len(found)):
                break
            found.append(line)
        return found, same

    def _texts_of(self, lines: list[dict[str, Any]]) -> np.ndarray | None:
        """Hashes of the documents before the last line's point; None where the file has fewer."""
        if not lines:
            return None
        mark = Mark(*lines[-1]["point"]["mark"])
        count = mark.documents + (mark.duplicates if self._header["shape"]["drop_duplicates"] else 0)
        try:
            found = np.fromfile(self.folder / _TEXTS, np.uint64, count)
        except OSError:
            return None
        return found if len(found) == count else None

    def _whole(self, line: dict[str, Any], number: int) -> bool:
        name = line["shard"]["raw_data"]["basename"]
        if name != f"shard.{number:05}.mds":
            return False
        try:
            ShardFile(self.data / name, line["shard"])
        except ShardProblem:
            return False
        return True


def _progress(lines: list[dict[str, Any]], unchanged: int) -> Progress:
    if not lines:
        return Progress()
    # the hash of a file that could not be read may have been noted before it was mended
    hashes = {int(number): sha for line in lines for number, sha in line["sha256"].items() if int(number) < unchanged}
    return Progress([line["shard"] for line in lines], Point.from_json(lines[-1]["point"]), hashes)


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
