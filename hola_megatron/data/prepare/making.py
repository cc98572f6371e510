"""One dataset out of its input files, by one process that reads, packs and writes (others may tokenize for it).

    read documents in order -> tokenize -> pack -> shards -> index.json, dataset.json -> rename

Everything is made in a work folder beside the target (journal.py) and renamed when complete, so nothing unfinished can
be taken for a dataset. Beside MDS's own index.json lies `dataset.json`: the tokenizer's identity, the sequence length,
the counts and the source files. It holds no time and no path, so the same input gives the same fingerprint anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hola_megatron.data.best_fit import WholePacker
from hola_megatron.data.documents import DocumentReader
from hola_megatron.data.duplicates import SeenTexts
from hola_megatron.data.packing import Packer, Sample, mds_columns, token_dtype
from hola_megatron.data.prepare.journal import Point, Work
from hola_megatron.data.prepare.options import PrepareOptions, Summary
from hola_megatron.data.prepare.progress import Counts
from hola_megatron.data.prepare.shard_writer import ShardWriter, to_disk, write_json
from hola_megatron.data.prepare.splitting import Part
from hola_megatron.data.prepare.tokenizing import tokenized
from hola_megatron.data.shards import DATASET_FILE, INDEX_HASH, ShardStore
from hola_megatron.data.sources import Source
from hola_megatron.data.tokenizer import Tokenizer
from hola_megatron.errors import DataError
from hola_megatron.files import FileProblem, read_bytes

Report = Callable[[Counts], None]

_RECORDED = ("format", "format_version", "project_version", "tokenizer", "sequence_length", "keep_tail", "packing",
             "drop_duplicates", "part")


@dataclass(frozen=True)
class Job:
    """A dataset to make.

    Attributes:
        options: what every part has in common.
        tokenizer: that of the options, loaded.
        sources: the input files, in order.
        out: the folder to make.
        part: which part of a dataset it is, if it is one.
    """

    options: PrepareOptions
    tokenizer: Tokenizer
    sources: Sequence[Source]
    out: Path
    part: Part | None = None

    def shape(self) -> dict[str, Any]:
        return self.options.shape(self.tokenizer) | ({"part": asdict(self.part)} if self.part else {})


def make(job: Job, report: Report) -> Summary:
    """Make the dataset, going on from what an earlier run of the same job has finished. The caller owns `job.out`.

    report: called with what has been done, by earlier runs too, before the first document and after every batch.
    """
    work = Work(job.out, job.shape(), [source.stamp() for source in job.sources])
    done = work.finished()
    if done is not None and done == _sha256(job.out / DATASET_FILE):  # killed after the rename
        remove_old(job.out)
        work.remove()
        return summary_of(job.out)
    refuse_existing(job.out, job.options.overwrite)
    making = _Making(job, work, report)
    try:
        making.run()
        refuse_existing(job.out, job.options.overwrite)  # something that takes no lock may have made it
        work.note_finished(_sha256(work.data / DATASET_FILE))
        put_in_place(work.data, job.out)
    except BaseException:
        making.give_up()
        raise
    remove_old(job.out)
    work.remove()
    return summary_of(job.out)


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raise `DataError` unless `out` can be made: it is not there, empty, or a dataset that is to be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / DATASET_FILE).is_file():
        raise DataError(f"{out}: exists and is no dataset of ours, so it is never overwritten; choose another --out")
    if not overwrite:
        raise DataError(f"{out}: holds a dataset already; choose another --out, or pass --overwrite to replace it")


def put_in_place(data: Path, out: Path) -> None:
    """Rename `data` to `out`; what was there before goes last."""
    old = _old(out)
    if out.is_symlink() or (out.exists() and any(out.iterdir())):
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    data.rename(out)  # replaces an empty folder
    to_disk(out.absolute().parent)


def _old(out: Path) -> Path:
    return out.absolute().parent / f".{out.absolute().name}.old"


def remove_old(out: Path) -> None:
    """Remove what `put_in_place` has put aside."""
    old = _old(out)
    if old.is_symlink():
        old.unlink()
    shutil.rmtree(old, ignore_errors=True)


class _Making:
    """The state of `make` between reading and writing."""

    def __init__(self, job: Job, work: Work, report: Report):
        self._job, self._work, self._report = job, work, report
        options, tokenizer = job.options, job.tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        kind = WholePacker if options.packing == "whole" else Packer
        self._packer = kind(options.sequence_length, tokenizer.bos_id, tokenizer.eos_id, self._dtype)
        self._seen: SeenTexts | None = None
        self._samples = 0  # packed so far, in order
        self._ending = False
        self._writer: ShardWriter | None = None
        self._hashes: _SourceHashes | None = None

    def run(self) -> None:
        """Write everything into the work folder's `data`."""
        options = self._job.options
        found = self._work.resume()
        if found.shards:
            print(f"prepare | {self._job.out}: {len(found.shards):,} finished shards are kept", file=sys.stderr,
                  flush=True)
        self._point, self._samples = found.point, found.point.samples
        if found.point.packer is not None:
            self._packer.restore(found.point.packer)
        self._seen = SeenTexts(found.texts)
        self._hashes = _SourceHashes(self._job.sources, found.sha256)
        reader = DocumentReader(self._job.sources, options.text_field, options.split_on, start=found.point.mark,
                                seen=self._seen, drop_duplicates=options.drop_duplicates, began=self._hashes.begin)
        self._writer = ShardWriter(
            self._work.staging, self._work.data, mds_columns(options.sequence_length, self._dtype), options.shard_size,
            entries=found.shards, finished=self._note)
        self._pack(reader)
        self._refuse_empty(reader)
        index = self._writer.finish()
        self._write_record(reader, index)

    def give_up(self) -> None:
        """After an error: keep the work folder where a later run can go on from it."""
        if self._writer:
            with contextlib.suppress(Exception):
                self._writer.abandon()
        if self._hashes:
            self._hashes.close()
        self._work.close()
        finished = len(list(self._work.data.glob("*.mds")))
        if finished:
            print(f"prepare | {finished:,} finished shards are kept in {self._work.folder}; the same command goes on "
                  "from there", file=sys.stderr, flush=True)
        else:
            self._work.remove()

    def _pack(self, reader: DocumentReader) -> None:
        skip = self._writer.samples  # they are in finished shards
        for number, sample in self._numbered(reader):
            if number >= skip:
                self._writer.write(sample)

    def _numbered(self, reader: DocumentReader) -> Iterator[tuple[int, Sample]]:
        """(number, sample), from the point on that packing goes on from."""
        options = self._job.options
        self._report(Counts(reader.bytes_read, reader.text_bytes, self._packer.tokens))
        for batch in tokenized(reader.marked(), self._job.tokenizer, options.tokenizer, options.workers):
            for mark, ids in batch:
                state = self._packer.state()
                if state is not None:
                    self._point = Point(mark, self._samples, state)
                for sample in self._packer.add(ids):
                    self._samples += 1
                    yield self._samples - 1, sample
            self._report(Counts(reader.bytes_read, reader.text_bytes, self._packer.tokens))
        self._ending = True
        for sample in self._rest():
            self._samples += 1
            yield self._samples - 1, sample

    def _rest(self) -> list[Sample]:
        """What has not filled a sample when the input ends."""
        if isinstance(self._packer, WholePacker):
            return self._packer.finish()
        tail = self._packer.finish() if self._job.options.keep_tail else None
        return [tail] if tail else []

    def _note(self, entry: dict[str, Any]) -> None:
        self._work.append(entry, self._point, self._hashes.new(), self._ending, self._seen.take_new())

    def _refuse_empty(self, reader: DocumentReader) -> None:
        options = self._job.options
        where = ", ".join(options.inputs) or f"--bundled {options.bundled}"
        where += f", part {self._job.part.number} of {self._job.part.of}" if self._job.part else ""
        if not reader.documents:
            raise DataError(f"input {where}: no document with text ({reader.empty} empty); give other input")
        if not self._samples:
            raise DataError(
                f"input {where}: {self._packer.tokens} tokens do not fill one sample of {options.sequence_length} + 1;"
                " give more text, a smaller --sequence-length, or --keep-tail"
            )

    def _write_record(self, reader: DocumentReader, index: bytes) -> None:
        shape = self._job.shape()
        record = {
            **{name: shape[name] for name in _RECORDED if name in shape},
            "documents": reader.documents,
            "empty": reader.empty,
            "duplicates": reader.duplicates,
            **({"padding": self._packer.padding} if isinstance(self._packer, WholePacker) else {}),
            "text_bytes": reader.text_bytes,
            "tokens": self._packer.tokens,
            "samples": self._samples,
            "sources": [source.describe(sha) for source, sha in
                        zip(self._job.sources, self._hashes.all(), strict=True)],
            INDEX_HASH: hashlib.sha256(index).hexdigest(),
        }
        write_json(self._work.data / DATASET_FILE, record)
        to_disk(self._work.data)


