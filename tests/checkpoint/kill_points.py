"""A save killed at every line it executes; run by test_writing.py in a process that has no threads to fork.

    python tests/checkpoint/kill_points.py next|again

next: the save is of a new step; again: of one that is there already, but damaged.
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
from hola_megatron.checkpoint.folder import FORMAT, newest_usable, open_checkpoint, retire, start_writing
from hola_megatron.checkpoint.tensors import TensorReader, shard_entry
from hola_megatron.checkpoint.writer import Held, put_together, write_rank

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


def run_and_die_at(line: int, action: Callable[[], None]) -> bool:
    """Run `action` in a child killed at the Nth line it executes in hola_megatron.checkpoint; False if it ended."""
    child = os.fork()
    if child == 0:
        seen = 0

        def trace(frame: Any, event: str, arg: Any) -> Any:
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


def kill_at_every_line(root: Path, again: bool) -> int:
    """Returns the number of kills survived."""
    survived = 0
    while True:
        shutil.rmtree(root, ignore_errors=True)
        write(root, 1, keep=2)
        if again:
            write(root, 2, keep=2)
            (root / "step_00000002/weights-00000.safetensors").write_bytes(b"damage")
        killed = run_and_die_at(survived + 1, lambda: write(root, 2))
        found, _ = newest_usable(root)
        assert found is not None and value_of(found.path) == found.step and found.step in (1, 2), survived
        last = found.step
        write(root, 3)
        assert newest_usable(root)[0].step == 3 and not list(root.glob("*.tmp")), survived
        if not killed:
            assert last == 2
            return survived
        survived += 1


if __name__ == "__main__":
    memory = "/dev/shm"  # hundreds of saves are made: a folder whose fsyncs cost nothing, where there is one
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        survived = kill_at_every_line(Path(folder) / "checkpoints", sys.argv[1] == "again")
        print(f"{sys.argv[1]}: {survived} kills survived")
