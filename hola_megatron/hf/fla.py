"""Gated DeltaNet checkpoints of flash-linear-attention, in and out.

Their layer computes what a G layer computes, under other names and with one more axis in the
convolution's weight. `from_fla` makes an exported folder of ours from one of theirs, as GDN or,
with a fresh exact cache on every GDN layer, as HOLA; `to_fla` is the way back for GDN. From
there `convert.from_hf` leads to training.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hola_megatron.data.tokenizer import MODEL_INPUTS, load_tokenizer
from hola_megatron.errors import CheckpointError, DataError
from hola_megatron.files import schemas, shown
from hola_megatron.hf import auto
from hola_megatron.hf.card import write_import_card
from hola_megatron.hf.configuration_hola import HolaConfig
from hola_megatron.hf.contained import contained, read_json
from hola_megatron.hf.convert import DTYPES, RECORD, write_config, write_record
from hola_megatron.hf.fla_cache import cache_of, has_cache, meanings
from hola_megatron.hf.fresh_folder import fresh_folder
from hola_megatron.hf.shape import CACHE
from hola_megatron.hf.weights import ModelReader, write_model
from hola_megatron.layers.registry import expand, kind_with_role
from hola_megatron.recipe.schema import CacheConfig

MODEL_TYPE, ARCHITECTURE = "gated_deltanet", "GatedDeltaNetForCausalLM"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
                   "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja")
# ours -> theirs, inside a layer or at the top
RENAME = {"embed_tokens": "embeddings", "mixer_norm": "attn_norm", "mixer": "attn", "q_conv": "q_conv1d",
          "k_conv": "k_conv1d", "v_conv": "v_conv1d"}
# what their layer can do and ours does not: the values we can take, the first being their default
TAKEN = {"use_gate": (True,), "use_short_conv": (True,), "allow_neg_eigval": (False, True), "conv_bias": (False,),
         "attnres_block_size": (None,), "output_gate_activation": ("swish", "silu"), "hidden_act": ("swish", "silu")}
ATTENTION_TAKEN = {"qkv_bias": (False,), "qk_norm": (False,), "window_size": (None,)}
NEW_IN_HOLA = ("gamma_q", "gamma_k", "gate", "sink")


def from_fla(folder: Path, out: Path, cache: CacheConfig | None = None, *, dtype: str = "fp32",
             shard_bytes: int = 5 * 10**9, overwrite: bool = False,
             tensor_meanings: dict[str, str] | None = None) -> Path:
    """Make the exported folder `out` from one of theirs; `cache` puts an exact cache on every GDN layer.

    The cache's parameters are initialised as in training. A published HOLA (use_gdn_swa) has its own; tensor_meanings:
    of its tensors, where their names do not tell (fla_cache.py). Raises CheckpointError where their model does
    something ours does not, or a tensor is missing.
    """
    values, reader = _read_config(folder), ModelReader(folder)
    published = has_cache(values)
    if published and cache is not None:
        raise CheckpointError(f"{folder}: its layers have an exact cache of their own (use_gdn_swa); leave "
                              "--exact-cache away")
    if tensor_meanings and not published:
        raise CheckpointError(f"{folder}: --tensor is for a folder with use_gdn_swa, which this is not")
    cache = cache_of(folder, values) if published else cache
    config = config_from_fla(folder, values, cache)
    config.dtype = DTYPES[dtype]
    shapes = {name: shape for name, shape in reader.shapes().items() if not _dropped(name, config)}
    published_cache = _published_cache(folder, shapes, config, tensor_meanings or {}) if published else {}
    fresh = {name: shape for name, shape in auto.expected_tensors(config).items()
             if cache is not None and name.rpartition(".")[2] in NEW_IN_HOLA and name not in published_cache.values()}
    found = {published_cache.get(name) or ours(name): _our_shape(name, shape) for name, shape in shapes.items()}
    found |= {mine: (config.num_heads,) for name, mine in published_cache.items()
              if shapes[name] in ((), (1,))}  # one value for all heads
    if problem := auto.describe_mismatch(found | fresh, config):
        raise CheckpointError(f"{folder}: is not the Gated DeltaNet of its config.json: {problem} (by our names)")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in shapes:
            value, mine = reader.read(name), published_cache.get(name) or ours(name)
            value = value.squeeze(1) if value.ndim == 3 else value
            yield mine, auto.stored(mine, value.expand(found[mine]) if name in published_cache else value, config.dtype)
        for name, shape in fresh.items():
            kind = name.rpartition(".")[2]
            start = 1.0 if kind.startswith("gamma") else cache.gate_init if kind == "gate" else 0.0
            yield name, torch.full(shape, start)

    with fresh_folder(out, overwrite=overwrite, marker=RECORD) as partial:
        write_model(tensors(), partial, shard_bytes)
        write_config(partial, config)
        _copy_tokenizer(folder, partial)
        write_import_card(partial, folder.name)
        write_record(partial, {"tokenizer": _identity(partial), "imported_from": folder.name})
    return out


def _published_cache(folder: Path, shapes: dict[str, tuple[int, ...]], config: HolaConfig,
                given: dict[str, str]) -> dict[str, str]:
    """Their tensors of a published HOLA's cache -> ours; prints what was recognised, and what is missing there."""
    known = {theirs(name) for name in auto.expected_tensors(config) if name.rpartition(".")[2] not in NEW_IN_HOLA}
    found = meanings(folder, shapes, known, config.num_heads, config.key_dim, given)
    kinds, layers = set(found.values()), {int(name.split(".")[2]) for name in found}
    if without := [n for n, role in enumerate(_roles(config)) if role == "delta rule with cache" and n not in layers]:
        raise CheckpointError(f"{folder}: layer {without[0]} has no tensor of an exact cache; it cannot be imported")
    config.cache_sink = "sink" in kinds
    words = {f"{name.split('.attn.')[-1]} is the {meaning}" for name, meaning in found.items()}
    absent = {"sink": "no sink, so none is used"}
    absent |= {name: f"no {name}, so it is 1" for name in ("gamma_q", "gamma_k")}
    words |= {text for name, text in absent.items() if name not in kinds}
    print(f"exact cache | {config.cache_slots} slots, block {config.cache_block}, score {config.cache_score}, norm "
          f"{config.cache_read_norm} | {', '.join(sorted(words))} (by their names: compare a text's loss)",
          flush=True)
    return {name: f"{ours(name).rsplit('.mixer.', 1)[0]}.mixer.{meaning}" for name, meaning in found.items()}


