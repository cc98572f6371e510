"""Samples of another length than the dataset was prepared with are those that preparing it again would give."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from corpus import make_documents, rewrite, write_jsonl

from hola_megatron.data.prepare import PrepareOptions, prepare
from hola_megatron.data.recut import RecutDataset, open_dataset
from hola_megatron.data.stream import Mixture, PackedDataset, SampleOrder
from hola_megatron.errors import DataError

STORED = 64


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("files")
    return [str(write_jsonl(folder / f"{n}.jsonl", make_documents(90 + 10 * n, seed=n))) for n in range(4)]


def make(out: Path, files: list[str], length: int, **more) -> str:
    prepare(PrepareOptions(files, str(out), "bytes", length, shard_size=5000 + 8 * length, workers=1, **more))
    return str(out)


def equal(found: PackedDataset, wanted: PackedDataset) -> bool:
    """Whether all samples are those wanted, in their order."""
    pairs = [(found[n], wanted[n]) for n in range(len(found))]
    return len(found) > 0 and all(
        np.array_equal(a.tokens, b.tokens) and np.array_equal(a.starts, b.starts) and a.length == b.length
        and a.starts.dtype == b.starts.dtype and a.tokens.dtype == b.tokens.dtype for a, b in pairs)


@pytest.mark.parametrize("length", [1, 16, 63, 65, 96, 128, 640, 1000])
def test_a_stream_cut_anew_is_a_stream_prepared_anew(length, files, tmp_path):
    stored = make(tmp_path / "stored", files, STORED)
    wanted = PackedDataset(make(tmp_path / "wanted", files, length))
    found = open_dataset(stored, length)
    assert found.sequence_length == length and found.num_samples == len(found)
    assert equal(found, wanted)
    assert 0 <= (len(wanted) - len(found)) * length < STORED + length  # the stored tail is lost with its sample
    assert sum(found.shard_sizes) == len(found) and min(found.shard_sizes) > 0
    assert found.fingerprint not in (PackedDataset(stored).fingerprint, RecutDataset(stored, length + 1).fingerprint)


def test_the_same_length_is_read_as_it_is(files, tmp_path):
    stored = make(tmp_path / "stored", files, STORED)
    assert type(open_dataset(stored, STORED)) is PackedDataset


def test_parts_are_streams_of_their_own(files, tmp_path):
    stored = make(tmp_path / "stored", files, STORED, parts=3)
    wanted = PackedDataset(make(tmp_path / "wanted", files, 160, parts=3))
    found = open_dataset(stored, 160)
    # a part may have lost its last sample with the stored tail, and those after it have other numbers then
    rows = {wanted[n].tokens.tobytes() for n in range(len(wanted))}
    assert {found[n].tokens.tobytes() for n in range(len(found))} <= rows
    assert len(wanted) - 3 <= len(found) <= len(wanted)


@pytest.mark.parametrize("length", [16, 128])
def test_a_padded_tail_is_left_out(length, files, tmp_path):
    kept = make(tmp_path / "kept", files, STORED, keep_tail=True)
    assert PackedDataset(kept)[len(PackedDataset(kept)) - 1].length < STORED + 1
    found, wanted = open_dataset(kept, length), PackedDataset(make(tmp_path / "wanted", files, length))
    assert 0 <= (len(wanted) - len(found)) * length < STORED + length
    assert all(np.array_equal(found[n].tokens, wanted[n].tokens) for n in range(len(found)))


def test_shuffled_reading_takes_every_sample_once_an_epoch(files, tmp_path):
    data = open_dataset(make(tmp_path / "stored", files, STORED), 160)
    order = SampleOrder(data.shard_sizes, 5)
    assert sorted(order[g] for g in range(len(data))) == list(range(len(data)))
    assert Mixture([data], seed=5)[0].tokens.shape == (161,)


def test_what_is_no_stream_is_refused(files, tmp_path):
    whole = make(tmp_path / "whole", files, STORED, packing="whole")
    with pytest.raises(DataError, match="packed with --packing whole, and train.sequence_length is 128"):
        open_dataset(whole, 128)
    stored = make(tmp_path / "stored", files, STORED)
    with pytest.raises(DataError, match="less than one sample of train.sequence_length = 1000000"):
        open_dataset(stored, 1_000_000)
    shutil.copytree(stored, tmp_path / "mended")
    rewrite(tmp_path / "mended", lambda number, record: record["tokens"].__setitem__(0, 7) if number == 3 else None)
    with pytest.raises(DataError, match="stored sample 3 does not go on where the one before ends"):
        open_dataset(str(tmp_path / "mended"), 128)[1]


def test_the_shards_of_the_first_samples_are_verified(files, tmp_path):
    stored = Path(make(tmp_path / "stored", files, STORED))
    shards = sorted(stored.glob("*.mds"))
    data = bytearray(shards[1].read_bytes())
    data[-1] ^= 1
    shards[1].write_bytes(data)
    before = PackedDataset(str(stored)).shard_sizes[0] * STORED // 128
    open_dataset(str(stored), 128).verify_first(before)
    with pytest.raises(DataError, match=shards[1].name):
        open_dataset(str(stored), 128).verify_first(before + 1)
