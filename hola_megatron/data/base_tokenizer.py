"""What every kind of tokenizer offers, and the comparison with its Hugging Face form."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from hola_megatron.data.probes import first_difference, probes
from hola_megatron.errors import DataError

# The names of the inputs that the model takes; transformers' generic class would add token_type_ids.
MODEL_INPUTS = ["input_ids", "attention_mask"]
# Beside a tokenizer.json that is not the original's bytes (a bos template was added): whose form it is.
SOURCE_FILE = "tokenizer_source.json"


@dataclass(frozen=True)
class HfForm:
    """A tokenizer.json's text and the names of its special tokens."""

    text: str
    eos: str
    bos: str | None
    pad: str | None


class Tokenizer(ABC):
    """Encodes documents to ids and back.

    Attributes:
        kind: "bytes", "huggingface", "gpt2" or "sentencepiece".
        vocab_size: one more than the largest id that `encode` or the special ids can give.
        bos_id: id put before a document, or None where the tokenizer has none.
        eos_id: id put after a document.
        pad_id: id of a special token that no text and no other role uses, or None: then batches are padded with eos.
    """

    kind: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int | None = None
    _defining_bytes: bytes
    _where: str = "the bytes tokenizer"

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens; the same ids as `encode` one by one."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bos, eos and ids outside the vocabulary (a padded output layer) give nothing."""

    @abstractmethod
    def _hf_forms(self) -> Iterator[HfForm]:
        """Hugging Face forms to try, the likeliest first."""

    def _probes(self) -> list[str]:
        """Texts on which the tokenizer and its form are compared."""
        return probes()

    def _wanted(self, texts: Sequence[str], found: list[list[int]]) -> list[list[int]]:
        """The ids that the form must give for `texts`; `found` are those it gives."""
        return self.encode_batch(texts)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens."""
        return self.encode_batch([text])[0]

    def identity(self) -> dict[str, Any]:
        """What makes this tokenizer this tokenizer: kind, vocab_size, bos_id, eos_id, sha256. No path."""
        return {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "sha256": hashlib.sha256(self._defining_bytes).hexdigest(),
        }

    def check_hf_form(self) -> HfForm:
        """The Hugging Face form, which gave the ids of `encode` for every probe, after bos where there is one.

        Raises:
            DataError: no form does.
        """
        texts, problem = self._probes(), None
        for form in self._hf_forms():
            found = encode_as_text(loaded(form), texts)
            difference = first_difference(texts, self._wanted(texts, found), found)
            if difference is None:
                return form
            problem = problem or difference
        raise DataError(
            f"{self._where}: no Hugging Face form of it encodes equally ({problem}), so a model trained with it"
            " could not be exported or evaluated; train the tokenizer with other options, or give a tokenizer.json made"
            " from it"
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the files from which `transformers.AutoTokenizer.from_pretrained(folder)` loads.

        With `add_special_tokens=False` it gives the ids of `encode`; by default it puts bos before them
        where the tokenizer has one, as in training. Batches are padded on the left, for generation.

        Raises:
            DataError: the Hugging Face form would encode a probe text differently.
        """
        form = self.check_hf_form()
        special = {"eos_token": form.eos} | ({"bos_token": form.bos} if form.bos else {})
        special["pad_token"] = form.pad or form.eos
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),
            "model_input_names": MODEL_INPUTS,
            "padding_side": "left",
            "bos_token": None,  # where there is none: else a token with a usual name would be taken for it
            **special,
        }
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / "tokenizer.json").write_text(form.text, encoding="utf-8")
        for name, values in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
            (target / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        (target / SOURCE_FILE).unlink(missing_ok=True)
        if self.kind == "huggingface" and form.text.encode("utf-8") != self._defining_bytes:
            source = {"sha256": self.identity()["sha256"], "form_sha256": sha256_of(form.text.encode("utf-8"))}
            (target / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")


def loaded(form: HfForm) -> tokenizers.Tokenizer:
    """The form, which takes the names of special tokens for text."""
    loaded = tokenizers.Tokenizer.from_str(form.text)
    loaded.encode_special_tokens = True
    return loaded


def encode_as_text(model: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, without special tokens."""
    # "fast" leaves out character offsets, which cost most of the memory of a long document.
    return [encoding.ids for encoding in model.encode_batch_fast(list(texts), add_special_tokens=False)]


def sha256_of(data: bytes) -> str:
    """sha256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())[:200]
