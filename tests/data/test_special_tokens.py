"""Which tokens begin and end documents and pad batches: by what a tokenizer's files say, not by the order of names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from corpus import run_tool

from hola_megatron.data.tokenizer import load_tokenizer
from hola_megatron.errors import DataError

TURNS = ["<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
         "<|eot_id|>"]
TEXT = "was <s>10</s> 8 <|endoftext|> <|im_end|> <eos> [EOS] <|end_of_text|> dollars"


def make(folder: Path, special: list[str], plain: list[str] = (), *, template: str | None = None,
         unmarked: list[str] = (), **files: Any) -> Path:
    """A byte-level tokenizer.json with these added tokens and these files beside it (names without .json).

    unmarked: in the vocabulary, but no added tokens. template: as a TemplateProcessing's `single`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [*special, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), *plain, *unmarked]
    form = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    form.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    form.decoder = tokenizers.decoders.ByteLevel()
    form.add_special_tokens([tokenizers.AddedToken(x, special=True, normalized=False) for x in special])
    form.add_tokens([tokenizers.AddedToken(x, special=False, normalized=False) for x in plain])
    form.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    if template:
        used = [(x, form.token_to_id(x)) for x in template.split() if x != "$A"]
        form.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=used)
    form.save(str(folder / "tokenizer.json"))
    for name, values in files.items():
        text = values if isinstance(values, str) else json.dumps(values)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


