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
from hola_megatron.evaluate.needle import (
    KEYS,
    NOISE,
    QUESTION,
    answers,
    check_lengths,
    haystack,
    needle,
    needle_documents,
)


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
    with pytest.raises(RecipeError) as error:
        check_lengths(tokenizer, [100, 5000, 10])
    assert [problem.split(", which")[0] for problem in str(error.value).splitlines()] == [
        f"--needle: {n} tokens do not hold needle and question" for n in (100, 10)]
    with pytest.raises(RecipeError, match="--needle: 100 tokens do not hold"):
        needle(None, tokenizer, 100)


def test_a_haystack_is_encoded_whole_and_never_too_long():
    """As SentencePiece, which marks the start of what it is given; from the third on repetitions cost more."""
    class Tokenizer:
        bos_token_id = None

        def __call__(self, text, **_):
            return {"input_ids": [1, *text.encode(), *[2] * 40 * max(text.count("sun is") - 2, 0)]}

    for length in (300, 700, 1700, 1701):
        ids = haystack(Tokenizer(), length, "harbor", "1234567", 0.5)
        assert ids.count(1) == 1 and 0.6 * length < len(ids) <= length


def test_answers_are_right_where_they_hold_the_number(loaded):
    _, tokenizer = loaded
    calls, places = [], []

    def answer(knows):
        def generate(given, *, attention_mask, **_):
            said = []
            assert attention_mask[:, -1].all() and (attention_mask.diff(dim=1) >= 0).all()  # padding in front
            for row, mask in zip(given, attention_mask, strict=True):
                text = tokenizer.decode(row[mask.bool()], skip_special_tokens=True)
                assert text.startswith(("The grass", "One of")) and text.endswith("text is")
                places.append(text.index("One of the special") / (len(text) - len(QUESTION)))
                said.append(list(f" {text.partition(' is: ')[2][:7] if knows else 'no idea'}.".encode()))
            calls.append(len(given))
            return torch.cat([given, torch.tensor(said)], 1)

        return SimpleNamespace(device="cpu", generate=generate)

    assert str(needle(answer(True), tokenizer, 800, samples=3)) == "needle      800 tokens  3/3 found (1.00)"
    assert calls == [1, 1, 1] and places == pytest.approx([0, 0.5, 1], abs=0.2)
    assert needle(answer(True), tokenizer, 800, samples=5, batch=2).right == 5 and calls[3:] == [2, 2, 1]
    assert needle(answer(False), tokenizer, 800, samples=3).right == 0


def test_texts_of_unequal_length_are_answered_as_alone(loaded):
    model, tokenizer = loaded
    texts = [haystack(tokenizer, length, "harbor", "1234567", 0.5) for length in (300, 420)]
    assert len(texts[0]) != len(texts[1])
    alone = [answer for ids in texts for answer in answers(model, tokenizer, [ids])]
    assert answers(model, tokenizer, texts) == alone and all(alone)


def test_what_is_asked_is_in_no_training_text(loaded):
    """Both drawn from one seed, a quarter of the numbers were."""
    _, tokenizer = loaded
    seen = []

    def generate(given, **_):
        seen.extend(re.findall(r"\d{7}", tokenizer.decode(given[0])))
        return torch.cat([given, given[:, :1]], 1)

    for length in (400, 500):
        needle(SimpleNamespace(device="cpu", generate=generate), tokenizer, length, samples=100)
    assert len(set(seen)) == 200  # and other numbers at every length
    assert not set(seen) & set(re.findall(r"\d{7}", " ".join(needle_documents(500, ()))))


def test_needle_documents_hold_what_they_ask_for():
    noise = [f"Sentence {n:x}. ".replace("1", "one") for n in range(40)]
    documents = list(needle_documents(200, noise, seed=1))
    assert documents == list(needle_documents(200, noise, seed=1)) != list(needle_documents(200, noise, seed=2))
    for n, text in enumerate(documents):
        told = dict(re.findall(r"for (\w+) is: (\d{7})\. ", text))
        asked = re.findall(re.escape(QUESTION).replace(r"\{key\}", r"(\w+)") + r" (\d{7})\.", text)
        assert {one: number for one, two, number in asked if one == two} == told and 1 <= len(told) <= 4
        assert set(told) <= set(KEYS) and len(asked) == len(told)
        assert ("Sentence a. " in text) == bool(n % 2) and (NOISE[:20] in text) != bool(n % 2)
        assert 800 <= len(text) < 6000 + 1200
    assert min(map(len, documents)) < 1500 and max(map(len, documents)) > 5500
    assert len({text[:14] for text in documents[1::2]}) > 20  # noise from other places on
    assert 50 < sum(text.index("One of the") > 500 for text in documents) < 150  # and needles at all of them


def test_the_program_that_writes_them(tmp_path, capsys):
    corpus, out = tmp_path / "corpus.txt", tmp_path / "new" / "texts.jsonl"
    corpus.write_text("a Part of a sentence, not its beginning. Here is a sentence of more than twenty letters.\n"
                      "In 1999 there was another sentence. Short. Another of them is the last one of the text.")

    def write(*options: str, target=out):
        return run_tool("needle_text", ["--documents", "6", "--out", str(target), *options], capsys)

    done = write("--noise", str(corpus))
    assert done.code == 0 and "6 texts in" in done.output and "and 2 sentences in every other text" in done.output
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert len(texts) == 6 and list(out.parent.iterdir()) == [out]
    for sentence in ("Here is a sentence of more than twenty letters", "Another of them is the last one of the text"):
        assert f"{sentence}. " in texts[1] and sentence not in texts[0]
    assert "1999" not in texts[1] and "Part of" not in texts[1] and "Short" not in texts[1]
    done = write("--noise", str(corpus), "--seed", "1", target=tmp_path / "other.jsonl")
    assert done.code == 0 and (tmp_path / "other.jsonl").read_text() != out.read_text()

    for problem, code, done in (
            ("exists; name another file or remove it", 2, write()),
            ("does not end in .jsonl", 2, write(target=tmp_path / "x.jsonl.xz")),
            ("cannot be written (File exists)", 2, write(target=corpus / "x.jsonl")),
            ("--documents: 0 is not above 0", 2, write("--documents", "0", target=tmp_path / "x.jsonl"))):
        assert done.code == code and problem in done.output and done.output.count("Error: ") == 1
    corpus.write_text("nothing here begins with a capital letter. 1999.")
    done = write("--noise", str(corpus), target=tmp_path / "x.jsonl")
    assert done.code == 3 and "DataError: --noise: no sentence in" in done.output
    assert not (tmp_path / "x.jsonl").exists()
