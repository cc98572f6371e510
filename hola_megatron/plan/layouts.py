"""Layouts that fit: every way to cut a recipe over N GPUs, fewest ranks a copy of the model first."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hola_megatron.plan.memory import StageMemory, worst_stage
from hola_megatron.recipe.checks import check_recipe
from hola_megatron.recipe.schema import Recipe

GPUS_A_NODE = 8      # choice: tensor ranks talk in every layer and stay within a node
LONG_TOKENS = 16384  # choice: from this length on the sequence may be cut as well
FIELDS = (("parallel", "tensor"), ("parallel", "sequence"), ("parallel", "context"), ("parallel", "pipeline"),
          ("parallel", "virtual_pipeline"), ("train", "micro_batch_size"), ("train", "recompute"),
          ("train", "cuda_graph"), ("train", "cuda_graph_documents"))


@dataclass(frozen=True)
class Suggestion:
    """A changed recipe that fits, the overrides that make it, its memory, and its predicted speed if there is one."""

    recipe: Recipe
    overrides: list[str]
    memory: StageMemory
    tokens_per_second: float | None = None


def suggest(recipe: Recipe, world: int, capacity_bytes: float, count: int = 3) -> list[Suggestion]:
    """Up to `count` layouts that fit, in order of `_cost`; empty when none does.

    Of one number of model ranks only the best with and the best without recompute. The first without recompute is
    always among them, however many ranks it takes.
    """
    found: dict[tuple[int, str], Suggestion] = {}
    for candidate in sorted(_candidates(recipe), key=_cost):
        kind = candidate.parallel.model_ranks, candidate.train.recompute
        enough = len(found) >= count and (candidate.train.recompute == "full" or _has_none(found))
        if enough or kind in found or check_recipe(candidate, world_size=world) or _idles(candidate, world):
            continue
        memory = worst_stage(candidate, world)
        if memory.total <= capacity_bytes:
            found[kind] = Suggestion(candidate, changed_fields(recipe, candidate), memory)
    ranked = list(found.values())
    return ranked[: count - 1] + ranked[count - 1:][-1:]


def fastest(recipe: Recipe, world: int, capacity_bytes: float, speed_of: Callable[[Recipe], float | None],
            ) -> Suggestion | None:
    """The layout of the highest predicted speed that fits; None when none does."""
    allowed = [candidate for candidate in _candidates(recipe)
               if not check_recipe(candidate, world_size=world) and not _idles(candidate, world)]
    for candidate in sorted(allowed, key=speed_of, reverse=True):
        memory = worst_stage(candidate, world)
        if memory.total <= capacity_bytes:
            return Suggestion(candidate, changed_fields(recipe, candidate), memory, speed_of(candidate))
    return None


def _has_none(found: dict[tuple[int, str], Suggestion]) -> bool:
    return any(recompute == "none" for _, recompute in found)


def changed_fields(recipe: Recipe, candidate: Recipe) -> list[str]:
    """The overrides that turn one into the other."""
    changed = []
    for section, field in FIELDS:
        value = getattr(getattr(candidate, section), field)
        if value != getattr(getattr(recipe, section), field):
            changed.append(f"{section}.{field}={value if isinstance(value, str) else json.dumps(value)}")
    return changed


def _cost(recipe: Recipe) -> tuple[int, ...]:
    """Fewest model ranks; then no recompute; then tensor before context before pipeline; then large micro-batches."""
    parallel, train = recipe.parallel, recipe.train
    return (parallel.model_ranks, train.recompute == "full", parallel.pipeline, parallel.context,
            -train.micro_batch_size)


def _idles(recipe: Recipe, world: int) -> bool:
    """Fewer micro-batches than stages: most of a pipeline would wait."""
    return recipe.micro_batches(world) < recipe.parallel.pipeline


def _candidates(recipe: Recipe) -> Iterator[Recipe]:
    model, train, parallel = recipe.model, recipe.train, recipe.parallel
    long = train.sequence_length >= LONG_TOKENS or parallel.context > 1
    heads = {kind.heads(model) for kind in model.layer_kinds}
    for tensor in (x for x in _powers(GPUS_A_NODE) if all(n % x == 0 for n in heads)):
        for pipeline in (x for x in range(1, model.layers + 1) if model.layers % x == 0 and x <= 64):
            for context in _powers(64) if long else [1]:
                # a graph is of ranks that share neither layers nor sequences
                graph = {} if pipeline == context == 1 else {"cuda_graph": False, "cuda_graph_documents": None}
                for micro in _micro_batches(train.micro_batch_size):
                    for recompute in ("none", "full"):
                        virtual = parallel.virtual_pipeline if pipeline == parallel.pipeline else 1
                        yield dataclasses.replace(
                            recipe,
                            train=dataclasses.replace(train, micro_batch_size=micro, recompute=recompute, **graph),
                            parallel=dataclasses.replace(
                                parallel, tensor=tensor, sequence=tensor > 1, pipeline=pipeline, context=context,
                                virtual_pipeline=virtual))


def _powers(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length()) if 2**i <= limit]


def _micro_batches(own: int) -> list[int]:
    """The recipe's micro-batch and its halves, down to 1."""
    sizes = [own]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes
