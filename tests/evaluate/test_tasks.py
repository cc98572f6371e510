"""Last words and needles: worked out by hand on a tiny model, and on a stand-in that knows the answers."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import run_tool
from tiny import export, recipe

from hola_megatron.errors import DataError, RecipeError
from hola_megatron.evaluate.last_word import last_word
from hola_megatron.evaluate.load import load
from hola_megatron.evaluate.needle import KEYS, NOISE, QUESTION, haystack, needle, needle_documents


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(export(tmp_path_factory.mktemp("tasks") / "out", recipe("HG")), device="cpu")


@torch.no_grad()
def test_last_words_are_scored_given_all_before_them(loaded):
    model, tokenizer = loaded
    passages = ["the cat sat on the mat", "ab c", "one"]  # the last has no word before its last
    nats, right = 0.0, 0
    for text, word in ((passages[0], " mat"), (passages[1], " c")):
        ids = torch.tensor([[256, *text.encode()]])
        logs = model(ids[:, :-1]).logits[0].log_softmax(-1)[-len(word):]
        nats -= float(logs.gather(1, ids[0, -len(word):, None]).sum())
        right += bool((logs.argmax(-1) == ids[0, -len(word):]).all())
    for batch in (1, 2):
        found = last_word(model, tokenizer, passages, batch=batch)
        assert (found.passages, found.found) == (2, right) and found.nats == pytest.approx(nats, rel=1e-4)
    with pytest.raises(DataError, match="two or more words"):
        last_word(model, tokenizer, ["one", " "])


def test_words_count_as_found_when_every_token_is_the_first_choice(loaded):
    _, tokenizer = loaded

    def reader(said: dict[int, int]):
        """A model that knows what comes next, but says said[token] where it should say `token`."""
        def body(tokens, **_):
            following = torch.roll(tokens, -1, 1)
            for token, other in said.items():
                following = torch.where(following == token, other, following)
            return [torch.nn.functional.one_hot(following, 300) * 50.0]

        return SimpleNamespace(device="cpu", model=body, lm_head=lambda hidden: hidden)

    passages = ["a longer passage, it ends", "ab c"]
    assert last_word(reader({}), tokenizer, passages).accuracy == 1.0
    assert last_word(reader({ord("d"): ord("t")}), tokenizer, passages).accuracy == 0.5  # "ents"
    assert last_word(reader({ord("a"): ord("t")}), tokenizer, passages).accuracy == 1.0  # not in a last word


def test_a_haystack_has_its_length_and_its_needle_at_its_depth(loaded):
    _, tokenizer = loaded
    question = QUESTION.format(key="harbor")
    for length, depth in ((1000, 0.0), (1000, 0.5), (3000, 1.0)):
        ids = haystack(tokenizer, length, "harbor", "1234567", depth)
        text = tokenizer.decode(ids[1:])
        assert length - 100 < len(ids) <= length and ids[0] == 256
        assert text.endswith(question) and text.count("1234567") == 1
        place = text.index("One of the special") / (len(text) - len(question))
        assert place == pytest.approx(depth, abs=0.12)
    with pytest.raises(RecipeError, match="--needle: 100 tokens do not hold needle and question"):
        haystack(tokenizer, 100, "harbor", "1234567", 0.5)


def test_answers_are_right_where_they_hold_the_number(loaded):
    _, tokenizer = loaded

    def answer(knows):
        def generate(given, *, attention_mask, **_):
            said = []
            for row, mask in zip(given, attention_mask, strict=True):
                text = tokenizer.decode(row[mask.bool()], skip_special_tokens=True)
                assert text.startswith(("The grass", "One of")) and text.endswith("text is")
                said.append(list(f" {text.partition(' is: ')[2][:7] if knows else 'no idea'}.".encode()))
            return torch.cat([given, torch.tensor(said)], 1)

        return SimpleNamespace(device="cpu", generate=generate)

    assert str(needle(answer(True), tokenizer, 800, asked=3)) == "needle      800 tokens  3/3 found (1.00)"
    assert needle(answer(True), tokenizer, 800, asked=5, batch=2).right == 5
    assert needle(answer(False), tokenizer, 800, asked=3).right == 0


def test_needle_documents_hold_what_they_ask_for():
    noise = [f"Sentence {word}. " for word in ("one", "two", "three")]
    documents = list(needle_documents(200, noise, seed=1))
    assert documents == list(needle_documents(200, noise, seed=1)) != list(needle_documents(200, noise, seed=2))
    for n, text in enumerate(documents):
        told = dict(re.findall(r"for (\w+) is: (\d{7})\. ", text))
        asked = re.findall(re.escape(QUESTION).replace(r"\{key\}", r"(\w+)") + r" (\d{7})\.", text)
        assert {one: number for one, two, number in asked if one == two} == told and 1 <= len(told) <= 4
        assert set(told) <= set(KEYS) and len(asked) == len(told)
        assert ("Sentence two. " in text) == bool(n % 2) and (NOISE[:20] in text) != bool(n % 2)
        assert 800 <= len(text) < 8000 + 1200
    assert min(map(len, documents)) < 1500 and max(map(len, documents)) > 6000


def test_the_program_that_writes_them(tmp_path, capsys):
    corpus, out = tmp_path / "corpus.txt", tmp_path / "texts.jsonl"
    corpus.write_text("Here is a sentence of more than twenty letters. In 1999 there was another sentence. Short. ")
    command = ["--documents", "4", "--noise", str(corpus), "--out", str(out)]
    done = run_tool("needle_text", command, capsys)
    assert done.code == 0 and "4 texts with 1 sentences of noise" in done.output
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert len(texts) == 4 and "Here is a sentence of more than twenty letters. " in texts[1] and "1999" not in texts[1]
    done = run_tool("needle_text", command, capsys)
    assert done.code == 2 and "exists; name another file or remove it" in done.output
    done = run_tool("needle_text", ["--documents", "0", "--out", str(tmp_path / "x")], capsys)
    assert done.code == 2 and "--documents: 0 is not above 0" in done.output
