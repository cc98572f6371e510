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

from hola_megatron.config import CacheConfig
from hola_megatron.data.tokenizer import load_tokenizer
from hola_megatron.errors import CheckpointError, DataError
from hola_megatron.hf import auto
from hola_megatron.hf.configuration_hola import HolaConfig
from hola_megatron.hf.convert import DTYPES, RECORD, write_config, write_record
from hola_megatron.hf.fresh_folder import fresh_folder
from hola_megatron.hf.shape import CACHE
from hola_megatron.hf.weights import ModelReader, write_model

MODEL_TYPE, ARCHITECTURE = "gated_deltanet", "GatedDeltaNetForCausalLM"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
                   "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja")
# ours -> theirs, inside a layer or at the top
RENAME = {"embed_tokens": "embeddings", "mixer_norm": "attn_norm", "mixer": "attn", "q_conv": "q_conv1d",
          "k_conv": "k_conv1d", "v_conv": "v_conv1d"}
# what their layer can do and ours does not: the values we can take, the first being their default
TAKEN = {"use_gate": (True,), "use_short_conv": (True,), "allow_neg_eigval": (False,), "conv_bias": (False,),
         "attnres_block_size": (None,), "output_gate_activation": ("swish", "silu"), "hidden_act": ("swish", "silu")}
ATTENTION_TAKEN = {"qkv_bias": (False,), "qk_norm": (False,), "window_size": (None,)}
NEW_IN_HOLA = ("gamma_q", "gamma_k", "gate", "sink")


def from_fla(folder: Path, out: Path, cache: CacheConfig | None = None, *, dtype: str = "fp32",
             shard_bytes: int = 5 * 10**9, overwrite: bool = False) -> Path:
    """Make the exported folder `out` from one of theirs; `cache` puts an exact cache on every GDN layer.

    The cache's parameters start as in training from nothing. Raises CheckpointError where their model
    does something ours does not, or a tensor is missing.
    """
    config = config_from_fla(folder, _read_config(folder), cache)
    config.dtype, reader = DTYPES[dtype], ModelReader(folder)
    shapes = {name: shape for name, shape in reader.shapes().items() if not _dropped(name, config)}
    found = {ours(name): _our_shape(name, shape) for name, shape in shapes.items()}
    fresh = {name: shape for name, shape in auto.expected_tensors(config).items()
             if cache is not None and name.rpartition(".")[2] in NEW_IN_HOLA}
    if problem := auto.describe_mismatch(found | fresh, config):
        raise CheckpointError(f"{folder}: is not the Gated DeltaNet of its config.json: {problem} (by our names)")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in shapes:
            value = reader.read(name)
            yield ours(name), auto.stored(ours(name), value.squeeze(1) if value.ndim == 3 else value, config.dtype)
        for name, shape in fresh.items():
            kind = name.rpartition(".")[2]
            start = 1.0 if kind.startswith("gamma") else cache.gate_init if kind == "gate" else 0.0
            yield name, torch.full(shape, start)

    with fresh_folder(out, overwrite=overwrite, marker=RECORD) as partial:
        write_model(tensors(), partial, shard_bytes)
        write_config(partial, config)
        _copy_tokenizer(folder, partial)
        write_record(partial, {"tokenizer": _identity(partial), "imported_from": folder.name})
    return out


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
        for file in ("generation_config.json", *TOKENIZER_FILES):
            if (folder / file).is_file():
                shutil.copyfile(folder / file, partial / file)
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
    layers, letter = values.get("num_hidden_layers", 21), "G" if cache is None else "H"
    kinds = "".join("A" if n in attention.get("layers", ()) else letter for n in range(layers))
    memory = {} if cache is None else {name: getattr(cache, field) for field, name in CACHE.items()}
    return HolaConfig(
        vocab_size=values.get("vocab_size", 32000), hidden_size=width, num_hidden_layers=layers,
        intermediate_size=values.get("intermediate_size") or _swiglu_width(width, values.get("hidden_ratio") or 4),
        layer_pattern=letter if set(kinds) == {letter} else kinds, num_heads=values.get("num_heads", 6),
        key_dim=key_dim, value_dim=round(key_dim * values.get("expand_v", 2.0)), conv_width=values.get("conv_size", 4),
        num_attention_heads=attention.get("num_heads", 1), rope_theta=attention.get("rope_theta", 10000.0),
        norm_eps=values.get("norm_eps", 1e-6), initializer_range=values.get("initializer_range", 0.02),
        max_position_embeddings=values.get("max_position_embeddings", 2048), architectures=["HolaForCausalLM"],
        tie_word_embeddings=values.get("tie_word_embeddings", False), bos_token_id=values.get("bos_token_id"),
        eos_token_id=values.get("eos_token_id"), pad_token_id=values.get("pad_token_id"), **memory)


