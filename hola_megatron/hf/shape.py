"""The shape of a model in its two forms: a recipe's model section and a HolaConfig."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hola_megatron.config import Recipe
from hola_megatron.errors import CheckpointError
from hola_megatron.hf.configuration_hola import HolaConfig

# recipe field -> HolaConfig field; what is not here (layer_spec) does not change what is computed
MODEL = {
    "layers": "num_hidden_layers", "hidden_size": "hidden_size", "pattern": "layer_pattern", "heads": "num_heads",
    "key_dim": "key_dim", "value_dim": "value_dim", "conv_width": "conv_width", "decay": "decay",
    "attention_heads": "num_attention_heads", "rope_theta": "rope_theta", "mlp_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size", "tie_embeddings": "tie_word_embeddings", "norm_eps": "norm_eps",
    "init_std": "initializer_range",
}
CACHE = {"block": "cache_block", "slots": "cache_slots", "score": "cache_score", "read_norm": "cache_read_norm",
         "sink": "cache_sink", "gate_init": "cache_gate_init"}
# only used to start a model from nothing
FREE = ("init_std", "cache.gate_init", "backend", "layer_spec")


def config_of(recipe: Recipe, **more: Any) -> HolaConfig:
    """The HolaConfig of a recipe's model; `more` are token ids and the like. CheckpointError where there is none."""
    if recipe.model.moe.experts is not None:
        raise CheckpointError(f"model.moe.experts: {recipe.model.moe.experts}: models with experts have no exported "
                              "form yet (no generation, no evaluation); validation during training measures them")
    model = asdict(recipe.model)
    values = {name: model[field] for field, name in MODEL.items()}
    values |= {name: model["cache"][field] for field, name in CACHE.items()}
    return HolaConfig(**values, max_position_embeddings=recipe.train.sequence_length,
                      architectures=["HolaForCausalLM"], **more)


def model_section(config: HolaConfig) -> dict[str, Any]:
    """The recipe's model section that gives this network."""
    section = {field: getattr(config, name) for field, name in MODEL.items()}
    return section | {"cache": {field: getattr(config, name) for field, name in CACHE.items()}}


def differences(section: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Fields in which two model sections describe different networks, as `model.field: here, there`."""
    here, there = _comparable(section), _comparable(other)
    # a field that only one of them uses belongs to a kind of layer that only one of them has
    return [f"model.{name}: {here[name]!r} here, {there[name]!r} there"
            for name in sorted(here.keys() & there.keys()) if here[name] != there[name]]


def _comparable(section: dict[str, Any]) -> dict[str, Any]:
    """Flat, with the pattern written out and without what the network does not use."""
    flat = {name: value for name, value in section.items() if name != "cache"}
    kinds = (flat.pop("pattern") * flat["layers"])[: flat["layers"]]
    flat |= {f"cache.{name}": value for name, value in section["cache"].items()}
    unused = set(FREE)
    if "H" not in kinds:
        unused |= {name for name in flat if name.startswith("cache.")}
    if not set(kinds) & set("HG"):
        unused |= {"heads", "key_dim", "value_dim", "conv_width", "decay"}
    if "A" not in kinds:
        unused |= {"attention_heads", "rope_theta"}
    return {"layer kinds": kinds} | {name: value for name, value in flat.items() if name not in unused}
