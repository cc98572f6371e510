"""far-MQAR as a study's task: which samples it trains on and is tested on.

The samples are those of tools/evaluate.py --far-mqar (hola_megatron/evaluate/recall/mqar.py): pairs of key and value in
the first half, questions in the last quarter, and nothing else has a loss.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from hola_megatron.evaluate.recall.mqar import Questions, far_mqar, fixed_samples
from hola_megatron.layers.given_score import SCORE
from hola_megatron.recipe.schema import Recipe


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class FarMqar:
    """The task of a study.

    pairs: numbers of pairs of a training sample, one drawn for each sample.
    test_pairs: numbers of pairs that are tested.
    test_lengths: lengths that are tested, as multiples of train.sequence_length.
    test_samples: samples of each test.
    test_tokens: tokens of one forward pass of a test, at least one sample.
    every: training steps between two measurements of accuracy.
    """

    pairs: list[int] = Field(min_length=1)
    test_pairs: list[int] = Field(min_length=1)
    test_lengths: list[int] = Field(default_factory=lambda: [1], min_length=1)
    test_samples: int = Field(256, ge=1)
    test_tokens: int = Field(65_536, ge=1)
    every: int = Field(100, ge=1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def problems(self, recipe: Recipe, by_task_score: bool) -> list[str]:
        """What does not fit together. by_task_score: the exact cache ranks tokens by `Questions.score`."""
        train, cache, vocabulary = recipe.train, recipe.model.cache, recipe.model.vocab_size
        length, most = train.sequence_length, max(*self.pairs, *self.test_pairs)
        reach, found = max(cache.block, cache.window or 0) + cache.slots, []
        if min(*self.pairs, *self.test_pairs, *self.test_lengths) < 1:
            found.append("task: pairs, test_pairs and test_lengths must be at least 1")
        if length % 4 or 2 * most > length // 4:
            found.append(f"task: {most} pairs need a train.sequence_length that is a multiple of 4 and at least "
                         f"{8 * most}, not {length}")
        if most > vocabulary // 4:
            found.append(f"task: {most} pairs need {most} keys, a quarter of model.vocab_size = {vocabulary}")
        if reach > length // 4:
            found.append(f"task: cache.block or window and cache.slots reach {reach} tokens, and answers are "
                         f"{length // 4} tokens away; make them smaller or train.sequence_length larger")
        if recipe.data.documents != "joined":
            found.append("data.documents: a generated sample is one document; set it to joined")
        if train.batch_ramp is not None:
            found.append("train.batch_ramp: a generated task has one batch size; set it to null")
        if recipe.init.source is not None:
            found.append("init.from: a run on a generated task starts from train.seed; set it to null")
        if by_task_score and (cache.score != SCORE or train.cuda_graph):
            found.append(f"model.cache.score: must be {SCORE}, and train.cuda_graph false, where the task gives scores")
        if by_task_score and train.micro_batch_size != train.global_batch_size:
            found.append("train.micro_batch_size: must be train.global_batch_size where the task gives the scores")
        return found

    def training(self, *, seed: int, step: int, rows: int, length: int, vocabulary: int) -> list[Questions]:
        """The samples of a training step, those of equal numbers of pairs together."""
        rng = np.random.default_rng([1, seed, step])
        counts = rng.choice(self.pairs, rows)
        return [far_mqar(rng, rows=int((counts == pairs).sum()), length=length, vocabulary=vocabulary,
                         pairs=int(pairs)) for pairs in np.unique(counts)]

    def tests(self, length: int) -> list[tuple[int, int]]:
        """(length in tokens, pairs) of every test."""
        return [(length * times, pairs) for times in self.test_lengths for pairs in self.test_pairs]

    def test(self, *, length: int, vocabulary: int, pairs: int, first: int, rows: int) -> Questions:
        """Test samples `first` .. `first + rows - 1`, the same in every run."""
        return fixed_samples(far_mqar, length=length, vocabulary=vocabulary, pairs=pairs, first=first, rows=rows)
