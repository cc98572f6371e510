"""Weight decay shrinks matrices and leaves vectors alone, as the recipe's description of it says."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from helpers import MICRO

from hola_megatron.config import build_recipe
from hola_megatron.data.stream import Batch
from hola_megatron.engine.build import build_engine
from hola_megatron.startup.start import start

RATE, DECAY = 0.5, 0.1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("engine", "changes"), [
    ("megatron", {"parallel": {"distributed_optimizer": True}}),
    ("megatron", {"parallel": {"distributed_optimizer": False}}), ("deepspeed", {})],
    ids=["distributed", "plain", "deepspeed"])
def test_decay_is_all_that_a_step_without_gradients_does(engine, changes, precision):
    if engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    values = json.loads(json.dumps(MICRO)) | {"engine": engine} | changes
    values["data"]["train"] = "unused"
    values["train"] |= {"weight_decay": DECAY, "precision": precision}
    made = build_engine(recipe := build_recipe(values), start(recipe))
    before = weights(made)
    tokens = torch.zeros(2, 64, dtype=torch.long)
    made.train_step([Batch(tokens, tokens, torch.zeros(2, 64), None)], RATE)  # no token counts: all gradients are zero
    kinds = set()
    for name, now in weights(made).items():
        vector = now.ndim == 1
        torch.testing.assert_close(now, before[name] * (1 if vector else 1 - RATE * DECAY), msg=name)
        kinds.add(name.split(".")[-2] if name.endswith(".weight") else name.split(".")[-1])
    assert {"A_log", "dt_bias", "gate", "gamma_q", "o_norm", "mixer_norm", "embed_tokens", "q_conv"} <= kinds


def weights(made) -> dict[str, torch.Tensor]:
    """The optimizer's, in float32."""
    return {shard.name: shard.of(made.state.gather(shard.parameter, 0)["weight"]).clone()
            for shard in made.param_shards()}
