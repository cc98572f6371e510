"""Datasets of MDS shards, read with every byte accounted for.

The shard format is mosaicml-streaming's, and so are the writer, the sample decoder and the downloaders used here
(mds.py). Its iterating dataset is not used: it ends an epoch silently when a shard is damaged, checks hashes only on
download, and leaves shared memory behind. `ShardStore` is a plain random-access store instead: a shard is verified
(size, xxh64, sample count) the first time a process opens it, and what is decoded later must still be what was
verified (shard_file.py); downloads are atomic and made once a machine (remote.py); anything wrong is a `DataError` that
names folder and file.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from hola_megatron.data.mds import HASH
from hola_megatron.data.packing import from_record, mds_columns, sample_problem
from hola_megatron.data.remote import Remote
from hola_megatron.data.shard_file import ShardFile, ShardProblem
from hola_megatron.errors import DataError
from hola_megatron.files import DamagedFile, FileProblem, parse_json, read_bytes, schemas, shown

INDEX_FILE = "index.json"
DATASET_FILE = "dataset.json"
FORMAT = "hola-megatron-packed"
FORMAT_VERSION = 1
JOINED_VERSION = 2  # shards lie in folders of parts, and index.json names them there
INDEX_HASH = "index_sha256"  # in dataset.json: which index.json it belongs to; older datasets have none
READ_ATTEMPTS = 3  # of the two files of a URL that is being written to


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
        self._remote = Remote(path, cache) if "://" in path else None
        self.folder = self._remote.folder if self._remote else Path(path)
        if self._remote is None:
            self._require_local()
        dataset, index = self._read_pair()
        self.info = self._parse_dataset(dataset)
        #: what `sample_problem` measures a sample by
        self.limits = {"sequence_length": self.info["sequence_length"],
                       "vocab_size": self.info["tokenizer"]["vocab_size"]}
        self._shards = self._parse_index(index)
        self.shard_sizes = [shard["samples"] for shard in self._shards]
        self.shard_bytes = sum(shard["raw_data"]["bytes"] for shard in self._shards)
        self._ends = list(accumulate(self.shard_sizes))
        self.fingerprint = _fingerprint(dataset, index)
        self._files: dict[int, ShardFile] = {}
        if self._ends[-1] != self.info["samples"]:
            raise DataError(
                f"{path}: {INDEX_FILE} lists {self._ends[-1]} samples, {DATASET_FILE} says {self.info['samples']};"
                " the two are not of one preparation, prepare the dataset again"
            )
        if not _belong_together(dataset, index):
            raise DataError(f"{path}: {INDEX_FILE} is not the one that {DATASET_FILE} was written with: the two are of"
                            " different preparations, or one is damaged; copy both again or prepare the dataset again")
        if self._remote:
            self._remote.use(self.fingerprint, {DATASET_FILE: dataset, INDEX_FILE: index})
            self.folder = self._remote.folder

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The shards' entries of index.json."""
        return self._shards

    @property
    def superseded(self) -> list[Path]:
        """Cache folders of earlier preparations of this URL; empty for a local folder."""
        return self._remote.superseded() if self._remote else []

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
        try:
            return self.open(shard).record(index - self._ends[shard] + self.shard_sizes[shard])
        except ShardProblem as problem:
            raise self._damaged(shard, str(problem)) from problem

    def open(self, shard: int) -> ShardFile:
        """A shard that this process has verified, downloaded if need be.

        Raises:
            DataError: missing or damaged.
        """
        if shard not in self._files:
            entry = self._shards[shard]
            name = entry["raw_data"]["basename"]
            if self._remote:
                self._remote.fetch(name, lambda path: _problem(path, entry), self._prepared_again)
            try:
                self._files[shard] = ShardFile(self.folder / name, entry)
            except ShardProblem as problem:
                raise self._damaged(shard, str(problem)) from problem
        return self._files[shard]

    def verify(self) -> list[str]:
        """Check every shard and every sample; the problems found, each with folder, file and what to do."""
        problems = []
        for shard, size in enumerate(self.shard_sizes):
            try:
                file = self.open(shard)
                for number in range(size):
                    problem = sample_problem(from_record(file.record(number)), **self.limits)
                    if problem:
                        raise ShardProblem(f"holds a bad sample, number {number} of the file: it {problem}")
            except ShardProblem as problem:
                problems.append(str(self._damaged(shard, str(problem))))
            except DataError as error:
                problems.append(str(error))
        return problems

    def bad_sample(self, index: int, problem: str) -> DataError:
        """The error of sample `index`, whose shard is as the index says and whose content cannot be used."""
        shard = bisect_right(self._ends, index)
        file, number = self._shards[shard]["raw_data"]["basename"], index - self._ends[shard] + self.shard_sizes[shard]
        return DataError(f"{self.folder}: sample {number} of shard {file} {problem}; the dataset was written wrongly,"
                         " prepare it again with tools/prepare_data.py")

    def _prepared_again(self) -> str | None:
        """What is at the URL now, if that is another preparation than the one whose index was read."""
        dataset, index = self._remote.peek(DATASET_FILE), self._remote.peek(INDEX_FILE)
        if dataset is None or index is None:  # not known: report the download's own error
            return None
        now = _fingerprint(dataset, index)
        if now == self.fingerprint:
            return None
        return f"the dataset was prepared again (fingerprint {self.fingerprint[:12]}, now {now[:12]})"

    def _damaged(self, shard: int, problem: str) -> DataError:
        file = self._shards[shard]["raw_data"]["basename"]
        cure = "delete it to have it downloaded again" if self._remote else "copy it again or prepare the dataset again"
        return DataError(f"{self.folder}: shard {file} {problem}; {cure}")

    def _require_local(self) -> None:
        if not self.folder.is_dir():
            raise DataError(f"{self.path}: no such data folder; make it with tools/prepare_data.py")
        if not any(self.folder.iterdir()):
            raise DataError(f"{self.path}: the data folder is empty; make the dataset with tools/prepare_data.py")
        for name in (INDEX_FILE, DATASET_FILE):
            if not (self.folder / name).is_file():
                inner = sorted(p.parent.name for p in self.folder.glob(f"*/{DATASET_FILE}"))
                if any(self.folder.glob("part-?????-of-?????")):
                    hint = f"its parts are not joined yet: tools/prepare_data.py --merge {self.path}"
                else:
                    hint = (f"give one of its datasets: {', '.join(inner)}" if inner
                            else "make it with tools/prepare_data.py")
                raise DataError(f"{self.path}: no {name}, so this is not a prepared dataset; {hint}")

    def _read_pair(self) -> tuple[bytes, bytes]:
        """dataset.json and index.json; of a URL that is just being written to, the two of one preparation."""
        if self._remote is None:
            return self._read_local(DATASET_FILE), self._read_local(INDEX_FILE)
        for _ in range(READ_ATTEMPTS):
            dataset, index = (self._remote.read(name, _json_problem) for name in (DATASET_FILE, INDEX_FILE))
            if _belong_together(dataset, index):
                break
        return dataset, index

    def _read_local(self, name: str) -> bytes:
        try:
            return read_bytes(self.folder / name)
        except FileProblem as problem:
            raise DataError(f"{self.path}: {name}: {problem}; mend the folder, or copy it again") from None

    def _parse_dataset(self, data: bytes) -> dict[str, Any]:
        where = f"{self.path}: {DATASET_FILE}"
        info = _parsed(data, where)
        if info.get("format") != FORMAT or info.get("format_version") not in (FORMAT_VERSION, JOINED_VERSION):
            raise DataError(
                f"{where} is format {shown(info.get('format'))} {shown(info.get('format_version'))},"
                f" this version reads {FORMAT} {FORMAT_VERSION} and {JOINED_VERSION}; prepare the dataset again"
            )
        return _parsed(data, where, schemas.DATASET)

    def _parse_index(self, data: bytes) -> list[dict[str, Any]]:
        where = f"{self.path}: {INDEX_FILE}"
        shards = _parsed(data, where, schemas.INDEX)["shards"]
        if not shards:
            raise DataError(f"{where} lists no shards; prepare the dataset again")
        columns = [mds_columns(self.info["sequence_length"], np.dtype(dtype)) for dtype in (np.uint16, np.uint32)]
        for number, shard in enumerate(shards):
            names, encodings = shard["column_names"], shard["column_encodings"]
            if len(names) != len(encodings) or dict(zip(names, encodings, strict=True)) not in columns \
                    or HASH not in shard["raw_data"]["hashes"]:
                raise DataError(
                    f"{where}: shard {number} is not an uncompressed MDS shard of {list(columns[0])} for sequence"
                    f" length {self.info['sequence_length']}"
                    f" with {HASH}; prepare the dataset again with tools/prepare_data.py"
                )
        return shards


