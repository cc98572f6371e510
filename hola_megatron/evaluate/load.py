"""The model to evaluate, from an exported folder or straight from a checkpoint."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from hola_megatron.errors import CheckpointError, DataError, RecipeError, one_line
from hola_megatron.files import shown
from hola_megatron.hf import auto
from hola_megatron.hf.configuration_hola import HolaConfig
from hola_megatron.hf.contained import read_json
from hola_megatron.hf.convert import ExportOptions, to_hf
from hola_megatron.hf.tokenizer_files import tokenizer_of


@contextlib.contextmanager
def exported(path: Path, tokenizer: str | None = None) -> Iterator[Path]:
    """`path` itself if it is an exported folder, else a temporary export of that run or checkpoint."""
    if (path / "config.json").is_file():
        yield path
        return
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give an exported model, a run folder or a checkpoint")
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(f"{path}: is a PEFT adapter without its model; merge it into the export that it was "
                              "trained on (docs/fine_tuning.md), and give that folder")
    with tempfile.TemporaryDirectory(prefix="hola-export-") as scratch:
        yield to_hf(path, Path(scratch) / "export", ExportOptions(tokenizer=tokenizer))


def _usable(device: str | None) -> str:
    """RecipeError for a device that torch does not have here, before a model is read."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1).to(device).item()  # not by a factory: parallel/cpu.py replaces those
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise RecipeError(f"--device: {shown(device)} cannot be used here ({one_line(error)}); give cpu, cuda or "
                          "cuda:NUMBER, or leave it out") from None
    return device


def load(folder: Path, *, dtype: torch.dtype | None = None, device: str | None = None,
         trust_remote_code: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) of an exported folder; device None: a GPU where there is one.

    trust_remote_code: a model that is not ours is loaded by transformers, which runs code in the folder. One
    of ours is read as data, independent of this argument. Raises CheckpointError, DataError, RecipeError.
    """
    device = _usable(device)
    kind = (read_json(folder, "config.json") or {}).get("model_type")
    if kind is not None and kind != HolaConfig.model_type:
        if not trust_remote_code:
            raise CheckpointError(f"{folder}: has a model of type {shown(kind)}, not {HolaConfig.model_type!r}; "
                                  "transformers would load it, and run code in the folder: pass "
                                  "--trust-remote-code if you trust it (flash-linear-attention models: "
                                  "tools/convert.py from-fla)")
        return foreign(folder, dtype=dtype, device=device)
    model, tokenizer = auto.load_model(folder, dtype=dtype, device=device), tokenizer_of(folder)
    if len(tokenizer) > model.config.vocab_size:
        raise DataError(f"{folder}: its tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}; "
                        "put back the tokenizer it was exported with")
    return model, tokenizer


def foreign(folder: Path, *, dtype: torch.dtype | None, device: str) -> tuple[Any, Any]:
    """(model, tokenizer) of another architecture, by transformers and with the folder's own code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    except Exception as error:  # anything can come out of code that is not ours
        raise CheckpointError(f"{folder}: transformers cannot load it ({type(error).__name__}: "
                              f"{' '.join(str(error).split())[:200]})") from error
    return LogitsModel(model.to(device).eval()), tokenizer


class LogitsModel:
    """Adapter of another model to the interface of the measures: `model` returns logits, `lm_head` is an identity.

    Some architectures do more to their logits than one matrix product, so they are taken from the whole model.
    """

    def __init__(self, whole: Any):
        self._whole, self.config, self.lm_head = whole, whole.config, torch.nn.Identity()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def model(self, tokens: torch.Tensor, **options: Any) -> BaseModelOutputWithPast:
        """The logits of `tokens` [B, T] as last_hidden_state [B, T, vocabulary]."""
        output = self._whole(tokens, **options)
        memory = getattr(output, "past_key_values", None)
        if options.get("use_cache") and memory is None:
            raise CheckpointError("--stream: this model hands out no past_key_values; leave --stream away")
        return BaseModelOutputWithPast(last_hidden_state=output.logits, past_key_values=memory)


@torch.no_grad()
def greedy_sample(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """`prompt` continued by the most likely tokens."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = start + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    given = torch.tensor([ids], device=model.device)
    found = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(found[0], skip_special_tokens=True)
