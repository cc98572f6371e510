"""MDS shards on disk: writing them, and reading them with every byte accounted for.

The shard format is mosaicml-streaming's, and so are the writer, the sample decoder and the
downloaders used here. Its iterating dataset is not used: it ends an epoch silently when a shard is
damaged, checks hashes only on download, and leaves shared memory behind. `ShardStore` is a plain
random-access store instead: a shard is verified (size, xxh64, sample count) the first time a
process opens it, downloads are atomic and made once a machine, and anything wrong is a `DataError`
that names folder and file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import sys
import time
import types
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from filelock import FileLock, Timeout

from hola_megatron.data.packing import mds_columns
from hola_megatron.errors import DataError, RecipeError

INDEX_FILE = "index.json"
DATASET_FILE = "dataset.json"
FORMAT = "hola-megatron-packed"
FORMAT_VERSION = 1
HASH = "xxh64"

DOWNLOAD_ATTEMPTS = 5
DOWNLOAD_TIMEOUT_S = 300.0
FIRST_DELAY_S = 1.0
LOCK_TIMEOUT_S = 3600.0

_UNUSED_PARTS = ("multimodal", "text", "vision")
_DATASET_KEYS = ("tokenizer", "sequence_length", "documents", "text_bytes", "tokens", "samples")


def _import_streaming() -> None:
    """Import `streaming` without its vision and text datasets.

    Those need torchvision (broken or absent beside many torch builds) and scikit-learn, which costs
    seconds at every start. They stay importable afterwards.
    """
    if "streaming" in sys.modules:
        return
    names = [f"streaming.{part}" for part in _UNUSED_PARTS]
    sys.modules.update({name: types.ModuleType(name) for name in names})
    try:
        import streaming
    except ImportError as error:
        raise DataError(f"MDS shards need mosaicml-streaming ({error}): pip install mosaicml-streaming") from error
    finally:
        for name in names:
            del sys.modules[name]
    for part in _UNUSED_PARTS:
        with contextlib.suppress(AttributeError):
            delattr(streaming, part)


@contextlib.contextmanager
def mds_writer(folder: Path, columns: dict[str, str], shard_size: int) -> Iterator[Any]:
    """An MDSWriter into the empty `folder`, with xxh64 of every shard in the index.

    Raises:
        RecipeError: `shard_size` cannot hold one sample, whatever its document starts.
    """
    _import_streaming()
    from streaming.base.format.mds.writer import MDSWriter

    with MDSWriter(columns=columns, out=str(folder), hashes=[HASH], size_limit=shard_size) as writer:
        fixed = sum(size or 4 for size in writer.column_sizes)
        tokens = int(columns["tokens"].rpartition(":")[2])
        least = writer.extra_bytes_per_shard + writer.extra_bytes_per_sample + fixed + 4 * tokens
        if shard_size < least:
            raise RecipeError(f"--shard-size {shard_size}: one sample needs up to {least} bytes; give that or more")
        yield writer


class ShardStore:
    """Random access to the records of one dataset folder, local or remote.

    Args:
        path: folder, or URL of one (s3://, gs://, ... whatever streaming downloads; file:// too).
        cache: local folder under which a remote dataset gets a subfolder of its own; a folder given
            without a scheme is read in place and needs none.

    Attributes:
        folder: where the files lie locally.
        info: the content of dataset.json.
        shard_sizes: samples of each shard.
        shard_bytes: bytes of all shards together.
        fingerprint: sha256 (hex) over dataset.json and index.json.

    Raises:
        DataError: no dataset there, an unreadable or inconsistent index, or a download that failed.
    """

    def __init__(self, path: str, cache: str | None = None):
        self.path = path
        self._remote = _Remote(path, cache) if "://" in path else None
        self.folder = self._remote.folder if self._remote else Path(path)
        if self._remote is None:
            self._require_local()
        dataset, index = self._read(DATASET_FILE), self._read(INDEX_FILE)
        self.info = self._parse_dataset(dataset)
        self._shards = self._parse_index(index)
        self.shard_sizes = [shard["samples"] for shard in self._shards]
        self.shard_bytes = sum(shard["raw_data"]["bytes"] for shard in self._shards)
        self._ends = list(accumulate(self.shard_sizes))
        self.fingerprint = hashlib.sha256(dataset + b"\0" + index).hexdigest()
        self._readers: dict[int, Any] = {}
        if self._ends[-1] != self.info["samples"]:
            raise DataError(
                f"{path}: {INDEX_FILE} lists {self._ends[-1]} samples, {DATASET_FILE} says {self.info['samples']};"
                " the two are not of one preparation, prepare the dataset again"
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def record(self, index: int) -> dict[str, Any]:
        """The MDS record of sample `index`.

        Raises:
            IndexError: index outside 0..len - 1.
            DataError: its shard is missing or damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: sample {index} of {len(self)}")
        shard = bisect_right(self._ends, index)
        reader = self.open(shard)
        try:
            return reader.get_item(index - self._ends[shard] + self.shard_sizes[shard])
        except (OSError, IndexError, ValueError) as error:
            raise self._damaged(shard, f"cannot be read any more ({error})") from error

    def open(self, shard: int) -> Any:
        """The library's reader of a shard that this process has verified.

        Raises:
            DataError: missing or damaged.
        """
        if shard not in self._readers:
            problem = self.check(shard)
            if problem:
                raise self._damaged(shard, problem)
            self._readers[shard] = self._reader(shard)
        return self._readers[shard]

    def check(self, shard: int) -> str | None:
        """What is wrong with a shard ("is missing", "has 10 bytes, ..."), or None. Downloads it if need be."""
        entry = self._shards[shard]
        if self._remote:
            self._remote.fetch(entry["raw_data"]["basename"], lambda path: _problem(path, entry))
        return _problem(self.folder / entry["raw_data"]["basename"], entry)

    def verify(self) -> list[str]:
        """Check every shard; the problems found, each with folder, file and what to do."""
        problems = ((shard, self.check(shard)) for shard in range(len(self._shards)))
        return [str(self._damaged(shard, problem)) for shard, problem in problems if problem]

    def _damaged(self, shard: int, problem: str) -> DataError:
        file = self._shards[shard]["raw_data"]["basename"]
        cure = "delete it to have it downloaded again" if self._remote else "copy it again or prepare the dataset again"
        return DataError(f"{self.folder}: shard {file} {problem}; {cure}")

    def _reader(self, shard: int) -> Any:
        _import_streaming()
        from streaming.base.format import reader_from_json

        return reader_from_json(str(self.folder), None, self._shards[shard])

    def _require_local(self) -> None:
        if not self.folder.is_dir():
            raise DataError(f"{self.path}: no such data folder; make it with tools/prepare_data.py")
        if not any(self.folder.iterdir()):
            raise DataError(f"{self.path}: the data folder is empty; make the dataset with tools/prepare_data.py")
        for name in (INDEX_FILE, DATASET_FILE):
            if not (self.folder / name).is_file():
                inner = sorted(p.parent.name for p in self.folder.glob(f"*/{DATASET_FILE}"))
                hint = (
                    f"give one of its datasets: {', '.join(inner)}" if inner else "make it with tools/prepare_data.py"
                )
                raise DataError(f"{self.path}: no {name}, so this is not a prepared dataset; {hint}")

    def _read(self, name: str) -> bytes:
        if self._remote:
            self._remote.fetch(name, _json_problem)
        return (self.folder / name).read_bytes()

    def _parse_dataset(self, data: bytes) -> dict[str, Any]:
        info = _json_object(data, f"{self.path}: {DATASET_FILE}")
        if info.get("format") != FORMAT or info.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"{self.path}: {DATASET_FILE} is format {info.get('format')} {info.get('format_version')},"
                f" this version reads {FORMAT} {FORMAT_VERSION}; prepare the dataset again"
            )
        missing = [key for key in _DATASET_KEYS if key not in info]
        if missing:
            raise DataError(f"{self.path}: {DATASET_FILE} lacks {', '.join(missing)}; prepare the dataset again")
        return info

    def _parse_index(self, data: bytes) -> list[dict[str, Any]]:
        where = f"{self.path}: {INDEX_FILE}"
        shards = _json_object(data, where).get("shards")
        if not shards:
            raise DataError(f"{where} lists no shards; prepare the dataset again")
        columns = [mds_columns(self.info["sequence_length"], np.dtype(dtype)) for dtype in (np.uint16, np.uint32)]
        for number, shard in enumerate(shards):
            try:
                usable = shard["format"] == "mds" and not shard["zip_data"] and shard["samples"] > 0
                usable = usable and dict(zip(shard["column_names"], shard["column_encodings"], strict=True)) in columns
                name, _ = shard["raw_data"]["basename"], shard["raw_data"]["hashes"][HASH]
                usable = usable and name == os.path.basename(name)
            except (KeyError, TypeError, ValueError):
                usable = False
            if not usable:
                raise DataError(
                    f"{where}: shard {number} is not an uncompressed MDS shard of {list(columns[0])} for sequence"
                    f" length {self.info['sequence_length']}"
                    f" with {HASH}; prepare the dataset again with tools/prepare_data.py"
                )
        return shards


