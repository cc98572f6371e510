"""Running the real programs from tests: own process group, a time limit, output to a file."""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from hola_megatron.checkpoint.folder import open_checkpoint
from hola_megatron.checkpoint.tensors import TensorReader
from hola_megatron.errors import run_cli

ROOT = Path(__file__).parent.parent
LONG = bool(os.environ.get("HOLA_TEST_LONG"))  # pytest --long

# every kind of layer, everything tiny
MICRO = {
    "name": "micro",
    "model": {"layers": 4, "hidden_size": 32, "pattern": "HGHA", "heads": 2, "key_dim": 16, "value_dim": 16,
              "attention_heads": 2, "mlp_hidden_size": 64, "vocab_size": 264, "cache": {"block": 16, "slots": 4}},
    "data": {"train": "", "tokenizer": "bytes"},
    "train": {"sequence_length": 64, "global_batch_size": 8, "micro_batch_size": 2, "steps": 5,
              "learning_rate": 3e-3, "warmup_steps": 2, "weight_decay": 0.1, "precision": "fp32"},
    "checkpoint": {"every": 100},
    "log": {"every": 1, "tensorboard": False},
}


@dataclass
class Finished:
    """How a program ended."""

    code: int
    output: str


def run_program(arguments: list[str], log: Path, *, ranks: int = 0, timeout: float = 300,
                environment: dict[str, str] | None = None) -> Finished:
    """`python -m arguments...`, or with ranks under our launcher; killed as a group when late."""
    process = start_program(arguments, log, ranks=ranks, environment=environment)
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise AssertionError(f"no end within {timeout} s:\n{log.read_text()[-3000:]}") from None
    return Finished(code, log.read_text(errors="replace"))


def run_ranks(arguments: list[str], log: Path, *, ranks: int, timeout: float = 300,
              before: Callable[[], None] | None = None) -> Finished:
    """`python -m hola_megatron.train arguments...` on so many ranks, each in a process of its own.

    What torchrun would do, but the ranks are forked from a server that has imported everything: one start of the
    real program costs eight seconds of imports a rank. Its launcher is tested in tests/train and tests/slurm.
    before: called in every rank first.
    """
    context, port = rank_server()
    log.write_text("")
    processes = [context.Process(target=_rank, args=(arguments, log, rank, ranks, port, before))
                 for rank in range(ranks)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    try:
        while True:
            codes = [process.exitcode for process in processes]
            failed = [code for code in codes if code]
            if failed or None not in codes:
                return Finished(failed[0] if failed else 0, log.read_text(errors="replace"))
            if time.monotonic() > deadline:
                raise AssertionError(f"no end within {timeout} s:\n{log.read_text()[-3000:]}")
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_each(arguments: list[list[str]], folder: Path, *, timeout: float = 300,
             folders: list[Path] | None = None) -> list[Finished]:
    """`python -m hola_megatron.train arguments[rank]` for every rank, each to its own end, as without a launcher.

    folders: the working folder of each rank, as if on its own node.
    """
    context, port = rank_server()
    logs = [folder / f"rank-{rank}.log" for rank in range(len(arguments))]
    for log in logs:
        log.write_text("")
    processes = []
    for rank, (given, log) in enumerate(zip(arguments, logs, strict=True)):
        before = partial(os.chdir, folders[rank]) if folders else None
        processes.append(context.Process(target=_rank, args=(given, log, rank, len(arguments), port, before)))
        processes[-1].start()
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
        output = [log.read_text(errors="replace") for log in logs]
        assert None not in [process.exitcode for process in processes], f"no end within {timeout} s:\n{output}"
        return [Finished(process.exitcode, text) for process, text in zip(processes, output, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def rank_server(preload: str = "preloaded") -> tuple[Any, int]:
    """(the multiprocessing context that forks ranks from a process with everything imported, a free port)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return context, free.getsockname()[1]


def _rank(arguments: list[str], log: Path, rank: int, ranks: int, port: int, before: Callable[[], None] | None) -> None:
    assert "preloaded" in sys.modules, "the fork server failed to import tests/preloaded.py, silently as is its way"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                      MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHDYNAMO_DISABLE="1")
    with log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    from hola_megatron.train.__main__ import main

    if before:
        before()
    run_cli(lambda: main(arguments))


def start_program(arguments: list[str], log: Path, *, ranks: int = 0,
                  environment: dict[str, str] | None = None) -> subprocess.Popen:
    launcher = ["-m", "hola_megatron.launch", "--nproc-per-node", str(ranks)] if ranks else []
    variables = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", **(environment or {})}
    with log.open("w") as output:
        return subprocess.Popen([sys.executable, *launcher, *arguments], stdout=output, stderr=subprocess.STDOUT,
                                cwd=ROOT, env=variables, start_new_session=True)


def run_tool(name: str, arguments: list[str], capsys: Any) -> Finished:
    """tools/NAME in this process, which has paid for its imports already."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    capsys.readouterr()
    with mock.patch.object(sys, "argv", [f"tools/{name}.py", *arguments]):
        try:
            run_cli(module.main)
        except SystemExit as ended:
            code = ended.code
    seen = capsys.readouterr()
    return Finished(code, seen.out + seen.err)


def run_main(arguments: list[str], capsys: Any) -> Finished:
    """`python -m hola_megatron.train arguments...` in this process, which has paid for its imports already."""
    from hola_megatron.train.__main__ import main

    capsys.readouterr()
    code = None
    try:
        run_cli(lambda: main(arguments))
    except SystemExit as ended:
        code = ended.code
    seen = capsys.readouterr()
    return Finished(code, seen.out + seen.err)


def write_recipe(path: Path, data: Path, **changes: Any) -> Path:
    """MICRO with changes given as section__key=value, as a file (JSON is YAML)."""
    recipe = json.loads(json.dumps(MICRO))
    recipe["data"]["train"] = str(data)
    for key, value in changes.items():
        *sections, last = key.split("__")
        at = recipe
        for section in sections:
            at = at.setdefault(section, {})
        at[last] = value
    path.write_text(json.dumps(recipe))
    return path


def small_recipe(path: Path, data: Path, **changes: Any) -> Path:
    """`write_recipe` with two layers and few micro-batches: a third of the work, for what depends on no model."""
    batch = math.gcd(4, changes.get("train__global_batch_size", MICRO["train"]["global_batch_size"]))
    small = {"model__layers": 2, "model__pattern": "HA", "train__micro_batch_size": batch}
    return write_recipe(path, data, **{**small, **changes})


def metric_rows(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def examples(count: int) -> int:
    """How many examples a property test draws: `count` with --long, a quarter of it otherwise."""
    return count if LONG else max(count // 4, 1)


def checkpoint_tensors(path: Path, kind: str = "weight") -> dict[str, torch.Tensor]:
    """Every logical tensor of a checkpoint, whole."""
    checkpoint = open_checkpoint(path)
    reader = TensorReader(path, checkpoint.manifest["tensors"][kind])
    return {name: reader.whole(name) for name in reader.names()}