def to_fla(folder: Path, out: Path, *, shard_bytes: int = 5 * 10**9, overwrite: bool = False) -> Path:
    """Make a folder in their layout from an exported GDN of ours. Raises CheckpointError for other models."""
    config, reader = auto.read_config(folder), ModelReader(folder)
    values = config_to_fla(folder, config)
    if problem := auto.describe_mismatch(reader.shapes(), config):
        raise CheckpointError(f"{folder}: does not hold the model of its config.json: {problem}")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in reader.names():
            value = reader.read(name)
            yield theirs(name), value[:, None] if name.endswith("_conv.weight") else value

    with fresh_folder(out, overwrite=overwrite, marker=RECORD) as partial:
        write_model(tensors(), partial, shard_bytes)
        (partial / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _copy_tokenizer(folder, partial, ("generation_config.json",))
        write_record(partial, {"exported_from": folder.name})
    return out


def theirs(name: str) -> str:
    """Their name of a tensor of ours."""
    return ".".join(RENAME.get(part, part) for part in name.split("."))


def ours(name: str) -> str:
    """Our name of a tensor of theirs."""
    back = {value: key for key, value in RENAME.items()}
    return ".".join(back.get(part, part) for part in name.split("."))


def config_from_fla(folder: Path, values: dict[str, Any], cache: CacheConfig | None) -> HolaConfig:
    """Their config.json as a HolaConfig; CheckpointError lists what ours cannot do."""
    attention = values.get("attn") or {}
    if problems := _not_ours(values, attention):
        raise CheckpointError(f"{folder}: {', '.join(problems)}; our layers do not have that")
    width, key_dim = values.get("hidden_size", 2048), values.get("head_dim", 256)
    layers = values.get("num_hidden_layers", 21)
    delta = kind_with_role("delta rule" if cache is None else "delta rule with cache").label
    softmax = kind_with_role("softmax").label
    pattern = "".join(softmax if n in attention.get("layers", ()) else delta for n in range(layers))
    memory = {} if cache is None else {name: getattr(cache, field) for field, name in CACHE.items()}
    return HolaConfig(
        vocab_size=values.get("vocab_size", 32000), hidden_size=width, num_hidden_layers=layers,
        intermediate_size=values.get("intermediate_size") or _swiglu_width(width, values.get("hidden_ratio") or 4),
        layer_pattern=delta if set(pattern) == {delta} else pattern, num_heads=values.get("num_heads", 6),
        key_dim=key_dim, value_dim=round(key_dim * values.get("expand_v", 2.0)), conv_width=values.get("conv_size", 4),
        beta_range=2 if values.get("allow_neg_eigval") else 1,
        num_attention_heads=attention.get("num_heads", 1), num_key_value_heads=attention.get("num_kv_heads"),
        rope_theta=attention.get("rope_theta", 10000.0), norm_eps=values.get("norm_eps", 1e-6),
        initializer_range=values.get("initializer_range", 0.02),
        max_position_embeddings=values.get("max_position_embeddings", 2048), architectures=["HolaForCausalLM"],
        tie_word_embeddings=values.get("tie_word_embeddings", False), bos_token_id=values.get("bos_token_id"),
        eos_token_id=values.get("eos_token_id"), pad_token_id=values.get("pad_token_id"), **memory)


def _roles(config: HolaConfig) -> list[str | None]:
    """Which layer of their model every layer of ours is."""
    return [kind.fla_role for kind in expand(config.layer_pattern, config.num_hidden_layers)]


def _not_ours(values: dict[str, Any], attention: dict[str, Any]) -> list[str]:
    """Settings of theirs that our layers do not have."""
    heads = values.get("num_heads", 6)
    problems = [f"{key} is {values[key]!r}" for key, taken in TAKEN.items() if values.get(key, taken[0]) not in taken]
    problems += [f"attn.{key} is {attention[key]!r}" for key, taken in ATTENTION_TAKEN.items()
                 if attention.get(key, taken[0]) not in taken]
    if values.get("num_v_heads") not in (None, heads):
        problems.append(f"num_v_heads is {values['num_v_heads']}, num_heads {heads}")
    if attention.get("num_heads", 1) % (attention.get("num_kv_heads") or 1):
        problems.append(f"attn.num_kv_heads is {attention['num_kv_heads']}, attn.num_heads {attention['num_heads']}")
    return problems


def config_to_fla(folder: Path, config: HolaConfig) -> dict[str, Any]:
    """A config.json of theirs; CheckpointError where their model cannot be ours."""
    roles = _roles(config)
    reasons = {"its layers have an exact cache": "delta rule with cache" in roles,
               "it has no Gated DeltaNet layer": "delta rule" not in roles,
               "it has layers of another kind": None in roles,
               "its state does not decay": config.rule == "delta",
               "it has no state": config.rule == "none",
               "its state is read late": config.state_delay > 0,
               "its softmax attention has no positions": "softmax" in roles and config.rope_theta is None,
               "its softmax attention norms queries and keys": "softmax" in roles and config.attention_qk_norm}
    if problems := [reason for reason, holds in reasons.items() if holds]:
        raise CheckpointError(f"{folder}: {', '.join(problems)}; their Gated DeltaNet cannot do that")
    attention = {"layers": [n for n, role in enumerate(roles) if role == "softmax"],
                 "num_heads": config.num_attention_heads,
                 "num_kv_heads": config.num_key_value_heads or config.num_attention_heads,
                 "qkv_bias": False, "window_size": None, "rope_theta": config.rope_theta}
    return {
        "model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size, "hidden_act": "swish",
        "num_hidden_layers": config.num_hidden_layers, "attn_mode": "chunk", "num_heads": config.num_heads,
        "num_v_heads": config.num_heads, "head_dim": config.key_dim, "expand_v": config.value_dim / config.key_dim,
        "conv_size": config.conv_width, "use_gate": True, "use_short_conv": True,
        "allow_neg_eigval": config.beta_range == 2,
        "attn": attention if attention["layers"] else None, "norm_eps": config.norm_eps,
        "initializer_range": config.initializer_range, "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings, "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id,
        "torch_dtype": str(config.dtype or torch.float32).removeprefix("torch.")}


def _read_config(folder: Path) -> dict[str, Any]:
    values = read_json(folder, "config.json")
    if values is None:
        raise CheckpointError(f"{folder}: no config.json; give the folder of a model")
    if values.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{folder}: has a model of type {shown(values.get('model_type'))}, only {MODEL_TYPE!r} "
                              "can be imported")
    read_json(folder, "config.json", schemas.FLA_CONFIG)
    return values


