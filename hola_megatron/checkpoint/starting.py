"""The start of a run from the weights of another one, or of an exported model, at any layout.

What the exact caches need and the source has not (a Gated DeltaNet's weights for a HOLA model) gets its initial value.
All other tensors must be there, in the model's shapes, and none may be left over.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hola_megatron.checkpoint.save_load import KINDS, check_moments, shards_by_parameter
from hola_megatron.checkpoint.tensors import TensorReader
from hola_megatron.engine.base import Engine
from hola_megatron.errors import CheckpointError
from hola_megatron.model.parameters import ParamShard, exact_cache_names, initial_functions, initial_value

MOMENTS = KINDS[1:]


def load_start(engine: Engine, readers: dict[str, TensorReader], updates: int) -> list[str]:
    """Set this rank's weights and moments. A collective.

    Args:
        engine: of the new run.
        readers: of "weight", and of each of MOMENTS that is kept; a moment that is not there is zero.
        updates: number of updates that the moments have seen; 0 without moments.

    Returns the names of the tensors with initial values, sorted; equal on all ranks.

    Raises CheckpointError where the source is of another model or optimizer.
    """
    fresh = _compare(engine, readers["weight"])
    if updates:
        check_moments(engine, readers, used=True, without=fresh)
    model, seed = engine.recipe.model, engine.recipe.train.seed
    initials = initial_functions(model)
    for parameter, its_shards in shards_by_parameter(engine.param_shards()):
        values = {}
        for kind in engine.state.kinds(parameter):
            local = torch.zeros(parameter.shape, dtype=torch.float32)  # padding is zero
            for shard in its_shards:
                if kind == "weight" and shard.name in fresh:
                    value = initial_value(shard, initials, model, seed)
                else:
                    value = _stored(readers.get(kind), shard)
                if value is not None:
                    shard.of(local).copy_(value)
            values[kind] = local.to(parameter.device)
        engine.state.restore(parameter, values)
    engine.state.step = updates
    return sorted(fresh)


def _stored(reader: TensorReader | None, shard: ParamShard) -> Tensor | None:
    """The shard's values in the source; None for a moment that it has not."""
    if reader is None or shard.name not in reader.index:
        return None
    return reader.slice(shard.name, shard.axis, shard.offset, shard.local_shape[shard.axis])


def _compare(engine: Engine, weights: TensorReader) -> set[str]:
    """Names that get initial values. CheckpointError for tensors of other shapes, missing or left over."""
    mine = {shard.name: shard.shape for shard in engine.param_shards()}
    of_ranks: list[dict[str, tuple[int, ...]]] = [{}] * engine.layout.world
    dist.all_gather_object(of_ranks, mine)
    wanted = {name: shape for shapes in of_ranks for name, shape in shapes.items()}
    fresh = exact_cache_names(engine.recipe.model) - weights.index.keys()
    problems = [f"{name} is {list(weights.shape(name))} there, {list(shape)} in the recipe's model"
                for name, shape in sorted(wanted.items()) if name in weights.index and weights.shape(name) != shape]
    problems += [f"{name} is not there" for name in sorted(wanted.keys() - weights.index.keys() - fresh)]
    problems += [f"{name} is there, and the recipe's model has no such tensor"
                 for name in sorted(weights.index.keys() - wanted.keys())]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"init.from: {weights.folder}: is of another model: {problems[0]}{more}; only an exact "
                              "cache may be added, change the recipe's model section or take other weights")
    return fresh
