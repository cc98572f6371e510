"""kill -9 of a preparation: the same command goes on, the result is that of an uninterrupted run, nobody is left."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from corpus import ROOT, make_documents, write_jsonl
from kill_preparation import contents

from hola_megatron.data.prepare import PrepareOptions, prepare
from hola_megatron.errors import DataError

TESTS = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{TESTS}"}


def kills_survived(*arguments: object) -> str:
    done = subprocess.run([sys.executable, str(TESTS / "kill_preparation.py"), *map(str, arguments)], check=False,
                          capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_killed_at_every_state_of_the_folder():
    assert "kills survived" in kills_survived("fresh", 400)
    assert "kills survived" in kills_survived("again", 400)
    assert "kills survived" in kills_survived("whole", 400)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["fresh", "again", "whole"])
def test_killed_at_every_third_line(kind):
    assert "kills survived" in kills_survived(kind, 3)


def make(source: Path, out: Path, **options: object) -> None:
    prepare(PrepareOptions([str(source)], str(out), "bytes", 32, **{"shard_size": 2000, "keep_tail": True, **options}))


def stop_at_shard(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The next preparation ends with an error when it has finished so many shards."""
    from hola_megatron.data.prepare.journal import Work

    append, seen = Work.append, []

    def fail(self, *arguments):
        append(self, *arguments)
        seen.append(1)
        if len(seen) == number:
            monkeypatch.undo()
            raise DataError("stopped")

    monkeypatch.setattr(Work, "append", fail)


@pytest.fixture
def interrupted(tmp_path, monkeypatch, capsys) -> tuple[Path, dict[str, bytes]]:
    """(folder with in.jsonl and the work of a preparation that ended behind its third shard, what it should give)."""
    source = write_jsonl(tmp_path / "in.jsonl", make_documents(60))
    make(source, tmp_path / "expected")
    stop_at_shard(monkeypatch, 3)
    with pytest.raises(DataError, match="stopped"):
        make(source, tmp_path / "out")
    assert "3 finished shards are kept" in capsys.readouterr().err
    return tmp_path, contents(tmp_path / "expected")


def test_finished_shards_are_not_made_again(interrupted, capsys):
    folder, expected = interrupted
    before = {path.name: path.stat().st_ino for path in (folder / ".out.partial/data").iterdir()}
    make(folder / "in.jsonl", folder / "out")
    assert len(before) == 3 and "3 finished shards are kept" in capsys.readouterr().err
    assert {name: (folder / "out" / name).stat().st_ino for name in before} == before
    assert contents(folder / "out") == expected


@pytest.mark.parametrize("damage", ["bit", "short", "missing", "journal", "line", "all"])
def test_damaged_work_is_made_again(damage, interrupted):
    folder, expected = interrupted
    work = folder / ".out.partial"
    shard, journal = work / "data/shard.00001.mds", work / "journal.jsonl"
    data, lines = shard.read_bytes(), journal.read_bytes()
    if damage == "bit":
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "short":
        shard.write_bytes(data[:-1])
    elif damage == "missing":
        shard.unlink()
    elif damage == "journal":
        journal.write_bytes(b"\xff" + lines)
    elif damage == "line":
        journal.write_bytes(lines[:-20])
    else:
        journal.unlink()
    make(folder / "in.jsonl", folder / "out")
    assert contents(folder / "out") == expected


def test_other_options_or_input_begin_anew(interrupted):
    folder, _ = interrupted
    make(folder / "in.jsonl", folder / "expected64", shard_size=4000)
    make(folder / "in.jsonl", folder / "out", shard_size=4000)
    assert contents(folder / "out") == contents(folder / "expected64")


def test_a_later_file_may_be_mended(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hola_megatron.data.prepare.tokenizing.BATCH_DOCUMENTS", 8)
    first = write_jsonl(tmp_path / "1.jsonl", make_documents(60))
    second = write_jsonl(tmp_path / "2.jsonl", make_documents(5, seed=1))
    whole = second.read_text()
    second.write_text(whole + "oops\n")

    def both(out: Path) -> None:
        prepare(PrepareOptions([str(first), str(second)], str(out), "bytes", 32, shard_size=2000))

    with pytest.raises(DataError, match="line 6: not valid JSON"):
        both(tmp_path / "out")
    kept = capsys.readouterr().err
    second.write_text(whole)
    both(tmp_path / "out")
    assert "finished shards are kept" in kept and "finished shards are kept" in capsys.readouterr().err
    both(tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def start(source: Path, out: Path, *options: object) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tools/prepare_data.py"), str(source), "--tokenizer", "bytes",
               "--sequence-length", "32", "--shard-size", "100000", "--out", str(out), *map(str, options)]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_workers_end_with_the_parent(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", make_documents(30_000, longest=100))
    process = start(source, tmp_path / "out", "--workers", 2)
    wait_for(lambda: (tmp_path / ".out.partial/data/shard.00002.mds").exists())
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=120)
    assert alive == []


@pytest.mark.long
def test_killed_at_ten_random_moments(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", make_documents(20_000, longest=100))
    assert start(source, tmp_path / "expected", "--workers", 2).wait() == 0
    rng, kills = random.Random(int(os.environ.get("HOLA_TEST_SEED", "0"))), 0
    while kills < 10:
        process = start(source, tmp_path / "out", "--workers", 2)
        journal, known = tmp_path / ".out.partial/journal.jsonl", rng.randint(1, 4)
        lines = journal.read_bytes().count(b"\n") if journal.exists() else 0
        wait_for(lambda p=process, j=journal, n=lines + known: p.poll() is not None or
                 (j.exists() and j.read_bytes().count(b"\n") >= n))
        time.sleep(rng.uniform(0, 0.05))
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 5
    if not (tmp_path / "out").exists():
        assert start(source, tmp_path / "out", "--workers", 2).wait() == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert json.loads((tmp_path / "out/dataset.json").read_text())["documents"] == 20_000
