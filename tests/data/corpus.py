"""Documents to prepare, and the command-line tool."""

import contextlib
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hola_megatron.data.mds import mds_writer
from hola_megatron.data.shards import DATASET_FILE, INDEX_FILE, ShardStore
from hola_megatron.errors import run_cli

ROOT = Path(__file__).parents[2]
WORDS = ["the", "of", "and", "to", "in", "a", "is", "that", "it", "was", "for", "with", "his", "which", "one"]


def make_documents(count: int, longest: int = 60, seed: int = 0) -> list[str]:
    """Documents of 1 to `longest` words, accents and line ends among them."""
    rng = random.Random(seed)
    extra = ["é中🙂", "\n\n", "  two  blanks ", "3.14", "x\u2028y"]
    return [" ".join(rng.choices(WORDS + extra, k=rng.randint(1, longest))) for _ in range(count)]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": d}) + "\n" for i, d in enumerate(documents)), encoding="utf-8")
    return path


def forked(function, *arguments) -> multiprocessing.Process:
    """A started process that runs `function`; forked, so that it need not import everything again."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def start_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run tools/prepare_data.py to its end, in a process of its own."""
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has paid for its imports already."""
    spec = importlib.util.spec_from_file_location("tool_prepare_data", ROOT / "tools" / "prepare_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words, out, err = ["tools/prepare_data.py", *map(str, arguments)], io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            pytest.raises(SystemExit) as ended:
        run_cli(module.main)
    return subprocess.CompletedProcess(words, ended.value.code, out.getvalue(), err.getvalue())


def rewrite(folder: Path, change: Callable[[int, dict[str, Any]], None]) -> None:
    """Write a dataset's shards anew, each record after `change(number, record)`, with hashes that are right."""
    data = ShardStore(str(folder))
    records = [data.record(i) for i in range(len(data))]
    columns = json.loads((folder / INDEX_FILE).read_text())["shards"][0]
    for path in (*folder.glob("*.mds"), folder / INDEX_FILE):
        path.unlink()
    names = dict(zip(columns["column_names"], columns["column_encodings"], strict=True))
    info = json.loads((folder / DATASET_FILE).read_text())
    (folder / DATASET_FILE).unlink()  # the writer wants an empty folder
    writer = mds_writer(folder, {name: names[name] for name in ("tokens", "starts", "length")}, 16_000)
    for number, record in enumerate(records):
        changed = {**record, "tokens": record["tokens"].copy(), "length": int(record["length"])}
        change(number, changed)
        writer.write(changed)
    writer.finish()
    info["index_sha256"] = hashlib.sha256((folder / INDEX_FILE).read_bytes()).hexdigest()
    (folder / DATASET_FILE).write_text(json.dumps(info))
