"""Last words and needles: worked out by hand on a tiny model, and on a stand-in that knows the answers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import export, recipe

from hola_megatron.errors import DataError, RecipeError
from hola_megatron.evaluate.last_word import last_word
from hola_megatron.evaluate.load import load
from hola_megatron.evaluate.needle import QUESTION, haystack, needle


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
        def generate(given, **_):
            number = tokenizer.decode(given[0]).partition(" is: ")[2][:7]
            said = f" {number if knows else 'no idea'}."
            return torch.cat([given, torch.tensor([list(said.encode())])], 1)

        return SimpleNamespace(device="cpu", generate=generate)

    assert str(needle(answer(True), tokenizer, 800, asked=3)) == "needle      800 tokens  3/3 found (1.00)"
    assert needle(answer(False), tokenizer, 800, asked=3).right == 0
