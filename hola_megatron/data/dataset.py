"""One prepared dataset: random access to its verified samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hola_megatron.data.packing import Sample, from_record, sample_problem
from hola_megatron.data.shards import ShardStore
from hola_megatron.data.tokenizer import Tokenizer
from hola_megatron.errors import DataError


class PackedDataset:
    """The samples of one prepared dataset, by index.

    Args:
        path: a local folder, read in place, or a URL (s3://, gs://, file://, ...).
        cache: local folder for the downloads of a URL; required there, not used for a folder.

    Raises:
        DataError: nothing there, not a dataset of ours, unreadable, or not downloadable.
    """

    def __init__(self, path: str, *, cache: str | None = None):
        self.path = path
        self._store = ShardStore(path, cache)

    @property
    def info(self) -> dict[str, Any]:
        """The content of dataset.json: counts, tokenizer, sources."""
        return self._store.info

    @property
    def sequence_length(self) -> int:
        """T: tokens predicted by a sample."""
        return self.info["sequence_length"]

    @property
    def tokenizer_identity(self) -> dict[str, Any]:
        """`Tokenizer.identity()` of the tokenizer that the dataset was prepared with."""
        return self.info["tokenizer"]

    @property
    def num_samples(self) -> int:
        """Samples in the dataset, also `len(dataset)`."""
        return len(self._store)

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard, in index order."""
        return self._store.shard_sizes

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over dataset.json and index.json, hence over every shard's hash."""
        return self._store.fingerprint

    @property
    def superseded(self) -> list[Path]:
        """Cache folders of earlier preparations of this URL, which nothing reads any more."""
        return self._store.superseded

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token of the stream (bos and eos count as tokens)."""
        return self.info["text_bytes"] / self.info["tokens"]

    def __len__(self) -> int:
        return len(self._store)

    def verify_first(self, samples: int) -> None:
        """Verify the shards of the first `samples` samples now; `DataError` names one that is missing or damaged."""
        before = 0
        for shard, size in enumerate(self.shard_sizes):
            if before >= samples:
                return
            self._store.open(shard)
            before += size

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` (0 .. len - 1): tokens int64 [T + 1], starts int32 [D], length.

        Raises:
            IndexError: out of range.
            DataError: its shard is missing or damaged, or the sample holds what a model cannot take.
        """
        sample = from_record(self._store.record(index))
        problem = sample_problem(sample, **self._store.limits)
        if problem:
            raise self._store.bad_sample(index, problem)
        return sample


def check_tokenizer(dataset: PackedDataset, tokenizer: Tokenizer) -> None:
    """Raise `DataError` unless `dataset` was prepared with this very tokenizer."""
    expected, found = dataset.tokenizer_identity, tokenizer.identity()
    if expected != found:
        raise DataError(
            f"{dataset.path}: prepared with tokenizer {_shown(expected)}, given is {_shown(found)};"
            " give the tokenizer it was prepared with, or prepare it again"
        )


def _shown(identity: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in identity.items())