@dataclass(frozen=True)
class VerifyReport:
    """A dataset all of whose shards are as the index says: `shards` files of together `bytes`.

    superseded: cache folders of earlier preparations of the same URL.
    """

    path: str
    fingerprint: str
    shards: int
    samples: int
    tokens: int
    bytes: int
    superseded: tuple[Path, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.shards:,} shards, {self.samples:,} samples, {self.tokens:,} tokens,"
                 f" {self.bytes:,} bytes verified", f"fingerprint {self.fingerprint}"]
        return "\n".join([*lines, *map(superseded_line, self.superseded)])


def verify_dataset(path: str, *, cache: str | None = None) -> VerifyReport:
    """Check size, hash and sample count of every shard, and every sample (a remote dataset is downloaded whole).

    Raises:
        DataError: as `ShardStore`; or one line for each shard that is missing, damaged or holds a bad sample.
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
        superseded=tuple(store.superseded),
    )


def superseded_line(folder: Path) -> str:
    """The message about the cache of an earlier preparation."""
    return f"{folder} is the cache of an earlier preparation and is not read; delete it if no other run uses it"


def _fingerprint(dataset: bytes, index: bytes) -> str:
    return hashlib.sha256(dataset + b"\0" + index).hexdigest()


def _belong_together(dataset: bytes, index: bytes) -> bool:
    """Whether the two files are of one preparation; True where that is not known."""
    try:
        expected = parse_json(dataset, schemas.DATASET).get(INDEX_HASH)
    except FileProblem:  # reported where the file is parsed
        return True
    return expected is None or expected == hashlib.sha256(index).hexdigest()


def _problem(path: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with the shard file at `path`, measured by its index entry, or None."""
    try:
        ShardFile(path, entry)
    except ShardProblem as problem:
        return str(problem)
    return None


def _json_problem(path: Path) -> str | None:
    try:
        parse_json(path.read_bytes())
    except FileProblem as problem:
        return f"it is {problem}"
    return None


def _parsed(data: bytes, where: str, schema: Any = None) -> dict[str, Any]:
    """The JSON object in `data`, as its schema wants it."""
    try:
        value = parse_json(data, schema)
        if not isinstance(value, dict):
            raise DamagedFile("damaged (not a JSON object)")
    except FileProblem as problem:
        raise DataError(f"{where} is {problem}; copy it again or prepare the dataset again") from None
    return value
