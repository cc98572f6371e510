"""Preparation in parts: how the input is cut, that machines and processes do not matter, joining, kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import psutil
import pyarrow
import pyarrow.parquet
import pytest
from corpus import forked, make_documents, run_tool, write_jsonl
from kill_preparation import contents
from test_kills import start, wait_for

from hola_megatron.data.documents import DocumentReader
from hola_megatron.data.prepare import PrepareOptions, merge, prepare
from hola_megatron.data.prepare.parts import make_part, tasks_of
from hola_megatron.data.prepare.splitting import split
from hola_megatron.data.shards import verify_dataset
from hola_megatron.data.sources import find_sources
from hola_megatron.data.stream import PackedDataset
from hola_megatron.data.tokenizer import load_tokenizer
from hola_megatron.errors import DataError, RecipeError


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(5):
        write_jsonl(folder / f"{number}.jsonl", make_documents(60 + 30 * number, seed=number))
    return folder


def options(corpus: Path, out: Path, **given) -> PrepareOptions:
    return PrepareOptions([str(corpus)], str(out), "bytes", 32, shard_size=4000, **given)


def documents_of(sources) -> list[str]:
    return list(DocumentReader(sources))


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 40, 200])
def test_every_line_is_in_one_part(tmp_path, parts):
    documents = ["é\r" * n for n in range(1, 120)] + ["x" * 5000] + make_documents(300, longest=9)
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    found = [documents_of(sources) for sources in split(find_sources([str(source)]), parts)]
    assert sorted(text for texts in found for text in texts) == sorted(documents)
    sizes = [sum(map(len, texts)) for texts in found]
    assert parts > 7 or max(sizes) - min(sizes) < sum(sizes) / parts / 2 + 5000


def test_every_row_is_in_one_part(tmp_path):
    documents = make_documents(500)
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "a.parquet", row_group_size=30)
    sources = find_sources([str(tmp_path)])
    found = [documents_of(part) for part in split(sources, 5)]
    assert sorted(text for texts in found for text in texts) == sorted(documents) and all(found)
    with pytest.raises(DataError, match="--parts 30: the input can be cut into 17 at most"):
        split(sources, 30)


def test_packed_files_are_not_cut_and_are_spread_by_size(tmp_path):
    sizes = [900, 100, 500, 400, 300, 200]
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.txt").write_text("x" * size)
    found = split(find_sources([str(tmp_path)]), 3)
    assert sorted(sum(source.size() for source in part) for part in found) == [700, 800, 900]
    assert all(source.whole for part in found for source in part)


def test_reading_goes_on_from_any_mark(tmp_path, corpus):
    pyarrow.parquet.write_table(pyarrow.table({"text": make_documents(50)}), corpus / "p.parquet", row_group_size=7)
    (corpus / "t.txt").write_text("\n\n".join(make_documents(20, seed=3)))
    for part in split(find_sources([str(corpus)]), 3):
        whole = list(DocumentReader(part, split_on="").marked())
        for document in whole[:: max(len(whole) // 25, 1)]:
            again = list(DocumentReader(part, split_on="", start=document.mark).marked())
            assert again == whole[len(whole) - len(again) :] and again[0] == document


def test_machines_and_processes_do_not_matter(corpus, tmp_path, capsys):
    """Three parts by one machine, by three "machines" with other paths to the input, and joined from their folders."""
    prepare(options(corpus, tmp_path / "one", parts=3, workers=2))
    expected = contents(tmp_path / "one")
    for number in (3, 1, 2):
        machine = tmp_path / f"machine{number}"
        shutil.copytree(corpus, machine / "corpus")
        prepare(options(machine / "corpus", tmp_path / "shared", part=(number, 3)))
        shutil.copytree(tmp_path / "shared" / f"part-{number:05}-of-00003", machine / f"part-{number:05}-of-00003")
    assert merge(tmp_path / "shared", []).out == str(tmp_path / "shared")
    assert contents(tmp_path / "shared") == expected
    summary = merge(tmp_path / "joined", [tmp_path / "machine1", tmp_path / "machine2/part-00002-of-00003",
                                          tmp_path / "machine3"])
    assert contents(tmp_path / "joined") == expected
    shard = "part-00001-of-00003/shard.00000.mds"
    assert (tmp_path / "joined" / shard).samefile(tmp_path / "machine1" / shard), "linked, not written again"
    assert verify_dataset(summary.out).samples == summary.samples
    assert "copied" not in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob(".*")]


def test_a_joined_dataset_holds_every_document_once(corpus, tmp_path):
    prepare(options(corpus, tmp_path / "out", parts=3, keep_tail=True))
    data = PackedDataset(str(tmp_path / "out"))
    text = load_tokenizer("bytes")
    found = []
    for index in range(len(data)):
        tokens = data[index].tokens[: data[index].length].tolist()
        # a sample begins with the last token of the one before it, but at the beginning of a part
        found += tokens if tokens[0] == text.bos_id and 0 in data[index].starts else tokens[1:]
    documents = "".join(map(chr, found)).split(chr(text.eos_id))
    wanted = [d for n in range(5) for d in make_documents(60 + 30 * n, seed=n)]
    assert sorted(bytes(map(ord, d.replace(chr(256), ""))).decode() for d in documents if d) == sorted(wanted)
    assert data.info["documents"] == len(wanted) and data.info["format_version"] == 2
    assert data.info["text_bytes"] == sum(len(d.encode()) for d in wanted)


def test_streaming_itself_reads_a_joined_dataset(corpus, tmp_path):
    prepare(options(corpus, tmp_path / "out", parts=2))
    ours = PackedDataset(str(tmp_path / "out"))
    from streaming.base import LocalDataset

    theirs = LocalDataset(local=str(tmp_path / "out"))
    assert len(theirs) == len(ours)
    assert all(theirs[i]["tokens"].tolist() == ours[i].tokens.tolist() for i in range(len(ours)))


def test_a_joined_dataset_behind_a_url(corpus, tmp_path):
    prepare(options(corpus, tmp_path / "out", parts=2))
    here = PackedDataset(str(tmp_path / "out"))
    there = PackedDataset(f"file://{tmp_path}/out", cache=str(tmp_path / "cache"))
    assert all(here[i].tokens.tolist() == there[i].tokens.tolist() for i in range(len(here)))


def test_a_part_that_is_made_is_verified(corpus, tmp_path):
    prepare(options(corpus, tmp_path / "out", part=(1, 2)))
    shard = tmp_path / "out/part-00001-of-00002/shard.00001.mds"
    before, data = shard.stat().st_ino, shard.read_bytes()
    prepare(options(corpus, tmp_path / "out", part=(1, 2)))
    assert shard.stat().st_ino == before
    shard.write_bytes(data[:-1] + b"\0")
    prepare(options(corpus, tmp_path / "out", part=(1, 2)))
    assert shard.read_bytes() == data
    with pytest.raises(DataError, match="of another preparation"):
        prepare(PrepareOptions([str(corpus)], str(tmp_path / "out"), "bytes", 64, part=(1, 2)))


def test_what_cannot_be_joined(corpus, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="holds no part"):
        merge(out, [])
    prepare(options(corpus, out, part=(1, 3)))
    prepare(options(corpus, out, part=(3, 3)))
    with pytest.raises(DataError, match="part 2 of 3 is missing; make it with --part I/3"):
        merge(out, [])
    with pytest.raises(DataError, match="its parts are not joined yet"):
        PackedDataset(str(out))
    prepare(options(corpus, tmp_path / "other", part=(2, 3), keep_tail=True))
    with pytest.raises(DataError, match="are not of one preparation"):
        merge(tmp_path / "mixed", [out, tmp_path / "other"])
    with pytest.raises(DataError, match="given twice"):
        merge(tmp_path / "mixed2", [out, out])
    prepare(options(corpus, out, part=(2, 3)))
    (out / "part-00002-of-00003/shard.00000.mds").unlink()
    with pytest.raises(DataError, match="part-00002-of-00003/shard.00000.mds is missing"):
        merge(out, [])


def test_a_dataset_of_other_parts_is_not_replaced(corpus, tmp_path):
    for number in (1, 2):
        prepare(options(corpus, tmp_path / "a", part=(number, 2)))
        prepare(options(corpus, tmp_path / "b", part=(number, 2), keep_tail=True))
    merge(tmp_path / "a", [])
    before = contents(tmp_path / "a")
    merge(tmp_path / "a", [])
    with pytest.raises(DataError, match="another part of that name"):
        merge(tmp_path / "a", [tmp_path / "b"])
    assert contents(tmp_path / "a") == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("years of work")
    with pytest.raises(DataError, match="never overwritten"):
        merge(tmp_path / "thesis", [tmp_path / "a"])


def test_options_of_parts(corpus, tmp_path):
    for given in ({"part": (0, 3)}, {"part": (4, 3)}, {"part": (1, 2), "parts": 2}, {"parts": 0}):
        with pytest.raises(RecipeError):
            prepare(options(corpus, tmp_path / "out", **given))
    with pytest.raises(RecipeError, match="not cut into parts"):
        prepare(PrepareOptions([], str(tmp_path / "out"), "bytes", 32, bundled="valid", parts=2))
    assert run_tool(corpus, "--tokenizer", "bytes", "--sequence-length", 32, "--out", tmp_path / "out", "--part",
                    "3").returncode == 2
    with pytest.raises(DataError, match="part 1 of 2: 5 tokens do not fill one sample"):
        write_jsonl(tmp_path / "short.jsonl", ["abc", "def"])
        prepare(PrepareOptions([str(tmp_path / "short.jsonl")], str(tmp_path / "out"), "bytes", 32, part=(1, 2)))


def test_an_error_in_one_part_ends_all(corpus, tmp_path):
    with (corpus / "3.jsonl").open("a") as file:
        file.write("oops\n")
    with pytest.raises(DataError, match="3.jsonl line .*: not valid JSON"):
        prepare(options(corpus, tmp_path / "out", parts=2, workers=2))
    assert not (tmp_path / "out").exists()


def test_parts_killed_in_the_middle(tmp_path):
    """The parent and its workers: nobody is left, finished parts are kept, the result is the same."""
    source = write_jsonl(tmp_path / "in.jsonl", make_documents(15_000, longest=100))
    process = start(source, tmp_path / "out", "--parts", 6, "--workers", 2)
    data = tmp_path / ".out.partial/data"
    wait_for(lambda: list(data.glob("part-*/dataset.json")))
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert psutil.wait_procs(workers, timeout=120)[1] == []
    part = next(data.glob("part-*/dataset.json")).parent
    # what a kill leaves between the end of a part and the removal of its work folder
    (data / f".{part.name}.partial/staging").mkdir(parents=True, exist_ok=True)
    made = {path: path.stat().st_ino for path in data.glob("part-*/*.mds")}
    assert made and not (tmp_path / "out").exists()
    assert start(source, tmp_path / "out", "--parts", 6, "--workers", 2).wait() == 0
    assert {path: (tmp_path / "out" / path.relative_to(data)).stat().st_ino for path in made} == made
    assert start(source, tmp_path / "expected", "--parts", 6, "--workers", 1).wait() == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "in.jsonl", "out"]


def test_two_processes_do_not_make_one_part_together(corpus, tmp_path):
    import time

    task = tasks_of(options(corpus, tmp_path / "out"), load_tokenizer("bytes"), find_sources([str(corpus)]), 2,
                    tmp_path / "out")[0]

    def slow() -> None:
        make_part(task, load_tokenizer("bytes"), lambda counts: time.sleep(60))

    other = forked(slow)
    wait_for(lambda: (tmp_path / "out/.part-00001-of-00002.partial/journal.jsonl").exists())
    done = run_tool(corpus, "--tokenizer", "bytes", "--sequence-length", 32, "--out", tmp_path / "out", "--part", "1/2")
    other.kill()
    other.join()
    assert done.returncode == 2 and f"in use by process {other.pid}" in done.stderr


def test_the_record_of_a_part(corpus, tmp_path):
    prepare(options(corpus, tmp_path / "out", part=(2, 2)))
    info = json.loads((tmp_path / "out/part-00002-of-00002/dataset.json").read_text())
    assert (info["part"]["number"], info["part"]["of"], info["format_version"]) == (2, 2, 1)
    assert str(tmp_path) not in json.dumps(info)
    ranges = [source for source in info["sources"] if "range" in source]
    assert all(len(source["sha256"]) == 64 for source in info["sources"]) and ranges
