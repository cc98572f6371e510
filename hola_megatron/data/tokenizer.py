"""Text to token ids and back: one small interface over four kinds of tokenizer.

A tokenizer is part of the data: a model trained on ids of one vocabulary is noise on another. So
each tokenizer states its `identity()`, which is stored beside the shards and compared before
training, and `save_pretrained` refuses to write a Hugging Face form that encodes differently.

`encode` follows the "ordinary text" rule: a special token's name inside a document (a web page
that quotes "</s>") is encoded as plain characters, so text can never forge a document end. Hugging
Face tokenizers loaded from `save_pretrained` do recognise such names, as their users expect.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from hola_megatron.data.hf_form import byte_level_form, sentencepiece_form
from hola_megatron.errors import DataError

BYTES_BOS, BYTES_EOS = "<|bos|>", "<|eos|>"
EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "<｜end▁of▁sentence｜>", "[EOS]", "<EOS>")
BOS_NAMES = (
    "<s>",
    "<bos>",
    "<|begin_of_text|>",
    "<|startoftext|>",
    "<|bos|>",
    "<｜begin▁of▁sentence｜>",
    "[BOS]",
    "<BOS>",
)

# Scripts, digits, runs of blanks, line ends, emoji and control characters: where two
# implementations of one vocabulary tend to part.
PROBE = "The cat's 3.14  sat,\n\n\ton the mat.  \r\nÀé ß 中文 日本 Привет مرحبا 🙂\u200b e\u0301 _x_ <tag/> 1000000 "


class Tokenizer(ABC):
    """Encodes documents to ids and back.

    Attributes:
        kind: "bytes", "huggingface", "gpt2" or "sentencepiece".
        vocab_size: one more than the largest id that `encode` or the special ids can give.
        bos_id: id put before a document, or None where the tokenizer has none.
        eos_id: id put after a document.
    """

    kind: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    _defining_bytes: bytes

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens; the same ids as `encode` one by one."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bos, eos and ids outside the vocabulary (a padded output layer) give nothing."""

    @abstractmethod
    def _hf_form(self) -> tuple[str, str | None, str]:
        """(text of a tokenizer.json, bos token or None, eos token)."""

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

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the files from which `transformers.AutoTokenizer.from_pretrained(folder)` loads.

        With `add_special_tokens=False` it gives the ids of `encode`; by default it adds what the
        tokenizer.json says, which for the bytes and sentencepiece kinds is a leading bos.

        Raises:
            DataError: the Hugging Face form would encode a probe text differently.
        """
        form, bos, eos = self._hf_form()
        found = tokenizers.Tokenizer.from_str(form).encode(PROBE, add_special_tokens=False).ids
        if found != self.encode(PROBE):
            raise DataError(
                f"{self.kind} tokenizer: its Hugging Face form encodes a probe text differently (an unusual normaliser"
                " or whitespace rule); convert it yourself and pass the tokenizer.json as the tokenizer"
            )
        special = {"eos_token": eos} | ({"bos_token": bos} if bos else {})
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),
            **special,
        }
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / "tokenizer.json").write_text(form, encoding="utf-8")
        (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (target / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


class BytesTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0..255, then bos 256 and eos 257. Needs no file, so demos and tests use it."""

    kind = "bytes"
    vocab_size = 258
    bos_id = 256
    eos_id = 257
    _defining_bytes = bytes(range(256))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def _hf_form(self) -> tuple[str, str | None, str]:
        return byte_level_form(BYTES_BOS, BYTES_EOS), BYTES_BOS, BYTES_EOS


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers` model: any tokenizer.json, or GPT-2's vocab.json and merges.txt."""

    def __init__(self, model: tokenizers.Tokenizer, kind: str, defining_bytes: bytes, where: str):
        """Wrap `model`; `where` names its file in errors.

        Raises:
            DataError: no added token carries a known end-of-text name.
        """
        self.kind = kind
        self._model = model
        self._defining_bytes = defining_bytes
        # A file may carry the length limits of whoever saved it; they must not cut documents.
        limited = model.truncation is not None or model.padding is not None
        model.no_truncation()
        model.no_padding()
        # A tokenizer.json is handed on byte for byte where it can be, so that its identity survives the copy.
        verbatim = kind == "huggingface" and not limited
        self._form = defining_bytes.decode("utf-8") if verbatim else model.to_str()
        model.encode_special_tokens = True
        added = {token.content: i for i, token in model.get_added_tokens_decoder().items()}
        eos = next((name for name in EOS_NAMES if name in added), None)
        if eos is None:
            raise DataError(
                f"{where}: none of its {len(added)} added tokens is an end of text, looked for"
                f" {', '.join(EOS_NAMES)}; add one of these as a special token"
            )
        self._eos = eos
        self._bos = next((name for name in BOS_NAMES if name in added), None)
        self.eos_id = added[eos]
        self.bos_id = added[self._bos] if self._bos else None
        self.vocab_size = max(model.get_vocab(with_added_tokens=True).values()) + 1

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # "fast" leaves out character offsets, which cost most of the memory of a long document.
        return [encoding.ids for encoding in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([i for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=True)

    def _hf_form(self) -> tuple[str, str | None, str]:
        return self._form, self._bos, self._eos


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece *.model (BPE or unigram)."""

    kind = "sentencepiece"

    def __init__(self, model_bytes: bytes, where: str):
        """Load the serialized model; `where` names its file in errors.

        Raises:
            DataError: not a sentencepiece model, or one without an end-of-sentence piece.
        """
        import sentencepiece

        self._defining_bytes = model_bytes
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model_bytes)
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(
                f"{where}: not a sentencepiece model ({_one_line(error)}); give the *.model file that training wrote"
            ) from error
        self.vocab_size = self._model.get_piece_size()
        self.eos_id = self._model.eos_id()
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else None
        if self.eos_id < 0:
            raise DataError(f"{where}: the model has no end-of-sentence piece; train it with eos_id set")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # One thread: parallelism is the caller's, by processes.
        return self._model.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        special = (self.bos_id, self.eos_id)
        return self._model.decode([int(i) for i in ids if 0 <= i < self.vocab_size and i not in special])

    def _hf_form(self) -> tuple[str, str | None, str]:
        bos = None if self.bos_id is None else self._model.id_to_piece(self.bos_id)
        eos = self._model.id_to_piece(self.eos_id)
        return sentencepiece_form(self._defining_bytes, bos, self.bos_id), bos, eos


def load_tokenizer(spec: str) -> Tokenizer:
    """Load the tokenizer that `spec` names.

    Args:
        spec: "bytes"; the path of a tokenizer.json or of a sentencepiece *.model; or a folder that
            holds tokenizer.json, vocab.json and merges.txt, or tokenizer.model (looked for in this order).

    Raises:
        DataError: nothing there, not readable as a tokenizer, or no end-of-text token.
    """
    if spec == "bytes":
        return BytesTokenizer()
    path = Path(spec)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise DataError(
            f"tokenizer {spec!r}: no such file or folder; give 'bytes', a tokenizer.json, a sentencepiece *.model,"
            " or a folder that holds one"
        )
    return _load_file(path)


def _load_folder(folder: Path) -> Tokenizer:
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if (folder / "tokenizer.json").is_file():
        return _load_file(folder / "tokenizer.json")
    if vocabulary.is_file() and merges.is_file():
        return _load_gpt2(vocabulary, merges)
    if (folder / "tokenizer.model").is_file():
        return _load_file(folder / "tokenizer.model")
    raise DataError(
        f"tokenizer folder {folder}: holds no tokenizer.json, no vocab.json with merges.txt and no tokenizer.model;"
        " give a folder that does"
    )


def _load_file(path: Path) -> Tokenizer:
    if path.suffix == ".model":
        return SentencePieceTokenizer(path.read_bytes(), str(path))
    if path.suffix != ".json":
        raise DataError(f"tokenizer {path}: unknown suffix {path.suffix!r}; allowed are .json and .model")
    data = path.read_bytes()
    try:
        model = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises plain Exception
        raise DataError(
            f"tokenizer {path}: not a Hugging Face tokenizer.json ({_one_line(error)}); for GPT-2 files give the folder"
        ) from error
    return HuggingFaceTokenizer(model, "huggingface", data, f"tokenizer {path}")


def _load_gpt2(vocabulary: Path, merges: Path) -> Tokenizer:
    try:
        model = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises plain Exception
        raise DataError(
            f"tokenizer {vocabulary.parent}: vocab.json and merges.txt are not a GPT-2 pair ({_one_line(error)});"
            " take both from one source"
        ) from error
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    known = [name for name in EOS_NAMES if model.token_to_id(name) is not None]
    model.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in known])
    defining = vocabulary.read_bytes() + b"\0" + merges.read_bytes()
    return HuggingFaceTokenizer(model, "gpt2", defining, f"tokenizer {vocabulary.parent}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
