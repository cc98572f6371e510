"""Padding of the fused projection: everywhere in memory, nowhere else, and it stays zero."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import MICRO

from hola_megatron.config import build_recipe, load_recipe
from hola_megatron.data.stream import Batch
from hola_megatron.layers.hola import HOLA
from hola_megatron.layers.padding import projection_padding, projection_rows
from hola_megatron.startup.start import start


@pytest.mark.parametrize("name", ["hola_340m", "hola_7b", "hola_1b_hybrid"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_ranks_projection_is_a_multiple_of_64(name, ranks):
    model = load_recipe(f"recipes/{name}.yaml").model
    for kind in set(model.layer_kinds):
        rows = projection_rows(kind, model, ranks)
        assert 0 <= projection_padding(rows) < 64 and (rows + projection_padding(rows)) % 64 == 0
    assert projection_rows(HOLA, load_recipe("recipes/hola_340m.yaml").model, 1) == 4104


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_padding_stays_zero_and_has_no_name(precision):
    from hola_megatron.engine.megatron import MegatronEngine
    from hola_megatron.model.parameters import param_shards

    values = json.loads(json.dumps(MICRO))
    values["data"]["train"] = "unused"
    values["train"]["precision"] = precision
    recipe = build_recipe(values)
    engine = MegatronEngine(recipe, start(recipe))
    tokens = torch.randint(0, 264, (2, 65), generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(2, 64), None)
    padded = 0
    for _ in range(3):
        assert engine.train_step([batch], 1e-2).updated
    for name, parameter in engine.model[0].named_parameters():
        if not name.endswith("in_proj.weight"):
            continue
        named = [shard for shard in param_shards(engine.model, 0, 1) if shard.parameter is parameter]
        used = sum(shard.rows for shard in named)
        padded += parameter.shape[0] - used
        assert parameter.shape[0] % 64 == 0 and sorted(shard.start for shard in named)[0] == 0
        assert sum(shard.shape[0] for shard in named) == used
        for kind, value in engine.state.gather(parameter, 0).items():
            assert not value[used:].any(), (name, kind)
            assert kind != "exp_avg" or value[:used].any(1).all()
    assert padded > 0
