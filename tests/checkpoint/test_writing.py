"""Killed at any line of a save, refused by the disk, or finished: what is in the folder afterwards."""

from __future__ import annotations

import re
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from checkpoint.kill_points import RANKS, held, write
from helpers import start_program

from hola_megatron.checkpoint.folder import FORMAT, MANIFEST, newest_usable, open_checkpoint, prune, start_writing
from hola_megatron.checkpoint.writer import BackgroundWriter, HostSnapshot, assemble, write_rank
from hola_megatron.errors import CheckpointError


@pytest.mark.parametrize(("stride", "least"), [(8, 20), pytest.param(1, 80, marks=pytest.mark.long)],
                         ids=["every eighth line and state", "every line"])
def test_killed_at_the_lines_of_a_save(stride, least, tmp_path):
    """The old or the new checkpoint is there and whole, and the next save works; both kinds of save side by side."""
    programs = {kind: start_program(["tests/checkpoint/kill_points.py", kind, str(stride)], tmp_path / kind)
                for kind in ("next", "again")}
    try:
        codes = [program.wait(500) for program in programs.values()]
    finally:
        for program in programs.values():
            program.kill()
    said = "".join((tmp_path / kind).read_text() for kind in programs)
    survived = [int(n) for n in re.findall(r": (\d+) kills survived", said)]
    assert codes == [0, 0] and len(survived) == 2 and min(survived) > least, said


def test_a_rank_that_died_while_another_waits_leaves_no_checkpoint(tmp_path):
    write(tmp_path, 1)
    folder = start_writing(tmp_path, 2)
    writer = BackgroundWriter(0, RANKS)
    writer.start(held(2, 0), folder, {"format": FORMAT, "step": 2})
    assert not (folder / "rank-00001.json").exists()  # rank 1 died before its report
    writer.abandon(0.3)
    assert not writer.busy and newest_usable(tmp_path)[0].step == 1


def test_what_fails_after_saving_does_not_deny_the_checkpoint(tmp_path, capsys):
    def plot_loss() -> None:
        raise OSError("no room for a picture")

    writer, done = BackgroundWriter(0, 1), []
    writer.start(held(1, 0), start_writing(tmp_path, 1), {"format": FORMAT, "step": 1},
                 (plot_loss, lambda: done.append(1)))
    writer.wait(30)
    assert not writer.failed and writer.take_result().name == "step_00000001" and done == [1]
    assert "after saving | plot_loss: no room" in capsys.readouterr().err


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path):
    write(tmp_path, 1)
    folder = start_writing(tmp_path, 2)
    big = HostSnapshot({"weights-00000.safetensors": {"w": torch.zeros(1 << 18)}}, {"weight": {}})
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
        assemble(folder, RANKS, {"format": FORMAT, "step": step, "healthy": healthy}, lambda: False)
        prune(tmp_path, 1, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step_0000000{n}" for n in (2, 3, 4)]
    assert newest_usable(tmp_path)[0].step == 4 and newest_usable(tmp_path, healthy=True)[0].step == 2


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(tmp_path):
    for step in (1, 2, 3):
        folder = start_writing(tmp_path, step)
        for rank in range(RANKS):
            write_rank(held(step, rank), rank, folder)
        path = assemble(folder, RANKS, {"format": FORMAT, "step": step, "healthy": step != 3}, lambda: False)
        if step == 2:
            next(path.glob("*.safetensors")).write_bytes(b"")
        prune(tmp_path, 1, None)
    assert newest_usable(tmp_path, healthy=True)[0].step == 1


def test_training_goes_on_while_it_is_written(tmp_path):
    """The writing thread gives the interpreter away: this thread counts on."""
    big = HostSnapshot({"weights-00000.safetensors": {"w": torch.zeros(1 << 26)}}, {"weight": {}})  # 256 MiB
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
