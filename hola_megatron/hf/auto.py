"""HOLA models inside this process: read from exported folders with our own classes, and known to transformers.

A folder of weights may come from a stranger. Nothing in it is run: the model is built here from plain values of its
config.json, and its safetensors are read by name. transformers' own loader is not used, since it imports code that
is in a local folder (custom_generate/generate.py, independent of trust_remote_code), follows adapters to other
folders, and takes the name of a kernel to download from a configuration.
"""

from __future__ import annotations

import functools
import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from hola_megatron.errors import CheckpointError
from hola_megatron.files import one_line, schemas, shown
from hola_megatron.hf.configuration_hola import HolaConfig
from hola_megatron.hf.contained import read_json
from hola_megatron.hf.modeling_hola import HolaForCausalLM, HolaModel
from hola_megatron.hf.weights import ModelReader
from hola_megatron.layers.registry import KINDS

STORED_AS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# of a config.json, all that is looked at; what else transformers keeps there could name code, kernels and other folders
FIELDS = frozenset(inspect.signature(HolaConfig).parameters) - {"kwargs"}
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
HALF_PRECISION = (torch.bfloat16, torch.float16)


@functools.cache
def register() -> None:
    """Make AutoConfig and AutoModelForCausalLM know the model type "hola"; our tools print their own messages."""
    logging.disable_progress_bar()
    AutoConfig.register(HolaConfig.model_type, HolaConfig)
    AutoModel.register(HolaConfig, HolaModel)
    AutoModelForCausalLM.register(HolaConfig, HolaForCausalLM)


def read_config(folder: Path) -> HolaConfig:
    """The configuration of an exported folder. Raises CheckpointError for another model."""
    values = read_json(folder, "config.json")
    if values is None:
        raise CheckpointError(f"{folder}: no config.json; give a folder written by tools/convert.py to-hf")
    if values.get("model_type") != HolaConfig.model_type:
        raise CheckpointError(f"{folder}: has a model of type {shown(values.get('model_type'))}, not "
                              f"{HolaConfig.model_type!r}; give a folder written by tools/convert.py to-hf "
                              "(flash-linear-attention models: from-fla)")
    read_json(folder, "config.json", schemas.HOLA_CONFIG)
    stored = values.get("dtype", values.get("torch_dtype")) or "float32"
    if stored not in STORED_AS:
        raise CheckpointError(f"{folder / 'config.json'}: dtype {stored!r} is none of {', '.join(STORED_AS)}; export "
                              "again")
    if values.get("quantization_config") is not None:
        raise CheckpointError(f"{folder / 'config.json'}: quantization_config: quantized weights are not read; give "
                              "the export they were made from")
    known = {name: values[name] for name in FIELDS & values.keys()}
    try:
        return HolaConfig(**known, dtype=STORED_AS[stored], architectures=["HolaForCausalLM"])
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: not usable ({error}); export again") from None


def load_model(folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu",
               backend: str | None = None) -> HolaForCausalLM:
    """The model of an exported folder, in evaluation mode; dtype None: as stored.

    In 16 bits decay, gates and their like stay float32 (`is_float32`). Raises CheckpointError where the tensors are not
    those of the configuration, or anything lies outside the folder.
    """
    config, reader = read_config(folder), ModelReader(folder)
    if backend is not None:
        config.backend = backend
    if problem := describe_mismatch(reader.shapes(), config):
        raise CheckpointError(f"{folder}: does not hold the model of its config.json: {problem}")
    config.dtype = dtype = dtype or config.dtype
    with torch.device("meta"):
        model = HolaForCausalLM(config)
    tensors = {}
    for name in reader.names():
        value = reader.read(name)
        tensors[name] = (stored(name, value, dtype) if dtype in HALF_PRECISION else value.to(dtype)).to(device)
    model.load_state_dict(tensors, strict=False, assign=True)  # all are there: compared above
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    # not the folder's generation_config.json, which may request decoding by external code
    model.generation_config = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id,
                                               pad_token_id=config.pad_token_id, use_cache=config.use_cache)
    return model.eval()


def expected_tensors(config: HolaConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of an export's tensors; a tied output projection is not stored."""
    try:
        with torch.device("meta"):
            model = HolaForCausalLM(config)
    except (RuntimeError, ValueError, ZeroDivisionError) as error:  # sizes that do not divide, or overflow
        raise CheckpointError(f"config.json: no model has these sizes ({one_line(error)}); export again") from None
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def stored(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter in the dtype of an export: decay, norms of the cache attention and gates stay float32."""
    return value.float() if is_float32(name) else value.to(dtype)


def is_float32(name: str) -> bool:
    """Whether some layer kind keeps the parameter or buffer of this name in float32."""
    return name.rpartition(".")[2] in _float32_names(tuple(KINDS))


@functools.lru_cache(maxsize=8)
def _float32_names(kinds: tuple[str, ...]) -> set[str]:
    exported = [KINDS[kind].exported() for kind in kinds]
    configs = (HolaConfig(), HolaConfig(cache_score="learned"))  # with every parameter that some model has
    return {name for kind in exported for config in configs for name in (*kind.float32(config), *kind.float32_buffers)}


def describe_mismatch(found: dict[str, tuple[int, ...]], config: Any) -> str | None:
    """The first difference between the tensors found and those the configuration asks for, or None."""
    layers = {int(match[1]) for name in found if (match := _LAYER.match(name))}
    if config.num_hidden_layers > 2 * len(layers) + 16:  # not even built to be compared
        return f"it has {len(layers)} layers, num_hidden_layers is {config.num_hidden_layers:,}"
    wanted = expected_tensors(config)
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name} does not belong to this model" for name in sorted(found.keys() - wanted.keys())]
    problems += [f"{name} is {list(found[name])}, not {list(wanted[name])}"
                 for name in sorted(wanted.keys() & found.keys()) if found[name] != wanted[name]]
    if not problems:
        return None
    return problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
