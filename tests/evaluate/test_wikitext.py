"""WikiText in lm-evaluation-harness's convention: pages, words of the originals, rolling windows; by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import run_tool
from tiny import export, recipe

from hola_megatron.errors import DataError
from hola_megatron.evaluate.load import load
from hola_megatron.evaluate.perplexity import perplexity
from hola_megatron.evaluate.wikitext import detokenized, wikitext

RAW = (" \n = Robert = \n \n Robert is an actor , born in 1 @,@ 979 . \n \n = = Career = = \n \n He had a \" role \" ; "
       "it 's well @-@ known . \n \n = Second page = \n \n = = = Deep = = = \n Short ( very ) . \n")
PAGES = [" = Robert = \n \n Robert is an actor , born in 1 @,@ 979 . \n \n = = Career = = \n \n He had a \" role \" ; "
         "it 's well @-@ known . \n ", " = Second page = \n \n = = = Deep = = = \n Short ( very ) . \n"]
TEXTS = [" = Robert =\n\nRobert is an actor, born in 1,979.\n\n== Career ==\n\nHe had a \"role\"; it's well-known.\n",
         " = Second page =\n\n=== Deep ===\nShort (very).\n"]


def test_a_raw_file_is_pages_and_pages_stay_pages():
    found = list(wikitext([RAW]))
    assert found == list(wikitext(PAGES)) and [page.text for page in found] == TEXTS == list(map(detokenized, PAGES))
    # blanks at both ends part off an empty word each, as the task counts them
    assert [page.words for page in found] == [34, 18]
    assert [page.bytes for page in found] == [len(page) for page in PAGES]


def test_lines_are_not_taken_for_pages():
    with pytest.raises(DataError, match="text before its first title .* give the raw file"):
        list(wikitext([" = Robert = \n", " Robert is an actor . \n"]))


@torch.no_grad()
def by_hand(model, ids: list[int], window: int) -> float:
    """Each token's loss in the window that lm-eval predicts it in, one by one."""
    total = 0.0
    for n, target in enumerate(ids):
        first = n // window * window
        context = [256, *ids[:n]] if first == 0 else ids[max(min(first + window, len(ids)) - window - 1, 0): n]
        total += float(F.cross_entropy(model(torch.tensor([context])).logits[0, -1:], torch.tensor([target])))
    return total


def test_rolling_windows_by_hand(tmp_path):
    model, tokenizer = load(export(tmp_path / "out", recipe("HGA")), device="cpu")
    found = perplexity(model, tokenizer, wikitext([RAW]), window=24, rolling=True, batch=3)
    nats = sum(by_hand(model, list(text.encode()), 24) for text in TEXTS)
    assert found.nats == pytest.approx(nats, rel=1e-5) and found.predicted == found.tokens == len("".join(TEXTS))
    assert found.per_word == pytest.approx(math.exp(nats / 52), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(nats / len("".join(PAGES)) / math.log(2))
    assert "rolling windows of 24" in str(found) and "lm-eval's task wikitext" in str(found)
    raw = perplexity(model, tokenizer, [RAW], window=24)
    assert raw.per_word != pytest.approx(found.per_word, rel=0.05) and "not lm-eval's" in str(raw)


def test_the_program_says_which_convention(tmp_path, capsys):
    folder = export(tmp_path / "out", recipe("G"))
    text, numbers = tmp_path / "wiki.test.raw.txt", tmp_path / "numbers.json"
    text.write_text(RAW)
    for options, said in ((["--wikitext"], "lm-eval's task wikitext"), (["--text"], "not lm-eval's"),
                          (["--lm-eval", "--text"], "loglikelihood_rolling")):
        done = run_tool("evaluate", [str(folder), "--json", str(numbers), *options, str(text)], capsys)
        assert done.code == 0 and said in done.output and said in json.loads(numbers.read_text())["convention"]
    for options, said in ((["--wikitext", "x", "--text", "y"], "give one of --text"),
                          (["--lm-eval"], "--lm-eval: applies to"),
                          (["--wikitext", "x", "--stream"], "--stream: lm-eval reads windows")):
        done = run_tool("evaluate", [str(folder), *options], capsys)
        assert done.code == 2 and said in done.output
