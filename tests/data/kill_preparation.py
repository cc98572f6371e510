"""A preparation killed at the lines it executes; run by test_kills.py in a process that has no threads to fork.

    python tests/data/kill_preparation.py fresh|again|whole STRIDE

fresh: the dataset is not there yet; again: an earlier one is replaced; whole: documents are kept whole, and duplicates
left out.
STRIDE: 1 kills at every line; n at every nth line and at every line before which the files changed, so that every
state of the folders is met.
Prints how many kills were survived: nothing unfinished lies under the dataset's name, and the same preparation, started
again, makes the bytes of one that was never interrupted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corpus import make_documents, write_jsonl

import hola_megatron.data.prepare
from hola_megatron.data import best_fit
from hola_megatron.data.mds import import_streaming
from hola_megatron.data.prepare.making import Job, make
from hola_megatron.data.prepare.options import PrepareOptions
from hola_megatron.data.sources import find_sources
from hola_megatron.data.tokenizer import load_tokenizer
from hola_megatron.errors import DataError

PACKAGE = str(Path(hola_megatron.data.prepare.__path__[0]))
TOKENIZER = load_tokenizer("bytes")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Preparation:
    """Three small files to four shards and a few samples more."""

    def __init__(self, root: Path, kind: str):
        self.root, self.again, self.out = root, kind == "again", root / "out"
        self.how = {"packing": "whole", "drop_duplicates": True} if kind == "whole" else {"keep_tail": True}
        self.inputs = [write_jsonl(root / f"{n}.jsonl", make_documents(12, longest=40, seed=n % 2)) for n in range(3)]
        self.old = write_jsonl(root / "old.jsonl", make_documents(9, seed=9))

    def make(self, out: Path | None = None, inputs: list[Path] | None = None) -> None:
        options = PrepareOptions([str(path) for path in inputs or self.inputs], str(out or self.out), "bytes", 32,
                                 shard_size=2000, overwrite=self.again, **self.how)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            make(Job(options, TOKENIZER, find_sources(options.inputs), out or self.out), lambda counts: None)

    def expected(self) -> dict[str, bytes]:
        """What a run that nothing interrupts makes."""
        self.make(self.root / "expected")
        found = contents(self.root / "expected")
        shutil.rmtree(self.root / "expected")
        return found

    def reset(self) -> dict[str, bytes]:
        """The state before; returns the dataset to be replaced, or {}."""
        for path in (self.out, self.root / ".out.partial", self.root / ".out.old"):
            shutil.rmtree(path, ignore_errors=True)
        if not self.again:
            return {}
        self.make(inputs=[self.old])
        return contents(self.out)


def run_and_trace(action: Callable[[], None], at_line: Callable[[int], None]) -> bool:
    """Run `action` in a child that calls at_line(N) at the Nth line it executes in hola_megatron.data.prepare.

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


def state_of(root: Path) -> list[tuple[str, int, int]]:
    """What a kill would leave: every path with its inode and size."""
    return [(str(path), about.st_ino, about.st_size) for path in sorted(root.rglob("*")) for about in [path.lstat()]]


def lines_to_kill(preparation: Preparation, record: Path, stride: int) -> list[int]:
    """The numbers of the lines."""
    preparation.reset()
    before = state_of(preparation.root)

    def note(line: int) -> None:
        nonlocal before
        now = state_of(preparation.root)
        with record.open("a") as file:
            file.write(f"{line} {int(now != before)}\n")
        before = now

    assert not run_and_trace(preparation.make, note)
    found = [(int(line), changed == "1") for line, changed in map(str.split, record.read_text().splitlines())]
    return [line for line, changed in found if changed or (line - 1) % stride == 0]


def kill_at(line: int, preparation: Preparation, expected: dict[str, bytes]) -> None:
    old = preparation.reset()

    def die(seen: int) -> None:
        if seen == line:
            os.kill(os.getpid(), signal.SIGKILL)

    assert run_and_trace(preparation.make, die), line
    if preparation.out.exists():
        assert contents(preparation.out) in (old, expected), line
    try:
        preparation.make()
    except DataError as error:  # it had removed its last trace but the dataset
        assert "holds a dataset already" in str(error), (line, error)
    else:
        assert not list(preparation.root.glob(".out.*")), line
    assert contents(preparation.out) == expected, line


def main(kind: str, stride: int) -> None:
    import_streaming()
    best_fit.WINDOW_SAMPLES = 10
    memory = "/dev/shm"  # hundreds of runs: a folder whose fsyncs cost nothing, where there is one
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        (Path(folder) / "data").mkdir()
        preparation = Preparation(Path(folder) / "data", kind)
        expected = preparation.expected()
        assert len(expected) >= 5, sorted(expected)
        lines = lines_to_kill(preparation, Path(folder) / "lines", stride)
        for line in lines:
            kill_at(line, preparation, expected)
    print(f"{kind}: {len(lines)} kills survived")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
