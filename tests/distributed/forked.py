"""A function of a test module on several ranks at once, forked from the server of `helpers.run_ranks`."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import rank_server


def run_on_ranks(target: Callable[..., None], ranks: int, folder: Path, *arguments: Any, timeout: float = 300,
                 preload: str = "preloaded") -> None:
    """target(rank, ranks, folder, *arguments) in a process each, with torchrun's variables.

    What they print is added to files in `folder` (`log_of`).

    preload: what their server imports, in a pytest where nobody has started it before. Ends all of them when one fails
    or the time is over, and shows what they said.
    """
    context, port = rank_server(preload)
    processes = [context.Process(target=_rank, args=(target, rank, ranks, port, folder, arguments))
                 for rank in range(ranks)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    try:
        while (None in (codes := [p.exitcode for p in processes])) and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.join()
    if codes != [0] * ranks:
        said = [f"rank {rank}: {log_of(folder, ranks, rank).read_text()[-2000:]}" for rank in range(ranks)]
        raise AssertionError("\n".join([f"ranks ended with {codes}", *said]))


def log_of(folder: Path, ranks: int, rank: int) -> Path:
    """What one rank printed."""
    return folder / f"log{ranks}_{rank}"


def _rank(target: Callable[..., None], rank: int, ranks: int, port: int, folder: Path,
          arguments: tuple[Any, ...]) -> None:
    import torch

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                      MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHDYNAMO_DISABLE="1")
    with log_of(folder, ranks, rank).open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    try:
        target(rank, ranks, folder, *arguments)
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
