"""Sentencepiece models as tokenizers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers

from hola_megatron.data import sentencepiece_form
from hola_megatron.data.base_tokenizer import HfForm, Tokenizer, encode_as_text, loaded, one_line
from hola_megatron.data.probes import probes
from hola_megatron.data.special_tokens import spare_name
from hola_megatron.errors import DataError


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece *.model (BPE, unigram or char).

    A unigram model encodes by its Hugging Face form. sentencepiece adds up scores in float32, so that of two equally
    likely splits of "-----" rounding takes one; the form, in float64, may take the other. Which does not matter, but
    training, export and evaluation must take the same.
    """

    kind = "sentencepiece"

    def __init__(self, model_bytes: bytes, where: str):
        """Load the serialized model; `where` names its file in errors.

        Raises:
            DataError: not a sentencepiece model, or one without an end-of-sentence piece of its own.
        """
        import sentencepiece

        self._defining_bytes = model_bytes
        self._where = where
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model_bytes)
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(
                f"{where}: not a sentencepiece model ({one_line(error)}); give the *.model file that training wrote"
            ) from error
        self._proto = sentencepiece_form.read_model(model_bytes)
        self.vocab_size = self._model.get_piece_size()
        self.eos_id = self._model.eos_id()
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else None
        if self.eos_id < 0:
            raise DataError(f"{where}: the model has no end-of-sentence piece that is a control symbol; train it with"
                            " eos_id set and without that piece among user_defined_symbols")
        self.pad_id = self._spare_id()
        self._symbols = sentencepiece_form.names(self._proto, "USER_DEFINED")
        self._form: HfForm | None = None
        self._unigram: tokenizers.Tokenizer | None = None
        if sentencepiece_form.is_unigram(self._proto):
            self._form = self._likeliest_form()
            self._unigram = loaded(self._form)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # One thread: parallelism is the caller's, by processes.
        if self._unigram is None:
            return self._model.encode(list(texts), num_threads=1)
        return encode_as_text(self._unigram, texts)

    def decode(self, ids: Sequence[int]) -> str:
        special = (self.bos_id, self.eos_id)
        return self._model.decode([int(i) for i in ids if 0 <= i < self.vocab_size and i not in special])

    def _hf_forms(self) -> Iterator[HfForm]:
        if self._form is not None:
            yield self._form
            return
        bos, pad = (None if i is None else self._model.id_to_piece(i) for i in (self.bos_id, self.pad_id))
        for text in sentencepiece_form.sentencepiece_forms(self._proto, bos, self.bos_id):
            yield HfForm(text, self._model.id_to_piece(self.eos_id), bos, pad)

    def _likeliest_form(self) -> HfForm:
        """The form that agrees on most of the hard texts; whether it agrees on all, `check_hf_form` says."""
        texts = probes(self._symbols)
        wanted = self._model.encode(texts, num_threads=1)

        def agreement(form: HfForm) -> int:
            return sum(map(list.__eq__, wanted, encode_as_text(loaded(form), texts)))

        return max(self._hf_forms(), key=agreement)

    def _probes(self) -> list[str]:
        pieces = sentencepiece_form.names(self._proto, "NORMAL", "USER_DEFINED", "UNUSED")
        texts = [piece.replace(sentencepiece_form.SPACE, " ") for piece in pieces]
        return probes(self._symbols, texts)

    def _wanted(self, texts: Sequence[str], found: list[list[int]]) -> list[list[int]]:
        """sentencepiece's own ids; of a unigram model the found ones where they cut the text as likely."""
        wanted = self._model.encode(list(texts), num_threads=1)
        if self._unigram is None:
            return wanted
        scores = sentencepiece_form.scores(self._proto)
        return [there if _as_likely(self._model, scores, here, there) else here
                for here, there in zip(wanted, found, strict=True)]

    def _spare_id(self) -> int | None:
        """A control symbol that pads, or the unknown piece where bytes spell what is outside the vocabulary."""
        control = {name: self._model.piece_to_id(name) for name in sentencepiece_form.names(self._proto, "CONTROL")}
        control = {name: i for name, i in control.items() if i not in (self.bos_id, self.eos_id)}
        if self._model.pad_id() in control.values():
            return self._model.pad_id()
        if name := spare_name(control):
            return control[name]
        return self._model.unk_id() if self._proto.trainer_spec.byte_fallback else None


def _as_likely(model: Any, scores: list[float], one: list[int], two: list[int]) -> bool:
    """Whether two encodings spell the same text with the same probability, up to float32's rounding."""
    if "".join(map(model.id_to_piece, one)) != "".join(map(model.id_to_piece, two)):
        return False
    sums = [sum(scores[i] for i in ids) for ids in (one, two)]
    return abs(sums[0] - sums[1]) <= 1e-5 * max(1.0, *map(abs, sums))
