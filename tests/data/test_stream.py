"""Reading: damage is always named, the order depends on nothing but the seed, batches mean what they say."""

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import forked, make_documents, run_tool, write_jsonl

from hola_megatron.data import remote
from hola_megatron.data.order import CYCLE, SHARDS_PER_WINDOW, SampleOrder, StreamOrder
from hola_megatron.data.packing import Sample
from hola_megatron.data.prepare import PrepareOptions, prepare
from hola_megatron.data.stream import (
    BatchLoader,
    Mixture,
    PackedDataset,
    check_tokenizer,
    collate,
    eval_batches,
    verify_dataset,
)
from hola_megatron.data.tokenizer import load_tokenizer
from hola_megatron.errors import DataError, RecipeError


@pytest.fixture
def copy(dataset, tmp_path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> list[PackedDataset]:
    """Datasets of different sizes, several shards each."""
    folder = tmp_path_factory.mktemp("three")
    found = []
    for i, count in enumerate((300, 100, 30)):
        source = write_jsonl(folder / f"{i}.jsonl", make_documents(count, seed=20 + i))
        prepare(PrepareOptions([str(source)], str(folder / f"d{i}"), "bytes", 64, shard_size=5000))
        found.append(PackedDataset(str(folder / f"d{i}")))
    return found


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


# One dataset


def test_properties(dataset):
    data = PackedDataset(str(dataset))
    assert data.sequence_length == 64 and len(data) == data.num_samples == sum(data.shard_sizes)
    assert len(data.shard_sizes) == len(list(dataset.glob("*.mds"))) > 4
    assert data.tokenizer_identity == load_tokenizer("bytes").identity()
    assert len(data.fingerprint) == 64 and data.fingerprint == PackedDataset(str(dataset)).fingerprint
    sample = data[3]
    assert (sample.tokens.dtype, sample.tokens.shape, sample.starts.dtype) == (np.int64, (65,), np.int32)
    assert sample.length == 65 and data[len(data) - 1].length < 65
    assert 0.9 < data.bytes_per_token < 1
    for index in (-1, len(data)):
        with pytest.raises(IndexError):
            data[index]


def test_shared_memory_is_never_used(dataset):
    before = set(os.listdir("/dev/shm"))
    data = PackedDataset(str(dataset))
    for i in range(len(data)):
        data[i]
    assert set(os.listdir("/dev/shm")) <= before


@pytest.mark.parametrize("position", [0, 9, 700, -1])
def test_flipped_bit(copy, position):
    flip(copy / "shard.00002.mds", position)
    data = PackedDataset(str(copy))
    assert data[0].length == 65, "other shards stay readable"
    with pytest.raises(DataError, match=r"copy: shard shard\.00002\.mds has xxh64 .* the index says .*; copy it again"):
        data[sum(data.shard_sizes[:2])]
    with pytest.raises(DataError, match=r"shard\.00002\.mds has xxh64"):
        verify_dataset(str(copy))


def test_missing_cut_and_changing_shards(copy):
    data = PackedDataset(str(copy))
    last = copy / f"shard.{len(data.shard_sizes) - 1:05}.mds"
    data[len(data) - 1]
    last.unlink()
    with pytest.raises(DataError, match="cannot be read any more"):
        data[len(data) - 1]
    cut = copy / "shard.00001.mds"
    cut.write_bytes(cut.read_bytes()[:-5])
    data = PackedDataset(str(copy))
    with pytest.raises(DataError, match=r"shard\.0000\d\.mds is missing"):
        data[len(data) - 1]
    with pytest.raises(DataError) as caught:
        verify_dataset(str(copy))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and "has" in lines[0] and "bytes, the index says" in lines[0] and "missing" in lines[1]


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def move_sample(index: dict) -> None:
    index["shards"][0]["samples"] += 1
    index["shards"][1]["samples"] -= 1


def sign_index(folder: Path) -> None:
    """Make dataset.json belong to the index as it is now."""
    index = hashlib.sha256((folder / "index.json").read_bytes()).hexdigest()
    edit(folder / "dataset.json", lambda d: d.update(index_sha256=index))


BROKEN = {
    "index gone": (lambda f: (f / "index.json").unlink(), "no index.json, so this is not a prepared dataset"),
    "record gone": (lambda f: (f / "dataset.json").unlink(), "no dataset.json, so this is not"),
    "index no json": (lambda f: (f / "index.json").write_text("{"), "index.json is damaged .not valid JSON"),
    "index no object": (lambda f: (f / "index.json").write_text("[]"), "index.json is damaged .*valid dictionary"),
    "no shards": (lambda f: (f / "index.json").write_text('{"shards": []}'), "index.json lists no shards"),
    "version": (lambda f: edit(f / "dataset.json", lambda d: d.update(format_version=9)), "format_version|reads .* 1"),
    "lacks": (
        lambda f: edit(f / "dataset.json", lambda d: d.pop("samples")),
        "dataset.json is damaged .samples: is missing",
    ),
    "counts": (lambda f: edit(f / "dataset.json", lambda d: d.update(samples=5)), "dataset.json says 5"),
    "length": (lambda f: edit(f / "dataset.json", lambda d: d.update(sequence_length=32)), "for sequence length 32"),
    "no hash": (
        lambda f: edit(f / "index.json", lambda d: d["shards"][1]["raw_data"].update(hashes={})),
        "shard 1 is not",
    ),
    "zip": (lambda f: edit(f / "index.json", lambda d: d["shards"][0].update(zip_data={"x": 1})), "shards.0.zip_data"),
    "pickle": (
        lambda f: edit(f / "index.json", lambda d: d["shards"][0].update(column_encodings=["int", "pkl", "pkl"])),
        "shard 0 is not an uncompressed MDS shard",
    ),
    "outside": (
        lambda f: edit(f / "index.json", lambda d: d["shards"][0]["raw_data"].update(basename="../x.mds")),
        "must be the name of a file",
    ),
    "sample counts": (
        lambda f: (edit(f / "index.json", move_sample), sign_index(f)), r"holds \d+ samples, the index says \d+"
    ),
    "two preparations": (
        lambda f: edit(f / "index.json", lambda d: d.update(more=1)), "index.json is not the one that dataset.json was",
    ),
    "listed twice": (
        lambda f: edit(f / "index.json", lambda d: d["shards"].append(d["shards"][0])), "two shards are one file",
    ),
    "shards no list": (lambda f: (f / "index.json").write_text('{"shards": {"a": 1}}'), "index.json is damaged"),
    "nested": (lambda f: (f / "index.json").write_text("[" * 100_000), "index.json is damaged .nested"),
    "half a sample": (
        lambda f: edit(f / "index.json", lambda d: d["shards"][0].update(samples=1.5)), "shards.0.samples",
    ),
    "name of a folder": (
        lambda f: edit(f / "index.json", lambda d: d["shards"][0]["raw_data"].update(basename="..")),
        "must be the name of a file",
    ),
    "tokens no number": (
        lambda f: edit(f / "dataset.json", lambda d: d.update(tokens="many")),
        "tokens: input should be a valid integer, found 'many'",
    ),
    "no vocabulary": (
        lambda f: edit(f / "dataset.json", lambda d: d.update(tokenizer=[])), "tokenizer: input should be"
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folder(name, copy):
    damage, message = BROKEN[name]
    damage(copy)
    with pytest.raises(DataError, match=message) as caught:
        PackedDataset(str(copy))[0]
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)


def test_no_folder_and_empty_folder(dataset, tmp_path):
    with pytest.raises(DataError, match="no such data folder"):
        PackedDataset(str(tmp_path / "absent"))
    with pytest.raises(DataError, match="the data folder is empty"):
        PackedDataset(str(tmp_path))
    with pytest.raises(DataError, match="give one of its datasets: out"):
        PackedDataset(str(dataset.parent))
    found = run_tool("--verify", tmp_path)
    assert found.returncode == 3 and found.stderr.startswith("DataError: ") and "empty" in found.stderr


def test_tokenizer_mismatch(dataset, tokenizer_specs):
    data = PackedDataset(str(dataset))
    check_tokenizer(data, load_tokenizer("bytes"))
    with pytest.raises(DataError, match="prepared with tokenizer kind=bytes .* given is kind=gpt2 vocab_size=300"):
        check_tokenizer(data, load_tokenizer(tokenizer_specs["gpt2"]))


# Remote datasets


def test_remote(dataset, three, tmp_path):
    local = PackedDataset(str(dataset))
    cache = str(tmp_path / "cache")
    cached = PackedDataset(f"file://{dataset}", cache=cache)
    PackedDataset(f"file://{three[0].path}", cache=cache)[0]  # the same file names, no collision
    assert cached.fingerprint == local.fingerprint
    assert cached[0].tokens.tolist() == local[0].tokens.tolist()
    assert len(list((tmp_path / "cache").glob("out-*/*.mds"))) == 1, "only what is read is downloaded"
    assert verify_dataset(f"file://{dataset}", cache=cache).samples == len(local)
    assert not list((tmp_path / "cache").rglob("*.part*"))
    before = sorted((tmp_path / "cache").rglob("*"))
    PackedDataset(three[1].path, cache=cache)[0]
    assert sorted((tmp_path / "cache").rglob("*")) == before, "a folder is read in place"


def test_remote_missing(copy, tmp_path):
    (copy / "shard.00000.mds").unlink()
    with pytest.raises(DataError, match=r"copy/shard\.00000\.mds: no such file"):
        PackedDataset(f"file://{copy}", cache=str(tmp_path / "cache"))[0]
    with pytest.raises(DataError, match=r"absent/dataset\.json: no such file"):
        PackedDataset(f"file://{tmp_path}/absent", cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="needs a local cache folder"):
        PackedDataset(f"file://{copy}")
    with pytest.raises(DataError, match="unknown kind of path"):
        PackedDataset("gopher://x/y", cache=str(tmp_path / "cache"))


def test_remote_damage_is_retried_then_named(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.02)
    shard = copy / "shard.00000.mds"
    flip(shard, 500)
    data = PackedDataset(f"file://{copy}", cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"shard\.00000\.mds: download failed 5 times, last: has xxh64"):
        data[0]
    assert not list((tmp_path / "cache").rglob("*.mds")) or not list((tmp_path / "cache").glob("*/*.mds"))
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.2)
    threading.Timer(0.3, flip, (shard, 500)).start()
    assert data[0].length == 65, "a passing fault is survived"


def test_left_overs_of_a_killed_download_go(dataset, tmp_path):
    cache = tmp_path / "cache"
    PackedDataset(f"file://{dataset}", cache=str(cache))
    folder = next(cache.glob("out-*"))
    (folder / ".locks").mkdir()
    left = [folder / f".shard.00000.mds.{name}" for name in ("0123.part", "4567.part.tmp")]
    for path in left:
        path.write_bytes(b"half")
    (folder / ".locks" / "shard.00000.mds").touch()  # a lock file without a living holder holds nothing
    assert PackedDataset(f"file://{dataset}", cache=str(cache))[0].length == 65
    assert not any(path.exists() for path in left)


def test_damaged_cache(dataset, tmp_path):
    PackedDataset(f"file://{dataset}", cache=str(tmp_path))[0]
    flip(next(tmp_path.glob("*/*.mds")), 500)
    with pytest.raises(DataError, match="delete it to have it downloaded again"):
        PackedDataset(f"file://{dataset}", cache=str(tmp_path))[0]


def _read_all(url: str, cache: str, folder: Path) -> None:
    data = PackedDataset(url, cache=cache)
    tokens = [data[i].tokens.tolist() for i in range(len(data))]
    (folder / str(os.getpid())).write_text(json.dumps(tokens))


def test_processes_share_a_cache(dataset, tmp_path):
    url, cache = f"file://{dataset}", tmp_path / "cache"
    PackedDataset(url, cache=str(tmp_path / "other"))[0]  # what the library imports, imported before the fork
    (tmp_path / "read").mkdir()
    running = [forked(_read_all, url, str(cache), tmp_path / "read") for _ in range(4)]
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0] * 4
    data = PackedDataset(str(dataset))
    want = [data[i].tokens.tolist() for i in range(len(data))]
    assert all(json.loads(file.read_text()) == want for file in (tmp_path / "read").iterdir())
    assert not list(tmp_path.rglob("*.part*"))


