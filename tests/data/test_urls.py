"""Preparation from and to URLs: fsspec's memory:// stands where s3://, gs:// and hf:// would."""

from __future__ import annotations

import gzip
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from corpus import make_documents, run_tool, write_jsonl
from kill_preparation import contents

from hola_megatron.data.prepare import PrepareOptions, prepare, uploading
from hola_megatron.data.sources import find_sources
from hola_megatron.data.urls import UrlFile
from hola_megatron.errors import DataError, RecipeError


@pytest.fixture
def storage():
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


def options(inputs: str | Path, out: str | Path, **given) -> PrepareOptions:
    return PrepareOptions([str(inputs)], str(out), "bytes", 32, shard_size=4000, **given)


def stored(system, root: str) -> dict[str, bytes]:
    return {name.removeprefix(root + "/"): system.cat_file(name) for name in system.find(root)}


def test_input_at_a_url(storage, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_jsonl(corpus / "a.jsonl", make_documents(200))
    (corpus / "b.jsonl.gz").write_bytes(gzip.compress((corpus / "a.jsonl").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.table({"text": make_documents(90)}), corpus / "c.parquet", row_group_size=20)
    (corpus / "README.md").write_text("not data")
    storage.put(str(corpus), "/bucket/corpus", recursive=True)
    storage.pipe_file("/bucket/corpus/.hidden.jsonl", b"not data")
    prepare(options(corpus, tmp_path / "here"))
    for number, url in enumerate(("memory://bucket/corpus", "memory://bucket/corpus/*[lzt]")):
        prepare(options(url, tmp_path / f"there{number}"))
        found, wanted = contents(tmp_path / f"there{number}"), contents(tmp_path / "here")
        assert {n: d for n, d in found.items() if n != "dataset.json"} == \
            {n: d for n, d in wanted.items() if n != "dataset.json"}
    with pytest.raises(DataError, match="unknown suffix '.md'"):
        find_sources(["memory://bucket/corpus/README.md"])
    with pytest.raises(DataError, match="memory://bucket/none: no such file or folder"):
        find_sources(["memory://bucket/none"])


def test_a_read_that_fails_is_tried_again(storage, monkeypatch):
    monkeypatch.setattr("hola_megatron.data.urls._FIRST_DELAY_S", 0.0)
    storage.pipe_file("/bucket/a.txt", bytes(range(200)) * 1000)
    opened, failures = type(storage).open, [1, 1, 1]

    def unreliable(self, *arguments, **more):
        if failures:
            failures.pop()
            raise ConnectionError("reset by peer")
        return opened(self, *arguments, **more)

    monkeypatch.setattr(type(storage), "open", unreliable)
    with UrlFile("memory://bucket/a.txt", 200_000, "").open() as file:
        assert file.read(7) == bytes(range(7))
        file.seek(199_990)
        assert file.read() == bytes(range(190, 200))
    failures.extend([1] * 9)
    with pytest.raises(OSError, match="a.txt: ConnectionError: reset by peer"):
        UrlFile("memory://bucket/a.txt", 200_000, "").open().read()


def test_output_at_a_url(storage, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", make_documents(400))
    prepare(options(source, tmp_path / "here", parts=3))
    for number in (1, 2):
        prepare(options(source, "memory://bucket/machines", part=(number, 3), work=str(tmp_path / "work")))
    done = run_tool("--merge", "memory://bucket/machines")
    assert done.returncode == 3 and "part 3 of 3 is missing" in done.stderr
    prepare(options(source, "memory://bucket/machines", part=(3, 3), work=str(tmp_path / "work")))
    assert run_tool("--merge", "memory://bucket/machines").returncode == 0
    summary = prepare(options(source, "memory://bucket/one", parts=3, workers=2, work=str(tmp_path / "work")))
    assert summary.out == "memory://bucket/one" and summary.documents == 400
    wanted = contents(tmp_path / "here")
    assert stored(storage, "/bucket/machines") == stored(storage, "/bucket/one") == wanted
    assert list((tmp_path / "work").iterdir()) == []


def test_an_upload_that_was_interrupted(storage, tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "in.jsonl", make_documents(400))
    given = options(source, "memory://bucket/out", part=(1, 1), work=str(tmp_path / "work"))
    prepare(given)
    wanted = stored(storage, "/bucket/out")
    shard = "part-00001-of-00001/shard.00001.mds"
    storage.rm("/bucket/out", recursive=True)
    put, seen = type(storage).put_file, []

    def fails_at_third(self, *arguments, **more):
        seen.append(arguments[0])
        if len(seen) == 3:
            raise ConnectionError("reset by peer")
        return put(self, *arguments, **more)

    monkeypatch.setattr(uploading, "_UPLOADS", 1)
    monkeypatch.setattr(type(storage), "put_file", fails_at_third)
    with pytest.raises(DataError, match="memory://bucket/out: the storage failed .ConnectionError: reset by peer"):
        prepare(given)
    made = len(list((tmp_path / "work").rglob("*.mds")))
    prepare(given)
    assert stored(storage, "/bucket/out") == wanted and made == len(wanted) - 2
    assert len(seen) == len(wanted) + 1, "what was there was not uploaded again"
    storage.rm_file(f"/bucket/out/{shard}")
    prepare(given)
    assert stored(storage, "/bucket/out") == wanted
    with pytest.raises(DataError, match="of another preparation"):
        prepare(options(source, "memory://bucket/out", part=(1, 1), work=str(tmp_path / "work"), packing="whole"))


def test_what_urls_need(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", make_documents(9))
    with pytest.raises(RecipeError, match="--out memory://b/x: needs --work, a local folder"):
        prepare(options(source, "memory://b/x"))
    with pytest.raises(RecipeError, match="unknown scheme nothing://; allowed are"):
        prepare(options("nothing://b/x", tmp_path / "out"))
    for scheme, package in (("s3", "s3fs"), ("gs", "gcsfs"), ("abfs", "adlfs")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(__import__("sys").modules, package, None)  # not installed
            with pytest.raises(RecipeError, match=f"needs the package {package}: pip install {package}"):
                prepare(options(f"{scheme}://b/x", tmp_path / "out"))
