"""The Hugging Face form of sentencepiece models of many settings: the same ids, or refused before a dataset is made."""

from __future__ import annotations

import io
import random
from functools import cache
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers
from corpus import make_documents, run_tool
from sentencepiece import sentencepiece_model_pb2 as proto

from hola_megatron.data.probes import HARD_TEXTS
from hola_megatron.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from hola_megatron.errors import DataError

LOSSLESS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
TURN, BLANKS, DIGITS = "<|im_start|>", "▁▁▁▁", list("0123456789")
EXTRA = ["def f(x):\n        return 10 * x", "<0x41> and 0x41", "Vie\u0323\u0302t ﬁne ½ ＡＢＣ Straße",
         "a-b--c---d  e   f"]
SETTINGS: dict[str, dict[str, Any]] = {
    "symbol": {**LOSSLESS, "user_defined_symbols": [TURN]},
    "blanks": {**LOSSLESS, "user_defined_symbols": [BLANKS, "▁▁"]},
    "line end": {**LOSSLESS, "user_defined_symbols": ["\n", "\t"]},
    "line end, mapped to a blank": {"normalization_rule_name": "nmt_nfkc", "user_defined_symbols": ["\n", "½"]},
    "digits": {**LOSSLESS, "user_defined_symbols": DIGITS},
    "overlapping": {**LOSSLESS, "user_defined_symbols": ["<a>", "<a><b>", "><", "b>", "e"]},
    "symbols in a pattern": {**LOSSLESS, "user_defined_symbols": ["(?i)x", ".*", "[a-z]+", "a|b", "\\d", "^", "$"]},
    "no prefix": {**LOSSLESS, "add_dummy_prefix": False, "user_defined_symbols": [TURN]},
    "suffix": {**LOSSLESS, "treat_whitespace_as_suffix": True, "user_defined_symbols": [TURN]},
    "suffix, blanks removed": {"treat_whitespace_as_suffix": True, "normalization_rule_name": "nmt_nfkc"},
    "blanks removed": {"normalization_rule_name": "identity", "user_defined_symbols": [TURN, " "]},
    "nmt_nfkc": {"normalization_rule_name": "nmt_nfkc", "user_defined_symbols": [TURN]},
    "nmt_nfkc, lossless": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": False},
    "nfkc": {"normalization_rule_name": "nfkc", "remove_extra_whitespaces": False, "add_dummy_prefix": False},
    "nfkc_cf": {"normalization_rule_name": "nfkc_cf", "user_defined_symbols": [TURN]},
    "unknown characters": {**LOSSLESS, "byte_fallback": False, "character_coverage": 0.98,
                           "user_defined_symbols": ["<sep>"]},
    "control": {**LOSSLESS, "control_symbols": ["<ctrl>", "<mask>"], "pad_id": 3},
    "other names": {**LOSSLESS, "bos_id": -1, "eos_id": 1, "unk_id": 0, "eos_piece": "[END]"},
}


@cache
def trained(kind: str, setting: str) -> bytes:
    text = [line for document in make_documents(200, seed=3) + EXTRA * 9 for line in document.split("\n") if line]
    options = {"byte_fallback": True, "vocab_size": 460, "hard_vocab_limit": False, **SETTINGS[setting]}
    return train(text, model_type=kind, **options)


def train(text: list[str], **options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=model, minloglevel=2, **options)
    return model.getvalue()


def texts_of(model: bytes, count: int = 300) -> list[str]:
    """Random mixtures of the model's own pieces, its symbols and characters that are hard to normalise.

    Without marks in another order than Unicode's, which the form puts in order.
    """
    draw = random.Random(1)
    pieces = [p.piece.replace("▁", " ") if p.type == 1 else p.piece for p in proto.ModelProto.FromString(model).pieces
              if p.type in (1, 4)]
    symbols = [p.piece for p in proto.ModelProto.FromString(model).pieces if p.type == 4] or ["x"]
    hard = [" ", "  ", "\n", "\r\n", "\u00a0", "\u200b", "ｅ\u0301", "한", "\u1112\u1161", "ﬁ", "A\u030a", "👩‍👧",
            "<0x41>", "½", "▁", "-----", "É", "ß", "\u0000", "🙂", "1️⃣"]
    kinds = [pieces, symbols, hard]
    return ["".join(draw.choice(draw.choice(kinds)) for _ in range(draw.randint(1, 20))) for _ in range(count)]


def log_probability(model: sentencepiece.SentencePieceProcessor, ids: list[int]) -> float:
    return sum(map(model.get_score, ids))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_training_and_export_give_the_same_ids(kind, setting, tmp_path):
    model = trained(kind, setting)
    tokenizer = SentencePieceTokenizer(model, "test")
    tokenizer.save_pretrained(tmp_path)
    form = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    texts = [*HARD_TEXTS, *texts_of(model)]
    ours = tokenizer.encode_batch(texts)
    assert [e.ids for e in form.encode_batch(texts, add_special_tokens=False)] == ours
    assert theirs(texts, add_special_tokens=False).input_ids == ours
    differing = [t for t, ids in zip(texts, ours, strict=True) if ids != original.encode(t)]
    if kind == "unigram":  # of two cuts as likely, float32's rounding takes one and float64's the other
        differing = [t for t in differing if log_probability(original, tokenizer.encode(t))
                     != pytest.approx(log_probability(original, original.encode(t)), rel=1e-5)]
    assert differing == []
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert theirs("a b").input_ids == ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode("a b")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_symbols_are_tokens_of_their_own(kind, tmp_path):
    tokenizer = SentencePieceTokenizer(trained(kind, "symbol"), "test")
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.convert_tokens_to_ids(TURN) in tokenizer.encode(f"the{TURN}of")
    assert theirs.decode(tokenizer.encode(f"the {TURN} of")) == f"the {TURN} of"


def test_pad_is_a_control_symbol_or_the_unknown_piece_that_bytes_replace():
    control, spelt, none = (SentencePieceTokenizer(trained("bpe", setting), "test")
                            for setting in ("control", "symbol", "unknown characters"))
    assert (control.pad_id, spelt.pad_id, none.pad_id) == (3, 0, None)


def test_an_end_that_text_can_write_is_refused():
    text = make_documents(200, seed=3)
    model = train(text, model_type="bpe", vocab_size=340, hard_vocab_limit=False, user_defined_symbols=["</s>"])
    with pytest.raises(DataError, match="no end-of-sentence piece that is a control symbol"):
        SentencePieceTokenizer(model, "test")


def test_what_cannot_be_exported_is_refused_before_a_dataset_is_made(tmp_path):
    """A model of whole words: consecutive unknown words are one token, which no Hugging Face form can do."""
    model = tmp_path / "word.model"
    model.write_bytes(train(make_documents(300, seed=3), model_type="word", vocab_size=30, hard_vocab_limit=False))
    text = tmp_path / "text.txt"
    text.write_text("the of and to\n" * 40)
    done = run_tool(text, "--tokenizer", model, "--sequence-length", 8, "--out", tmp_path / "out")
    assert done.returncode == 3 and not (tmp_path / "out").exists()
    said = done.stderr.strip().splitlines()[-1]
    assert "no Hugging Face form of it encodes equally (" in said and f"{model}" in said
    with pytest.raises(DataError, match="could not be exported or evaluated; train the tokenizer with other options"):
        load_tokenizer(str(model)).save_pretrained(tmp_path / "export")
    assert not (tmp_path / "export").exists()
