"""What is decoded is what was verified, and a sample that a model cannot take is an error and never trained on."""

import mmap
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from corpus import rewrite, run_tool
from helpers import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hola_megatron.data.shard_file import BLOCK_BYTES, ShardFile
from hola_megatron.data.stream import BatchLoader, Mixture, PackedDataset, eval_batches, verify_dataset
from hola_megatron.errors import DataError


@pytest.fixture
def copy(dataset, tmp_path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def starts(*positions: int) -> dict[str, bytes]:
    return {"starts": np.array(positions, "<i4").tobytes()}


def set_token(place: int, value: int) -> dict[str, object]:
    return {"token": (place, value)}


# T = 64: 65 tokens of a vocabulary of 258, starts 0 .. length - 1
BAD = {
    "id at the vocabulary": (set_token(5, 258), "holds token id 258, the tokenizer's vocabulary is 0 to 257"),
    "id far above": (set_token(0, 65535), "holds token id 65535"),
    "last id": (set_token(64, 60000), "holds token id 60000"),
    "starts doubled": (starts(3, 3), "document starts that do not ascend within 0 to 64"),
    "starts descending": (starts(9, 3), "document starts that do not ascend"),
    "start negative": (starts(-1, 3), "document starts that do not ascend"),
    "start behind the end": (starts(3, 65), "document starts that do not ascend"),
    "start far behind": (starts(2**31 - 1), "document starts that do not ascend"),
    "half a start": ({"starts": b"\x01\x00\x00"}, "document starts that do not ascend"),
    "start in the padding": ({**starts(3, 40), "length": 40}, "document starts that do not ascend within 0 to 39"),
    "length too large": ({"length": 66}, "has length 66, allowed are 2 to 65"),
    "length negative": ({"length": -1}, "has length -1"),
    "nothing to predict": ({"length": 1, "starts": b""}, "has length 1"),
}


def spoil(change: dict[str, object]):
    def apply(number: int, record: dict) -> None:
        if number == 7:
            record.update({k: v for k, v in change.items() if k != "token"})
            if "token" in change:
                place, value = change["token"]
                record["tokens"][place] = value
    return apply


@pytest.mark.parametrize("name", BAD)
def test_a_bad_sample_is_named_wherever_it_is_read(name, copy):
    change, said = BAD[name]
    rewrite(copy, spoil(change))
    data = PackedDataset(str(copy))
    assert data[6].length == 65 and data[8].length == 65
    loader = BatchLoader(Mixture([data], seed=0), data_rank=0, data_size=1, micro_batch_size=1, micro_batches=len(data))
    for read in (lambda: data[7], lambda: next(loader),
                 lambda: list(eval_batches(data, data_rank=0, data_size=1, micro_batch_size=4))):
        with pytest.raises(DataError, match=said) as caught:
            read()
        assert "copy: sample 7 of shard shard.00000.mds" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match=said):
        verify_dataset(str(copy))


def test_verify_says_it_on_the_command_line(copy):
    rewrite(copy, spoil(set_token(5, 300)))
    found = run_tool("--verify", copy)
    assert found.returncode == 3 and len(found.stderr.splitlines()) == 1 and "token id 300" in found.stderr


def test_a_rewritten_dataset_without_a_change_is_fine(copy, dataset):
    rewrite(copy, lambda number, record: None)
    before, after = PackedDataset(str(dataset)), PackedDataset(str(copy))
    assert len(after) == len(before)
    assert all(after[i].tokens.tolist() == before[i].tokens.tolist() for i in range(len(before)))
    assert verify_dataset(str(copy)).samples == len(after)


# A file that changes after it was verified


def in_place(path: Path, position: int, data: bytes) -> None:
    """Overwrite, with the times that the file had."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def through_a_map(path: Path, position: int, data: bytes) -> None:
    """Overwrite through memory, which changes no time until it is written back."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[position : position + len(data)] = data


