"""Tiny models and exports in which every part of the network matters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from helpers import MICRO

from hola_megatron.config import Recipe, build_recipe
from hola_megatron.data.tokenizer import load_tokenizer
from hola_megatron.hf.auto import register
from hola_megatron.hf.configuration_hola import HolaConfig
from hola_megatron.hf.convert import write_config, write_record, write_tokenizer
from hola_megatron.hf.modeling_hola import HolaForCausalLM
from hola_megatron.hf.shape import config_of

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_heads": 2,
         "key_dim": 8, "value_dim": 16, "num_attention_heads": 2, "attention_window": 9, "cache_block": 8,
         "cache_slots": 3}


def model(pattern: str, **changes: Any) -> HolaForCausalLM:
    """A model of `pattern` in evaluation mode, with weights far from their start values.

    In float64, where two ways to one answer differ by little more than the few float32 steps inside.
    """
    return liven(HolaForCausalLM(HolaConfig(layer_pattern=pattern, **{**SHAPE, **changes}))).double()


@torch.no_grad()
def liven(model: HolaForCausalLM, seed: int = 0) -> HolaForCausalLM:
    """Open gates, uneven norms, slow and fast decay, sharp reads: nothing hides behind a small start value."""
    register()
    g = torch.Generator().manual_seed(seed)
    for name, x in model.named_parameters():
        last = name.removesuffix(".weight").rpartition(".")[2]
        if last in ("gate", "sink", "dt_bias"):
            x.copy_(torch.randn(x.shape, generator=g))
        elif last == "A_log":
            x.copy_(torch.rand(x.shape, generator=g) * 6 - 5)
        elif last.startswith("gamma") or last.endswith("norm"):
            x.copy_(1 + 0.3 * torch.randn(x.shape, generator=g))
        else:
            x.copy_(torch.randn(x.shape, generator=g) * (0.5 if "conv" in last else 0.15))
    return model.eval()


def tokens(rows: int, length: int, vocabulary: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def recipe(pattern: str = "HGHA", data: str = "nowhere", **model: Any) -> Recipe:
    """MICRO with another pattern and model settings (cache settings as cache={...})."""
    values = copy.deepcopy(MICRO)
    cache = {**values["model"]["cache"], **model.pop("cache", {})}
    values["model"] |= {"pattern": pattern, **model, "cache": cache}
    values["data"]["train"] = data
    return build_recipe(values)


def export(folder: Path, recipe: Recipe, *, seed: int = 0) -> Path:
    """An exported folder of the recipe's model with lively weights, as if it came from a run."""
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    config = config_of(recipe, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
                       pad_token_id=tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id,
                       dtype=torch.float32)
    liven(HolaForCausalLM(config), seed).save_pretrained(folder)
    write_config(folder, config)
    write_tokenizer(folder, tokenizer)
    write_record(folder, {"recipe": json.loads(json.dumps(recipe.to_dict())), "step": 0, "data_fingerprint": None,
                          "trainer": {"step": 0, "samples": 0, "bad_steps": 0}, "tokenizer": tokenizer.identity()})
    return folder