@dataclass(frozen=True)
class VerifyReport:
    """A dataset all of whose shards are as the index says: `shards` files of together `bytes`."""

    path: str
    fingerprint: str
    shards: int
    samples: int
    tokens: int
    bytes: int

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.shards:,} shards, {self.samples:,} samples, {self.tokens:,} tokens,"
            f" {self.bytes:,} bytes verified\nfingerprint {self.fingerprint}"
        )


def verify_dataset(path: str, *, cache: str | None = None) -> VerifyReport:
    """Check size, hash and sample count of every shard (a remote dataset is downloaded whole).

    Raises:
        DataError: as `ShardStore`; or one line for each missing or damaged shard.
    """
    store = ShardStore(path, cache)
    problems = store.verify()
    if problems:
        raise DataError("\n".join(problems))
    return VerifyReport(
        path=path,
        fingerprint=store.fingerprint,
        shards=len(store.shard_sizes),
        samples=len(store),
        tokens=store.info["tokens"],
        bytes=store.shard_bytes,
    )


class _Remote:
    """Downloads the files of one remote dataset into its own folder under the cache, each file once a machine."""

    def __init__(self, url: str, cache: str | None):
        if cache is None:
            raise DataError(f"{url}: a remote dataset needs a local cache folder; give one")
        # streaming knows a local "remote" as a path without scheme.
        local = url.startswith("file://")
        self.url = os.path.abspath(url.removeprefix("file://")) if local else url.rstrip("/")
        tag = hashlib.sha256(self.url.encode()).hexdigest()[:12]
        # Two datasets both hold a shard.00000.mds, so each URL has a folder of its own.
        self.folder = Path(cache) / f"{self.url.rpartition('/')[2]}-{tag}"
        self._downloader: Any = None

    def fetch(self, name: str, problem_of: Callable[[Path], str | None]) -> None:
        """Have `name` in the folder; a file that is there is left as it is.

        Args:
            problem_of: says what is wrong with a downloaded file, or None; it is tried again then.

        Raises:
            DataError: not there, or still failing after DOWNLOAD_ATTEMPTS.
        """
        target = self.folder / name
        if target.is_file():
            return
        try:
            locks = self.folder / ".locks"
            locks.mkdir(parents=True, exist_ok=True)
            with FileLock(locks / name, timeout=LOCK_TIMEOUT_S):
                if not target.is_file():
                    self._download(name, target, problem_of)
        except Timeout as error:
            raise DataError(
                f"{self.url}/{name}: another process has held its download lock for {LOCK_TIMEOUT_S:.0f} s;"
                f" stop that process or delete {locks}"
            ) from error
        except OSError as error:
            raise DataError(f"{self.folder}: the cache cannot be written ({error}); give another cache") from error

    def _download(self, name: str, target: Path, problem_of: Callable[[Path], str | None]) -> None:
        failure = ""
        for left in target.parent.glob(f".{name}.*.part*"):  # of a process that was killed: the lock is ours
            left.unlink(missing_ok=True)
        for attempt in range(DOWNLOAD_ATTEMPTS):
            if attempt:
                time.sleep(FIRST_DELAY_S * 2 ** (attempt - 1) * random.uniform(1, 1.5))
            partial = target.with_name(f".{name}.{uuid.uuid4().hex}.part")
            try:
                self._get(name, partial)
                failure = problem_of(partial) or ""
                if not failure:
                    os.replace(partial, target)
                    return
            except DataError:
                raise
            except Exception as error:
                failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            finally:
                for leftover in (partial, partial.with_name(partial.name + ".tmp")):
                    leftover.unlink(missing_ok=True)
        raise DataError(
            f"{self.url}/{name}: download failed {DOWNLOAD_ATTEMPTS} times, last: {failure}; check the path, the"
            f" credentials and the network, and empty {self.folder} if the dataset was prepared again"
        )

    def _get(self, name: str, partial: Path) -> None:
        try:
            if self._downloader is None:
                self._downloader = self._make_downloader()
            self._downloader.download(f"{self.url}/{name}", str(partial), DOWNLOAD_TIMEOUT_S)
        except FileNotFoundError as error:
            raise DataError(f"{self.url}/{name}: no such file; check the path, or prepare the dataset again") from error
        except ImportError as error:
            scheme = self.url.partition("://")[0]
            raise DataError(f"{self.url}: {scheme}:// needs the package {error.name}: pip install it") from error

    def _make_downloader(self) -> Any:
        _import_streaming()
        from streaming.base.storage.download import CloudDownloader

        try:
            return CloudDownloader.get(self.url)
        except ValueError as error:
            raise DataError(
                f"{self.url}: unknown kind of path; allowed are a folder, file://, s3://, gs:// and the others of"
                " mosaicml-streaming"
            ) from error


def _problem(path: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with the shard file at `path`, measured by its index entry, or None."""
    expected = entry["raw_data"]
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"has {size} bytes, the index says {expected['bytes']}"
        digest = xxhash.xxh64()
        with path.open("rb") as file:
            samples = int.from_bytes(file.read(4), "little")
            file.seek(0)
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error})"
    if digest.hexdigest() != expected["hashes"][HASH]:
        return f"has {HASH} {digest.hexdigest()}, the index says {expected['hashes'][HASH]}"
    if samples != entry["samples"]:
        return f"holds {samples} samples, the index says {entry['samples']}"
    return None


def _json_problem(path: Path) -> str | None:
    try:
        _json_object(path.read_bytes(), path.name)
    except DataError as error:
        return str(error)
    return None


def _json_object(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise DataError(f"{where} is not valid JSON ({error}); copy it again or prepare the dataset again") from error
    if not isinstance(value, dict):
        raise DataError(f"{where} is not a JSON object; copy it again or prepare the dataset again")
    return value
