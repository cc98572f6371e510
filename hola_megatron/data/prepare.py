"""Text files to a folder of packed MDS shards.

    read documents in order -> tokenize (many processes) -> pack -> MDSWriter -> rename

Only tokenizing is spread out; its results come back in the order of the documents, so the shards
are the same bytes for any number of workers. Everything is written to a hidden folder beside the
target and renamed when complete: a killed run leaves nothing that could be taken for a dataset.

Beside MDS's own index.json lies `dataset.json`: the tokenizer's identity, the sequence length, the
counts and the source files. It holds no time and no path, so the same input gives the same
fingerprint anywhere.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hola_megatron import __version__
from hola_megatron.data.documents import BUNDLED_PARTS, DocumentReader, Source, bundled_source, find_sources
from hola_megatron.data.packing import Packer, mds_columns, to_record, token_dtype
from hola_megatron.data.shards import DATASET_FILE, FORMAT, FORMAT_VERSION, INDEX_FILE, mds_writer
from hola_megatron.data.tokenizer import Tokenizer, load_tokenizer
from hola_megatron.errors import DataError, RecipeError

DEFAULT_SHARD_SIZE = 1 << 26
_MAX_SHARD_SIZE = (1 << 32) - 1  # MDS stores offsets within a shard as uint32
_BATCH_CHARACTERS = 1 << 18
_BATCH_DOCUMENTS = 1024
_BATCHES_PER_WORKER = 3

_worker_tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare; the fields are the options of tools/prepare_data.py.

    Attributes:
        inputs: files, folders or glob patterns; empty if `bundled` is given.
        out: folder to make.
        tokenizer: as in `load_tokenizer`.
        sequence_length: tokens predicted by a sample (>= 1).
        bundled: "train" or "valid": the text that comes with the project, instead of `inputs`.
        text_field: key (jsonl) or column (parquet) of the text.
        split_on: txt only: the line that parts documents ("" = blank lines); None = a file is a document.
        workers: tokenizing processes (>= 1); the output does not depend on it.
        shard_size: most bytes of a shard.
        keep_tail: pad the last, partial sample with eos instead of dropping it (validation sets).
        overwrite: replace `out` if it is a dataset already.
    """

    inputs: Sequence[str]
    out: str
    tokenizer: str
    sequence_length: int
    bundled: str | None = None
    text_field: str = "text"
    split_on: str | None = None
    workers: int = 1
    shard_size: int = DEFAULT_SHARD_SIZE
    keep_tail: bool = False
    overwrite: bool = False

    def check(self) -> None:
        """Raise `RecipeError` with every option that cannot be used."""
        problems = []
        if bool(self.inputs) == bool(self.bundled):
            problems.append("inputs: give input files or --bundled, one of the two")
        if self.bundled and self.bundled not in BUNDLED_PARTS:
            problems.append(f"--bundled {self.bundled}: allowed are {', '.join(BUNDLED_PARTS)}")
        if self.sequence_length < 1:
            problems.append(f"--sequence-length {self.sequence_length}: must be 1 or more")
        if self.workers < 1:
            problems.append(f"--workers {self.workers}: must be 1 or more")
        if self.shard_size > _MAX_SHARD_SIZE:
            problems.append(f"--shard-size {self.shard_size}: must be {_MAX_SHARD_SIZE} or less")
        if problems:
            raise RecipeError(problems)


@dataclass(frozen=True)
class Summary:
    """What was written.

    Attributes:
        out: the folder.
        documents, empty: documents packed, and left out because they had no text.
        tokens: tokens of the whole stream, bos and eos included.
        samples, shards: samples written and the files they lie in.
        text_bytes: UTF-8 bytes of the documents.
    """

    out: str
    documents: int
    empty: int
    tokens: int
    samples: int
    shards: int
    text_bytes: int

    def __str__(self) -> str:
        left_out = f" ({self.empty:,} without text left out)" if self.empty else ""
        return (
            f"documents      {self.documents:,}{left_out}\n"
            f"tokens         {self.tokens:,}\n"
            f"samples        {self.samples:,} in {self.shards:,} shards\n"
            f"bytes a token  {self.text_bytes / self.tokens:.3f}\n"
            f"out            {self.out}"
        )


