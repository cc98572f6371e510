"""A save killed at the lines it executes; run by test_writing.py in a process that has no threads to fork.

    python tests/checkpoint/kill_points.py next|again STRIDE

next: the save is of a new step; again: of one that is there already, but damaged.
STRIDE: 1 kills at every line; n at every nth line and at every line before which the folder's files changed, so that
every state of the folder is met.
Prints how many kills were survived: the old or the new checkpoint is there and whole, and the next save works.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hola_megatron.checkpoint
from hola_megatron.checkpoint.folder import FORMAT, newest_usable, open_checkpoint, prune, start_writing
from hola_megatron.checkpoint.tensors import TensorReader, shard_entry
from hola_megatron.checkpoint.writer import HostSnapshot, assemble, write_rank

PACKAGE = str(Path(hola_megatron.checkpoint.__path__[0]))
RANKS = 2


def held(step: int, rank: int) -> HostSnapshot:
    """Half of a logical tensor filled with the step's number, and half of its moment."""
    files, index = {}, {"weight": {}, "exp_avg": {}}
    for kind, prefix in (("weight", "weights"), ("exp_avg", "optimizer")):
        name = f"{prefix}-{rank:05d}.safetensors"
        files[name] = {"w": torch.full((2, 3), float(step))}
        index[kind]["w"] = {"shape": [2 * RANKS, 3], "shards": [shard_entry(name, "w", 0, 2 * rank, 2)]}
    return HostSnapshot(files, index)


def write(root: Path, step: int, keep: int = 1) -> None:
    """What the ranks of a run do, one after the other."""
    folder = start_writing(root, step)
    for rank in reversed(range(RANKS)):
        write_rank(held(step, rank), rank, folder)
    assemble(folder, RANKS, {"format": FORMAT, "step": step}, lambda: False)
    prune(root, keep, None)


def value_of(path: Path) -> float:
    checkpoint = open_checkpoint(path)
    values = {float(x) for kind in ("weight", "exp_avg")
              for x in TensorReader(path, checkpoint.manifest["tensors"][kind]).whole("w").flatten()}
    assert len(values) == 1, "halves of two saves mixed"
    return values.pop()


def run_and_trace(action: Callable[[], None], at_line: Callable[[int], None]) -> bool:
    """Run `action` in a child that calls at_line(N) at the Nth line it executes in hola_megatron.checkpoint.

    Returns whether a signal ended the child.
    """
    child = os.fork()
    if child == 0:
        seen = 0

        def trace(frame: Any, event: str, arg: Any) -> Any:
            nonlocal seen
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            if event == "line":
                seen += 1
                at_line(seen)
            return trace

        sys.settrace(trace)
        try:
            action()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def run_and_die_at(line: int, action: Callable[[], None]) -> bool:
    """False if `action` ended before its Nth line."""
    return run_and_trace(action, lambda seen: os.kill(os.getpid(), signal.SIGKILL) if seen == line else None)


def state_of(root: Path) -> list[tuple[str, int, int]]:
    """What a kill would leave: every path with its inode and size."""
    return [(str(path), about.st_ino, about.st_size) for path in sorted(root.rglob("*")) for about in [path.lstat()]]


def lines_to_kill(root: Path, again: bool, stride: int) -> list[int]:
    """The numbers of the lines; the last one is behind the end of the save."""
    prepare(root, again)
    record, before = root.parent / "lines", state_of(root)

    def note(line: int) -> None:
        nonlocal before
        now = state_of(root)
        with record.open("a") as file:
            file.write(f"{line} {int(now != before)}\n")
        before = now

    record.unlink(missing_ok=True)
    assert not run_and_trace(lambda: write(root, 2), note)
    found = [(int(line), changed == "1") for line, changed in map(str.split, record.read_text().splitlines())]
    return [line for line, changed in found if changed or (line - 1) % stride == 0] + [len(found) + 1]


def prepare(root: Path, again: bool) -> None:
    shutil.rmtree(root, ignore_errors=True)
    write(root, 1, keep=2)
    if again:
        write(root, 2, keep=2)
        (root / "step_00000002/weights-00000.safetensors").write_bytes(b"damage")


def kill_at_lines(root: Path, again: bool, stride: int) -> int:
    """Returns the number of kills survived."""
    *lines, end = lines_to_kill(root, again, stride)
    for line in [*lines, end]:
        prepare(root, again)
        killed = run_and_die_at(line, lambda: write(root, 2))
        assert killed == (line != end), line
        found, _ = newest_usable(root)
        assert found is not None and value_of(found.path) == found.step and found.step in (1, 2), line
        assert killed or found.step == 2
        write(root, 3)
        assert newest_usable(root)[0].step == 3 and not list(root.glob("*.tmp")), line
    return len(lines)


if __name__ == "__main__":
    memory = "/dev/shm"  # hundreds of saves are made: a folder whose fsyncs cost nothing, where there is one
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        survived = kill_at_lines(Path(folder) / "checkpoints", sys.argv[1] == "again", int(sys.argv[2]))
        print(f"{sys.argv[1]}: {survived} kills survived")
