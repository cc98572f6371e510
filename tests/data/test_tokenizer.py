"""Tokenizers of every kind: ids, text, identity, and the Hugging Face form."""

import json
import random
import shutil
from pathlib import Path

import pytest
import tokenizers
import transformers
from corpus import make_documents

from hola_megatron.data.tokenizer import PROBE, load_tokenizer
from hola_megatron.errors import DataError

KINDS = ["bytes", "huggingface", "gpt2", "sentencepiece-bpe", "sentencepiece-unigram"]
LOSSLESS = [kind for kind in KINDS if kind != "sentencepiece-unigram"]
TEXTS = ["", " ", "a", "  a  b\n\nc ", "x\u0000y", PROBE, *make_documents(20, seed=1)]


@pytest.fixture(params=KINDS)
def tokenizer(request, tokenizer_specs):
    return load_tokenizer(tokenizer_specs[request.param])


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)
    assert tokenizer.decode([256, 97, 0xC3, 257, 300, -1]) == "a\ufffd"


@pytest.mark.parametrize("kind", LOSSLESS)
def test_decode_undoes_encode(kind, tokenizer_specs):
    tokenizer = load_tokenizer(tokenizer_specs[kind])
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_batch_is_one_by_one(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_special_ids_never_come_from_text(tokenizer):
    ids = tokenizer.encode("a <s> b </s> c <|endoftext|> d <|bos|> e <|eos|>")
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert max(ids) < tokenizer.vocab_size and tokenizer.eos_id < tokenizer.vocab_size


def test_decode_leaves_out_special_and_unknown_ids(tokenizer):
    ids = tokenizer.encode("to be or not")
    special = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    assert tokenizer.decode([*special, *ids, tokenizer.vocab_size + 5, *special]) == "to be or not"


def test_loads_in_transformers(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert len(theirs) == tokenizer.vocab_size
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


def test_bytes_decode_alike_for_any_ids(tmp_path):
    tokenizer = load_tokenizer("bytes")
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = random.Random(0).choices(range(258), k=2000)
    assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    assert theirs("a").input_ids == [256, 97]


def test_identity_is_of_the_content_not_the_place(tokenizer_specs, tmp_path):
    identities = {kind: load_tokenizer(spec).identity() for kind, spec in tokenizer_specs.items()}
    assert len({json.dumps(identity) for identity in identities.values()}) == len(KINDS)
    assert set(identities["bytes"]) == {"kind", "vocab_size", "bos_id", "eos_id", "sha256"}
    for kind in ("huggingface", "sentencepiece-bpe"):
        copy = shutil.copy(tokenizer_specs[kind], tmp_path)
        assert load_tokenizer(str(copy)).identity() == identities[kind]


def test_saved_copy_keeps_the_identity(tokenizer_specs, tmp_path):
    unlimited = tokenizers.Tokenizer.from_file(tokenizer_specs["huggingface"])
    unlimited.no_truncation()
    unlimited.no_padding()
    unlimited.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved")).identity() == tokenizer.identity()


def test_folder_with_a_sentencepiece_model(tokenizer_specs, tmp_path):
    shutil.copy(tokenizer_specs["sentencepiece-bpe"], tmp_path / "tokenizer.model")
    assert load_tokenizer(str(tmp_path)).kind == "sentencepiece"


def _no_eos(folder: Path) -> Path:
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])).save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def _random(folder: Path) -> Path:
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "aa": 1}, merges=[("a", "a")], dropout=0.5))
    model.add_special_tokens(["<|endoftext|>"])
    model.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent", "no such file or folder"),
        (lambda folder: folder, "holds no tokenizer.json"),
        (lambda folder: _written(folder / "t.txt", b""), "unknown suffix '.txt'"),
        (lambda folder: _written(folder / "t.json", b"{}"), "not a Hugging Face tokenizer.json"),
        (lambda folder: _written(folder / "t.model", b"nothing"), "not a sentencepiece model"),
        (_random, "its model has dropout = 0.5, so it encodes one text in many ways"),
        (_no_eos, "none of its 0 added tokens is an end of text"),
    ],
)
def test_unusable(make, message, tmp_path):
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(str(make(tmp_path)))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
