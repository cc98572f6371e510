"""The phases that a recipe plans, and how a run that has read some samples goes on with them.

A plan is a list of phases whose first samples count from the run's first step: exact ones (each stream gives a number
of samples), then one without an end. A run follows its plan over stops, other ranks and batch sizes. A changed plan is
taken over from the present sample on.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from hola_megatron.data.phases import Phase, Phases
from hola_megatron.errors import RecipeError


def numbered(plan: Sequence[Phase]) -> list[Phase]:
    """The plan with each phase's first sample: after the samples of those before it. All but the last are exact."""
    begins = accumulate((phase.samples for phase in plan[:-1]), initial=0)
    return [Phase(begin, phase.seed, phase.sequence_length, phase.streams, phase.exact)
            for begin, phase in zip(begins, plan, strict=True)]


def follow(plan: Sequence[Phase], before: Phases | None = None, samples: int = 0, begin: int = 0) -> Phases:
    """The phases of a run with this plan.

    Args:
        plan: as `numbered` gives it.
        before: the phases of which something was read, or which were planned; None for a new run.
        samples: global samples read so far.
        begin: global samples read before the run's first step (by the run of `init.from`).

    Returns: `before` up to the present sample, and the plan from there on.

    Raises:
        RecipeError: the run is in the middle of an exact phase that the plan has changed.
    """
    phases = before.until(samples) if before else None
    ends = [begin + phase.first_sample for phase in plan[1:]]
    for number, (phase, end) in enumerate(zip(plan, [*ends, None], strict=True)):
        first = begin + phase.first_sample
        if end is not None and end <= samples:
            continue
        present = phases.phases[-1] if phases else None
        if present is not None and present.reads_as(phase) and (not phase.exact or present.first_sample == first):
            continue
        if phase.exact and first < samples:
            raise RecipeError(f"data.phases.{number}: is another phase than the one in which the run has read "
                              f"{samples - first:,} samples; put that one back (its streams, their order and tokens), "
                              "later ones may change; or start a new run from this one (init.from)")
        at = max(first, samples)
        phases = phases.followed_by(phase, at) if phases else Phases([phase]).followed_by(phase, 0)
    return phases
