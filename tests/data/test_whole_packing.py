"""Packing that keeps documents whole against its definition, and duplicates."""

from __future__ import annotations

import numpy as np
import pytest
from corpus import make_documents, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from hola_megatron.data.best_fit import WholePacker, best_fit
from hola_megatron.data.duplicates import SeenTexts
from hola_megatron.data.packing import token_dtype
from hola_megatron.data.prepare import PrepareOptions, prepare
from hola_megatron.data.stream import PackedDataset, collate
from hola_megatron.data.tokenizer import load_tokenizer
from hola_megatron.errors import RecipeError


def slow_best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """The definition: the longest first, into the bin with the least room that is enough."""
    bins: list[tuple[int, int, list[int]]] = []  # (room left, when it got it, items)
    for when, item in enumerate(sorted(range(len(lengths)), key=lambda n: -lengths[n])):
        fitting = [b for b in bins if b[0] >= lengths[item]]
        chosen = min(fitting, key=lambda b: (b[0], -b[1])) if fitting else (room, 0, [])
        if fitting:
            bins.remove(chosen)
        bins.append((chosen[0] - lengths[item], when, [*chosen[2], item]))
    return sorted((sorted(items) for _, _, items in bins), key=lambda items: items[0])


@given(st.lists(st.integers(1, 33), max_size=60))
def test_best_fit_is_the_definition(lengths):
    assert best_fit(lengths, 33) == slow_best_fit(lengths, 33)


@pytest.mark.parametrize("T", [1, 2, 7, 64])
@pytest.mark.parametrize("bos", [None, 9])
@pytest.mark.parametrize("window", [1, 3, 1000])
def test_no_short_document_is_cut_and_every_token_is_predicted_once(T, bos, window):
    rng = np.random.default_rng(T)
    sizes = [*rng.integers(0, 3 * T, 100), 0, 1, T - 1, T, T + 1, 2 * T, 2 * T + 1]
    documents = [rng.integers(10, 50, size).tolist() for size in sizes]
    whole = [([] if bos is None else [bos]) + d + [8] for d in documents]
    packer = WholePacker(T, bos, 8, token_dtype(100), window)
    samples = [sample for d in documents for sample in packer.add(d)] + packer.finish()
    assert packer.tokens == sum(map(len, whole))
    pieces = []
    for sample in samples:
        assert 2 <= sample.length <= T + 1 == len(sample.tokens)
        assert sample.tokens[sample.length :].tolist() == [8] * (T + 1 - sample.length)
        cuts = [*sorted({0, *sample.starts.tolist()}), sample.length]
        pieces += [sample.tokens[a:b].tolist() for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    wanted = [d[k : k + T + 1] for d in whole for k in range(0, max(len(d) - 1, 1), T) if len(d) > 1]
    assert sorted(pieces) == sorted(wanted)
    assert packer.padding == sum(T + 1 - sample.length for sample in samples)
    # labels that count: every token of a document but its first
    batch = collate(samples, "separate")
    counted = np.sort(batch.labels.numpy()[batch.loss_mask.numpy() == 1])
    assert counted.tolist() == sorted(t for d in whole for t in d[1:])


def make(source, out, **options):
    return prepare(PrepareOptions([str(source)], str(out), "bytes", 64, shard_size=4000, **options))


def test_a_dataset_of_whole_documents(tmp_path):
    documents = make_documents(400, longest=12)
    summary = make(write_jsonl(tmp_path / "in.jsonl", documents), tmp_path / "out", packing="whole")
    data, tokenizer = PackedDataset(str(tmp_path / "out")), load_tokenizer("bytes")
    found = []
    for index in range(len(data)):
        tokens = data[index].tokens[: data[index].length].tolist()
        found += [text for text in "".join(map(chr, tokens)).split(chr(tokenizer.eos_id)) if text]
    short = [d for d in documents if len(d.encode()) <= 63]
    texts = {bytes(map(ord, text[1:])).decode(errors="replace") for text in found if text[0] == chr(tokenizer.bos_id)}
    assert set(short) <= texts
    assert data.info["padding"] == summary.padding and f"{100 * summary.padding / (65 * summary.samples):.2f} %" in \
        str(summary)
    assert data.info["packing"] == "whole"
    with pytest.raises(RecipeError, match="--keep-tail"):
        make(tmp_path / "in.jsonl", tmp_path / "tail", packing="whole", keep_tail=True)
    with pytest.raises(RecipeError, match="--packing wohle: allowed are stream, whole"):
        make(tmp_path / "in.jsonl", tmp_path / "tail", packing="wohle")


def test_duplicates_are_counted_or_left_out(tmp_path):
    documents = make_documents(300, seed=4)
    once = list(dict.fromkeys(documents))
    again = [*documents, *documents[50:80], "", documents[3]]
    source = write_jsonl(tmp_path / "in.jsonl", again)
    kept = make(source, tmp_path / "kept")
    assert (kept.documents, kept.duplicates, kept.dropped) == (331, 331 - len(once), False)
    assert "1 without text left out, " in str(kept) and "duplicates among them" in str(kept)
    left_out = make(source, tmp_path / "dropped", drop_duplicates=True)
    assert (left_out.documents, left_out.duplicates) == (len(once), 331 - len(once))
    assert "duplicates left out" in str(left_out)
    wanted = make(write_jsonl(tmp_path / "once.jsonl", once), tmp_path / "once", drop_duplicates=True)
    shards = [sorted((path.name, path.read_bytes()) for path in (tmp_path / name).glob("*.mds"))
              for name in ("dropped", "once")]
    assert wanted.duplicates == 0 and shards[0] == shards[1]


def test_seen_texts_remember_across_their_tables(monkeypatch):
    monkeypatch.setattr("hola_megatron.data.duplicates._RECENT", 7)
    texts, known, seen = [b"%d" % n for n in np.random.default_rng(0).integers(0, 60, 300)], set(), SeenTexts()
    for number, text in enumerate(texts):
        if number == 100:
            seen = SeenTexts(seen.take_new())
        assert seen.add(text) == (text in known)
        known.add(text)
    assert seen.count == 300 and len(seen.take_new()) == 200
