"""RULER, passkeys and MQAR: what a prompt holds, who finds it, and the numbers of a model worked out by hand."""

from __future__ import annotations

import collections
import importlib.util
import json
import re

import numpy as np
import pytest
import torch
from helpers import run_tool
from tiny import export, recipe

from hola_megatron.errors import DataError, RecipeError
from hola_megatron.evaluate import reader as reader_module
from hola_megatron.evaluate.load import load
from hola_megatron.evaluate.reader import ModelReader
from hola_megatron.evaluate.recall import mqar, ruler
from hola_megatron.evaluate.recall.jobs import MqarJob
from hola_megatron.evaluate.recall.passkey import ANSWER, passkey_prompts
from hola_megatron.evaluate.recall.prompts import Prompt, shares_found
from hola_megatron.evaluate.recall.ruler import ANSWERS, NEEDLES, TASKS, ruler_prompts
from hola_megatron.evaluate.recall.words import Haystack
from hola_megatron.evaluate.suite.jobs import Reading, Subject
from hola_megatron.study.far_mqar import FarMqar

MISSING = [name for name in ("lm_eval", "wonderwords") if importlib.util.find_spec(name) is None]
needs_words = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed (the extra eval)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export(tmp_path_factory.mktemp("recall") / "out", recipe("HG"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def haystack():
    return Haystack()


@needs_words
@pytest.mark.parametrize("task", TASKS)
def test_prompts_fill_their_length_and_hold_their_answers(task, loaded, haystack):
    _, tokenizer = loaded
    length = 16000 if task == "cwe" else 6000  # bytes
    found = ruler_prompts(task, tokenizer, length=length, count=4, seed=0, haystack=haystack)
    texts = [tokenizer.decode(prompt.ids[1:]) for prompt in found]
    for prompt, text in zip(found, texts, strict=True):
        assert prompt.ids[0] == 256 and 0.9 * length < len(prompt.ids) + ANSWERS[task] <= length, len(prompt.ids)
        question = text[text.rindex("\n"):]
        assert all(word in text[: -len(question)] for word in prompt.expected)
        assert not any(word in question for word in prompt.expected)
    assert found == ruler_prompts(task, tokenizer, length=length, count=4, seed=0, haystack=haystack)
    others = ruler_prompts(task, tokenizer, length=length, count=2, seed=1, haystack=haystack)
    assert len({prompt.expected for prompt in [*found, *others]}) == 6
    assert len({len(prompt.expected) for prompt in found}) == 1
    with pytest.raises(RecipeError, match=f"{task}: 300 tokens do not hold its question and an answer of"):
        ruler_prompts(task, tokenizer, length=300, count=1, seed=0, haystack=haystack)


@needs_words
@pytest.mark.parametrize(("task", "needles", "asked"), [("niah_single_1", 1, 1), ("niah_single_2", 1, 1),
                                                        ("niah_multikey_1", 4, 1), ("niah_multivalue", 4, 4),
                                                        ("niah_multiquery", 4, 4)])
def test_needles_are_those_asked_for(task, needles, asked, loaded, haystack):
    _, tokenizer = loaded
    for prompt in ruler_prompts(task, tokenizer, length=5000, count=3, seed=2, haystack=haystack):
        text = tokenizer.decode(prompt.ids)
        told = re.findall(r"One of the special magic numbers for ([\w'. -]+?) is: (\d{7})\.", text)
        query = re.search(r"(?:is|are all) the special magic numbers? for (.+?) mentioned", text[text.rindex("\n"):])[1]
        assert len(told) == needles and len(prompt.expected) == asked
        keys = query.replace(", and ", ", ").split(", ")
        assert len(set(keys)) == (4 if task == "niah_multiquery" else 1)
        assert sorted(value for name, value in told if name in keys) == sorted(prompt.expected)
        assert ("The grass is green." in text) == (not NEEDLES[task].in_text)


@needs_words
def test_variables_are_those_of_the_chain(loaded, haystack):
    _, tokenizer = loaded
    for prompt in ruler_prompts("vt", tokenizer, length=4000, count=3, seed=0, haystack=haystack):
        text = tokenizer.decode(prompt.ids).rpartition("Memorize and track")[2]
        value = re.findall(r"assigned the value (\d+)", text)[0]
        reached = set()
        for name, given in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", text):
            reached |= {name} if given == value or given in reached else set()
        assert reached == set(prompt.expected) and len(reached) == 5
        assert tokenizer.decode(prompt.ids).count("Memorize and track") == 2  # one example


@needs_words
@pytest.mark.parametrize(("length", "counts"), [(3000, (6, 1)), (16000, (30, 3))])
def test_common_words_are_the_most_common(length, counts, loaded, haystack):
    _, tokenizer = loaded
    (prompt,) = ruler_prompts("cwe", tokenizer, length=length, count=1, seed=0, haystack=haystack)
    text = tokenizer.decode(prompt.ids).rpartition("most often.\n")[2].partition("\nQuestion")[0]
    words = re.split(r" ?\b\d+\. ", text)[1:]
    found = collections.Counter(words)
    assert {word for word, _ in found.most_common(10)} == set(prompt.expected)
    assert {found[word] for word in prompt.expected} == {counts[0]}
    assert {n for word, n in found.items() if word not in prompt.expected} == {counts[1]}


@needs_words
@pytest.mark.long
def test_templates_are_the_published_ones(monkeypatch, haystack):
    """lm-evaluation-harness has them too, but for words that its tasks would download."""
    import nltk

    monkeypatch.setattr(nltk.data, "find", lambda name: name)
    from lm_eval.tasks.ruler import cwe_utils, niah_utils, vt_utils
    from lm_eval.tasks.ruler.prepare_niah import generate_input_output

    assert cwe_utils.TEMPLATE == ruler.COMMON
    theirs = vt_utils.TEMPLATE.replace("{num_v}", "{count}").rstrip()
    assert theirs == ruler.TRACKING
    for keys, values, queries, template in ((1, 1, 1, ruler.ONE), (4, 4, 4, ruler.SEVERAL), (1, 4, 1, ruler.SEVERAL)):
        text, answers, query = generate_input_output(
            30, "Noise.", type_haystack="repeat", num_needle_k=keys, type_needle_k="words", num_needle_v=values,
            type_needle_v="numbers", template=niah_utils.TEMPLATE, num_needle_q=queries)
        context = text.partition("afterwards.\n")[2].rpartition("\nWhat")[0]
        question = template.format(kind="number", context=context, query=query)
        assert question.startswith(text) and len(answers) == values * queries
        needle = ruler.NEEDLE.format(kind="number", key=query.split(", ")[0], value=answers[0])
        assert needle in context


class Knows:
    """Answers with `text(prompt)`."""

    def __init__(self, tokenizer, text):
        self.tokenizer, self.text = tokenizer, text

    def answers(self, prompts, most, ended, name=""):
        return [self.tokenizer(self.text(n), add_special_tokens=False)["input_ids"][:most]
                for n, _ in enumerate(prompts)]


def test_shares_are_of_the_words_found(loaded):
    _, tokenizer = loaded
    asked = [Prompt([1], ("1234567",)), Prompt([1], ("Alpha", "BETA", "gamma", "delta"))]
    reader = Knows(tokenizer, lambda n: (" 1234567.", " alpha, beta and Gamma")[n])
    assert shares_found(reader, tokenizer, asked, 40, "x") == [1.0, 0.75]
    assert shares_found(reader, tokenizer, asked, 8, "x") == [1.0, 0.25]


def test_a_reader_stops_where_all_is_found(loaded):
    """An answer goes on until all words are there, and not further."""
    model, tokenizer = loaded
    prompt = [256, *b"To be or not"]
    whole = ModelReader(model, tokenizer).answers([prompt], 12, lambda n, ids: False)[0]
    text = tokenizer.decode(whole[:5])
    seen = []

    class Counting(ModelReader):
        def answers(self, prompts, most, ended, name=""):
            found = super().answers(prompts, most, ended, name)
            seen.extend(found)
            return found

    assert shares_found(Counting(model, tokenizer), tokenizer, [Prompt(prompt, (text[-1],))], 12, "x") == [1.0]
    assert len(seen[0]) <= 5 and whole[: len(seen[0])] == seen[0]


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_passkeys_are_at_their_depth(depth, loaded):
    _, tokenizer = loaded
    for prompt in passkey_prompts(tokenizer, length=4000, depth=depth, count=2, seed=0):
        text = tokenizer.decode(prompt.ids[1:])
        (key,) = prompt.expected
        assert 3800 < len(prompt.ids) + ANSWER <= 4000 and text.count(key) == 2 and text.endswith("The pass key is")
        start, end = text.index("The grass" if depth else "The pass"), text.rindex("What is the pass key?")
        assert (text.index("The pass key is") - start) / (end - start) == pytest.approx(depth, abs=0.06)
    with pytest.raises(RecipeError, match="100 tokens do not hold its question"):
        passkey_prompts(tokenizer, length=100, depth=depth, count=1, seed=0)


def test_running_text_of_any_length(tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(f"Word{n} is here." for n in range(100)))
    hay = Haystack(str(tmp_path / "text.txt"))
    assert hay.sentences(7) == ["Word0 is here.", "Word1 is here.", "Word2"]
    assert len(" ".join(hay.sentences(1000)).split()) == 1000 and hay.sentences(1000)[100] == "Word0 is here."
    (tmp_path / "short.txt").write_text("Few words.")
    with pytest.raises(DataError, match="--haystack: .* has 2 words; give a text of at least 200"):
        Haystack(str(tmp_path / "short.txt"))


@pytest.mark.parametrize("kind", ["mqar", "far_mqar"])
def test_associative_recall_can_be_answered(kind):
    sample = {"mqar": mqar.mqar, "far_mqar": mqar.far_mqar}[kind]
    drawn = mqar.fixed_samples(sample, length=128, vocabulary=400, pairs=8, first=3, rows=5)
    for row, asked, answers, stored in zip(*drawn[:2], drawn.answers, drawn.stored, strict=True):
        assert len(set(asked)) == 8 and set(row[stored]) >= set(answers)
        for place, answer in zip(asked, answers, strict=True):
            before = np.flatnonzero(row[:place] == row[place])
            assert len(before) == 1 and row[before[0] + 1] == answer and row[place] < 100 <= answer < 200
        if kind == "mqar":
            assert sorted(stored) == list(range(1, 16, 2)) and asked.min() >= 16
        else:
            assert stored.max() < 64 and asked.min() >= 96
    again = mqar.fixed_samples(sample, length=128, vocabulary=400, pairs=8, first=0, rows=8)
    assert (again.tokens[3:] == drawn.tokens).all()  # sample by sample the same, however many are asked for
    with pytest.raises(RecipeError, match=r"--pairs: 8 pairs need a length that is a multiple of 4 and at least 64"):
        mqar.check(60, 8, 400)
    with pytest.raises(RecipeError, match="8 pairs need as many keys"):
        mqar.check(128, 8, 20)


def test_near_questions_come_soon():
    """By the power law half of the first questions lie within a tenth of the room; uniform ones would not."""
    drawn = mqar.fixed_samples(mqar.mqar, length=1024, vocabulary=4000, pairs=8, first=0, rows=60)
    assert np.mean(drawn.asked - 16 < 100) > 0.5
    far = mqar.fixed_samples(mqar.far_mqar, length=1024, vocabulary=4000, pairs=8, first=0, rows=60)
    assert 768 + 110 < far.asked.mean() < 768 + 146


def test_far_mqar_is_the_studys():
    """The samples on which a study's models were tested, which another order of draws would change."""
    task = FarMqar(pairs=[4], test_pairs=[8])
    ours = mqar.fixed_samples(mqar.far_mqar, length=128, vocabulary=400, pairs=8, first=2, rows=3)
    theirs = task.test(length=128, vocabulary=400, pairs=8, first=2, rows=3)
    assert (ours.tokens == theirs.tokens).all() and (ours.asked == theirs.asked).all()
    assert ours.tokens[0, :6].tolist() == [385, 24, 151, 352, 254, 233]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mqar", "far_mqar"])
def test_accuracy_by_hand(kind, folder, monkeypatch):
    """The first choice after each asked key, whole and in pieces of 20 tokens."""
    subject = Subject("x", folder, Reading(batch=2, dtype=torch.float32, device="cpu"))
    model = subject.loaded[0]
    drawn = mqar.fixed_samples({"mqar": mqar.mqar, "far_mqar": mqar.far_mqar}[kind], length=64,
                               vocabulary=model.config.vocab_size, pairs=4, first=0, rows=5)
    choice = model(torch.from_numpy(drawn.tokens)).logits.argmax(-1).numpy()
    said = np.take_along_axis(choice, drawn.asked, 1)
    for chunk in (4096, 20):
        monkeypatch.setattr(reader_module, "CHUNK", chunk)
        assert subject.reader.choices(drawn.tokens.tolist(), [sorted(row) for row in drawn.asked.tolist()]) == \
            [row[np.argsort(asked)].tolist() for row, asked in zip(said, drawn.asked, strict=True)]
    # a model that is right where ours says so
    right = drawn.tokens.copy()
    np.put_along_axis(right[:3], drawn.asked[:3] + 1, said[:3], 1)
    monkeypatch.setattr(mqar, "fixed_samples", lambda *_, **__: mqar.Questions(right, drawn.asked, drawn.stored))
    found = MqarJob(kind, 64, 4, 5, subject.reading).run(subject)
    expected = (np.take_along_axis(model(torch.from_numpy(right)).logits.argmax(-1).numpy(), drawn.asked, 1)
                == np.take_along_axis(right, drawn.asked + 1, 1)).mean()
    assert found.metrics["accuracy"].value == pytest.approx(expected) and 0.1 < expected < 0.9 and found.items == 20


@needs_words
def test_the_program(folder, tmp_path, capsys):
    out = tmp_path / "out"
    command = [str(folder), "--ruler", "1400", "--ruler-tasks", "niah_single_1,niah_single_3", "--passkey", "500",
               "620", "--depths", "3", "--far-mqar", "64", "--pairs", "4", "--samples", "2", "--out", str(out),
               "--device", "cpu"]
    done = run_tool("evaluate", command, capsys)
    assert done.code == 0, done.output
    for row in ("| niah_single_1/1400 | found | 2 | 0.000 [0.000, 0.658] |", "| passkey/620 | found | 6 |",
                "| far_mqar/64/4_pairs | accuracy | 8 |"):
        assert row in done.output
    (picture,) = out.glob("passkey-1-*.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and f"heat map: {picture}" in done.output
    report = json.loads((out / "report.json").read_text())["models"][str(folder)]
    assert [cell["depth"] for cell in report[2]["cells"]] == [0.0, 0.5, 1.0]
    assert report[1]["settings"]["haystack"] and report[0]["settings"]["haystack"] is None
    again = run_tool("evaluate", command, capsys)
    assert again.output.count("from an earlier run") == 5
    for options, said in ((["--ruler", "200"], "niah_single_1: 200 tokens do not hold its question"),
                          (["--ruler", "2000", "--ruler-tasks", "qa"], "--ruler-tasks: 'qa' is none of niah_single_1"),
                          (["--mqar", "64", "--haystack", "x"], "--haystack: applies to --ruler"),
                          (["--mqar", "64", "--pairs", "70"], "--pairs: 70 pairs need a length")):
        done = run_tool("evaluate", [str(folder), *options], capsys)
        assert done.code == 2 and said in done.output and "Traceback" not in done.output, done.output