def prepare(options: PrepareOptions) -> Summary:
    """Make the dataset that `options` describe.

    Raises:
        RecipeError: an option cannot be used.
        DataError: input missing, unreadable or empty; tokenizer unusable; output folder in the way.
    """
    options.check()
    out = Path(options.out)
    _refuse_existing(out, options.overwrite)
    tokenizer = load_tokenizer(options.tokenizer)
    sources = [bundled_source(options.bundled)] if options.bundled else find_sources(options.inputs)
    partial = out.absolute().parent / f".{out.absolute().name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        partial.mkdir(parents=True)
        summary = _write(options, tokenizer, sources, partial)
        _put_in_place(partial, out)
    except OSError as error:
        raise DataError(f"{out}: could not be prepared ({error}); check permissions and free space") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return summary


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / DATASET_FILE).is_file():
        raise DataError(f"{out}: exists and is no dataset of ours, so it is never overwritten; choose another --out")
    if not overwrite:
        raise DataError(f"{out}: holds a dataset already; choose another --out, or pass --overwrite to replace it")


def _put_in_place(partial: Path, out: Path) -> None:
    old = partial.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _write(options: PrepareOptions, tokenizer: Tokenizer, sources: list[Source], folder: Path) -> Summary:
    """Write shards, index.json and dataset.json into `folder`."""
    T, dtype = options.sequence_length, token_dtype(tokenizer.vocab_size)
    reader = DocumentReader(sources, options.text_field, options.split_on)
    packer = Packer(T, tokenizer.bos_id, tokenizer.eos_id, dtype)
    samples = 0
    with mds_writer(folder, mds_columns(T, dtype), options.shard_size) as writer:
        for sample in _samples(options, tokenizer, reader, packer):
            writer.write(to_record(sample))
            samples += 1
    _refuse_empty(options, reader, packer, samples)
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "project_version": __version__,
        "tokenizer": tokenizer.identity(),
        "sequence_length": T,
        "keep_tail": options.keep_tail,
        "documents": reader.documents,
        "text_bytes": reader.text_bytes,
        "tokens": packer.tokens,
        "samples": samples,
        "sources": [source.describe() for source in sources],
    }
    (folder / DATASET_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shards = len(json.loads((folder / INDEX_FILE).read_text())["shards"])
    return Summary(options.out, reader.documents, reader.empty, packer.tokens, samples, shards, reader.text_bytes)


def _refuse_empty(options: PrepareOptions, reader: DocumentReader, packer: Packer, samples: int) -> None:
    where = ", ".join(options.inputs) or f"--bundled {options.bundled}"
    if not reader.documents:
        raise DataError(f"input {where}: no document with text ({reader.empty} empty); give other input")
    if not samples:
        raise DataError(
            f"input {where}: {packer.tokens} tokens do not fill one sample of {options.sequence_length} + 1;"
            " give more text, a smaller --sequence-length, or --keep-tail"
        )


def _samples(options: PrepareOptions, tokenizer: Tokenizer, reader: DocumentReader, packer: Packer) -> Iterator[Any]:
    """The packed samples in order, with a progress bar where somebody watches."""
    total = sum(source.path.stat().st_size for source in reader.sources)
    with tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for document_ids in _tokenized(reader, tokenizer, options):
            yield from packer.add(document_ids)
            bar.set_postfix_str(f"{packer.tokens:,} tokens", refresh=False)
            bar.update(reader.bytes_read - bar.n)
    tail = packer.finish() if options.keep_tail else None
    if tail:
        yield tail


def _tokenized(reader: DocumentReader, tokenizer: Tokenizer, options: PrepareOptions) -> Iterator[np.ndarray]:
    """Ids of each document, in the order of the documents."""
    if options.workers == 1:
        for batch in _batches(reader):
            yield from _encode(tokenizer, batch)
        return
    # "spawn": forking a process that holds the tokenizer's threads can deadlock.
    pool = ProcessPoolExecutor(options.workers, get_context("spawn"), _start_worker, (options.tokenizer,))
    try:
        for arrays in _ordered(pool, _batches(reader), options.workers * _BATCHES_PER_WORKER):
            yield from arrays
    except BrokenProcessPool as error:
        raise DataError(
            "a tokenizer process was killed, perhaps for want of memory; try again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _ordered(pool: ProcessPoolExecutor, batches: Iterator[list[str]], ahead: int) -> Iterator[list[np.ndarray]]:
    """Results in the order of `batches`, reading at most `ahead` of them in advance (a pool's map reads all)."""
    pending: deque[Future[list[np.ndarray]]] = deque()
    for batch in batches:
        pending.append(pool.submit(_encode_in_worker, batch))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _batches(documents: DocumentReader) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    dtype = token_dtype(tokenizer.vocab_size)
    return [np.array(ids, dtype) for ids in tokenizer.encode_batch(texts)]


def _start_worker(spec: str) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process: the processes are the parallelism
    _worker_tokenizer = load_tokenizer(spec)


def _encode_in_worker(texts: list[str]) -> list[np.ndarray]:
    return _encode(_worker_tokenizer, texts)
