"""HOLA models known to transformers inside this process, so that our own tools never run remote code."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import logging

from hola_megatron.errors import CheckpointError
from hola_megatron.hf.configuration_hola import HolaConfig
from hola_megatron.hf.modeling_hola import FLOAT32_PARAMETERS, HolaForCausalLM, HolaModel


@functools.cache
def register() -> None:
    """Make AutoConfig and AutoModelForCausalLM know the model type "hola"; our tools say themselves what they do."""
    logging.disable_progress_bar()
    AutoConfig.register(HolaConfig.model_type, HolaConfig)
    AutoModel.register(HolaConfig, HolaModel)
    AutoModelForCausalLM.register(HolaConfig, HolaForCausalLM)


def read_config(folder: Path) -> HolaConfig:
    """The configuration of an exported folder; CheckpointError where it is none of ours."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no config.json; give a folder written by tools/convert.py to-hf") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: damaged ({error}); export again") from None
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != HolaConfig.model_type:
        raise CheckpointError(f"{folder}: holds a model of type {kind!r}, not {HolaConfig.model_type!r}; give a folder "
                              "written by tools/convert.py to-hf (flash-linear-attention models: from-fla)")
    try:
        return HolaConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: not usable ({error}); export again") from None


def load_model(folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu",
               backend: str | None = None) -> HolaForCausalLM:
    """The model of an exported folder, in evaluation mode; dtype None: as stored."""
    register()
    config = read_config(folder)
    if backend is not None:
        config.backend = backend
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype or "auto")
    return model.to(device).eval()


def expected_tensors(config: HolaConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what an export holds; a tied output projection is not stored."""
    with torch.device("meta"):
        model = HolaForCausalLM(config)
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def stored(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter as an export of this dtype holds it: decay, norms of the read and gates stay float32."""
    return value.float() if is_float32(name) else value.to(dtype)


def is_float32(name: str) -> bool:
    return name.rpartition(".")[2] in FLOAT32_PARAMETERS


def describe_mismatch(found: dict[str, tuple[int, ...]], config: Any) -> str | None:
    """The first difference between the tensors found and those the configuration asks for, or None."""
    wanted = expected_tensors(config)
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name} does not belong to this model" for name in sorted(found.keys() - wanted.keys())]
    problems += [f"{name} is {list(found[name])}, not {list(wanted[name])}"
                 for name in sorted(wanted.keys() & found.keys()) if found[name] != wanted[name]]
    if not problems:
        return None
    return problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
