"""The phases of a run's mixture, and the position of each stream.

A recipe may plan phases, and a run may be resumed with another mixture (phase_plan.py). The order of samples is then a
function of (seed, phases, global sample index): a phase defines its first global sample, its streams and their shares.
A stream keeps its number, which decides its order together with the first phase's seed, and its position through all
phases: what has been read of it is not read again before its epoch ends, and nothing of it is skipped. The seed of a
later phase mixes the streams anew. Checkpoints contain the phases. An unchanged run without planned ones has one.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hola_megatron.data.order import CYCLE, BudgetOrder, StreamOrder
from hola_megatron.errors import CheckpointError

STRICT = ConfigDict(extra="forbid", strict=True)
MOST_SAMPLES, MOST_STREAMS = 2**62, 2**32  # what 64-bit sums and the generator's addresses take


@dataclass(frozen=True, config=STRICT)
class StreamShare:
    """One stream in a phase.

    Attributes:
        dataset: fingerprint of its dataset; the path may change.
        name: for logs.
        number: which of the run's streams it is; decides the order of its samples.
        first: samples of it read before the phase.
        share: its samples among CYCLE of the phase; in an exact phase, its samples in the whole phase.
    """

    dataset: str
    name: str
    number: int = Field(ge=0, lt=MOST_STREAMS)
    first: int = Field(ge=0, lt=MOST_SAMPLES)
    share: int = Field(ge=1, lt=MOST_SAMPLES)


@dataclass(frozen=True, config=STRICT)
class Phase:
    """A mixture that is read from global sample `first_sample` on, until the next phase starts.

    exact: each stream gives so many samples as its share says, and the phase ends with them.
    """

    first_sample: int = Field(ge=0, lt=MOST_SAMPLES)
    seed: int = Field(ge=0, lt=2**64)
    sequence_length: int = Field(ge=1, lt=MOST_SAMPLES)
    streams: list[StreamShare] = Field(min_length=1)
    exact: bool = False

    @property
    def samples(self) -> int | None:
        """Samples of an exact phase; None: it has no end of its own."""
        return sum(stream.share for stream in self.streams) if self.exact else None

    def reads_as(self, other: Phase) -> bool:
        """Whether both read the same data in the same shares and order."""
        mine, theirs = ((p.seed, p.sequence_length, p.exact, [(s.dataset, s.share) for s in p.streams])
                        for p in (self, other))
        return mine == theirs


PHASES = TypeAdapter(list[Phase])


class Phases:
    """All phases of a run, the last one being read: which stream a global sample is of, and what was read so far."""

    def __init__(self, phases: Sequence[Phase]):
        self.phases = list(phases)
        self._firsts = [phase.first_sample for phase in self.phases]
        self._order = lru_cache(4)(self._make_order)

    @classmethod
    def from_dicts(cls, stored: list[dict[str, Any]]) -> Phases:
        """From plain values of a checkpoint. Raises CheckpointError for invalid ones."""
        try:
            # JSON mode: strict about types, yet dataclasses may be given as mappings
            phases = PHASES.validate_json(json.dumps(stored))
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            path = ".".join(map(str, problem["loc"]))
            raise CheckpointError(f"trainer.phases.{path}: {problem['msg']}; use another checkpoint") from None
        firsts = [phase.first_sample for phase in phases]
        if not phases or firsts[0] != 0 or firsts != sorted(set(firsts)):
            raise CheckpointError(f"trainer.phases: begin at samples {firsts}, must ascend from 0; use another "
                                  "checkpoint")
        if bad := [n for n, phase in enumerate(phases)
                   if len({s.number for s in phase.streams}) < len(phase.streams)]:
            raise CheckpointError(f"trainer.phases.{bad[0]}: two of its streams have one number; use another "
                                  "checkpoint")
        if bad := [n for n, phase in enumerate(phases)
                   if not phase.exact and sum(s.share for s in phase.streams) != CYCLE]:
            raise CheckpointError(f"trainer.phases.{bad[0]}: its shares do not sum to {CYCLE}; use another checkpoint")
        if any(phase.exact and phase.first_sample + phase.samples < following.first_sample
               for phase, following in itertools.pairwise(phases)):
            raise CheckpointError("trainer.phases: one ends before the next begins; use another checkpoint")
        return cls(phases)

    def to_dicts(self) -> list[dict[str, Any]]:
        return [asdict(phase) for phase in self.phases]

    def locate(self, g: int) -> tuple[StreamShare, int]:
        """(stream, which sample of that stream's order) of global sample g."""
        at = bisect_right(self._firsts, g) - 1
        phase = self.phases[at]
        slot, k = self._order(at).locate(g - phase.first_sample)
        stream = phase.streams[slot]
        return stream, stream.first + k

    def read(self, samples: int) -> dict[int, tuple[int, int]]:
        """{stream number: (samples, tokens)} read of each stream among the first `samples` global samples."""
        total: dict[int, tuple[int, int]] = {}
        for at, (phase, end) in enumerate(zip(self.phases, [*self._firsts[1:], samples], strict=True)):
            count = max(min(end, samples) - phase.first_sample, 0)
            for stream, taken in zip(phase.streams, self._order(at).taken(count), strict=True):
                known, tokens = total.get(stream.number, (0, 0))
                total[stream.number] = known + taken, tokens + taken * phase.sequence_length
        return total

    def until(self, samples: int) -> Phases | None:
        """The phases of which something was read among the first `samples` global samples; None where there is none."""
        begun = [phase for phase in self.phases if phase.first_sample < samples]
        return Phases(begun) if begun else None

    def followed_by(self, new: Phase, samples: int) -> Phases:
        """With `new` read from global sample `samples` on, after the last phase that begins before it.

        The streams of `new` get their numbers and positions here: by their datasets, where these were read before.
        """
        before = self.until(samples)
        earlier = before.phases if before else []
        read = before.read(samples) if before else {}
        numbers: dict[str, list[int]] = {}
        for number, dataset in sorted({s.number: s.dataset for phase in earlier for s in phase.streams}.items()):
            numbers.setdefault(dataset, []).append(number)
        fresh = max(read, default=-1) + 1
        streams = []
        for stream in new.streams:
            known = numbers.get(stream.dataset)
            if known:
                number = known.pop(0)
            else:
                number, fresh = fresh, fresh + 1
            streams.append(StreamShare(stream.dataset, stream.name, number, read.get(number, (0, 0))[0], stream.share))
        return Phases([*earlier, replace(new, first_sample=samples if earlier else 0, streams=streams)])

    def _make_order(self, at: int) -> StreamOrder | BudgetOrder:
        phase = self.phases[at]
        if phase.exact:
            return BudgetOrder([s.share for s in phase.streams], phase.seed)
        return StreamOrder([s.share for s in phase.streams], phase.seed, [s.name for s in phase.streams])
