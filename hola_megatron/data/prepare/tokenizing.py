"""Documents to token ids, in their order, by one process or many."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from hola_megatron.data.documents import Document, Mark
from hola_megatron.data.packing import token_dtype
from hola_megatron.data.prepare.children import end_with_parent, spawning
from hola_megatron.data.tokenizer import Tokenizer, load_tokenizer
from hola_megatron.errors import DataError

BATCH_CHARACTERS = 1 << 18
BATCH_DOCUMENTS = 1024
_BATCHES_PER_WORKER = 3

Tokenized = list[tuple[Mark, np.ndarray]]

_worker_tokenizer: Tokenizer | None = None


def tokenized(documents: Iterator[Document], tokenizer: Tokenizer, spec: str, workers: int) -> Iterator[Tokenized]:
    """Batches of (mark before the document, its ids), in the order of the documents.

    Args:
        tokenizer: `load_tokenizer(spec)`.
        workers: processes; 1 is this one alone.

    Raises:
        DataError: a worker process was killed; or as `documents` raises.
    """
    if workers == 1:
        for batch in _batches(documents):
            yield _with_marks(batch, _encode(tokenizer, [document.text for document in batch]))
        return
    pool = ProcessPoolExecutor(workers, spawning(), _start_worker, (spec,))
    try:
        yield from _ordered(pool, _batches(documents), workers * _BATCHES_PER_WORKER)
    except BrokenProcessPool as error:
        raise DataError(
            "a tokenizer process was killed, perhaps for want of memory; try again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _ordered(pool: ProcessPoolExecutor, batches: Iterator[list[Document]], ahead: int) -> Iterator[Tokenized]:
    """Results in the order of `batches`, reading at most `ahead` of them in advance (a pool's map reads all)."""
    pending: deque[tuple[list[Document], Future[list[np.ndarray]]]] = deque()
    for batch in batches:
        pending.append((batch, pool.submit(_encode_in_worker, [document.text for document in batch])))
        if len(pending) >= ahead:
            first, future = pending.popleft()
            yield _with_marks(first, future.result())
    while pending:
        first, future = pending.popleft()
        yield _with_marks(first, future.result())


def _with_marks(batch: list[Document], ids: list[np.ndarray]) -> Tokenized:
    return [(document.mark, array) for document, array in zip(batch, ids, strict=True)]


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    dtype = token_dtype(tokenizer.vocab_size)
    return [np.array(ids, dtype) for ids in tokenizer.encode_batch(texts)]


def _start_worker(spec: str) -> None:
    global _worker_tokenizer
    end_with_parent()
    one_thread()
    _worker_tokenizer = load_tokenizer(spec)


def one_thread() -> None:
    """For worker processes: they are the parallelism."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _encode_in_worker(texts: list[str]) -> list[np.ndarray]:
    return _encode(_worker_tokenizer, texts)
