"""Weights & Biases by its own package, offline: a run that is stopped and started again goes on under one id."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from helpers import metric_rows, run_main, run_ranks, small_recipe
from train.faults import install_named

pytestmark = pytest.mark.skipif(importlib.util.find_spec("wandb") is None,
                                reason="wandb is not installed (pip install -e '.[wandb]')")
BLOCK, PREAMBLE, HEADER = 32768, 7, 7  # of the package's files: records in the form of LevelDB's log


def records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file."""
    data, at, record = path.read_bytes(), PREAMBLE, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # a block's end too short for a header is padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        record += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def logged(run: Path) -> list[tuple[str, int, dict[str, float]]]:
    """(id, step, values) of every row of all starts of the run, in their order."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted((run / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime):
        for data in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                values = {item.key or "/".join(item.nested_key): json.loads(item.value_json)
                          for item in record.history.item}
                found.append((path.stem.removeprefix("run-"), record.history.step.num, values))
    return found


def offline(fault: str) -> None:
    """In the rank: no network, and a signal after some steps."""
    import os

    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
    if fault:
        install_named(fault)


def test_a_resumed_run_goes_on_under_its_id_with_every_step_once(text_data, tmp_path, monkeypatch, capsys):
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"),
                          train__steps=6, train__global_batch_size=2, log__wandb_project="journeys",
                          data__valid={"web": str(text_data / "valid")}, valid={"every": 3, "samples": 4})
    stopped = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=1, before=partial(offline, "interrupt@3"))
    assert stopped.code == 75 and "report |" not in stopped.output, stopped.output[-3000:]
    done = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=1, before=partial(offline, ""))
    assert done.code == 0 and "resuming at step 3" in done.output and "report |" not in done.output, done.output[-3000:]
    rows = logged(tmp_path / "run")
    assert {name for name, _, _ in rows} == {(tmp_path / "run/wandb_id.txt").read_text().strip()}
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*"))) == 2
    losses = [(step, values["train/loss"]) for _, step, values in rows if "train/loss" in values]
    assert losses == [(row["step"], row["loss"]) for row in metric_rows(tmp_path / "run")]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    valid = [(step, values["valid/web/loss"]) for _, step, values in rows if "valid/web/loss" in values]
    assert valid == [(row["step"], row["loss"]) for row in metric_rows(tmp_path / "run", "valid/web")] and valid


def test_the_recipe_is_the_run_s_configuration(text_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"),
                          train__steps=2, train__global_batch_size=2, log__wandb_project="journeys")
    assert run_main([str(recipe)], capsys).code == 0
    from wandb.proto import wandb_internal_pb2

    (path,) = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
    for data in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            assert record.run.project == "journeys" and config["train"]["steps"] == 2
            return
    raise AssertionError("no record of the run")
