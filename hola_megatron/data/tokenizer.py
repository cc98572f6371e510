"""Text to token ids and back: one small interface over four kinds of tokenizer.

A tokenizer is part of the data: a model trained on ids of one vocabulary is noise on another. So
each tokenizer states its `identity()`, which is stored beside the shards and compared before
training. Its Hugging Face form is compared with it on hard texts before a dataset is made
(`check_hf_form`) and again when it is written (`save_pretrained`): whatever trains can be exported.

`encode` follows the "ordinary text" rule: a special token's name inside a document (a web page
that quotes "</s>") is encoded as plain characters, so text can never forge a document end. Hugging
Face tokenizers loaded from `save_pretrained` do recognise such names, as their users expect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from hola_megatron.data.base_tokenizer import (
    MODEL_INPUTS,
    SOURCE_FILE,
    HfForm,
    Tokenizer,
    encode_as_text,
    one_line,
    sha256_of,
)
from hola_megatron.data.hf_form import byte_level_form, with_leading_bos
from hola_megatron.data.probes import PROBE, probes
from hola_megatron.data.sentencepiece_tokenizer import SentencePieceTokenizer
from hola_megatron.data.special_tokens import EOS_NAMES, choose_special_tokens
from hola_megatron.errors import DataError
from hola_megatron.files import FileProblem, MissingFile, read_bytes, read_json
from hola_megatron.files.schemas import TOKENIZER_SOURCE

__all__ = ["MODEL_INPUTS", "PROBE", "SOURCE_FILE", "BytesTokenizer", "HuggingFaceTokenizer", "SentencePieceTokenizer",
           "Tokenizer", "load_tokenizer"]

BYTES_BOS, BYTES_EOS = "<|bos|>", "<|eos|>"


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

    def _hf_forms(self) -> Iterator[HfForm]:
        yield HfForm(byte_level_form(BYTES_BOS, BYTES_EOS), BYTES_EOS, BYTES_BOS, None)


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers` model: any tokenizer.json, or GPT-2's vocab.json and merges.txt."""

    def __init__(self, model: tokenizers.Tokenizer, kind: str, defining_bytes: bytes, where: str,
                 folder: Path | None = None):
        """Wrap `model`; `where` names its file in errors; `folder` holds the files that say which tokens are special.

        Raises:
            DataError: no token ends a document, or several may.
        """
        self.kind = kind
        self._model = model
        self._where = where
        self._defining_bytes = defining_bytes
        self._sha256 = None
        if getattr(model.model, "dropout", None):
            raise DataError(f"{where}: its model has dropout = {model.model.dropout:g}, so it encodes one text in many "
                            "ways; set \"dropout\" to null in the file")
        # A file may carry the length limits of whoever saved it; they must not cut documents.
        limited = model.truncation is not None or model.padding is not None
        model.no_truncation()
        model.no_padding()
        self._special = chosen = choose_special_tokens(model, folder, where)
        # What begins or ends documents is special, whatever the file says: text must not be able to forge it.
        marked = {token.content for token in model.get_added_tokens_decoder().values() if token.special}
        unmarked = [name for name in (chosen.eos, chosen.bos) if name is not None and name not in marked]
        model.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in unmarked])
        # A tokenizer.json is handed on byte for byte where it can be, so that its identity survives the copy.
        verbatim = kind == "huggingface" and not limited and not unmarked
        self._form = defining_bytes.decode("utf-8") if verbatim else model.to_str()
        model.encode_special_tokens = True
        self.eos_id = model.token_to_id(chosen.eos)
        self.bos_id = None if chosen.bos is None else model.token_to_id(chosen.bos)
        self.pad_id = None if chosen.pad is None else model.token_to_id(chosen.pad)
        self.vocab_size = max(model.get_vocab(with_added_tokens=True).values()) + 1
        if folder is not None and kind == "huggingface":
            self._sha256 = _recorded_source(folder, defining_bytes)

    def identity(self) -> dict[str, Any]:
        return super().identity() | ({"sha256": self._sha256} if self._sha256 else {})

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return encode_as_text(self._model, texts)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([i for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=True)

    def _hf_forms(self) -> Iterator[HfForm]:
        eos, bos, pad = self._special.eos, self._special.bos, self._special.pad
        yield HfForm(with_leading_bos(self._form, bos, self.bos_id), eos, bos, pad)

    def _probes(self) -> list[str]:
        added = self._model.get_added_tokens_decoder().values()
        return probes([token.content for token in added if not token.special])


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
        return SentencePieceTokenizer(_bytes_of(path), str(path))
    if path.suffix != ".json":
        raise DataError(f"tokenizer {path}: unknown suffix {path.suffix!r}; allowed are .json and .model")
    data = _bytes_of(path)
    with _refused(f"tokenizer {path}: not a Hugging Face tokenizer.json", "for GPT-2 files give the folder"):
        model = tokenizers.Tokenizer.from_buffer(data)
    if problem := gaps(model):
        raise DataError(f"tokenizer {path}: {problem}; get the file again")
    # other files beside it describe it only under the name that Hugging Face gives it
    folder = path.parent if path.name == "tokenizer.json" else None
    return HuggingFaceTokenizer(model, "huggingface", data, f"tokenizer {path}", folder)


def gaps(model: tokenizers.Tokenizer) -> str | None:
    """What is wrong where ids lie far beyond the number of tokens: the library then lists every id that is missing, for
    minutes or until the memory is full, and no embedding has so many rows. None for ids as tokenizers have them."""
    ids = model.get_vocab(with_added_tokens=True).values()
    if ids and max(ids) > 2 * len(ids) + 100_000:
        return f"a token has the id {max(ids):,}, and there are {len(ids):,} tokens"
    return None


def _bytes_of(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except FileProblem as problem:
        raise DataError(f"tokenizer {path}: {problem}; give another file") from None


@contextlib.contextmanager
def _refused(what: str, advice: str) -> Iterator[None]:
    """DataError for whatever the library tokenizers raises: plain Exception, or PanicException, which is none."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{what} ({one_line(error)}); {advice}") from None


def _load_gpt2(vocabulary: Path, merges: Path) -> Tokenizer:
    defining = _bytes_of(vocabulary) + b"\0" + _bytes_of(merges)
    with _refused(f"tokenizer {vocabulary.parent}: vocab.json and merges.txt are not a GPT-2 pair",
                  "take both from one source"):
        model = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocabulary), str(merges)))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    known = [name for name in EOS_NAMES if model.token_to_id(name) is not None]
    model.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in known])
    return HuggingFaceTokenizer(model, "gpt2", defining, f"tokenizer {vocabulary.parent}", vocabulary.parent)


def _recorded_source(folder: Path, form: bytes) -> str | None:
    """The sha256 of the tokenizer.json that the one in `folder`, of bytes `form`, was written from; None: of itself."""
    try:
        source = read_json(folder / SOURCE_FILE, TOKENIZER_SOURCE)
    except MissingFile:
        return None
    except FileProblem as problem:
        raise DataError(f"tokenizer {folder / SOURCE_FILE}: {problem}; remove it, or export again") from None
    return source["sha256"] if source["form_sha256"] == sha256_of(form) else None
