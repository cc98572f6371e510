"""Packed datasets to micro-batches.

    PackedDataset   random access to the verified samples of one folder
    Mixture         global sample index g -> (dataset, sample), by `order`
    BatchLoader     optimizer step -> the micro-batches of one data-parallel rank

The token stream of a run is a function of the mixture, the seed and the number of samples consumed.
How many ranks and micro-batches share a step, and how often the run was stopped, does not enter it.

Legend: B samples of a micro-batch, T sequence length, N documents (or parts of one) in a micro-batch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from hola_megatron.data.order import SampleOrder, StreamOrder
from hola_megatron.data.packing import Sample, from_record
from hola_megatron.data.shards import ShardStore, VerifyReport, verify_dataset
from hola_megatron.data.tokenizer import Tokenizer
from hola_megatron.errors import DataError, RecipeError

Documents = Literal["separate", "joined"]

__all__ = [
    "Batch",
    "BatchLoader",
    "Mixture",
    "PackedDataset",
    "Sample",
    "SampleOrder",
    "VerifyReport",
    "check_tokenizer",
    "collate",
    "eval_batches",
    "verify_dataset",
]


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
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token of the stream (bos and eos count as tokens)."""
        return self.info["text_bytes"] / self.info["tokens"]

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` (0 .. len - 1): tokens int64 [T + 1], starts int32 [D], length.

        Raises:
            IndexError: out of range.
            DataError: its shard is missing or damaged.
        """
        return from_record(self._store.record(index))


class Mixture:
    """Several datasets as one endless sequence of samples.

    Args:
        datasets: one or more, of one sequence length and tokenizer.
        weights: share of each in the samples; None = in proportion to their sizes.
        seed: 0 .. 2**64 - 1; decides the whole order.
        names: for logs and errors; None = the last part of each path, or the paths where these are alike.

    Raises:
        DataError: the datasets do not fit together.
        RecipeError: a weight is not positive or under 1/1000 of the mixture; numbers do not match.
    """

    def __init__(
        self,
        datasets: Sequence[PackedDataset],
        weights: Sequence[float] | None = None,
        *,
        seed: int,
        names: Sequence[str] | None = None,
    ):
        self.datasets = list(datasets)
        self.names = list(names or _short_names([d.path for d in self.datasets]))
        self.weights = [float(w) for w in ([len(d) for d in datasets] if weights is None else weights)]
        if not len(self.datasets) == len(self.weights) == len(self.names) > 0:
            raise RecipeError(
                f"mixture: {len(self.datasets)} datasets, {len(self.weights)} weights and {len(self.names)} names;"
                " give one weight and one name a dataset"
            )
        self._require_alike()
        self.sequence_length = self.datasets[0].sequence_length
        self._streams = StreamOrder(self.weights, seed, self.names)
        self._orders = [SampleOrder(d.shard_sizes, seed, stream=i) for i, d in enumerate(self.datasets)]

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the datasets' fingerprints and weights: the same data in the same proportions."""
        parts = [f"{d.fingerprint} {count}" for d, count in zip(self.datasets, self._streams.counts, strict=True)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def locate(self, g: int) -> tuple[int, int]:
        """(stream, index in its dataset) of global sample g."""
        stream, k = self._streams.locate(g)
        return stream, self._orders[stream][k]

    def __getitem__(self, g: int) -> Sample:
        """Global sample g (>= 0, without end). Raises `DataError` as `PackedDataset` does."""
        stream, index = self.locate(g)
        return self.datasets[stream][index]

    def samples_per_stream(self, samples: int) -> list[int]:
        """Samples of each stream among the first `samples` global samples."""
        return self._streams.taken(samples)

    def tokens_per_stream(self, samples: int) -> list[int]:
        """Tokens trained on of each stream after `samples` global samples, T a sample."""
        return [n * self.sequence_length for n in self.samples_per_stream(samples)]

    def epochs_per_stream(self, samples: int) -> list[float]:
        """How many times each dataset has been read through after `samples` global samples."""
        return [n / len(d) for n, d in zip(self.samples_per_stream(samples), self.datasets, strict=True)]

    def _require_alike(self) -> None:
        first = self.datasets[0]
        for other in self.datasets[1:]:
            for what in ("sequence_length", "tokenizer_identity"):
                mine, theirs = getattr(first, what), getattr(other, what)
                if mine != theirs:
                    raise DataError(
                        f"mixture: {what} of {other.path} is {theirs}, of {first.path} {mine};"
                        " prepare both with the same tokenizer and sequence length"
                    )


def _short_names(paths: list[str]) -> list[str]:
    short = [os.path.basename(path.rstrip("/")) for path in paths]
    return short if len(set(short)) == len(short) else paths


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        tokens: int64 [B, T] inputs.
        labels: int64 [B, T] the token after each input.
        loss_mask: float32 [B, T] 1 where the label counts, else 0.
        cu_seqlens: int32 [N + 1] cuts of the flattened B * T inputs at which the model's state
            starts anew, from 0 to B * T, strictly ascending; None where documents are joined.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    cu_seqlens: torch.Tensor | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on `device`."""
        moved = {k: v.to(device, non_blocking=non_blocking) for k, v in vars(self).items() if v is not None}
        return replace(self, **moved)


def collate(samples: Sequence[Sample], documents: Documents = "separate") -> Batch:
    """Stack samples to a batch.

    "separate": a document sees nothing of the others: `cu_seqlens` cuts at every sample edge and
    document start, and a label that is the first token of another document is masked.
    "joined": documents of a sample are one text; only padding is masked.
    """
    tokens = np.stack([sample.tokens for sample in samples])
    B, T = tokens.shape[0], tokens.shape[1] - 1
    mask = np.zeros((B, T), np.float32)
    cuts = []
    for row, sample in enumerate(samples):
        mask[row, : max(sample.length - 1, 0)] = 1
        later = sample.starts[sample.starts > 0]
        if documents == "separate":
            mask[row, later - 1] = 0
            cuts += [[row * T], row * T + later[later < T]]
    cu_seqlens = torch.from_numpy(np.concatenate([*cuts, [B * T]]).astype(np.int32)) if cuts else None
    return Batch(
        tokens=torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
        labels=torch.from_numpy(np.ascontiguousarray(tokens[:, 1:])),
        loss_mask=torch.from_numpy(mask),
        cu_seqlens=cu_seqlens,
    )


class BatchLoader:
    """The micro-batches of one data-parallel rank, step after step, without end.

    Step s uses the global samples first_sample + [s * G, (s + 1) * G), G = samples_per_step;
    micro-batch m of rank r holds (m * data_size + r) * micro_batch_size + 0 .. micro_batch_size - 1
    of them. Tensor-, pipeline- and context-parallel peers share r and so read the same samples.

        for batches in loader:          # one optimizer step
            for batch in batches: ...   # one micro-batch
            save({"loader": loader.state()})

    To go on: `BatchLoader(..., first_sample=state["samples"])`, with any other split as well.

    Args:
        mixture: what to read.
        data_rank, data_size: place in the data-parallel group.
        micro_batch_size: B, samples of a micro-batch.
        micro_batches: micro-batches of a step on each rank.
        first_sample: global samples consumed before.
        documents: "separate" or "joined", see `collate`.

    Raises:
        RecipeError: a number out of range or an unknown `documents`.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        data_rank: int,
        data_size: int,
        micro_batch_size: int,
        micro_batches: int,
        first_sample: int = 0,
        documents: Documents = "separate",
    ):
        _check_split(data_rank, data_size, micro_batch_size, documents)
        if micro_batches < 1 or first_sample < 0:
            raise RecipeError(
                f"loader: micro_batches {micro_batches} must be 1 or more, first_sample {first_sample} 0 or more"
            )
        self.mixture = mixture
        self.samples_per_step = data_size * micro_batch_size * micro_batches
        self._rank, self._size = data_rank, data_size
        self._micro_batch_size, self._micro_batches = micro_batch_size, micro_batches
        self._first = first_sample
        self._documents = documents
        self._steps = 0

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """The micro-batches of the next step, which then counts as consumed.

        Raises:
            DataError: a shard is missing or damaged; the step does not count.
        """
        batches = [self.micro_batch(self._steps, m) for m in range(self._micro_batches)]
        self._steps += 1
        return batches

    def sample_indices(self, step: int, micro_batch: int) -> range:
        """Global sample indices of one micro-batch of this rank; `step` counts from this loader's start."""
        begin = self._first + step * self.samples_per_step
        begin += (micro_batch * self._size + self._rank) * self._micro_batch_size
        return range(begin, begin + self._micro_batch_size)

    def micro_batch(self, step: int, micro_batch: int) -> Batch:
        """Any micro-batch of this rank, without moving the loader."""
        return collate([self.mixture[g] for g in self.sample_indices(step, micro_batch)], self._documents)

    def state(self) -> dict[str, int]:
        """{"samples": global samples consumed}; the same on every rank."""
        return {"samples": self._first + self._steps * self.samples_per_step}


def eval_batches(
    dataset: PackedDataset,
    *,
    data_rank: int,
    data_size: int,
    micro_batch_size: int,
    documents: Documents = "separate",
    limit: int | None = None,
) -> Iterator[Batch]:
    """One pass over a dataset in order, split over the data-parallel ranks.

    Every rank gets the same number of batches of the same shape [micro_batch_size, T], so
    collectives inside the loop meet: what is missing at the end is filled with samples that are
    masked throughout. Sum losses over `loss_mask` and the ranks; do not average batches.

    Args:
        limit: use the first `limit` samples only.

    Raises:
        RecipeError: a number out of range.
        DataError: a shard is missing or damaged.
    """
    _check_split(data_rank, data_size, micro_batch_size, documents)
    total = len(dataset) if limit is None else min(limit, len(dataset))
    together = data_size * micro_batch_size
    filler = Sample(
        np.full(dataset.sequence_length + 1, dataset.tokenizer_identity["eos_id"], np.int64), np.zeros(0, np.int32), 0
    )
    for begin in range(data_rank * micro_batch_size, -(-total // together) * together, together):
        indices = range(begin, begin + micro_batch_size)
        yield collate([dataset[i] if i < total else filler for i in indices], documents)


def _check_split(data_rank: int, data_size: int, micro_batch_size: int, documents: str) -> None:
    problems = []
    if not 0 <= data_rank < data_size:
        problems.append(f"loader: data_rank {data_rank} must be in 0 .. data_size - 1 = {data_size - 1}")
    if micro_batch_size < 1:
        problems.append(f"loader: micro_batch_size {micro_batch_size} must be 1 or more")
    if documents not in ("separate", "joined"):
        problems.append(f"loader: documents {documents!r}; allowed are separate, joined")
    if problems:
        raise RecipeError(problems)


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