def _dropped(name: str, config: HolaConfig) -> bool:
    """Stored by some versions and not a parameter: a tied output projection, rotary tables."""
    return name.endswith("inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def _our_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[2]) if re.search(r"_conv1d\.weight$", name) and len(shape) == 3 else shape


def _swiglu_width(width: int, ratio: int) -> int:
    """Two thirds of ratio x width, rounded up to a multiple of 256, as they size their MLP."""
    return -(-int(width * ratio * 2 / 3) // 256) * 256


def _copy_tokenizer(source: Path, target: Path, more: tuple[str, ...] = ()) -> None:
    """Copy the files of `source`; references to code in the settings are left out, with a message."""
    for file in (*more, *TOKENIZER_FILES):
        if contained(source, file).is_file():
            shutil.copyfile(source / file, target / file)
    settings = read_json(target, "tokenizer_config.json")
    if settings is None:
        return
    before = dict(settings)
    if settings.pop("auto_map", None) is not None:
        print(f"note: {source / 'tokenizer_config.json'}: auto_map names code, which is not copied", flush=True)
    settings.setdefault("model_input_names", MODEL_INPUTS)  # transformers' generic class adds one that no model takes
    if settings != before:
        (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _identity(folder: Path) -> dict[str, Any] | None:
    """The tokenizer's identity, where there is one that our data tools can read."""
    try:
        return load_tokenizer(str(folder)).identity()
    except DataError:
        return None
