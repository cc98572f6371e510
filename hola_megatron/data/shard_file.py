"""One MDS shard file: verified as a whole when it is opened, and again in every block that is read later.

Opening hashes the whole file against the index. While it does, it keeps a 64-bit hash of every block of BLOCK_BYTES
(1/8192 of the file's size). A sample is decoded only from blocks whose hash is still the same. So a file that is
changed in place, replaced or shortened after it was opened is an error, independent of its times and size, and also
where the change came through a memory map or another machine.
"""

from __future__ import annotations

import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from hola_megatron.data.mds import HASH, import_streaming
from hola_megatron.errors import DataError

BLOCK_BYTES = 1 << 16


class ShardProblem(Exception):
    """The problem of a shard, as a clause after its name: "is missing", "has 10 bytes, the index says 12"."""


class ShardFile:
    """Random access to the records of one shard.

    Args:
        path: the file.
        entry: the shard's entry of index.json.

    Raises:
        ShardProblem: the file is missing, unreadable, or not the one that the entry describes.
    """

    def __init__(self, path: Path, entry: dict[str, Any]):
        self._path, self._entry, self._size = path, entry, entry["raw_data"]["bytes"]
        self._hashes = array("Q")
        self._decoder: Any = None
        try:
            self._verify()
            self._check_offsets()
        except FileNotFoundError as error:
            raise ShardProblem("is missing") from error
        except OSError as error:
            raise ShardProblem(f"cannot be read ({error})") from error

    def record(self, number: int) -> dict[str, Any]:
        """The MDS record of the shard's sample `number` (0 .. samples - 1).

        Raises:
            ShardProblem: the file is not what it was when it was opened, or the record cannot be decoded.
        """
        try:
            data = self._sample_bytes(number)
        except OSError as error:
            raise ShardProblem(f"cannot be read any more ({error})") from error
        try:
            if self._decoder is None:
                self._decoder = self._make_decoder()
            return self._decoder.decode_sample(data)
        except DataError:
            raise
        except Exception as error:  # the library's decoder raises whatever numpy does on bytes of another shape
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ShardProblem(f"holds a sample that cannot be decoded, number {number} of the file ({reason})"
                               ) from error

    def _verify(self) -> None:
        """Hash the whole file, and keep the hash of every block."""
        expected = self._entry["raw_data"]
        whole = xxhash.xxh64()
        with self._path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != self._size:
                raise ShardProblem(f"has {size} bytes, the index says {self._size}")
            for start_byte in range(0, size, BLOCK_BYTES):
                block = _read(file.fileno(), start_byte, min(BLOCK_BYTES, size - start_byte))
                whole.update(block)
                self._hashes.append(xxhash.xxh3_64_intdigest(block))
        if whole.hexdigest() != expected["hashes"][HASH]:
            raise ShardProblem(f"has {HASH} {whole.hexdigest()}, the index says {expected['hashes'][HASH]}")

    def _check_offsets(self) -> None:
        """The table at the head of the file: the number of samples, their starts, and the end of the last one."""
        samples = self._entry["samples"]
        found = int.from_bytes(self._bytes(0, min(4, self._size)), "little")
        if found != samples:
            raise ShardProblem(f"holds {found} samples, the index says {samples}")
        head = 4 * (samples + 2)
        offsets = np.frombuffer(self._bytes(4, head), "<u4") if head <= self._size else np.zeros(1, "<u4")
        if int(offsets[-1]) != self._size or int(offsets[0]) < head or (offsets[1:] <= offsets[:-1]).any():
            raise ShardProblem("has a table of samples that does not fit the file")

    def _sample_bytes(self, number: int) -> bytes:
        start_byte, end = np.frombuffer(self._bytes(4 * number + 4, 4 * number + 12), "<u4").tolist()
        return self._bytes(start_byte, end)

    def _bytes(self, start_byte: int, end: int) -> bytes:
        """Bytes start_byte .. end - 1 of the file, from verified blocks."""
        first, last = start_byte // BLOCK_BYTES, (end - 1) // BLOCK_BYTES
        start = first * BLOCK_BYTES
        file = os.open(self._path, os.O_RDONLY)
        try:
            data = _read(file, start, min((last + 1) * BLOCK_BYTES, self._size) - start)
        finally:
            os.close(file)
        view = memoryview(data)
        for number in range(first, last + 1):
            at = (number - first) * BLOCK_BYTES
            if xxhash.xxh3_64_intdigest(view[at : at + BLOCK_BYTES]) != self._hashes[number]:
                raise ShardProblem("has changed since this process verified it")
        return data[start_byte - start : end - start]

    def _make_decoder(self) -> Any:
        import_streaming()
        from streaming.base.format import reader_from_json

        return reader_from_json(str(self._path.parent), None, self._entry)


def _read(file: int, start_byte: int, size: int) -> bytes:
    """`size` bytes from `start_byte` on, fewer where the file ends before."""
    data = os.pread(file, size, start_byte)
    while 0 < len(data) < size and (more := os.pread(file, size - len(data), start_byte + len(data))):
        data += more
    return data
