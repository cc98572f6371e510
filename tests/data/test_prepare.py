"""Preparation: packing against a slow definition, every input form, every error, killed runs."""

import functools
import gzip
import json
import lzma
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from corpus import forked, make_documents, run_tool, start_tool, write_jsonl

from hola_megatron.data.documents import DocumentReader
from hola_megatron.data.packing import Packer, token_dtype
from hola_megatron.data.prepare import PrepareOptions, prepare
from hola_megatron.data.sources import BUNDLED, bundled_source
from hola_megatron.data.stream import PackedDataset
from hola_megatron.data.tokenizer import load_tokenizer
from hola_megatron.errors import DataError, RecipeError


def stream_of(documents: list[str], spec: str) -> tuple[list[int], list[int]]:
    """(tokens of the whole stream, positions at which documents start), the slow way."""
    tokenizer = load_tokenizer(spec)
    stream, starts = [], []
    for document in documents:
        starts.append(len(stream))
        stream += [tokenizer.bos_id] if tokenizer.bos_id is not None else []
        stream += [*tokenizer.encode(document), tokenizer.eos_id]
    return stream, starts


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make(inputs, out, *, tokenizer="bytes", sequence_length=32, **rest):
    return prepare(PrepareOptions([str(i) for i in inputs], str(out), tokenizer, sequence_length, **rest))


@pytest.mark.parametrize("T", [1, 2, 7, 64, 500])
@pytest.mark.parametrize("bos", [None, 9])
def test_packer_is_the_definition(T, bos):
    rng = np.random.default_rng(T)
    documents = [rng.integers(10, 50, size).tolist() for size in [0, 1, 1, 3, 2000, 2, 0, 5, 63, 64, 65]]
    head = [] if bos is None else [bos]
    stream = [t for d in documents for t in [*head, *d, 8]]
    begins = np.cumsum([0] + [len(head) + len(d) + 1 for d in documents])[:-1].tolist()
    packer = Packer(T, bos, 8, token_dtype(100))
    samples = [sample for d in documents for sample in packer.add(d)]
    tail = packer.finish()
    full, rest = divmod(len(stream) - 1, T)
    assert (len(samples), packer.tokens, tail is None) == (full, len(stream), rest == 0)
    for k, sample in enumerate(samples + ([tail] if tail else [])):
        want = stream[k * T : k * T + T + 1]
        assert sample.length == len(want)
        assert sample.tokens.tolist() == want + [8] * (T + 1 - len(want))
        assert sample.starts.tolist() == [b - k * T for b in begins if 0 <= b - k * T <= T]


