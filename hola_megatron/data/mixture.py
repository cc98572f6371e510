"""Several datasets as one endless sequence of samples."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Sequence

from hola_megatron.data.dataset import PackedDataset
from hola_megatron.data.order import SampleOrder, StreamOrder
from hola_megatron.data.packing import Sample
from hola_megatron.data.phase_plan import follow, numbered
from hola_megatron.data.phases import Phase, Phases, StreamShare
from hola_megatron.errors import DataError, RecipeError


class Mixture:
    """Several datasets as one endless sequence of samples.

    Args:
        datasets: one or more, of one sequence length and tokenizer.
        weights: share of each in the samples; None = in proportion to their sizes.
        seed: 0 .. 2**64 - 1; decides the whole order.
        names: for logs and errors; None = the last part of each path, or the paths where these are equal.
        budgets: of the phases before these weights count, each as [(dataset, samples), ...].

    Attributes:
        datasets, names: of every stream, those of the weights first.

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
        budgets: Sequence[Sequence[tuple[PackedDataset, int]]] = (),
    ):
        self.datasets = list(datasets)
        self.names = list(names or _short_names([d.path for d in self.datasets]))
        self.weights = [float(w) for w in ([len(d) for d in datasets] if weights is None else weights)]
        if not len(self.datasets) == len(self.weights) == len(self.names) > 0:
            raise RecipeError(
                f"mixture: {len(self.datasets)} datasets, {len(self.weights)} weights and {len(self.names)} names;"
                " give one weight and one name a dataset"
            )
        self.shares = [int(n) for n in StreamOrder(self.weights, seed, self.names).counts]
        described = list(zip(self.datasets, self.names, self.shares, strict=True))
        self._add_datasets([dataset for phase in budgets for dataset, _ in phase])
        self._require_same_form()
        self.sequence_length = self.datasets[0].sequence_length
        named = {d.fingerprint: name for d, name in reversed(list(zip(self.datasets, self.names, strict=True)))}
        plan = [[(d.fingerprint, named[d.fingerprint], count) for d, count in phase] for phase in budgets]
        plan.append([(d.fingerprint, name, share) for d, name, share in described])
        self._plan = numbered([
            Phase(0, seed, self.sequence_length, [StreamShare(*stream[:2], i, 0, stream[2])
                                                  for i, stream in enumerate(streams)], exact=number < len(budgets))
            for number, streams in enumerate(plan)])
        self._set(follow(self._plan))

    def _add_datasets(self, more: Sequence[PackedDataset]) -> None:
        """Append those that are not there yet, with names of their own."""
        known = {dataset.fingerprint for dataset in self.datasets}
        for dataset in more:
            if dataset.fingerprint not in known:
                known.add(dataset.fingerprint)
                (name,) = _short_names([dataset.path])
                self.datasets.append(dataset)
                self.names.append(dataset.path if name in self.names else name)

    def _set(self, phases: Phases) -> None:
        """Give every dataset its stream of these phases."""
        self.phases = phases
        last = phases.phases[-1].streams
        of_dataset = {s.dataset: s.number for phase in phases.phases for s in phase.streams}
        rest = self.datasets[len(last):]
        # one that only phases read that are over, in a run that has never read it, has none
        self._numbers = [*(s.number for s in last), *(of_dataset.get(d.fingerprint, -1) for d in rest)]
        self._dataset_of = {number: i for i, number in enumerate(self._numbers) if number >= 0}
        self._orders: dict[int, SampleOrder] = {}

    def going_on(self, before: Phases, samples: int, begin: int = 0) -> Mixture:
        """This mixture in a run that has read `samples` global samples in the phases `before`.

        Where the last of them reads the same, the run continues in it; else a phase starts at sample `samples`, and
        each dataset that was read before continues at its position. begin: samples read before the run's first step,
        from where on planned phases count.

        Raises RecipeError where the run is in the middle of a planned phase that has changed.
        """
        found = copy.copy(self)
        found._set(follow(self._plan, before, samples, begin))
        return found

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the datasets' fingerprints and weights: the same data in the same proportions."""
        streams = [(f"phase {number} {stream.dataset}" if phase.exact else stream.dataset, stream.share)
                   for number, phase in enumerate(self._plan) for stream in phase.streams]
        return fingerprint_of(*zip(*streams, strict=True))

    def locate(self, g: int) -> tuple[int, int]:
        """(stream, index in its dataset) of global sample g.

        Raises `DataError` where g is of an earlier phase, and of a dataset that is not in this mixture.
        """
        stream, k = self.phases.locate(g)
        if stream.number not in self._dataset_of:
            raise DataError(f"sample {g:,} of the run is of {stream.name}, which data.train no longer names; name it")
        number = self._dataset_of[stream.number]
        if stream.number not in self._orders:
            # a later phase's seed reshuffles the streams; within a stream it would repeat and skip samples
            seed = self.phases.phases[0].seed
            self._orders[stream.number] = SampleOrder(self.datasets[number].shard_sizes, seed, stream=stream.number)
        return number, self._orders[stream.number][k]

    def __getitem__(self, g: int) -> Sample:
        """Global sample g (>= 0, without end). Raises `DataError` as `PackedDataset` does."""
        stream, index = self.locate(g)
        return self.datasets[stream][index]

    def samples_per_stream(self, samples: int) -> list[int]:
        """Samples of each stream among the first `samples` global samples."""
        return [count for count, _ in self._read(samples)]

    def tokens_per_stream(self, samples: int) -> list[int]:
        """Tokens read of each stream after `samples` global samples, T a sample."""
        return [tokens for _, tokens in self._read(samples)]

    def tokens(self, samples: int) -> int:
        """Tokens of the first `samples` global samples, those of streams read in earlier phases included."""
        return sum(tokens for _, tokens in self.phases.read(samples).values())

    def epochs_per_stream(self, samples: int) -> list[float]:
        """How many times each dataset has been read through after `samples` global samples."""
        return [n / len(d) for n, d in zip(self.samples_per_stream(samples), self.datasets, strict=True)]

    def earlier_streams(self, samples: int) -> dict[str, int]:
        """{name: tokens} of the streams that were read in earlier phases only."""
        names = {s.number: s.name for phase in self.phases.phases for s in phase.streams}
        found: dict[str, int] = {}
        for number, (_, tokens) in sorted(self.phases.read(samples).items()):
            if number not in self._dataset_of:
                name = names[number]
                taken = name in self.names or name in found
                found[f"{name} (stream {number})" if taken else name] = tokens
        return found

    def _read(self, samples: int) -> list[tuple[int, int]]:
        read = self.phases.read(samples)
        return [read.get(number, (0, 0)) for number in self._numbers]

    def _require_same_form(self) -> None:
        first = self.datasets[0]
        for other in self.datasets[1:]:
            for what in ("sequence_length", "tokenizer_identity"):
                mine, theirs = getattr(first, what), getattr(other, what)
                if mine != theirs:
                    raise DataError(
                        f"mixture: {what} of {other.path} is {theirs}, of {first.path} {mine};"
                        " prepare both with the same tokenizer and sequence length"
                    )


def fingerprint_of(fingerprints: Sequence[str], shares: Sequence[int]) -> str:
    """sha256 (hex) of a mixture of datasets with these fingerprints."""
    parts = [f"{fingerprint} {share}" for fingerprint, share in zip(fingerprints, shares, strict=True)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _short_names(paths: list[str]) -> list[str]:
    short = [os.path.basename(path.rstrip("/")) for path in paths]
    if len(set(short)) == len(short):
        return short
    return [path if paths.count(path) == 1 else f"{path} (stream {n})" for n, path in enumerate(paths)]
