"""One owner for a folder: who comes second is refused by name, and a dead owner locks nobody out."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Semaphore

import pytest
from helpers import ROOT, metric_rows, run_each, run_main, run_tool, small_recipe

from hola_megatron.checkpoint.folder import find_checkpoint
from hola_megatron.errors import CheckpointError, FolderInUseError
from hola_megatron.files.ownership import LEASE_SECONDS, beside, inside, owned, read_owner, take
from hola_megatron.hf.fresh_folder import fresh_folder
from hola_megatron.log.plot import plot_loss

OWNER = """
import fcntl, os, sys
from pathlib import Path
from hola_megatron.files import ownership
if "no-flock" in sys.argv:
    def flock(*_): raise OSError(38, "no locks on this file system")
    fcntl.flock = flock
path = Path(sys.argv[1])
place = (ownership.beside if "beside" in sys.argv else ownership.inside)(path, "choose another")
if "file" in sys.argv:
    place = ownership.LockFiles(path, path, path.with_name(path.name + ".lease"), "choose another")
owner = ownership.take(place, lease_seconds=float(sys.argv[2]))
print("owns", flush=True)
for line in sys.stdin:
    if line == "ending\\n":
        ownership.note_ending()
    if line == "release\\n":
        owner.release()
    print("done", flush=True)
