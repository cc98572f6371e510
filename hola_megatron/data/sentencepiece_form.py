"""The tokenizer.json of a sentencepiece model.

It is built from the model itself rather than through a converter class of `transformers`, because those
classes differ between its major versions while the tokenizer.json format does not, and because they treat
user-defined symbols as added tokens: split off before normalisation, which restarts after each.

Correspondence:
* Normalisation. `Precompiled` looks up a whole grapheme cluster and keeps the first hit of its first characters
  only, so a separator is put inside clusters: then it maps character by character. The built-in rules then compose
  what can be composed, which is Unicode's NFC.
* Unigram. User-defined symbols compete with other pieces, with a score of their own: nothing is cut out.
* BPE and char. User-defined symbols are found from left to right, the longest first, and never merged with others:
  a pre-tokenizer isolates them, and the model takes a word that is in the vocabulary as it is (`ignore_merges`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from hola_megatron.data.hf_form import leading
from hola_megatron.errors import DataError

SPACE = "▁"
# Unassigned control characters, which end a grapheme cluster and block composition; noncharacters for symbols.
_BREAK, _GUARD = "\U000e0002", "\U000e0003"
_PLACEHOLDERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


def read_model(model_bytes: bytes) -> Any:
    """The parsed protobuf of a serialized model. DataError where the package protobuf is not installed."""
    try:
        from sentencepiece import sentencepiece_model_pb2 as proto
    except ImportError as error:
        raise DataError(
            f"a sentencepiece model in Hugging Face form needs the package protobuf ({error}): pip install protobuf"
        ) from error
    return proto.ModelProto.FromString(model_bytes)


def names(model: Any, *kinds: str) -> list[str]:
    """The pieces of the given types (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE), in the order of ids."""
    piece = model.SentencePiece
    wanted = {piece.Type.Value(kind) for kind in kinds}
    return [p.piece for p in model.pieces if p.type in wanted]


def is_unigram(model: Any) -> bool:
    """Whether a sentencepiece model is of type unigram."""
    return model.trainer_spec.model_type == model.trainer_spec.UNIGRAM


def scores(model: Any) -> list[float]:
    """Each piece's log probability as sentencepiece's unigram search uses it.

    A user-defined symbol has 0.1 for each of its UTF-8 bytes after the first (measured on sentencepiece 0.2.3).
    Pieces that text never gives have the lowest.
    """
    kind = model.SentencePiece
    least = min((p.score for p in model.pieces if p.type == kind.NORMAL), default=0.0)

    def score(p: Any) -> float:
        if p.type == kind.USER_DEFINED:
            return 0.1 * (len(p.piece.encode("utf-8")) - 1)
        return p.score if p.type == kind.NORMAL else least

    return [score(p) for p in model.pieces]


def sentencepiece_forms(model: Any, bos: str | None, bos_id: int | None) -> Iterator[str]:
    """The tokenizer.json texts that may encode as `model` does, ids kept, the likeliest first.

    They differ in whether characters are composed after a normalisation map: a map's own rules do not say.
    """
    mapped = bool(model.normalizer_spec.precompiled_charsmap)
    for compose in (True, False) if mapped else (False,):
        yield _form(model, bos, bos_id, compose)


def _form(model: Any, bos: str | None, bos_id: int | None, compose: bool) -> str:
    symbols = sorted(names(model, "USER_DEFINED"), key=len, reverse=True)
    unigram, spec = is_unigram(model), model.trainer_spec
    form = Tokenizer(_unigram(model) if unigram else _bpe(model, bool(symbols)))
    form.normalizer = _normalizer(model.normalizer_spec, spec.treat_whitespace_as_suffix, symbols, compose)
    splits_on = [] if unigram or not symbols else [pre_tokenizers.Split(Regex(_any_of(symbols)), "isolated")]
    if inner := _inside_names(model):
        splits_on.append(pre_tokenizers.Split(Regex(inner), "merged_with_previous"))
    if splits_on:
        form.pre_tokenizer = pre_tokenizers.Sequence(splits_on)
    form.decoder = _decoder(model.normalizer_spec, spec.treat_whitespace_as_suffix)
    special = names(model, "CONTROL", "UNKNOWN")
    form.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    if bos is not None and bos_id is not None:
        form.post_processor = leading(bos, bos_id)
    return form.to_str()


def _unigram(model: Any) -> models.Unigram:
    vocabulary = [(p.piece, score) for p, score in zip(model.pieces, scores(model), strict=True)]
    return models.Unigram(vocabulary, model.trainer_spec.unk_id, byte_fallback=model.trainer_spec.byte_fallback)


def _bpe(model: Any, whole_words: bool) -> models.BPE:
    """Sentencepiece stores pieces with scores; `tokenizers` wants the merges that lead to them, best first.

    Only normal pieces are merged: sentencepiece never builds the others from text.
    """
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    normal = model.SentencePiece.NORMAL
    parts = {p.piece for p in model.pieces if p.type == normal}
    ranked = sorted((-p.score, i, p.piece) for i, p in enumerate(model.pieces) if p.type == normal and len(p.piece) > 1)
    merges = []
    for _, _, piece in ranked:
        splits = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        pairs = [(left, right) for left, right in splits if left in parts and right in parts]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    spec = model.trainer_spec
    return models.BPE(ids, merges, unk_token=spec.unk_piece, fuse_unk=True, byte_fallback=spec.byte_fallback,
                      ignore_merges=whole_words)


def _inside_names(model: Any) -> str | None:
    """A pattern that splits text such as `<0x41>` or `</s>` where no piece crosses, so that it stays text.

    `tokenizers` would take it for the piece of that name; sentencepiece does not. A name without such a place is
    left alone.
    """
    pairs = {p.piece[k: k + 2] for p in model.pieces if p.type in (1, 4, 5) for k in range(len(p.piece) - 1)}
    patterns = []
    if names(model, "BYTE"):
        free = next((k for k in (1, 2) if "<0x"[k - 1: k + 1] not in pairs), None)
        if free:
            patterns.append(f"{'<0x'[:free]}(?={'<0x'[free:]}[0-9A-F]{{2}}>)")
    for name in names(model, "CONTROL", "UNKNOWN"):
        free = next((k for k in range(1, len(name)) if name[k - 1: k + 1] not in pairs), None)
        if free:
            patterns.append(f"{_quoted(name[:free])}(?={_quoted(name[free:])})")
    return "|".join(patterns) or None


def _normalizer(spec: Any, suffix: bool, symbols: list[str], compose: bool) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    prepend = spec.add_dummy_prefix and not suffix
    if prepend and not spec.remove_extra_whitespaces:
        steps.append(normalizers.Prepend(SPACE))  # first: also where the map leaves nothing of the text
    if spec.precompiled_charsmap:
        steps += _mapped(spec.precompiled_charsmap, symbols, compose)
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        steps += [normalizers.Prepend(SPACE)] if prepend else []
    steps.append(normalizers.Replace(" ", SPACE))
    if spec.add_dummy_prefix and suffix:
        end = f"{SPACE}+\\z|(?<=[^{SPACE}])\\z" if spec.remove_extra_whitespaces else r"(?<=[\s\S])\z"
        steps.append(normalizers.Replace(Regex(end), SPACE))
    elif spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(f"{SPACE}+\\z"), ""))
    return normalizers.Sequence(steps)


def _mapped(charsmap: bytes, symbols: list[str], compose: bool) -> list[normalizers.Normalizer]:
    """The steps of a normalisation map. Symbols pass it unchanged, alone and with combining marks."""
    steps = [normalizers.Replace(Regex(r"\Y"), _BREAK), normalizers.Precompiled(charsmap),
             normalizers.Replace(_BREAK, "")]
    if compose:
        if symbols:
            steps.append(normalizers.Replace(Regex(rf"(?=\p{{M}})(?<={_any_of(symbols)})"), _GUARD))
        steps.append(normalizers.NFC())
        if symbols:
            steps.append(normalizers.Replace(_GUARD, ""))
    alone = normalizers.Sequence(steps)
    changed = [symbol for symbol in symbols if alone.normalize_str(symbol) != symbol]
    hidden = list(zip(changed, _PLACEHOLDERS, strict=False))
    return [*(normalizers.Replace(symbol, mark) for symbol, mark in hidden), *steps,
            *(normalizers.Replace(mark, symbol) for symbol, mark in hidden)]


def _decoder(spec: Any, suffix: bool) -> decoders.Decoder:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 0, 1) if suffix else decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _any_of(texts: list[str]) -> str:
    """A pattern for the first of `texts` that matches: give the longest first."""
    return "|".join(map(_quoted, texts))


def _quoted(text: str) -> str:
    """`text` as a pattern; a line end or a blank as a code, which `re.escape` leaves to the eye."""
    return "".join(re.escape(c) if c.isprintable() and not c.isspace() else f"\\x{{{ord(c):X}}}" for c in text)
