"""The parts of a dataset: one of them, or all of them by processes of this machine.

A part is a dataset of its own, in `OUT/part-IIIII-of-NNNNN`. Its bytes depend on the input, the options and the number
of parts, not on where or by how many processes it is made.
"""

from __future__ import annotations

import shutil
import signal
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

from hola_megatron.data.prepare.children import end_with_parent, spawning
from hola_megatron.data.prepare.making import Job, Report, make, summary_of
from hola_megatron.data.prepare.options import PrepareOptions, Summary
from hola_megatron.data.prepare.progress import Counts, ProgressReport
from hola_megatron.data.prepare.splitting import Part, plan_of, split
from hola_megatron.data.prepare.tokenizing import one_thread
from hola_megatron.data.shards import DATASET_FILE, ShardStore
from hola_megatron.data.sources import Source
from hola_megatron.data.tokenizer import Tokenizer, load_tokenizer
from hola_megatron.errors import DataError, UserError
from hola_megatron.files.ownership import beside, owned

# a worker of a killed preparation ends within a batch
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Task:
    """A part to make in the folder `parent`; it can be sent to another process."""

    options: PrepareOptions
    sources: Sequence[Source]
    parent: Path
    part: Part

    @property
    def out(self) -> Path:
        return self.parent / self.part.name

    @property
    def bytes(self) -> int:
        return sum(source.bytes_of_range() for source in self.sources)


def tasks_of(options: PrepareOptions, tokenizer: Tokenizer, sources: Sequence[Source], parts: int,
             parent: Path) -> list[Task]:
    """All parts, in order. Raises `DataError` where the input cannot be cut into so many."""
    plan = plan_of(options.shape(tokenizer), sources, parts)
    return [Task(options, own, parent, Part(number, parts, plan))
            for number, own in enumerate(split(sources, parts), start=1)]


def make_part(task: Task, tokenizer: Tokenizer, report: Report, *, patience_seconds: float = 0.0) -> Summary:
    """Make a part, or go on with it, or verify the one that is there.

    Raises:
        DataError: as `prepare`; or a part of another preparation lies there.
    """
    out = task.out
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with owned(beside(out, "wait for its end"), patience_seconds=patience_seconds):
            if (out / DATASET_FILE).exists() and _is_made(task):
                report(Counts(task.bytes, *_sizes(out)))
                return summary_of(out)
            return make(Job(task.options, tokenizer, task.sources, out, task.part), report)
    except OSError as error:
        raise DataError(f"{out}: could not be prepared ({error}); check permissions and free space") from error


def _is_made(task: Task) -> bool:
    """Whether the part that is there is this one, whole; one that is damaged or another's is made again or refused."""
    try:
        store = ShardStore(str(task.out))
        same = (store.info.get("part") or {}).get("plan") == task.part.plan
        if same and not task.options.overwrite:
            for shard in range(len(store.shard_sizes)):
                store.open(shard)
            return True
    except DataError:
        shutil.rmtree(task.out)
        return False
    if not same and not task.options.overwrite:
        raise DataError(f"{task.out}: is of another preparation (input files or options); choose another --out, or "
                        "pass --overwrite to replace it")
    return False


def _sizes(out: Path) -> tuple[int, int]:
    info = ShardStore(str(out)).info
    return info["text_bytes"], info["tokens"]


def make_all(tasks: Sequence[Task], workers: int, progress: ProgressReport) -> None:
    """Make the parts by so many processes, each one part at a time.

    Raises:
        DataError: what a part met (the others keep what they have finished), or a process was killed.
    """
    context = spawning()
    counters = context.RawArray("q", 3 * len(tasks))
    waiting, busy, processes = deque(enumerate(tasks)), [], []
    try:
        for _ in range(min(workers, len(tasks))):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, counters), daemon=True)
            process.start()
            theirs.close()  # so that the pipe ends with the process
            processes.append(process)
            pipe.send(waiting.popleft())
            busy.append(pipe)
        while busy:
            for pipe in connection.wait(busy, timeout=1):
                _raise_problem(pipe)
                if waiting:
                    pipe.send(waiting.popleft())
                else:
                    busy.remove(pipe)
                    pipe.close()
            progress.update(Counts(*(sum(counters[field::3]) for field in range(3))))
    finally:
        for process in processes:
            process.kill()  # what it has finished is kept
            process.join()


def _raise_problem(pipe: Any) -> None:
    try:
        answer = pipe.recv()
    except (EOFError, ConnectionError):
        raise DataError("a process that makes a part was killed, perhaps for want of memory; the same command goes on, "
                        "try it with fewer --workers") from None
    if answer is not None:
        raise answer


def _serve(pipe: Any, counters: Any) -> None:
    """A worker process: make the parts that come, until the parent closes the pipe or is killed."""
    end_with_parent()
    one_thread()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    tokenizer = None
    while True:
        try:
            number, task = pipe.recv()
        except EOFError:
            return
        tokenizer = tokenizer or load_tokenizer(task.options.tokenizer)

        def report(now: Counts, at: int = 3 * number) -> None:
            counters[at : at + 3] = now

        try:
            make_part(replace(task, options=replace(task.options, workers=1)), tokenizer, report,
                      patience_seconds=PATIENCE_SECONDS)
            pipe.send(None)
        except UserError as error:
            pipe.send(error)