def _not_ours(values: dict[str, Any], attention: dict[str, Any]) -> list[str]:
    """Settings of theirs that our layers do not have."""
    heads = values.get("num_heads", 6)
    problems = [f"{key} is {values[key]!r}" for key, taken in TAKEN.items() if values.get(key, taken[0]) not in taken]
    problems += [f"attn.{key} is {attention[key]!r}" for key, taken in ATTENTION_TAKEN.items()
                 if attention.get(key, taken[0]) not in taken]
    if values.get("num_v_heads") not in (None, heads):
        problems.append(f"num_v_heads is {values['num_v_heads']}, num_heads {heads}")
    if attention.get("num_kv_heads") not in (None, attention.get("num_heads")):
        problems.append(f"attn.num_kv_heads is {attention['num_kv_heads']}, attn.num_heads {attention['num_heads']}")
    return problems


def config_to_fla(folder: Path, config: HolaConfig) -> dict[str, Any]:
    """A config.json of theirs; CheckpointError where their model cannot be ours."""
    kinds = config.layer_kinds
    reasons = {"its layers have an exact cache": "H" in kinds, "it has no Gated DeltaNet layer": "G" not in kinds,
               "its state does not decay": not config.decay,
               "its softmax attention has no positions": "A" in kinds and config.rope_theta is None}
    if problems := [reason for reason, holds in reasons.items() if holds]:
        raise CheckpointError(f"{folder}: {', '.join(problems)}; their Gated DeltaNet cannot do that")
    attention = {"layers": [n for n, kind in enumerate(kinds) if kind == "A"], "num_heads": config.num_attention_heads,
                 "num_kv_heads": config.num_attention_heads, "qkv_bias": False, "window_size": None,
                 "rope_theta": config.rope_theta}
    return {
        "model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size, "hidden_act": "swish",
        "num_hidden_layers": config.num_hidden_layers, "attn_mode": "chunk", "num_heads": config.num_heads,
        "num_v_heads": config.num_heads, "head_dim": config.key_dim, "expand_v": config.value_dim / config.key_dim,
        "conv_size": config.conv_width, "use_gate": True, "use_short_conv": True, "allow_neg_eigval": False,
        "attn": attention if attention["layers"] else None, "norm_eps": config.norm_eps,
        "initializer_range": config.initializer_range, "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings, "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id,
        "torch_dtype": str(config.dtype or torch.float32).removeprefix("torch.")}


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no config.json; give a folder that holds a model") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: damaged ({error}); get it again") from None
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != MODEL_TYPE:
        raise CheckpointError(f"{folder}: holds a model of type {kind!r}, only {MODEL_TYPE!r} can be imported")
    return values


def _dropped(name: str, config: HolaConfig) -> bool:
    """Stored by some versions and not a parameter: a tied output projection, rotary tables."""
    return name.endswith("inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def _our_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[2]) if re.search(r"_conv1d\.weight$", name) and len(shape) == 3 else shape


def _swiglu_width(width: int, ratio: int) -> int:
    """Two thirds of ratio x width, rounded up to a multiple of 256, as they size their MLP."""
    return -(-int(width * ratio * 2 / 3) // 256) * 256


def _copy_tokenizer(source: Path, target: Path) -> None:
    for file in TOKENIZER_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, target / file)


def _identity(folder: Path) -> dict[str, Any] | None:
    """The tokenizer's identity, where there is one that our data tools can read."""
    try:
        return load_tokenizer(str(folder)).identity()
    except DataError:
        return None