# Order


def test_order_is_a_permutation_with_locality():
    sizes = [30, 7, 50, 1, 20] * 6
    order = SampleOrder(sizes, seed=3)
    n = sum(sizes)
    epochs = [[order[e * n + i] for i in range(n)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    assert epochs[0] != epochs[1] != epochs[2]
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    for begin in range(n - 100):
        assert len(set(shard_of[epochs[0][begin : begin + 100]])) <= 2 * SHARDS_PER_WINDOW
    assert np.corrcoef(np.arange(n), epochs[0])[0, 1] < 0.5


def test_order_is_random_access_and_keyed():
    sizes = [11, 5, 8] * 5
    order = SampleOrder(sizes, seed=1)
    forward = [order[g] for g in range(300)]
    assert [SampleOrder(sizes, seed=1)[g] for g in (299, 0, 150)] == [forward[299], forward[0], forward[150]]
    assert [order[g] for g in reversed(range(300))] == forward[::-1]
    assert [SampleOrder(sizes, seed=2)[g] for g in range(300)] != forward
    assert [SampleOrder(sizes, seed=1, stream=1)[g] for g in range(300)] != forward
    windows = [[SampleOrder([1] * 40, seed=1, stream=s)[g] for g in range(SHARDS_PER_WINDOW)] for s in (0, 1)]
    assert set(windows[0]) != set(windows[1]), "the shards are shuffled for each stream too"


ORDER_OF_VERSION_1 = [4, 11, 8, 3, 1, 10, 2, 7, 9, 6, 5, 0, 6, 3]
STREAMS_OF_VERSION_1 = [(0, 1498), (1, 498), (1, 499), (0, 1499), (0, 1500), (0, 1501), (1, 500), (1, 501)]


def test_order_never_changes_between_versions():
    order = SampleOrder([4, 3, 5], seed=2**63 + 17)
    streams = StreamOrder([3, 1], seed=17, names=["a", "b"])
    assert [order[g] for g in range(14)] == ORDER_OF_VERSION_1
    assert [streams.locate(g) for g in range(1996, 2004)] == STREAMS_OF_VERSION_1


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.3, 0.2], [2, 1], [1, 1, 1], [0.9985, 0.0015], [7.0, 0.013, 3]])
def test_mixture_proportions(weights):
    streams = StreamOrder(weights, seed=5, names=["x"] * len(weights))
    assert streams.counts.sum() == CYCLE
    assert np.all(np.abs(streams.counts - CYCLE * np.array(weights) / sum(weights)) < 1)
    taken = [0] * len(weights)
    for g in range(2 * CYCLE + 137):
        if g % 97 == 0 or g % CYCLE == 0:
            assert streams.taken(g) == taken
        stream, k = streams.locate(g)
        assert k == taken[stream], "samples of a stream come one after the other"
        taken[stream] += 1