"""
SHORT = 3.0  # a lease for tests
NODE2 = ["unshare", "--uts", "sh", "-c", 'hostname node2; exec "$@"', "sh"]
needs_host = pytest.mark.skipif(
    subprocess.run(["unshare", "--uts", "true"], capture_output=True, check=False).returncode != 0,
    reason="needs the right to give a process another host name")


class OwningProcess:
    """Another process that owns a folder and does what it is told."""

    def __init__(self, folder: Path, *words: str, lease: float = LEASE_SECONDS, other_host: bool = False,
                 **environment: str):
        self.process = subprocess.Popen(
            [*(NODE2 if other_host else []), sys.executable, "-c", OWNER, str(folder), str(lease), *words],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **environment})
        assert self.process.stdout.readline() == "owns\n", self.process.communicate()[1]

    def tell(self, word: str) -> None:
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def owning(folder: Path, *words: str, **options: object) -> Iterator[OwningProcess]:
    other = OwningProcess(folder, *words, **options)
    try:
        yield other
    finally:
        other.kill()
        other.process.communicate()


def refused(folder: Path, **options: float) -> str:
    with pytest.raises(FolderInUseError) as caught:
        take(inside(folder, "choose another"), **options)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    return str(caught.value)


def test_the_second_is_told_who_the_first_is(tmp_path):
    with owning(tmp_path) as other:
        said = refused(tmp_path)
        assert f"{tmp_path}: in use by process {other.process.pid} on {socket.gethostname()} since 20" in said
        assert "-c" in said and said.endswith("; choose another")
        other.tell("release")
        assert list(tmp_path.iterdir()) == []
        with owned(inside(tmp_path, "")):
            assert read_owner(inside(tmp_path, "")).pid == os.getpid()
        assert list(tmp_path.iterdir()) == []


def test_the_same_process_cannot_own_a_folder_twice(tmp_path):
    with owned(inside(tmp_path, "choose another")):
        assert f"process {os.getpid()} " in refused(tmp_path)


def test_of_many_that_come_at_once_one_owns(tmp_path):
    others = Semaphore(0)

    def one(_: int) -> bool:
        try:
            with owned(inside(tmp_path, "")):
                return all(others.acquire(timeout=60) for _ in range(7))
        except FolderInUseError:
            others.release()
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(one, range(8))) == 1


def test_a_killed_owner_locks_nobody_out(tmp_path):
    with owning(tmp_path) as other:
        other.kill()
        assert read_owner(inside(tmp_path, "")).pid == other.process.pid
        take(inside(tmp_path, "")).release()


def test_an_owner_that_was_killed_and_still_holds_its_lock_is_waited_for(tmp_path):
    """As while its memory is being freed: here another process holds the lock, and the named one is gone."""
    with owning(tmp_path) as other:
        other.kill()
        holder = subprocess.Popen(["flock", tmp_path / "owner.lock", "sh", "-c", "echo holds; read line"],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert holder.stdout.readline() == "holds\n"
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(take, inside(tmp_path, ""))
            time.sleep(1.5)
            assert not second.done()
            holder.communicate("go\n")
            second.result(60).release()


def test_a_process_id_that_is_used_again_is_not_the_owner(tmp_path):
    with owning(tmp_path) as other:
        other.kill()
        lease = tmp_path / "owner.lease"
        lease.write_text(lease.read_text().replace(f"pid={other.process.pid}\n", f"pid={os.getpid()}\n"))
        take(inside(tmp_path, "")).release()


def test_a_suspended_owner_of_this_machine_keeps_its_folder(tmp_path):
    with owning(tmp_path, lease=SHORT) as other:
        other.process.send_signal(signal.SIGSTOP)
        time.sleep(2 * SHORT)  # its lease is not renewed meanwhile
        refused(tmp_path, lease_seconds=SHORT)
        other.process.send_signal(signal.SIGCONT)
        other.tell("still there")
        refused(tmp_path, lease_seconds=SHORT)


@needs_host
def test_an_owner_on_another_machine_is_seen_by_its_renewals(tmp_path):
    """With the lock file gone no kernel lock tells: as on a file system that keeps locks to each machine."""
    with owning(tmp_path, lease=SHORT, other_host=True) as other:
        assert "on node2 " in refused(tmp_path, lease_seconds=SHORT), "the kernel's lock is enough where it works"
        (tmp_path / "owner.lock").rename(tmp_path / "kept")
        assert "in use by another process" in refused(tmp_path, lease_seconds=SHORT)
        other.kill()
        owner = take(inside(tmp_path, ""), lease_seconds=SHORT)  # after so long without a sign of life
        assert read_owner(inside(tmp_path, "")).pid == os.getpid()
        owner.release()


@needs_host
def test_an_owner_that_was_cut_off_and_replaced_ends_when_it_comes_back(tmp_path):
    with owning(tmp_path, lease=SHORT, other_host=True) as other:
        (tmp_path / "owner.lock").unlink()
        other.process.send_signal(signal.SIGSTOP)
        with owned(inside(tmp_path, ""), lease_seconds=SHORT):
            other.process.send_signal(signal.SIGCONT)
            assert other.process.wait(60) == 2
            said = other.process.stderr.read()
            assert said.startswith("FolderInUseError: ") and f"taken over by process {os.getpid()} on " in said


def test_file_systems_without_locks_are_guarded_by_the_lease(tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(38, "no locks on this file system")

    monkeypatch.setattr("fcntl.flock", flock)
    with owning(tmp_path, "no-flock", lease=SHORT) as other:
        assert f"process {other.process.pid} " in refused(tmp_path, lease_seconds=SHORT)
        other.kill()
        take(inside(tmp_path, ""), lease_seconds=SHORT).release()
        assert not (tmp_path / "owner.lease").exists()


def test_an_owner_that_is_ending_is_waited_for(tmp_path, capfd):
    with owning(tmp_path) as other, ThreadPoolExecutor(1) as pool:
        other.tell("ending")
        second = pool.submit(take, inside(tmp_path, ""))
        while "is ending: waiting for it" not in capfd.readouterr().err:
            assert not second.done()
            time.sleep(0.05)
        other.tell("release")
        second.result(60).release()
    with owning(tmp_path) as other:
        other.tell("ending")
        refused(tmp_path, ending_seconds=0.5)


def test_a_job_that_is_queued_again_waits_for_its_predecessor_and_no_other_job_does(tmp_path, monkeypatch):
    with owning(tmp_path, SLURM_JOB_ID="7") as other, ThreadPoolExecutor(1) as pool:
        monkeypatch.setenv("SLURM_JOB_ID", "8")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        refused(tmp_path)
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        second = pool.submit(take, inside(tmp_path, ""))
        time.sleep(1)
        assert not second.done()
        other.kill()
        second.result(60).release()


def test_a_second_run_is_refused_and_the_first_is_whole(tmp_path, text_data, capsys):
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"),
                          train__steps=60, checkpoint={"every": 10, "keep": 9})
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run_each, [[str(recipe)]], tmp_path)
        while not list((tmp_path / "run/checkpoints").glob("step_*/manifest.json")):
            assert not first.done(), first.result()
            time.sleep(0.05)
        owner = read_owner(inside(tmp_path / "run", ""))
        for words in (["train.lr=6e-3"], ["--new"], []):
            second = run_main([str(recipe), *words], capsys)
            assert not first.done(), "the first run was to be longer than this"
            assert second.code == 2 and f"in use by process {owner.pid} on {owner.host}" in second.output
            assert second.output.count("\n") == 1 and second.output.startswith("FolderInUseError: ")
        # readers are not held up
        assert find_checkpoint(tmp_path / "run").step >= 10
        plot_loss(tmp_path / "run", "title")
        assert first.result()[0].code == 0
    rows = metric_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 61)) and max(row["learning_rate"] for row in rows) <= 3e-3
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "run", "rank-0.log"}
    assert not list((tmp_path / "run").glob("owner*"))
    assert run_main([str(recipe), "train.steps=61", "--allow-change"], capsys).code == 0


def test_a_new_run_moves_the_old_folder_aside_with_its_lock(tmp_path, text_data, capsys):
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"), train__steps=2)
    assert run_main([str(recipe)], capsys).code == 0
    done = run_main([str(recipe), "--new"], capsys)
    assert done.code == 0 and "(new run)" in done.output
    assert (tmp_path / "run.old-1/metrics.jsonl").exists()
    assert not list(tmp_path.glob("run*/owner*"))


@pytest.mark.distributed
def test_a_folder_that_the_program_stands_in_is_not_moved_aside(tmp_path, text_data, monkeypatch, capsys):
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"), train__steps=2)
    (tmp_path / "run/inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run/inner")
    for place in (".", "..", str(tmp_path / "run")):
        done = run_main([str(recipe), f"run_dir={place}", "--new"], capsys)
        assert done.code == 2 and "was started inside the run folder" in done.output, done
        assert len(done.output.strip().splitlines()) == 1, done
    assert sorted(os.listdir(tmp_path)) == ["recipe.yaml", "run"] and os.listdir(tmp_path / "run") == ["inner"]


@pytest.mark.parametrize("name", ["dataset.json", "hola_export.json"])
def test_a_folder_of_another_use_is_no_run_folder(name, tmp_path, text_data, capsys):
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"), train__steps=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("{}")
    done = run_main([str(recipe)], capsys)
    assert done.code == 2 and "a run needs a folder of its own" in done.output, done
    assert os.listdir(tmp_path / "run") == [name]


def test_ranks_that_do_not_share_the_run_folder_are_named(tmp_path, text_data, monkeypatch):
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir="run")
    for rank in (0, 1):
        (tmp_path / f"node{rank}").mkdir()
    found = run_each([[str(recipe)]] * 2, tmp_path, folders=[tmp_path / "node0", tmp_path / "node1"])
    assert [rank.code for rank in found] == [2, 2], found
    assert found[0].output == found[1].output and found[0].output.startswith("RunFolderError: rank 1 (on ")
    assert f"another folder ({tmp_path / 'node1/run'}) on rank 1" in found[0].output


def test_a_second_preparation_is_refused(tmp_path, capsys):
    arguments = ["--bundled", "valid", "--tokenizer", "bytes", "--sequence-length", "64", "--out"]
    (tmp_path / "link").symlink_to(tmp_path)
    out = tmp_path / "deep/out"
    out.parent.mkdir()
    with owning(out, "beside") as other:
        for name in (out, tmp_path / "link/deep/out"):
            done = run_tool("prepare_data", [*arguments, str(name)], capsys)
            assert done.code == 2 and f"in use by process {other.process.pid} " in done.output
            assert done.output.count("\n") == 1 and not out.exists()
        other.kill()
        assert run_tool("prepare_data", [*arguments, str(out)], capsys).code == 0
    assert run_tool("prepare_data", ["--verify", str(out)], capsys).code == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_second_export_is_refused_and_a_folder_made_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"
    with owning(out, "beside") as other, pytest.raises(FolderInUseError, match=f"process {other.process.pid} "), \
            fresh_folder(out):
        pass
    with pytest.raises(CheckpointError, match="exists and is no folder written by this tool"), \
            fresh_folder(out) as partial:
        (partial / "ours").touch()
        out.mkdir()
        (out / "of somebody else").touch()
    assert [path.name for path in out.iterdir()] == ["of somebody else"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with fresh_folder(tmp_path / "two"):
        (tmp_path / "two").mkdir()  # empty: replaced
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == '["out", "two"]'


def test_a_download_waits_for_the_process_that_makes_it(tmp_path, text_data):
    """Many processes share a cache: whoever comes second uses the first one's file, or makes it if that one dies."""
    from hola_megatron.data.stream import PackedDataset

    PackedDataset(f"file://{text_data / 'valid'}", cache=str(tmp_path))
    folder, = tmp_path.iterdir()
    shard = next(text_data.glob("valid/*.mds"))
    (folder / ".locks").mkdir(exist_ok=True)
    lock = folder / ".locks" / shard.name
    for died in (False, True):
        (folder / shard.name).unlink(missing_ok=True)
        with owning(lock, "file") as other, ThreadPoolExecutor(1) as pool:
            second = pool.submit(lambda: PackedDataset(f"file://{text_data / 'valid'}", cache=str(tmp_path))[0])
            time.sleep(1.5)
            assert not second.done()
            if died:
                other.kill()
            else:
                (folder / shard.name).write_bytes(shard.read_bytes())
                other.tell("release")
            assert second.result(60).length > 0
        assert (folder / shard.name).read_bytes() == shard.read_bytes()
        assert not list((folder / ".locks").iterdir()) and not list(folder.glob(".*.part*"))


def test_places_do_not_depend_on_the_path_that_leads_there(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    assert beside(tmp_path / "link/a", "").lock == beside(tmp_path / "a", "").lock
