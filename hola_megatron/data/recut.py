"""A prepared dataset read in samples of another length: longer context without preparing the text again.

Sample k of a dataset that was packed as a stream holds the S + 1 tokens from position k S on (packing.py). So its
samples, one after the other, are the stream, and a sample of T tokens is cut from it at position j T, for any T:

        stored     a b c d e    e f g h i    i j k l m        S = 4
        re-cut     a b c d e f g    g h i j k l m             T = 6

Each part of a dataset is a stream of its own. What does not fill the last sample of a stream is left out.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from itertools import accumulate, groupby

import numpy as np

from hola_megatron.data.dataset import PackedDataset
from hola_megatron.data.packing import Sample
from hola_megatron.errors import DataError


def open_dataset(path: str, sequence_length: int, *, cache: str | None = None) -> PackedDataset:
    """A dataset in samples of `sequence_length` tokens, re-cut where it was prepared with another length.

    Raises:
        DataError: as PackedDataset; it cannot be re-cut.
    """
    dataset = PackedDataset(path, cache=cache)
    return dataset if dataset.sequence_length == sequence_length else RecutDataset(path, sequence_length, cache=cache)


class RecutDataset(PackedDataset):
    """A dataset of S tokens a sample, read in samples of `sequence_length` = T tokens.

    The samples are in the order of the stream, so that shuffling by windows of shards works as for the stored ones.

    Args:
        path: as of PackedDataset.
        sequence_length: T, any number of tokens.
        cache: as of PackedDataset.

    Raises:
        DataError: as PackedDataset; its documents were kept whole, so that its samples are no stream; it has less
            tokens than one sample.
    """

    def __init__(self, path: str, sequence_length: int, *, cache: str | None = None):
        super().__init__(path, cache=cache)
        self._length, self._stored = sequence_length, super().sequence_length
        if self.info.get("packing", "stream") != "stream":
            raise DataError(f"{path}: samples of {self._stored} tokens packed with --packing {self.info['packing']}, "
                            f"and train.sequence_length is {sequence_length}: only streams can be cut anew; prepare "
                            f"the text again with --sequence-length {sequence_length}")
        streams = [[size for _, size in group] for _, group in groupby(
            zip(self._folders(), super().shard_sizes, strict=True), key=lambda shard: shard[0])]
        # the last sample of a stream is not full where tails were kept
        usable = [sum(sizes) - bool(self.info.get("keep_tail")) for sizes in streams]
        self._samples = [count * self._stored // sequence_length for count in usable]
        self._ends = list(accumulate(self._samples))
        self._first_stored = [0, *accumulate(map(sum, streams))][:-1]  # stored samples before each stream
        self._sizes = [size for sizes, samples in zip(streams, self._samples, strict=True)
                       for size in self._starting_in(sizes, samples) if size]
        if not self._ends[-1]:
            raise DataError(f"{path}: its longest stream has {max(usable) * self._stored:,} tokens, less than one "
                            f"sample of train.sequence_length = {sequence_length}; take more text, or a shorter length")

    @property
    def stored_length(self) -> int:
        """S: tokens of a stored sample."""
        return self._stored

    @property
    def sequence_length(self) -> int:
        return self._length

    @property
    def num_samples(self) -> int:
        return self._ends[-1]

    @property
    def shard_sizes(self) -> list[int]:
        """Samples that start in each shard, without the shards in which none does."""
        return self._sizes

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the dataset's fingerprint and the length."""
        return hashlib.sha256(f"{super().fingerprint} in samples of {self._length}".encode()).hexdigest()

    def __len__(self) -> int:
        return self._ends[-1]

    def verify_first(self, samples: int) -> None:
        last = self._place(min(samples, len(self)) - 1)[1] if samples else -1
        for shard, before in enumerate(accumulate([0, *self._store.shard_sizes[:-1]])):
            if before <= last:
                self._store.open(shard)

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` (0 .. len - 1), as of PackedDataset; always full.

        Raises:
            IndexError: out of range.
            DataError: as of PackedDataset; the stored samples are not one stream.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: sample {index} of {len(self)}")
        first, last, offset = self._place(index)
        stored = [super(RecutDataset, self).__getitem__(k) for k in range(first, last + 1)]
        S, T = self._stored, self._length
        for k, sample in enumerate(stored):
            if sample.length != S + 1 or (k and sample.tokens[0] != stored[k - 1].tokens[S]):
                raise DataError(f"{self.path}: stored sample {first + k} does not go on where the one before ends, so "
                                f"the samples cannot be cut anew to train.sequence_length = {T}; prepare the text "
                                f"again with --sequence-length {T}")
        tokens = np.concatenate([*(sample.tokens[:S] for sample in stored), stored[-1].tokens[S:]])
        starts = np.concatenate([sample.starts[sample.starts < S] + k * S for k, sample in enumerate(stored)]
                                + [stored[-1].starts[stored[-1].starts == S] + (len(stored) - 1) * S]) - offset
        return Sample(tokens[offset : offset + T + 1], starts[(starts >= 0) & (starts <= T)].astype(np.int32), T + 1)

    def _place(self, index: int) -> tuple[int, int, int]:
        """(first stored sample, last stored sample, position of sample `index` in the first)."""
        stream = bisect_right(self._ends, index)
        begin = (index - self._ends[stream] + self._samples[stream]) * self._length
        first, offset = divmod(begin, self._stored)
        last = (begin + self._length - 1) // self._stored
        return self._first_stored[stream] + first, self._first_stored[stream] + last, offset

    def _starting_in(self, sizes: list[int], samples: int) -> list[int]:
        """Of a stream's `samples`, how many start in each shard of `sizes` stored samples."""
        before = [min(-(-end * self._stored // self._length), samples) for end in [0, *accumulate(sizes)]]
        return [after - now for now, after in zip(before, before[1:], strict=False)]

    def _folders(self) -> list[str]:
        """The part's folder of each shard; empty in a dataset without parts."""
        return [entry["raw_data"]["basename"].rpartition("/")[0] for entry in self._store.entries]
