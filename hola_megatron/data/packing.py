"""Documents to fixed-length samples.

Every document becomes `[bos] text [eos]` (bos only where the tokenizer has one) and all documents
form one stream. With T = sequence_length, sample k holds the T + 1 tokens from position k T on:
consecutive samples share one token, the last label of one being the first input of the next, so
that each token of the stream is predicted exactly once.

        stream     a b c d e f g        T = 3
        sample 0   a b c d              predicts b c d
        sample 1         d e f g        predicts e f g
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# `starts` is stored as raw little-endian int32 because MDS arrays may not be empty, and a sample
# inside one long document has no start at all.
_STARTS_DTYPE = np.dtype("<i4")


@dataclass(frozen=True)
class Sample:
    """One packed sample.

    Attributes:
        tokens: [T + 1] ids; int64 as read, the stored dtype as written.
        starts: [D] int32 ascending positions in 0..T at which a document starts.
        length: valid tokens, T + 1 but in the padded tail of a dataset; tokens[length:] is padding.
    """

    tokens: np.ndarray
    starts: np.ndarray
    length: int


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that ids below `vocab_size` are stored in: uint16 where they fit, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def mds_columns(sequence_length: int, dtype: np.dtype) -> dict[str, str]:
    """MDS column name -> encoding, for samples of `sequence_length + 1` tokens."""
    return {"tokens": f"ndarray:{dtype.name}:{sequence_length + 1}", "starts": "bytes", "length": "int"}


def to_record(sample: Sample) -> dict[str, Any]:
    """The MDS record of a sample (columns of `mds_columns`)."""
    return {
        "tokens": sample.tokens,
        "starts": sample.starts.astype(_STARTS_DTYPE).tobytes(),
        "length": int(sample.length),
    }


def from_record(record: dict[str, Any]) -> Sample:
    """The sample of an MDS record, tokens converted to int64. Not checked, see `sample_problem`."""
    raw = record["starts"]
    # bytes that are no whole number of starts give a start that no sample can have
    starts = np.frombuffer(raw, _STARTS_DTYPE).astype(np.int32) if len(raw) % 4 == 0 else np.array([-1], np.int32)
    return Sample(record["tokens"].astype(np.int64), starts, int(record["length"]))


def sample_problem(sample: Sample, *, sequence_length: int, vocab_size: int) -> str | None:
    """What makes a stored sample unusable, to be put after its name, or None. Costs a few microseconds.

    A token id at or above the vocabulary indexes outside the embedding, or, where tensor ranks cut the embedding, is
    taken for a row of another rank and trained on; document starts out of order reset the state at wrong positions.
    """
    T, starts = sequence_length, sample.starts
    if sample.tokens.shape != (T + 1,):
        return f"holds {sample.tokens.size} tokens, sequence length {T} needs {T + 1}"
    if int(sample.tokens.max()) >= vocab_size or int(sample.tokens.min()) < 0:
        bad = int(sample.tokens.max() if sample.tokens.max() >= vocab_size else sample.tokens.min())
        return f"holds token id {bad}, the tokenizer's vocabulary is 0 to {vocab_size - 1}"
    if not 2 <= sample.length <= T + 1:
        return f"has length {sample.length}, allowed are 2 to {T + 1}"
    if starts.size and (int(starts[0]) < 0 or int(starts[-1]) >= sample.length or (starts[1:] <= starts[:-1]).any()):
        return f"has document starts that do not ascend within 0 to {sample.length - 1}"
    return None


class Packer:
    """Packs a stream of documents; what does not fill a sample waits for the next document.

    Args:
        sequence_length: T, tokens predicted by a sample.
        bos_id: id before each document, or None.
        eos_id: id after each document, and the padding of the tail.
        dtype: of the tokens given out, see `token_dtype`.
    """

    def __init__(self, sequence_length: int, bos_id: int | None, eos_id: int, dtype: np.dtype):
        self.tokens = 0
        self._length = sequence_length
        self._head = np.array([] if bos_id is None else [bos_id], dtype)
        self._tail = np.array([eos_id], dtype)
        self._buffer = np.empty(0, dtype)
        self._starts: list[int] = []

    def add(self, ids: Sequence[int] | np.ndarray) -> list[Sample]:
        """Append one document (ids without special tokens); return the samples that are now full."""
        T = self._length
        self._starts.append(len(self._buffer))
        document = [self._head, np.asarray(ids, self._buffer.dtype), self._tail]
        buffer = np.concatenate([self._buffer, *document])
        self.tokens += len(buffer) - len(self._buffer)
        full = (len(buffer) - 1) // T
        samples = [self._cut(buffer[k * T : k * T + T + 1], T + 1) for k in range(full)]
        self._buffer = buffer[full * T :]
        return samples

    def state(self) -> dict[str, Any] | None:
        """What the packer holds between two documents, for `restore`; its values are not changed later."""
        return {"tokens": self.tokens, "buffer": self._buffer, "starts": list(self._starts)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.tokens, self._starts = state["tokens"], list(state["starts"])
        self._buffer = np.asarray(state["buffer"], self._buffer.dtype)

    def finish(self) -> Sample | None:
        """The tail padded with eos, or None where every token has been predicted already."""
        valid = len(self._buffer)
        if valid < 2:
            return None
        tokens = np.full(self._length + 1, self._tail[0], self._buffer.dtype)
        tokens[:valid] = self._buffer
        return self._cut(tokens, valid)

    def _cut(self, tokens: np.ndarray, length: int) -> Sample:
        """The sample at the head of the buffer; document starts become relative to the next one."""
        T = self._length
        starts = np.array([s for s in self._starts if s <= T], np.int32)
        self._starts = [s - T for s in self._starts if s >= T]
        return Sample(tokens, starts, length)