def summary_of(folder: Path) -> Summary:
    """What a dataset holds."""
    store = ShardStore(str(folder))
    counts = {name: store.info.get(name, 0) for name in ("documents", "empty", "duplicates", "tokens", "samples",
                                                         "text_bytes", "sequence_length")}
    return Summary(str(folder), shards=len(store.shard_sizes), dropped=store.info.get("drop_duplicates", False),
                   padding=store.info.get("padding"), **counts)


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except FileProblem:
        return None


class _SourceHashes:
    """sha256 of the input files, computed by a thread while each is read."""

    def __init__(self, sources: Sequence[Source], known: dict[int, str | None]):
        self._sources, self._known, self._noted = sources, dict(known), set(known)
        self._thread = ThreadPoolExecutor(1)
        self._running: dict[int, Future[str | None]] = {}

    def begin(self, number: int) -> None:
        if number not in self._known and number not in self._running:
            self._running[number] = self._thread.submit(self._sources[number].sha256)

    def new(self) -> dict[int, str | None]:
        """Those that are known since the last call."""
        for number, future in [item for item in self._running.items() if item[1].done()]:
            self._known[number] = future.result()
            del self._running[number]
        found = {number: sha for number, sha in self._known.items() if number not in self._noted}
        self._noted |= set(found)
        return found

    def all(self) -> list[str | None]:
        """One a source, in order."""
        for number in range(len(self._sources)):
            self.begin(number)
        self._known |= {number: future.result() for number, future in self._running.items()}
        self.close()
        return [self._known[number] for number in range(len(self._sources))]

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
