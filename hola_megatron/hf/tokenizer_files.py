"""The tokenizer of a model's folder, from its data files alone.

AutoTokenizer runs a class that tokenizer_config.json or config.json names (auto_map), and reads the files that they
name, wherever these lie. Here the fast tokenizer is made from tokenizer.json (or, where there is none, from what our
data tools read: vocab.json with merges.txt, tokenizer.model) and from a few plain settings.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast

from hola_megatron.data.special_tokens import ID_FILES, NAME_FILES
from hola_megatron.data.tokenizer import SOURCE_FILE, gaps, load_tokenizer
from hola_megatron.errors import DataError
from hola_megatron.files import read_bytes
from hola_megatron.hf.contained import contained, read_json

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
PLAIN = {"padding_side": str, "truncation_side": str, "clean_up_tokenization_spaces": bool, "model_max_length": int,
         "model_input_names": list}
# all that load_tokenizer opens
SOURCES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", SOURCE_FILE, *NAME_FILES, *ID_FILES)


def tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    """The folder's tokenizer.

    Raises DataError where there is no usable one, CheckpointError where a file lies outside the folder.
    """
    for name in SOURCES:
        contained(folder, name)
    if not (folder / "tokenizer.json").is_file():
        return _converted(folder)
    try:
        model = tokenizers.Tokenizer.from_buffer(read_bytes(folder / "tokenizer.json"))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises plain Exception, and panics that are none
        raise _unusable(folder, error) from None
    if problem := gaps(model):
        raise _unusable(folder, DataError(problem))
    settings = (read_json(folder, "special_tokens_map.json") or {}) | (read_json(folder, "tokenizer_config.json") or {})
    plain = {name: settings[name] for name, kind in PLAIN.items() if type(settings.get(name)) is kind}
    special = {name: text for name in SPECIAL if (text := _content(settings.get(name))) is not None}
    try:
        return PreTrainedTokenizerFast(tokenizer_object=model, **plain, **special)
    except Exception as error:  # settings that the class refuses, each in its own way
        raise _unusable(folder, error) from None


def _converted(folder: Path) -> PreTrainedTokenizerFast:
    """Of a folder without tokenizer.json, by way of the form that an export of this tokenizer has."""
    try:
        tokenizer = load_tokenizer(str(folder))
        with tempfile.TemporaryDirectory(prefix="hola-tokenizer-") as scratch:
            tokenizer.save_pretrained(scratch)
            return tokenizer_of(Path(scratch))
    except DataError as error:
        raise _unusable(folder, error) from None


def _content(token: Any) -> str | None:
    """The text of a special token, which settings store as such or as a mapping with its properties."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _unusable(folder: Path, error: BaseException) -> DataError:
    reason = " ".join(str(error).split())[:200]
    return DataError(f"{folder}: holds no usable tokenizer ({reason}); export again")
