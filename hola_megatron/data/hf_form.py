"""tokenizer.json texts for vocabularies that were not born as one: raw bytes and sentencepiece.

Both are built from the vocabulary itself rather than through a converter class of `transformers`,
because those classes differ between its major versions while the tokenizer.json format does not.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from hola_megatron.errors import DataError

_SPACE = "▁"


def byte_level_form(bos: str, eos: str) -> str:
    """A byte-level BPE without merges: id = byte for 0..255, then `bos`, then `eos`."""
    letters = _byte_letters()
    form = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(letters)}, merges=[]))
    form.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    form.decoder = decoders.ByteLevel()
    form.add_special_tokens([_special(bos), _special(eos)])
    form.post_processor = _leading(bos, 256)
    return form.to_str()


def sentencepiece_form(model_bytes: bytes, bos: str | None, bos_id: int | None) -> str:
    """The tokenizer.json of a serialized sentencepiece model, ids kept.

    Raises:
        DataError: protobuf, which reads the model's pieces, is not installed.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2 as proto
    except ImportError as error:
        raise DataError(
            f"a sentencepiece model in Hugging Face form needs the package protobuf ({error}): pip install protobuf"
        ) from error
    model = proto.ModelProto.FromString(model_bytes)
    kinds = proto.ModelProto.SentencePiece
    unigram = model.trainer_spec.model_type == proto.TrainerSpec.UNIGRAM
    form = Tokenizer(_unigram(model) if unigram else _bpe(model, {kinds.CONTROL, kinds.UNKNOWN, kinds.BYTE}))
    form.normalizer = _normalizer(model.normalizer_spec)
    form.decoder = _decoder(model.normalizer_spec.add_dummy_prefix)
    specials = [p.piece for p in model.pieces if p.type in (kinds.CONTROL, kinds.UNKNOWN)]
    form.add_special_tokens([_special(piece) for piece in specials])
    own = [p.piece for p in model.pieces if p.type == kinds.USER_DEFINED]
    form.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in own])
    if bos is not None and bos_id is not None:
        form.post_processor = _leading(bos, bos_id)
    return form.to_str()


def _byte_letters() -> list[str]:
    """The character by which byte-level models write each byte: itself if printable, else one from U+0100 on."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    spare = iter(sorted(letter for letter in alphabet if ord(letter) >= 256))
    return [chr(byte) if chr(byte) in alphabet else next(spare) for byte in range(256)]


def _special(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=False)


def _leading(token: str, token_id: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, token_id)]
    )


def _unigram(model: Any) -> models.Unigram:
    vocabulary = [(piece.piece, piece.score) for piece in model.pieces]
    return models.Unigram(vocabulary, model.trainer_spec.unk_id, byte_fallback=model.trainer_spec.byte_fallback)


def _bpe(model: Any, unmergeable: set[int]) -> models.BPE:
    """Sentencepiece stores pieces with scores; `tokenizers` wants the merges that lead to them, best first.

    Control, unknown and byte pieces get no merges: sentencepiece never builds them from text.
    """
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    parts = {p.piece for p in model.pieces if p.type not in unmergeable}
    ranked = sorted((-p.score, i, p.piece) for i, p in enumerate(model.pieces) if p.piece in parts and len(p.piece) > 1)
    merges = []
    for _, _, piece in ranked:
        splits = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        pairs = [(left, right) for left, right in splits if left in parts and right in parts]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    spec = model.trainer_spec
    return models.BPE(ids, merges, unk_token=spec.unk_piece, fuse_unk=True, byte_fallback=spec.byte_fallback)


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def _decoder(dummy_prefix: bool) -> decoders.Decoder:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if dummy_prefix else []))