CASES: dict[str, tuple[dict[str, Any], str, str | None, str | None]] = {
    # Gemma 2: <s> and </s> are HTML's strike-through
    "gemma": ({"special": ["<pad>", "<eos>", "<bos>"], "plain": ["<s>", "</s>"],
               "tokenizer_config": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}},
              "<eos>", "<bos>", "<pad>"),
    "gemma without settings": ({"special": ["<pad>", "<eos>", "<bos>"], "plain": ["<s>", "</s>"]},
                               "<eos>", "<bos>", "<pad>"),
    "gemma by ids": ({"special": ["<pad>", "<eos>", "<bos>"], "plain": ["</s>"],
                      "generation_config": {"bos_token_id": 2, "eos_token_id": [1, 5], "pad_token_id": 0}},
                     "<eos>", "<bos>", "<pad>"),
    "llama 3": ({"special": LLAMA, "generation_config": {"bos_token_id": 0, "eos_token_id": [1, 4]},
                 "tokenizer_config": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}},
                "<|end_of_text|>", "<|begin_of_text|>", "<|reserved_special_token_0|>"),
    "llama 3 without settings": ({"special": LLAMA}, "<|end_of_text|>", "<|begin_of_text|>",
                                 "<|reserved_special_token_0|>"),
    "qwen": ({"special": ["<|endoftext|>", *TURNS],
              "tokenizer_config": {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
                                   "add_bos_token": False, "chat_template": "{{ messages }}"}},
             "<|im_end|>", None, "<|endoftext|>"),
    "qwen without settings": ({"special": ["<|endoftext|>", *TURNS],
                               "generation_config": {"eos_token_id": [2, 0], "bos_token_id": 0}},
                              "<|endoftext|>", None, None),
    "settings win over the usual name": ({"special": ["</s>", "<stop>", "<s>"],
                                          "tokenizer_config": {"eos_token": {"content": "<stop>", "lstrip": False}}},
                                         "<stop>", "<s>", None),
    "special_tokens_map": ({"special": ["</s>", "<stop>"], "special_tokens_map": {"eos_token": {"content": "<stop>"}}},
                           "<stop>", None, None),
    "config.json": ({"special": ["</s>", "<stop>"], "config": {"eos_token_id": 1, "model_type": "x"}},
                    "<stop>", None, None),
    "no bos wanted": ({"special": ["<s>", "</s>"], "tokenizer_config": {"bos_token": None}}, "</s>", None, None),
    "bos named, not added": ({"special": ["<s>", "</s>"],
                              "tokenizer_config": {"bos_token": "<s>", "add_bos_token": False}}, "</s>", None, None),
    "bos named, not added, but in the template": (
        {"special": ["<s>", "</s>"], "template": "<s> $A",
         "tokenizer_config": {"bos_token": "<s>", "add_bos_token": False}}, "</s>", "<s>", None),
    "two names for bos, one in the template": ({"special": ["<s>", "<bos>", "</s>"], "template": "<bos> $A"},
                                               "</s>", "<bos>", None),
    "one token for both": ({"special": ["<|endoftext|>"], "template": "<|endoftext|> $A",
                            "tokenizer_config": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}},
                           "<|endoftext|>", None, None),
    "roberta": ({"special": ["<s>", "<pad>", "</s>", "<unk>"], "template": "<s> $A </s>"}, "</s>", "<s>", "<pad>"),
    "named and not marked special": ({"special": ["<x>"], "plain": ["</s>"],
                                      "tokenizer_config": {"eos_token": "</s>"}}, "</s>", None, None),
    "named and no added token": ({"special": ["<x>"], "unmarked": ["<end>"],
                                  "tokenizer_config": {"eos_token": "<end>"}}, "<end>", None, None),
    "pad is eos": ({"special": ["</s>"], "tokenizer_config": {"pad_token": "</s>"}}, "</s>", None, None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_files_decide(case, tmp_path):
    """What trains, what it was loaded from, and what is exported agree; no text ends a document."""
    given, eos, bos, pad = CASES[case]
    folder = make(tmp_path / "given", **given)
    vocabulary = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [None if name is None else vocabulary.token_to_id(name) for name in (eos, bos, pad)]
    tokenizer = load_tokenizer(str(folder))
    assert [tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id] == ids
    assert load_tokenizer(str(folder / "tokenizer.json")).identity() == tokenizer.identity()
    assert not {tokenizer.eos_id, tokenizer.bos_id} & set(tokenizer.encode(TEXT))

    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"))
    assert again.identity() == tokenizer.identity() and again.pad_id == tokenizer.pad_id
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [theirs.eos_token_id, theirs.bos_token_id] == ids[:2]
    assert theirs.pad_token_id == (ids[0] if pad is None else ids[2])
    plain = tokenizer.encode("a word")
    assert theirs("a word").input_ids == ([] if bos is None else [ids[1]]) + plain  # nothing behind a prompt
    assert theirs("a word", add_special_tokens=False).input_ids == plain
    batch = theirs(["a word", "b"], padding=True)
    assert list(batch) == ["input_ids", "attention_mask"] and batch["attention_mask"][1][0] == 0  # on the left


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two that end": ({"special": ["</s>", "<|endoftext|>"]},
                     r'2 special tokens may be its eos: <\|endoftext\|>, </s>; choose one in a tokenizer_config.json '
                     r'beside the tokenizer.json: {"eos_token": "<\|endoftext\|>"}$'),
    "two in a list": ({"special": ["</s>", "<eos>"], "generation_config": {"eos_token_id": [0, 1]}},
                      "2 special tokens may be its eos"),
    "two that begin": ({"special": ["</s>", "<s>", "<bos>"]}, "2 special tokens may be its bos: <s>, <bos>; choose"),
    "two files": ({"special": ["</s>", "<eos>"], "tokenizer_config": {"eos_token": "</s>"},
                   "special_tokens_map": {"eos_token": "<eos>"}},
                  r"eos_token is named twice and differently: '</s>' \(tokenizer_config.json\), '<eos>' "
                  r"\(special_tokens_map.json\); make the two files agree"),
    "ordinary text": ({"special": ["<x>"], "plain": ["</s>"]},
                      '</s> is not marked special, .* mark it "special": true'),
    "none": ({"special": ["<x>"]}, "none of its 1 added tokens is an end of text"),
    "unknown": ({"special": ["</s>"], "tokenizer_config": {"eos_token": "<gone>"}},
                "tokenizer_config.json names '<gone>' as eos_token, which is no token of the vocabulary"),
    "no mapping": ({"special": ["</s>"], "tokenizer_config": [1]},
                   r"tokenizer_config.json: damaged \(.*; repair the file"),
    "no json": ({"special": ["</s>"], "generation_config": "{"}, "generation_config.json: damaged .*not valid JSON"),
    "a number": ({"special": ["</s>"], "special_tokens_map": {"eos_token": 7}}, "special_tokens_map.json: damaged"),
    "a bad source": ({"special": ["</s>"], "tokenizer_source": {"sha256": 1}}, "tokenizer_source.json: damaged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_ambiguous_or_damaged_is_refused_in_one_line(case, tmp_path):
    given, message = REFUSED[case]
    folder = make(tmp_path, **given)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(str(folder))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_the_choice_that_the_message_offers_works(tmp_path):
    folder = make(tmp_path / "given", ["</s>", "<|endoftext|>"])
    text = tmp_path / "text.txt"
    text.write_text("some words " * 20)
    arguments = (text, "--tokenizer", folder, "--sequence-length", 16, "--out", tmp_path / "out", "--workers", 1)
    done = run_tool(*arguments)
    assert done.returncode == 3 and "choose one in a tokenizer_config.json" in done.stderr, done.stderr
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert run_tool(*arguments).returncode == 0
    identity = json.loads((tmp_path / "out" / "dataset.json").read_text())["tokenizer"]
    assert (identity["eos_id"], identity["bos_id"]) == (1, None)


def test_files_beside_a_tokenizer_of_another_name_do_not_count(tmp_path):
    folder = make(tmp_path, ["</s>", "<eos>"], tokenizer_config={"eos_token": "<eos>"})
    (folder / "tokenizer.json").rename(folder / "other.json")
    with pytest.raises(DataError, match="2 special tokens may be its eos"):
        load_tokenizer(str(folder / "other.json"))


def test_a_changed_copy_is_another_tokenizer(tmp_path):
    """The record of where an exported tokenizer.json comes from does not vouch for another file."""
    load_tokenizer(str(make(tmp_path / "given", ["<s>", "</s>"]))).save_pretrained(tmp_path / "saved")
    before = load_tokenizer(str(tmp_path / "saved")).identity()
    form = tmp_path / "saved" / "tokenizer.json"
    form.write_text(form.read_text() + "\n")
    assert load_tokenizer(str(tmp_path / "saved")).identity() != before