def test_bad_weights():
    for weights in ([1, 0], [1, -1], [1, float("nan")], [1, float("inf")], [1, 0.0001]):
        with pytest.raises(RecipeError, match="weight of b: "):
            StreamOrder(weights, seed=0, names=["a", "b"])


def test_mixture(three):
    mixture = Mixture(three, [5, 3, 2], seed=1, names=["a", "b", "c"])
    seen = [mixture.locate(g) for g in range(CYCLE)]
    assert mixture.samples_per_stream(CYCLE) == [500, 300, 200]
    assert mixture.tokens_per_stream(CYCLE) == [32000, 19200, 12800]
    for i, data in enumerate(three):
        mine = [index for stream, index in seen if stream == i]
        whole = len(mine) // len(data) * len(data)
        counts = np.bincount(mine[:whole], minlength=len(data))
        assert set(counts) <= {whole // len(data)}, "whole epochs read every sample equally often"
        assert mixture.epochs_per_stream(CYCLE)[i] == len(mine) / len(data)
    stream, index = seen[17]
    assert mixture[17].tokens.tolist() == three[stream][index].tokens.tolist()
    assert Mixture(three, seed=1).samples_per_stream(CYCLE) == pytest.approx(
        [CYCLE * len(d) / sum(map(len, three)) for d in three], abs=1
    )
    assert Mixture(three, seed=1).names == ["d0", "d1", "d2"]
    assert Mixture([three[0], three[0]], seed=1).names == [f"{three[0].path} (stream {n})" for n in (0, 1)]
    assert Mixture(three, [5, 3, 2], seed=9).fingerprint == mixture.fingerprint
    assert Mixture(three, [5, 2, 3], seed=1).fingerprint != mixture.fingerprint


def test_mixture_of_unlike_datasets(three, documents, tokenizer_specs, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    for name, spec, T in (("short", "bytes", 32), ("other", tokenizer_specs["gpt2"], 64)):
        prepare(PrepareOptions([str(source)], str(tmp_path / name), spec, T))
    with pytest.raises(DataError, match="sequence_length of .*short is 32, of .*d0 64"):
        Mixture([three[0], PackedDataset(str(tmp_path / "short"))], [1, 1], seed=0)
    with pytest.raises(DataError, match="tokenizer_identity of .*other"):
        Mixture([three[0], PackedDataset(str(tmp_path / "other"))], [1, 1], seed=0)
    with pytest.raises(RecipeError, match="3 datasets, 1 weights"):
        Mixture(three, [1], seed=0)


# Batches


def tokens_in_order(mixture: Mixture, size: int, b: int, m: int, steps: int, first: int = 0) -> torch.Tensor:
    """[samples, T] of `steps` steps over all ranks, put back into global order by the documented rule."""
    loaders = [
        BatchLoader(mixture, data_rank=r, data_size=size, micro_batch_size=b, micro_batches=m, first_sample=first)
        for r in range(size)
    ]
    rows = []
    for _ in range(steps):
        of_rank = [next(loader) for loader in loaders]
        rows += [of_rank[r][k].tokens for k in range(m) for r in range(size)]
    assert {loader.state()["samples"] for loader in loaders} == {first + steps * size * b * m}
    return torch.cat(rows)


def test_any_split_gives_the_same_stream(three):
    mixture = Mixture(three, [5, 3, 2], seed=4)
    want = torch.from_numpy(np.stack([mixture[g].tokens[:-1] for g in range(48)]))
    for size, b, m in ((1, 1, 8), (2, 2, 2), (4, 1, 2), (1, 8, 1), (8, 1, 1), (2, 1, 4), (1, 24, 1), (3, 4, 2)):
        got = tokens_in_order(mixture, size, b, m, 48 // (size * b * m))
        assert torch.equal(got, want)


def test_restarts_at_other_splits_give_the_same_stream(three):
    want = tokens_in_order(Mixture(three, [5, 3, 2], seed=4), 1, 1, 1, 40)
    got, samples = [], 0
    for size, b, m, steps in ((2, 2, 2, 2), (1, 4, 1, 1), (4, 1, 3, 1), (1, 1, 1, 3), (5, 1, 1, 1)):
        got.append(tokens_in_order(Mixture(three, [5, 3, 2], seed=4), size, b, m, steps, first=samples))
        samples += size * b * m * steps
    assert samples == 40 and torch.equal(torch.cat(got), want)


def test_ranks_share_nothing(three):
    split = {"data_size": 3, "micro_batch_size": 2, "micro_batches": 4}
    loaders = [BatchLoader(Mixture(three, seed=0), data_rank=r, **split) for r in range(3)]
    assert loaders[0].samples_per_step == 24
    indices = [g for loader in loaders for m in range(4) for g in loader.sample_indices(1, m)]
    assert sorted(indices) == list(range(24, 48))


def test_a_damaged_shard_stops_the_loader(copy):
    mixture = Mixture([PackedDataset(str(copy))], seed=0)
    loader = BatchLoader(mixture, data_rank=0, data_size=1, micro_batch_size=1, micro_batches=1)
    next(loader)
    for shard in copy.glob("*.mds"):
        flip(shard, -1)
    fresh = Mixture([PackedDataset(str(copy))], seed=0)
    loader = BatchLoader(fresh, data_rank=0, data_size=1, micro_batch_size=1, micro_batches=1, first_sample=1)
    with pytest.raises(DataError, match="has xxh64"):
        next(loader)
    assert loader.state() == {"samples": 1}


def slow_masks(samples: list[Sample], T: int) -> tuple[list[list[float]], list[int]]:
    """Mask and cuts of separate documents, token by token from a document number for each token."""
    mask, cuts, position = [], [], 0
    for sample in samples:
        number, numbers = 0, []
        for t in range(T + 1):
            number += t in sample.starts.tolist()
            numbers.append(number)
        mask.append([float(numbers[t] == numbers[t + 1] and t + 1 < sample.length) for t in range(T)])
        for t in range(T):
            if t == 0 or numbers[t] != numbers[t - 1]:
                cuts.append(position + t)
        position += T
    return mask, [*cuts, position]


def test_masks_and_cuts(dataset):
    data = PackedDataset(str(dataset))
    for first in range(0, len(data) - 3, 5):
        samples = [data[i] for i in (first, first + 1, len(data) - 1)]
        batch = collate(samples)
        mask, cuts = slow_masks(samples, 64)
        assert batch.loss_mask.tolist() == mask and batch.cu_seqlens.tolist() == cuts
        assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
        joined = collate(samples, "joined")
        assert joined.cu_seqlens is None
        assert joined.loss_mask.sum(1).tolist() == [s.length - 1 for s in samples]
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.float32 and batch.cu_seqlens.dtype == torch.int64
    assert batch.to("cpu").cu_seqlens is not None and joined.to("cpu").cu_seqlens is None


def test_masked_labels_are_the_document_begins(dataset):
    data = PackedDataset(str(dataset))
    batch = collate([data[i] for i in range(len(data) - 1)])
    assert set(batch.labels[batch.loss_mask == 0].tolist()) == {256}
    assert 256 not in batch.labels[batch.loss_mask == 1]


@pytest.mark.parametrize("starts", [[], [0], [1], [63], [64], [0, 2, 64], [1, 63, 64]])
def test_cuts_at_the_edges(starts):
    sample = Sample(np.arange(65), np.array(starts, np.int32), 65)
    batch = collate([sample, sample])
    mask, cuts = slow_masks([sample, sample], 64)
    assert batch.loss_mask.tolist() == mask and batch.cu_seqlens.tolist() == cuts
    assert torch.all(batch.cu_seqlens.diff() > 0)


@pytest.mark.parametrize(("size", "b"), [(1, 1), (1, 7), (3, 4), (2, 16)])
@pytest.mark.parametrize("limit", [None, 10])
def test_evaluation_sees_every_token_once(dataset, size, b, limit):
    data = PackedDataset(str(dataset))
    ranks = [
        list(eval_batches(data, data_rank=r, data_size=size, micro_batch_size=b, documents="joined", limit=limit))
        for r in range(size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert {batch.tokens.shape for batches in ranks for batch in batches} == {(b, 64)}
    counted = sum(float(batch.loss_mask.sum()) for batches in ranks for batch in batches)
    assert counted == (data.info["tokens"] - 1 if limit is None else 10 * 64)
    separate = next(eval_batches(data, data_rank=size - 1, data_size=size, micro_batch_size=b))
    assert separate.cu_seqlens[-1] == b * 64


def test_loader_arguments(three):
    with pytest.raises(RecipeError) as caught:
        BatchLoader(
            Mixture(three, seed=0), data_rank=2, data_size=2, micro_batch_size=0, micro_batches=1, documents="x"
        )
    assert len(caught.value.problems) == 3
    with pytest.raises(RecipeError, match="micro_batches 0"):
        BatchLoader(Mixture(three, seed=0), data_rank=0, data_size=1, micro_batch_size=1, micro_batches=0)