@pytest.mark.parametrize("kind", ["bytes", "huggingface", "gpt2", "sentencepiece-bpe"])
def test_every_token_is_predicted_once(kind, tokenizer_specs, documents, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    summary = make([source], tmp_path / "out", tokenizer=tokenizer_specs[kind], keep_tail=True)
    stream, starts = stream_of(documents, tokenizer_specs[kind])
    dataset = PackedDataset(str(tmp_path / "out"))
    samples = [dataset[i] for i in range(len(dataset))]
    predicted = [t for s in samples for t in s.tokens[1 : s.length].tolist()]
    assert predicted == stream[1:] and samples[0].tokens[0] == stream[0]
    assert sorted({32 * k + s for k, sample in enumerate(samples) for s in sample.starts.tolist()}) == starts
    assert summary.tokens == dataset.info["tokens"] == len(stream)
    assert summary.documents == len(documents)
    assert summary.text_bytes == sum(len(d.encode()) for d in documents)


def test_tail_is_dropped_unless_kept(documents, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    tokens = len(stream_of(documents, "bytes")[0])
    assert make([source], tmp_path / "a").samples == (tokens - 1) // 32
    assert make([source], tmp_path / "b", keep_tail=True).samples == -(-(tokens - 1) // 32)


def test_workers_do_not_change_a_byte(tokenizer_specs, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "hola_megatron.data.prepare.tokenizing.BATCH_CHARACTERS", 1 << 14
    )  # many more batches than are read ahead
    source = write_jsonl(tmp_path / "in.jsonl", make_documents(3000, longest=100, seed=3))
    made = []
    for workers in (1, 2):
        out = tmp_path / f"w{workers}"
        make([source], out, tokenizer=tokenizer_specs["huggingface"], workers=workers, shard_size=1 << 17)
        made.append(contents(out))
    assert made[0] == made[1] and len(made[0]) > 4


def test_every_input_form_gives_the_same_shards(tmp_path):
    documents = [d.replace("\n", " ").strip() + "\n" for d in make_documents(40, seed=5)]
    lines = "".join(json.dumps({"body": d}) + "\n\n" for d in documents).encode()
    parted = "".join(d + "<|next|>\n" for d in documents).encode()
    blank = "\n\n".join(documents).encode()
    forms = {"a.jsonl": lines, "b.txt": parted, "c.txt": blank}
    packers = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
    inputs = []
    for name, data in forms.items():
        for suffix, pack in packers.items():
            # Two members one after the other are one file to each of these packers.
            half = len(data) // 2
            (tmp_path / (name + suffix)).write_bytes(pack(data[:half]) + pack(data[half:]))
            inputs.append(tmp_path / (name + suffix))
    table = pyarrow.table({"n": list(range(40)), "body": documents})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=7)
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for number, document in enumerate(documents):
        (tmp_path / "folder" / "sub" / f"{number:03}.txt").write_text(document)
    (tmp_path / "folder" / "README.md").write_text("not data")
    (tmp_path / "folder" / ".hidden.txt").write_text("not data")
    made = []
    for number, given in enumerate(
        [*inputs, tmp_path / "d.parquet", tmp_path / "folder", tmp_path / "fold*" / "*" / "*.txt"]
    ):
        split_on = {"b": "<|next|>", "c": ""}.get(given.name[0]) if "folder" not in str(given) else None
        make([given], tmp_path / f"out{number}", text_field="body", split_on=split_on)
        found = contents(tmp_path / f"out{number}")
        del found["dataset.json"]  # names the source files
        made.append(found)
    assert len(made) == 15 and all(found == made[0] for found in made)


def test_text_is_kept_as_it_is(tmp_path):
    text = "a\r\nb\rc\u2028d\n\n\ne"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    make([tmp_path / "a.txt"], tmp_path / "out", sequence_length=len(text.encode()) + 1)
    assert load_tokenizer("bytes").decode(PackedDataset(str(tmp_path / "out"))[0].tokens.tolist()) == text


def test_documents_without_text_are_counted_not_packed(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["abc" * 20, "", "def" * 20])
    summary = make([source], tmp_path / "out")
    assert (summary.documents, summary.empty) == (2, 1) and "1 without text" in str(summary)


def test_record_beside_the_index(dataset):
    info = json.loads((dataset / "dataset.json").read_text())
    assert info["tokenizer"] == load_tokenizer("bytes").identity()
    assert info["sources"][0]["name"] == "in.jsonl" and len(info["sources"][0]["sha256"]) == 64
    assert str(dataset.parent) not in (dataset / "dataset.json").read_text()
    assert len(list(dataset.glob("*.mds"))) >= 5


def test_streaming_itself_reads_the_shards(dataset):
    ours = PackedDataset(str(dataset))
    from streaming.base import LocalDataset

    theirs = LocalDataset(local=str(dataset))
    assert len(theirs) == len(ours)
    for i in (0, len(ours) // 2, len(ours) - 1):
        assert theirs[i]["tokens"].tolist() == ours[i].tokens.tolist()
        assert theirs[i]["length"] == ours[i].length


def test_bundled_text_is_whole_and_varied():
    parts = {part: list(DocumentReader([bundled_source(part)])) for part in ("train", "valid")}
    with lzma.open(BUNDLED, "rt", encoding="utf-8") as file:
        speeches = [s.strip("\n") for s in file.read().split("\n\n") if s.strip()]
    assert "".join(parts["train"] + parts["valid"]) == "".join(s + "\n\n" for s in speeches)
    lengths = [len(d) for documents in parts.values() for d in documents]
    assert min(lengths) >= 200 and max(lengths) <= 8000
    assert 0.03 < sum(map(len, parts["valid"])) / sum(lengths) < 0.07


def test_tool_end_to_end(tmp_path):
    out = tmp_path / "valid"
    made = start_tool("--bundled", "valid", "--tokenizer", "bytes", "--sequence-length", 128, "--keep-tail",
                      "--out", out)
    assert made.returncode == 0
    assert [line for line in made.stderr.splitlines() if not line.startswith("prepare | ")] == []  # on a slow machine
    assert "documents      23\n" in made.stdout and str(out) in made.stdout
    checked = run_tool("--verify", out)
    assert checked.returncode == 0 and "samples" in checked.stdout
    shard = out / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    failed = run_tool("--verify", out)
    assert failed.returncode == 3 and failed.stdout == ""
    assert failed.stderr.count("\n") == 1 and "shard.00000.mds has xxh64" in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["absent.jsonl", "--tokenizer", "bytes", "--sequence-length", 8, "--out", "o"], 3, "no file matched"),
        (["a.doc", "--tokenizer", "bytes", "--sequence-length", 8, "--out", "o"], 3, "unknown suffix '.doc'"),
        (["a.jsonl", "--tokenizer", "a.json", "--sequence-length", 8, "--out", "o"], 3, "tokenizer 'a.json': no such"),
        (["a.jsonl", "--tokenizer", "bytes", "--out", "o"], 2, "--sequence-length: required"),
        (["--verify", "."], 3, "no index.json, so this is not a prepared dataset"),
    ],
)
def test_exit_codes(arguments, code, message, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", ["text"])
    (tmp_path / "a.doc").touch()
    monkeypatch.chdir(tmp_path)
    found = run_tool(*arguments)
    assert found.returncode == code and message in found.stderr and "Traceback" not in found.stderr
    assert not (tmp_path / "o").exists()


def _parquet(path: Path, data: dict) -> None:
    pyarrow.parquet.write_table(pyarrow.table(data), path)


GOOD = json.dumps({"text": "a" * 100}) + "\n"
BAD_INPUTS = {
    "broken.jsonl": (lambda p: p.write_text(GOOD + GOOD + '{"text": \n'), "line 3: not valid JSON"),
    "list.jsonl": (lambda p: p.write_text(GOOD + "[1]\n"), "line 2: a JSON list"),
    "field.jsonl": (lambda p: p.write_text(GOOD + '{"body": ""}\n'), "line 2: no text field 'text', it has body"),
    "number.jsonl": (lambda p: p.write_text(GOOD + '{"text": 3}\n'), "line 2: field 'text' is a int"),
    "null.jsonl": (lambda p: p.write_text('{"text": null}\n'), "line 1: field 'text' is a NoneType"),
    "surrogate.jsonl": (lambda p: p.write_text('{"text": "\\ud83d"}\n'), "line 1: a lone surrogate"),
    "latin.txt": (lambda p: p.write_bytes(b"caf\xe9 " * 99), "not UTF-8"),
    "cut.txt.gz": (lambda p: p.write_bytes(gzip.compress(b"a" * 999)[:-9]), "cannot be unpacked as .gz"),
    "cut.txt.xz": (lambda p: p.write_bytes(lzma.compress(b"a" * 999)[:-9]), "cannot be unpacked as .xz"),
    "cut.txt.zst": (lambda p: p.write_bytes(zstandard.compress(b"a" * 999)[:-3]), "cannot be unpacked as .zst"),
    "plain.txt.zst": (lambda p: p.write_bytes(b"not packed"), "cannot be unpacked as .zst"),
    "plain.txt.xz": (lambda p: p.write_bytes(b"not packed"), "cannot be unpacked as .xz"),
    "plain.txt.gz": (lambda p: p.write_bytes(b"not packed"), "cannot be unpacked as .gz"),
    "bad.parquet": (lambda p: p.write_bytes(b"not parquet"), "cannot be read as parquet"),
    "bytes.parquet": (lambda p: _parquet(p, {"text": pyarrow.Array.from_buffers(  # named text, and not UTF-8
        pyarrow.string(), 1, pyarrow.array([b"\xff\xfe"]).buffers())}), "cannot be read as parquet"),
    "column.parquet": (lambda p: _parquet(p, {"a": ["x"], "b": [1]}), "no column 'text', it has a, b"),
    "null.parquet": (lambda p: _parquet(p, {"text": ["x", None]}), "row 2: field 'text' is a NoneType"),
    "what.doc": (lambda p: p.write_text("x"), "unknown suffix '.doc'; allowed are .txt"),
    "what.parquet.gz": (lambda p: p.write_text("x"), "unknown suffix '.parquet.gz'"),
    "empty.txt": (lambda p: p.write_text(""), "no document with text"),
    "short.txt": (lambda p: p.write_text("abc"), "5 tokens do not fill one sample of 32"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input(name, tmp_path):
    write, message = BAD_INPUTS[name]
    write(tmp_path / name)
    with pytest.raises(DataError) as caught:
        make([tmp_path / name], tmp_path / "out")
    assert message in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing is left behind"


def test_error_in_the_middle_with_workers(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", make_documents(3000, longest=100))
    with source.open("a") as file:
        file.write("oops\n")
    with pytest.raises(DataError, match="line 3001: not valid JSON"):
        make([source], tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists()


def test_no_input_and_double_input(tmp_path):
    with pytest.raises(DataError, match="no file matched"):
        make([tmp_path], tmp_path / "out")
    source = write_jsonl(tmp_path / "in.jsonl", ["a" * 99])
    with pytest.raises(DataError, match="named twice"):
        make([source, tmp_path], tmp_path / "out")


def test_options_that_cannot_be_used(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["a" * 99])
    with pytest.raises(RecipeError) as caught:
        make([], tmp_path / "out", sequence_length=0, workers=0, shard_size=1 << 32, bundled="test")
    assert len(caught.value.problems) == 4
    with pytest.raises(RecipeError, match="one of the two"):
        make([source], tmp_path / "out", bundled="train")
    with pytest.raises(RecipeError, match="--shard-size 300: one sample needs up to"):
        make([source], tmp_path / "out", shard_size=300)


def test_existing_folder(tmp_path):
    first, second = (write_jsonl(tmp_path / f"{c}.jsonl", [c * 99]) for c in "ab")
    make([first], tmp_path / "out")
    with pytest.raises(DataError, match="pass --overwrite"):
        make([second], tmp_path / "out")
    make([second], tmp_path / "out", overwrite=True)
    assert PackedDataset(str(tmp_path / "out"))[0].tokens[1] == ord("b")
    (tmp_path / "home").mkdir()
    make([first], tmp_path / "home")  # an empty folder is no obstacle
    shutil.rmtree(tmp_path / "home")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="never overwritten"):
        make([first], tmp_path / "home", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "home", "out"]


def test_a_killed_run_leaves_no_dataset(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", make_documents(10_000, longest=100))
    process = forked(functools.partial(make, [source], tmp_path / "out", shard_size=100_000))
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial/data/*.mds")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert list(tmp_path.glob(".out.partial/data/*.mds")), "killed in the middle"
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial/data/dataset.json").exists()
    make([write_jsonl(source, ["a" * 99])], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out"]
