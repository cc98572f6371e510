"""Real tokenizers trained on the spot, and a small real dataset."""

import io
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from corpus import make_documents, write_jsonl

from hola_megatron.data.prepare import PrepareOptions, prepare


@pytest.fixture(scope="session")
def tokenizer_specs(tmp_path_factory) -> dict[str, str]:
    """One tokenizer of each kind, by name."""
    folder = tmp_path_factory.mktemp("tokenizers")
    text = make_documents(300, seed=7)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    bpe.train_from_iterator(text, trainer)
    bpe.enable_truncation(8)  # of whoever saved it; must not cut documents
    bpe.enable_padding(length=8)
    bpe.save(str(folder / "tokenizer.json"))
    gpt2 = tokenizers.ByteLevelBPETokenizer()
    gpt2.train_from_iterator(text, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    (folder / "gpt2").mkdir()
    gpt2.save_model(str(folder / "gpt2"))
    specs = {"bytes": "bytes", "huggingface": str(folder / "tokenizer.json"), "gpt2": str(folder / "gpt2")}
    for kind in ("bpe", "unigram"):
        specs[f"sentencepiece-{kind}"] = str(_train_sentencepiece(folder / f"{kind}.model", kind, text))
    return specs


def _train_sentencepiece(path: Path, kind: str, text: list[str]) -> Path:
    model = io.BytesIO()
    # BPE lossless as in language models; unigram with the default normaliser, which is the harder one to carry over.
    lossless = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False} if kind == "bpe" else {}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, model_type=kind, vocab_size=340, hard_vocab_limit=False,
        byte_fallback=True, minloglevel=2, **lossless,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return make_documents(400)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, documents) -> Path:
    """A bytes dataset of sequence length 64 in about ten shards, tail kept. Read only."""
    folder = tmp_path_factory.mktemp("dataset")
    source = write_jsonl(folder / "in.jsonl", documents)
    prepare(PrepareOptions([str(source)], str(folder / "out"), "bytes", 64, shard_size=16_000, keep_tail=True))
    return folder / "out"
