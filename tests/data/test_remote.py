"""A dataset behind a URL is what lies there now; what was cached of another preparation is never read with it."""

import json
import os
import shutil
from pathlib import Path

import pytest
from corpus import forked, make_documents, run_tool, write_jsonl

from hola_megatron.data import remote
from hola_megatron.data.prepare import PrepareOptions, prepare
from hola_megatron.data.stream import PackedDataset, verify_dataset
from hola_megatron.errors import DataError


@pytest.fixture(scope="module")
def versions(tmp_path_factory) -> dict[str, Path]:
    """Two preparations of equal sizes: only letters differ."""
    folder = tmp_path_factory.mktemp("versions")
    documents = make_documents(200, seed=5)
    for name, texts in {"old": documents, "new": [d.swapcase() for d in documents]}.items():
        source = write_jsonl(folder / f"{name}.jsonl", texts)
        prepare(PrepareOptions([str(source)], str(folder / name), "bytes", 64, shard_size=8000))
    sizes = [[path.stat().st_size for path in sorted((folder / n).glob("*.mds"))] for n in ("old", "new")]
    assert sizes[0] == sizes[1] and len(sizes[0]) > 3
    return {name: folder / name for name in ("old", "new")}


@pytest.fixture
def bucket(tmp_path) -> Path:
    return tmp_path / "bucket" / "train"


def put(version: Path, bucket: Path) -> str:
    shutil.rmtree(bucket, ignore_errors=True)
    shutil.copytree(version, bucket)
    return f"file://{bucket}"


def content(data: PackedDataset) -> list[list[int]]:
    return [data[i].tokens.tolist() for i in range(len(data))]


def test_prepared_again_under_its_url(versions, bucket, tmp_path):
    cache = tmp_path / "cache"
    url = put(versions["old"], bucket)
    old = PackedDataset(url, cache=str(cache))
    assert content(old) == content(PackedDataset(str(versions["old"]))) and old.superseded == []
    put(versions["new"], bucket)
    new, local = PackedDataset(url, cache=str(cache)), PackedDataset(str(versions["new"]))
    assert new.fingerprint == local.fingerprint != old.fingerprint
    assert content(new) == content(local)
    assert [path.name for path in new.superseded] == [old._store.folder.name], "the old cache is named"
    assert verify_dataset(url, cache=str(cache)).fingerprint == local.fingerprint
    said = run_tool("--verify", url, "--cache", cache)
    assert said.returncode == 0 and local.fingerprint in said.stdout and str(old._store.folder) in said.stdout
    put(versions["old"], bucket)
    assert content(PackedDataset(url, cache=str(cache))) == content(old), "and back"


def test_a_cache_of_an_earlier_version_of_this_project_is_not_read(versions, bucket, tmp_path):
    cache = tmp_path / "cache"
    url = put(versions["new"], bucket)
    data = PackedDataset(url, cache=str(cache))
    shutil.rmtree(data._store.folder)
    earlier = cache / data._store.folder.name.rpartition("-")[0]
    shutil.copytree(versions["old"], earlier)
    fresh = PackedDataset(url, cache=str(cache))
    assert content(fresh) == content(PackedDataset(str(versions["new"]))) and fresh.superseded == [earlier]


def test_the_remote_changes_while_a_process_reads(versions, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 30.0)  # a change is told at once, not after all attempts
    url = put(versions["old"], bucket)
    data = PackedDataset(url, cache=str(tmp_path / "cache"))
    want = content(PackedDataset(str(versions["old"])))
    assert data[0].tokens.tolist() == want[0]
    new = PackedDataset(put(versions["new"], bucket), cache=str(tmp_path / "other"))
    assert data[1].tokens.tolist() == want[1], "what is cached goes on"
    said = rf"prepared again \(fingerprint {data.fingerprint[:12]}, now {new.fingerprint[:12]}\) since this process"
    with pytest.raises(DataError, match=said):
        data[len(data) - 1]
    for shard in bucket.glob("*.mds"):
        shard.unlink()
    with pytest.raises(DataError, match=said):
        data[len(data) - 1]
    with pytest.raises(DataError, match="prepared again"):
        raise DataError(data._store.verify()[0])
    assert not list((tmp_path / "cache").rglob("*.part*"))


def test_one_of_the_two_files_is_of_another_preparation(versions, bucket, tmp_path):
    url = put(versions["old"], bucket)
    shutil.copy(versions["new"] / "index.json", bucket)
    with pytest.raises(DataError, match=r"index\.json is not the one that dataset\.json was written with"):
        PackedDataset(url, cache=str(tmp_path / "cache"))


def test_the_remote_cannot_be_reached(versions, bucket, tmp_path):
    """A cache alone says nothing of what lies at the URL; it may be given as a folder."""
    url = put(versions["old"], bucket)
    data = PackedDataset(url, cache=str(tmp_path / "cache"))
    content(data)
    shutil.rmtree(bucket)
    with pytest.raises(DataError, match=r"dataset\.json: no such file"):
        PackedDataset(url, cache=str(tmp_path / "cache"))
    assert content(PackedDataset(str(data._store.folder))) == content(data)


def test_a_damaged_index_in_the_cache_does_not_matter(versions, bucket, tmp_path):
    url, cache = put(versions["old"], bucket), str(tmp_path / "cache")
    data = PackedDataset(url, cache=cache)
    want = content(data)
    for name in ("index.json", "dataset.json"):
        (data._store.folder / name).write_bytes(b"\x00")
    assert content(PackedDataset(url, cache=cache)) == want
    assert content(PackedDataset(str(data._store.folder))) == want, "it is put right"


def _read(url: str, cache: str, out: Path) -> None:
    data = PackedDataset(url, cache=cache)
    out.mkdir(exist_ok=True)
    (out / f"{os.getpid()}").write_text(json.dumps([data.fingerprint, content(data)]))


def test_processes_that_start_before_and_after_the_change_do_not_mix(versions, bucket, tmp_path):
    cache, out = str(tmp_path / "cache"), tmp_path / "read"
    urls = {name: put(versions[name], bucket.with_name(name)) for name in versions}
    PackedDataset(urls["old"], cache=str(tmp_path / "other"))[0]  # what the library imports, before the fork
    (bucket.parent / "train").symlink_to(bucket.parent / "old")
    url = f"file://{bucket}"
    early = PackedDataset(url, cache=cache)
    running = [forked(_read, url, cache, out) for _ in range(2)]
    for process in running:
        process.join(60)
    (bucket.parent / "train").unlink()
    (bucket.parent / "train").symlink_to(bucket.parent / "new")
    running += [forked(_read, url, cache, out) for _ in range(2)]
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0] * 4
    read = [json.loads(path.read_text()) for path in out.iterdir()]
    by_fingerprint = {PackedDataset(str(v)).fingerprint: content(PackedDataset(str(v))) for v in versions.values()}
    assert sorted(f for f, _ in read) == sorted(2 * list(by_fingerprint))
    assert all(tokens == by_fingerprint[fingerprint] for fingerprint, tokens in read)
    assert content(early) == by_fingerprint[early.fingerprint]