def replaced(path: Path, position: int, data: bytes) -> None:
    """Another file of the same size under the same name."""
    content = bytearray(path.read_bytes())
    content[position : position + len(data)] = data
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("change", [in_place, through_a_map, replaced])
@pytest.mark.parametrize("place", ["tokens", "offsets"])
def test_a_change_after_the_first_read_is_never_decoded(change, place, copy):
    data = PackedDataset(str(copy))
    data[0]
    shard = copy / "shard.00000.mds"
    begin = int.from_bytes(shard.read_bytes()[4:8], "little")
    change(shard, begin + 40 if place == "tokens" else 8, b"\x07\x00")
    with pytest.raises(DataError, match=r"shard shard\.00000\.mds has changed since this process verified it"):
        data[1]


def test_every_block_of_a_large_shard_is_covered(tmp_path):
    """Any byte of a file of several blocks, at their edges too."""
    from hola_megatron.data.prepare import PrepareOptions, prepare

    (tmp_path / "in.txt").write_text("many words " * 40_000)
    prepare(PrepareOptions([str(tmp_path / "in.txt")], str(tmp_path / "d"), "bytes", 4096))
    path = tmp_path / "d" / "shard.00000.mds"
    data = PackedDataset(str(tmp_path / "d"))
    assert path.stat().st_size > 5 * BLOCK_BYTES and len(data.shard_sizes) == 1
    want = [data[i].tokens.tolist() for i in range(len(data))]
    for position in (BLOCK_BYTES - 1, BLOCK_BYTES, 3 * BLOCK_BYTES + 7, path.stat().st_size - 1):
        before = path.read_bytes()
        in_place(path, position, bytes([before[position] ^ 1]))
        failed = 0
        for i, tokens in enumerate(want):
            try:
                assert data[i].tokens.tolist() == tokens
            except DataError:
                failed += 1
        assert failed
        in_place(path, position, before[position : position + 1])
    assert [data[i].tokens.tolist() for i in range(len(data))] == want


def test_a_file_that_is_touched_or_copied_back_is_read_on(copy):
    data = PackedDataset(str(copy))
    want = data[0].tokens.tolist()
    shard = copy / "shard.00000.mds"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(DataError, match="cannot be read any more"):
        data[0]
    shard.write_bytes(content)
    os.utime(shard)
    assert data[0].tokens.tolist() == want


@pytest.mark.parametrize("damage", ["grows", "empty", "garbage", "offsets", "folder", "unreadable table"])
def test_any_bytes_with_a_hash_that_is_right(damage, copy):
    """A file that is as the index says, and still no shard: said in one line."""
    path = copy / "shard.00000.mds"
    entry = PackedDataset(str(copy))._store._shards[0]
    content = bytearray(path.read_bytes())
    if damage == "grows":
        content += b"more"
    elif damage == "empty":
        content = bytearray()
    elif damage == "garbage":
        content = bytearray(os.urandom(len(content)))
    elif damage == "offsets":
        content[8:12], content[12:16] = content[12:16], content[8:12]
    elif damage == "unreadable table":
        content[4:8] = b"\xff\xff\xff\xff"
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes(content)
    import xxhash

    entry["raw_data"] |= {"bytes": len(content), "hashes": {"xxh64": xxhash.xxh64(bytes(content)).hexdigest()}}
    with pytest.raises(Exception, match="holds|has|cannot be read") as caught:
        ShardFile(path, entry)
    assert type(caught.value).__name__ == "ShardProblem" and "\n" not in str(caught.value)


@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["index.json", "dataset.json", "shard.00000.mds", "shard.00003.mds"]),
       st.sampled_from(["set", "cut", "insert", "repeat"]), st.floats(0, 1), st.binary(min_size=1, max_size=9))
def test_any_bytes_in_any_file_give_the_same_samples_or_one_line(dataset, tmp_path, name, how, where, data):
    copy = tmp_path / "any"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(dataset, copy)
    before = (copy / name).read_bytes()
    at = int(where * len(before))
    after = {"set": before[:at] + data + before[at + len(data):], "cut": before[:at],
             "insert": before[:at] + data + before[at:], "repeat": before[:at] + before[at // 2:]}[how]
    (copy / name).write_bytes(after)
    original = PackedDataset(str(dataset))
    try:
        found = PackedDataset(str(copy))
        samples = [found[i] for i in range(len(found))]
    except DataError as error:
        assert "\n" not in str(error) and str(copy) in str(error)
        return
    assert len(samples) == len(original)
    for i, sample in enumerate(samples):
        assert sample.tokens.tolist() == original[i].tokens.tolist() and sample.length == original[i].length
