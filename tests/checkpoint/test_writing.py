"""Killed at any line of a save, refused by the disk, or finished: what is in the folder afterwards."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hola_megatron.checkpoint
from hola_megatron.checkpoint.folder import FORMAT, MANIFEST, newest_usable, open_checkpoint, retire, start_writing
from hola_megatron.checkpoint.tensors import TensorReader, shard_entry
from hola_megatron.checkpoint.writer import BackgroundWriter, Held, put_together, write_rank
from hola_megatron.errors import CheckpointError

PACKAGE = str(Path(hola_megatron.checkpoint.__path__[0]))
RANKS = 2


def held(step: int, rank: int) -> Held:
    """Half of a logical tensor filled with the step's number, and half of its moment."""
    files, index = {}, {"weight": {}, "exp_avg": {}}
    for kind, prefix in (("weight", "weights"), ("exp_avg", "optimizer")):
        name = f"{prefix}-{rank:05d}.safetensors"
        files[name] = {"w": torch.full((2, 3), float(step))}
        index[kind]["w"] = {"shape": [2 * RANKS, 3], "shards": [shard_entry(name, "w", 0, 2 * rank, 2)]}
    return Held(files, index)


def write(root: Path, step: int, keep: int = 1) -> None:
    """What the ranks of a run do, one after the other."""
    folder = start_writing(root, step)
    for rank in reversed(range(RANKS)):
        write_rank(held(step, rank), rank, folder)
    put_together(folder, RANKS, {"format": FORMAT, "step": step}, lambda: False)
    retire(root, keep, None)


def value_of(path: Path) -> float:
    checkpoint = open_checkpoint(path)
    values = {float(x) for kind in ("weight", "exp_avg")
              for x in TensorReader(path, checkpoint.manifest["tensors"][kind]).whole("w").flatten()}
    assert len(values) == 1, "halves of two saves mixed"
    return values.pop()


@pytest.fixture
def in_memory(tmp_path) -> Iterator[Path]:
    """A folder whose fsyncs cost nothing, where there is one: hundreds of saves are made in it."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def run_and_die_at(line: int, action) -> bool:
    """Run `action` in a child killed at the Nth line it executes in hola_megatron.checkpoint; False if it ended."""
    child = os.fork()
    if child == 0:
        seen = 0

        def trace(frame, event, arg):
            nonlocal seen
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            if event == "line":
                seen += 1
                if seen == line:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        try:
            action()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("again", [False, True], ids=["next_step", "same_step"])
def test_killed_at_every_line_of_a_save(again, in_memory, record_property):
    """The old or the new checkpoint is there and whole, and the next save works; `again`: over a damaged one."""
    line, survived = 0, 0
    while True:
        line += 1
        root = in_memory / "checkpoints"
        shutil.rmtree(root, ignore_errors=True)
        write(root, 1, keep=2)
        if again:  # step 2 is there, but damaged, and is written once more
            write(root, 2, keep=2)
            (root / "step_00000002/weights-00000.safetensors").write_bytes(b"damage")
        killed = run_and_die_at(line, lambda root=root: write(root, 2))
        found, _ = newest_usable(root)
        assert found is not None and value_of(found.path) == found.step and found.step in (1, 2), line
        write(root, 3)
        assert newest_usable(root)[0].step == 3 and not list(root.glob("*.tmp")), line
        if not killed:
            break
        survived += 1
    assert found.step == 2 and survived > 80
    record_property("kill points survived", survived)


def test_a_rank_killed_while_another_waits_leaves_no_checkpoint(tmp_path):
    write(tmp_path, 1)
    folder = start_writing(tmp_path, 2)
    writer = BackgroundWriter(0, RANKS)
    writer.start(held(2, 0), folder, {"format": FORMAT, "step": 2})
    assert run_and_die_at(20, lambda: write_rank(held(2, 1), 1, folder))
    writer.abandon(0.3)
    assert not writer.busy and newest_usable(tmp_path)[0].step == 1


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path):
    write(tmp_path, 1)
    folder = start_writing(tmp_path, 2)
    big = Held({"weights-00000.safetensors": {"w": torch.zeros(1 << 18)}}, {"weight": {}})
    writer = BackgroundWriter(0, 1)
    # the kernel refuses writes beyond this size to this process: EFBIG where a full disk says ENOSPC
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, before[1]))
    try:
        writer.start(big, folder, {"format": FORMAT, "step": 2})
        writer.wait(30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert writer.failed
    with pytest.raises(CheckpointError, match="could not be written .*File too large.*free the disk"):
        writer.take_result()
    assert newest_usable(tmp_path)[0].step == 1
    write(tmp_path, 2)
    assert newest_usable(tmp_path)[0].step == 2


def test_every_bit_of_the_manifest_counts(tmp_path):
    """Flip each byte's lowest bit in turn: never a silently different checkpoint."""
    write(tmp_path, 1)
    path = tmp_path / "step_00000001"
    whole = (path / MANIFEST).read_bytes()
    for at in range(len(whole)):
        (path / MANIFEST).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        try:
            checkpoint = open_checkpoint(path, verify=False)
        except CheckpointError as error:
            assert MANIFEST in str(error)
            continue
        assert checkpoint.manifest == open_whole(path, whole), at  # white space only


def open_whole(path: Path, whole: bytes) -> dict:
    (path / MANIFEST).write_bytes(whole)
    return open_checkpoint(path).manifest


def test_unhealthy_checkpoints_do_not_push_out_healthy_ones(tmp_path):
    for step, healthy in ((1, True), (2, True), (3, False), (4, False)):
        folder = start_writing(tmp_path, step)
        for rank in range(RANKS):
            write_rank(held(step, rank), rank, folder)
        put_together(folder, RANKS, {"format": FORMAT, "step": step, "healthy": healthy}, lambda: False)
        retire(tmp_path, 1, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step_0000000{n}" for n in (2, 3, 4)]
    assert newest_usable(tmp_path)[0].step == 4 and newest_usable(tmp_path, healthy=True)[0].step == 2


def test_training_goes_on_while_it_is_written(tmp_path):
    """The writing thread gives the interpreter away: this thread counts on."""
    big = Held({"weights-00000.safetensors": {"w": torch.zeros(1 << 26)}}, {"weight": {}})  # 256 MiB
    writer = BackgroundWriter(0, 1)
    writer.start(big, start_writing(tmp_path, 1), {"format": FORMAT, "step": 1})
    began, longest = time.perf_counter(), 0.0
    while writer.busy:
        before = time.perf_counter()
        time.sleep(0.001)
        longest = max(longest, time.perf_counter() - before)
    assert newest_usable(tmp_path)[0].step == 1
    # a writer that kept the interpreter would make this nearly 1
    assert longest < 0.5 * (time.perf_counter() - began)
