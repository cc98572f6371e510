"""Packed datasets to micro-batches.

    PackedDataset   random access to the verified samples of one folder
    Mixture         global sample index g -> (dataset, sample), by `order`
    BatchLoader     optimizer step -> the micro-batches of one data-parallel rank

The token stream of a run is a function of the mixture, the seed and the number of samples consumed.
How many ranks and micro-batches share a step, and how often the run was stopped, does not enter it.

Legend: B samples of a micro-batch, T sequence length, N documents of a micro-batch (some of them incomplete).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from hola_kernels import PackedDocuments
from hola_megatron.data.dataset import PackedDataset, check_tokenizer
from hola_megatron.data.mixture import Mixture
from hola_megatron.data.order import SampleOrder
from hola_megatron.data.packing import Sample
from hola_megatron.data.shards import VerifyReport, verify_dataset
from hola_megatron.errors import RecipeError

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


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        tokens: int64 [B, T] inputs.
        labels: int64 [B, T] the token after each input.
        loss_mask: float32 [B, T] 1 where the label counts, else 0.
        documents: the N documents of the flattened B * T inputs; None where documents are joined. The
            layers of the model use this value, with the tables that operations make from it. A tensor
            cu_seqlens [N + 1] of integers, rising from 0 to B * T, is converted.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    documents: PackedDocuments | None

    def __post_init__(self) -> None:
        if isinstance(self.documents, torch.Tensor):
            object.__setattr__(self, "documents", PackedDocuments(self.documents))

    @property
    def cu_seqlens(self) -> torch.Tensor | None:
        """int64 [N + 1] on the CPU; None where documents are joined."""
        return None if self.documents is None else self.documents.host()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with its tensors on `device`."""
        moved = {k: v.to(device, non_blocking=non_blocking) for k, v in vars(self).items()
                 if isinstance(v, torch.Tensor)}
        return replace(self, **moved)


def collate(samples: Sequence[Sample], documents: Documents = "separate") -> Batch:
    """Stack samples to a batch.

    "separate": documents are independent; one starts at every sample and document start, and a label
    that is the first token of another document is masked.
    "joined": documents of a sample are one sequence; only padding is masked.
    """
    tokens = np.stack([sample.tokens for sample in samples])
    B, T = tokens.shape[0], tokens.shape[1] - 1
    mask = np.zeros((B, T), np.float32)
    starts = []
    for row, sample in enumerate(samples):
        mask[row, : max(sample.length - 1, 0)] = 1
        later = sample.starts[sample.starts > 0]
        if documents == "separate":
            mask[row, later - 1] = 0
            starts += [[row * T], row * T + later[later < T]]
    cu_seqlens = torch.from_numpy(np.concatenate([*starts, [B * T]]).astype(np.int64)) if starts else None
    return Batch(
        tokens=torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
        labels=torch.from_numpy(np.ascontiguousarray(tokens[:, 1:])),
        loss_mask=torch.from_numpy(mask),
        documents=cu_seqlens,
    )


class BatchLoader:
    """The micro-batches of one data-parallel rank, step after step, without end.

    Step s uses the global samples first_sample + [s * G, (s + 1) * G), G = samples_per_step;
    micro-batch m of rank r holds (m * data_size + r) * micro_batch_size + 0 .. micro_batch_size - 1
    of them. Tensor-, pipeline- and context-parallel peers share r and so read the same samples.

        for batches in loader:          # one optimizer step
            for batch in batches: ...   # one micro-batch
            save({"loader": loader.state()})

    To continue: `BatchLoader(..., first_sample=state["samples"])`, with any other split as well.

    Args:
        mixture: what to read.
        data_rank, data_size: rank in the data-parallel group, and its size.
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
        start = self._first + step * self.samples_per_step
        start += (micro_batch * self._size + self._rank) * self._micro_batch_size
        return range(start, start + self._micro_batch_size)

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
    for start in range(data_rank * micro_batch_size, -(-total // together) * together, together):
        indices = range(start, start + micro_batch_size)
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
