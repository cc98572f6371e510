"""Perplexity under both policies against numbers worked out by hand, and the program around it."""

from __future__ import annotations

import json
import lzma
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import run_tool
from tiny import export, recipe

from hola_megatron.errors import CheckpointError, DataError
from hola_megatron.evaluate import perplexity as module
from hola_megatron.evaluate.load import exported, greedy_sample, load
from hola_megatron.evaluate.perplexity import perplexity
from hola_megatron.hf.convert import from_hf

DOCUMENTS = ["Ein Wort, ein Satz: aus Chiffren steigen\nerkanntes Leben, jäher Sinn.", "To be, or not to be", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export(tmp_path_factory.mktemp("evaluate") / "out", recipe("HGA"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder, device="cpu")


@torch.no_grad()
def by_hand(model, pieces: list[list[int]]) -> float:
    """Summed loss of pieces, each read alone after bos."""
    total = 0.0
    for piece in pieces:
        row = torch.tensor([[256, *piece]])
        total += float(F.cross_entropy(model(row[:, :-1]).logits[0], row[0, 1:], reduction="sum"))
    return total


def test_windows_start_with_an_empty_memory(loaded):
    model, tokenizer = loaded
    ids = [list(text.encode()) for text in DOCUMENTS]
    for batch in (1, 3, 8):
        found = perplexity(model, tokenizer, DOCUMENTS, window=20, batch=batch)
        pieces = [row[i: i + 20] for row in ids for i in range(0, len(row), 20)]
        assert found.nats == pytest.approx(by_hand(model, pieces), rel=1e-5)
        assert found.predicted == found.tokens == found.bytes == sum(map(len, ids))
    assert (found.words, found.documents) == (18, 3) and "windows of 20 tokens" in found.policy
    assert found.per_token == pytest.approx(math.exp(found.nats / found.tokens))
    assert found.per_word == pytest.approx(math.exp(found.nats / 18))
    assert found.bits_per_byte == pytest.approx(found.nats / found.bytes / math.log(2))


def test_a_stream_carries_its_memory_through_each_document(loaded, monkeypatch):
    model, tokenizer = loaded
    whole = by_hand(model, [list(text.encode()) for text in DOCUMENTS])
    for chunk in (7, 2048):
        monkeypatch.setattr(module, "STREAM_CHUNK", chunk)
        found = perplexity(model, tokenizer, DOCUMENTS, window=None)
        assert found.nats == pytest.approx(whole, rel=1e-5) and found.predicted == found.bytes
    assert "stream" in found.policy


def test_without_bos_first_tokens_are_not_predicted(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(module, "LOGIT_ROWS", 5)
    monkeypatch.setattr(tokenizer, "_bos_token", None, raising=False)
    monkeypatch.setitem(getattr(tokenizer, "_special_tokens_map", {}), "bos_token", None)
    if tokenizer.bos_token_id is not None:
        pytest.skip("this transformers keeps bos elsewhere")
    found = perplexity(model, tokenizer, DOCUMENTS[:2], window=20)
    windows = sum(-(-len(text.encode()) // 20) for text in DOCUMENTS[:2])
    assert found.predicted == found.tokens - windows and "no bos" in found.policy
    with pytest.raises(DataError, match="no token to predict"):
        perplexity(model, tokenizer, ["x"], window=20)


def test_a_checkpoint_is_evaluated_as_its_export(folder, loaded, tmp_path):
    from_hf(folder, tmp_path / "run")
    expected = perplexity(*loaded, DOCUMENTS, window=20)
    with exported(tmp_path / "run") as scratch:
        assert perplexity(*load(scratch, device="cpu"), DOCUMENTS, window=20).nats == pytest.approx(expected.nats)
    assert not scratch.exists()
    assert greedy_sample(*loaded, "To", 3).startswith("To")
    with pytest.raises(CheckpointError, match="no such folder"), exported(tmp_path / "nothing"):
        pass
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a PEFT adapter"), exported(tmp_path / "adapter"):
        pass


def test_a_foreign_tokenizer_is_refused(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    form = json.loads((tmp_path / "tokenizer.json").read_text())
    form["added_tokens"].append(form["added_tokens"][-1] | {"id": 300, "content": "<more>"})
    for n in range(258, 300):
        form["added_tokens"].insert(-1, form["added_tokens"][-1] | {"id": n, "content": f"<{n}>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(form))
    with pytest.raises(DataError, match="its tokenizer has 301 tokens, the model 264"):
        load(tmp_path, device="cpu")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="holds no usable tokenizer"):
        load(tmp_path, device="cpu")


@pytest.mark.parametrize("device", ["banana", "cpu:x", "meta", "cuda:99", ""])
def test_a_device_that_is_not_there_is_one_line(device, folder, capsys):
    done = run_tool("evaluate", [str(folder), "--bundled", "valid", "--device", device], capsys)
    assert done.code == 2 and len(done.output.splitlines()) == 1, done
    assert done.output.startswith(f"RecipeError: --device: {device!r} cannot be used here")


def test_the_program(folder, tmp_path, capsys):
    text = tmp_path / "text.txt.xz"
    text.write_bytes(lzma.compress("\n".join(DOCUMENTS[:2]).encode()))
    numbers = tmp_path / "numbers.json"
    done = run_tool("evaluate", [str(folder), "--text", str(text), "--prompt", "To be", "--json", str(numbers),
                                 "--last-word", str(text), "--needle", "300", "--needle-texts", "3", "--batch", "2"],
                    capsys)
    assert done.code == 0, done.output
    assert "last word            1 passages, accuracy" in done.output and "needle      300 tokens  0/3" in done.output
    assert "windows of 64 tokens" in done.output and "greedy sample  " in done.output
    kept = json.loads(numbers.read_text())
    assert kept["perplexity_per_token"] > 1 and kept["needle"] == {"300": 0} and kept["needle_texts"] == 3
    done = run_tool("evaluate", [str(folder), "--text", str(text), "--needle", "300", "100", "20"], capsys)
    assert done.code == 2 and done.output.count("RecipeError: --needle: ") == 2 and "perplexity" not in done.output
    done = run_tool("evaluate", [str(folder), "--stream", "--window", "5"], capsys)
    assert done.code == 2 and done.output.count("RecipeError: ") == 2
    done = run_tool("evaluate", [str(tmp_path / "none"), "--text", str(text)], capsys)
    assert done.code == 2 and "no such folder; give an exported model" in done.output
