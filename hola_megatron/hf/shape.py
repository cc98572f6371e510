"""The shape of a model in its two forms: a recipe's model section and a HolaConfig."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hola_megatron.errors import CheckpointError
from hola_megatron.hf.configuration_hola import HolaConfig
from hola_megatron.layers.registry import expand, unused_fields
from hola_megatron.recipe.schema import Recipe

# recipe field -> HolaConfig field; what is not here (layer_spec) does not change what is computed
MODEL = {
    "layers": "num_hidden_layers", "hidden_size": "hidden_size", "pattern": "layer_pattern", "heads": "num_heads",
    "key_dim": "key_dim", "value_dim": "value_dim", "conv_width": "conv_width", "rule": "rule",
    "beta_range": "beta_range", "delta_steps": "delta_steps", "state_delay": "state_delay",
    "state_delay_mode": "state_delay_mode",
    "attention_heads": "num_attention_heads",
    "attention_kv_heads": "num_key_value_heads", "attention_qk_norm": "attention_qk_norm",
    "attention_window": "attention_window", "rope_theta": "rope_theta",
    "mlp_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size", "tie_embeddings": "tie_word_embeddings", "norm_eps": "norm_eps",
    "init_std": "initializer_range",
}
CACHE = {"block": "cache_block", "slots": "cache_slots", "local": "cache_local", "window": "cache_window",
         "score": "cache_score", "read_norm": "cache_read_norm",
         "rope_theta": "cache_rope_theta", "router_width": "cache_router_width",
         "merge": "cache_merge", "sink": "cache_sink", "gate_init": "cache_gate_init"}
HQLT = {"blend": "hqlt_blend", "window": "hqlt_window", "rope_theta": "hqlt_rope_theta", "mixing": "hqlt_mixing"}
HAM = {"router": "ham_router", "share": "ham_share", "threshold": "ham_threshold", "rate": "ham_rate",
       "freeze_steps": "ham_freeze_steps", "router_width": "ham_router_width"}
SECTIONS = {"cache": CACHE, "hqlt": HQLT, "ham": HAM}
# only used to start a model from nothing, or to train it
FREE = ("init_std", "cache.gate_init", "ham.share", "ham.threshold", "ham.rate", "ham.freeze_steps", "backend",
        "layer_spec")


def config_of(recipe: Recipe, **more: Any) -> HolaConfig:
    """The HolaConfig of a recipe's model; `more` are token ids and the like. CheckpointError where there is none."""
    if recipe.model.moe.experts is not None:
        raise CheckpointError(f"model.moe.experts: {recipe.model.moe.experts}: models with experts have no exported "
                              "form yet (no generation, no evaluation); validation during training measures them")
    model = asdict(recipe.model)
    values = {name: model[field] for field, name in MODEL.items()}
    values |= {name: model[section][field] for section, names in SECTIONS.items() for field, name in names.items()}
    return HolaConfig(**values, max_position_embeddings=recipe.train.sequence_length,
                      architectures=["HolaForCausalLM"], **more)


def model_section(config: HolaConfig) -> dict[str, Any]:
    """The recipe's model section that gives this network."""
    section = {field: getattr(config, name) for field, name in MODEL.items()}
    return section | {part: {field: getattr(config, name) for field, name in names.items()}
                      for part, names in SECTIONS.items()}


def differences(section: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Fields in which two model sections describe different networks, as `model.field: here, there`."""
    here, there = _comparable(section), _comparable(other)
    # a field that only one of them uses belongs to a kind of layer that only one of them has
    return [f"model.{name}: {here[name]!r} here, {there[name]!r} there"
            for name in sorted(here.keys() & there.keys()) if here[name] != there[name]]


def _comparable(section: dict[str, Any]) -> dict[str, Any]:
    """Flat, with the pattern written out and without what the network does not use."""
    flat = {name: value for name, value in section.items() if name not in SECTIONS}
    kinds = expand(flat.pop("pattern"), flat["layers"])
    flat |= {f"{part}.{name}": value for part in SECTIONS for name, value in section[part].items()}
    flat["attention_kv_heads"] = flat["attention_kv_heads"] or flat["attention_heads"]
    unused = unused_fields(kinds)
    return {"layer kinds": ", ".join(kind.name for kind in kinds)} | {
        name: value for name, value in flat.items() if name not in FREE and name.partition(".")[0] not in unused}
