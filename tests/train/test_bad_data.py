"""Data that cannot be trained on end a run with code 3, whatever its layout; a remote that changed is never swapped."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from data.corpus import rewrite
from helpers import metric_rows, run_main, run_ranks, small_recipe

from hola_megatron.data.prepare import PrepareOptions, prepare
from hola_megatron.data.stream import Mixture, PackedDataset


def spoil_all(change: dict[str, bytes] | None) -> object:
    """Every sample: change some columns, or (None) put one token id behind the model's vocabulary of 264."""
    def apply(number: int, record: dict) -> None:
        if change is None:
            record["tokens"][11] = 300
        else:
            record.update(change)
    return apply


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2", "parallel.tensor=1"])
def test_token_ids_above_the_vocabulary_end_every_layout_with_code_3(layout, text_data, tmp_path):
    """Tensor ranks, which each hold a part of the embedding, once trained on them to the end."""
    shutil.copytree(text_data / "train", tmp_path / "data")
    rewrite(tmp_path / "data", spoil_all(None))
    recipe = small_recipe(tmp_path / "recipe.yaml", tmp_path / "data", run_dir=str(tmp_path / "run"))
    done = run_ranks([str(recipe), layout], tmp_path / "log.txt", ranks=2)
    assert done.code == 3 and "Traceback" not in done.output, done.output
    assert "holds token id 300, the tokenizer's vocabulary is 0 to 257" in done.output


@pytest.mark.parametrize("name", ["doubled", "descending", "negative"])
def test_document_starts_that_do_not_ascend_end_with_code_3(name, text_data, tmp_path, capsys):
    positions = {"doubled": (5, 5), "descending": (9, 5), "negative": (-3, 5)}[name]
    shutil.copytree(text_data / "train", tmp_path / "data")
    rewrite(tmp_path / "data", spoil_all({"starts": np.array(positions, "<i4").tobytes()}))
    recipe = small_recipe(tmp_path / "recipe.yaml", tmp_path / "data", run_dir=str(tmp_path / "run"))
    done = run_main([str(recipe)], capsys)
    errors = [line for line in done.output.splitlines() if "Error" in line]
    assert done.code == 3 and len(errors) == 1 and "document starts that do not ascend" in errors[0], done.output


def test_a_tokenizer_larger_than_the_models_vocabulary(text_data, tmp_path, capsys):
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"))
    done = run_main([str(recipe), "model.vocab_size=256"], capsys)
    assert done.code == 3 and "has 258 tokens, model.vocab_size is 256" in done.output, done.output


@pytest.fixture
def bucket(tmp_path) -> Path:
    """What lies behind the URL."""
    folder = tmp_path / "bucket" / "train"
    _prepare(folder, "train")
    return folder


def _fingerprint(folder: Path) -> str:
    return Mixture([PackedDataset(str(folder))], seed=0).fingerprint


def _prepare(folder: Path, part: str) -> None:
    prepare(PrepareOptions([], str(folder), "bytes", 64, bundled=part, overwrite=folder.exists()))


def test_a_remote_prepared_again_is_refused_at_resume_and_read_by_a_new_run(bucket, tmp_path, capsys):
    recipe = small_recipe(tmp_path / "recipe.yaml", bucket, run_dir=str(tmp_path / "run"), train__steps=2,
                          data__train=f"file://{bucket}", data__cache=str(tmp_path / "cache"))
    assert run_main([str(recipe)], capsys).code == 0
    old, losses = _fingerprint(bucket), [row["loss"] for row in metric_rows(tmp_path / "run")]
    _prepare(bucket, "valid")
    new = _fingerprint(bucket)
    done = run_main([str(recipe)], capsys)
    assert done.code == 2 and old[:12] in done.output and new[:12] in done.output, done.output
    done = run_main([str(recipe), "--new"], capsys)
    assert done.code == 0 and new[:12] in done.output and "cache of an earlier preparation" in done.output
    fresh = run_main([str(recipe), f"data.train={bucket}", f"run_dir={tmp_path / 'fresh'}"], capsys)
    assert fresh.code == 0
    again = [row["loss"] for row in metric_rows(tmp_path / "run")]
    assert again == [row["loss"] for row in metric_rows(tmp_path / "fresh")] != losses, "the new text, and only it"
