"""The model to evaluate, from an exported folder or straight from a checkpoint."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hola_megatron.errors import CheckpointError, DataError
from hola_megatron.hf import auto
from hola_megatron.hf.convert import ExportOptions, to_hf


@contextlib.contextmanager
def exported(path: Path, tokenizer: str | None = None) -> Iterator[Path]:
    """`path` itself if it is an exported folder, else a temporary export of that run or checkpoint."""
    if (path / "config.json").is_file():
        yield path
        return
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give an exported model, a run folder or a checkpoint")
    with tempfile.TemporaryDirectory(prefix="hola-export-") as scratch:
        yield to_hf(path, Path(scratch) / "export", ExportOptions(tokenizer=tokenizer))


def load(folder: Path, *, dtype: torch.dtype | None = None, device: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of an exported folder; device None: a GPU where there is one."""
    from transformers import AutoTokenizer

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = auto.load_model(folder, dtype=dtype, device=device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{folder}: holds no usable tokenizer ({reason}); export again") from None
    if len(tokenizer) > model.config.vocab_size:
        raise DataError(f"{folder}: its tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}; "
                        "put back the tokenizer it was exported with")
    return model, tokenizer


@torch.no_grad()
def greedy_sample(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """`prompt` continued by the most likely tokens."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = start + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    given = torch.tensor([ids], device=model.device)
    found = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(found[0], skip_special_tokens=True)
