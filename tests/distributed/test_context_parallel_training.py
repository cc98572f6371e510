"""Training with the sequence cut over ranks, beside every other cut, against one process.

Documents of 1 to 400 bytes in samples of 64, so that cuts fall anywhere in them. Three steps, six in
bf16: losses, gradient norms and every parameter; then the whole program with validation and sample text.
"""

from __future__ import annotations

import json
import lzma
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from context_layouts import LAYOUTS, main
from forked import log_of, run_on_ranks
from helpers import ROOT, checkpoint_tensors, metric_rows, write_recipe

from hola_megatron.config import load_recipe
from hola_megatron.data.prepare import PrepareOptions, prepare
from hola_megatron.errors import RecipeError

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("short")
    with lzma.open(ROOT / "hola_megatron/data/bundled/shakespeare.txt.xz", "rt") as file:
        text = file.read(40_000)
    lengths, at = random.Random(5), 0
    for part, size in (("train", 12_000), ("valid", 1_500)):
        end = at + size
        with (folder / f"{part}.jsonl").open("w") as file:
            while at < end:
                length = lengths.choice((1, 1, 3, 14, 15, 16, 40, 70, 130, 400))
                file.write(json.dumps({"text": text[at: at + length]}) + "\n")
                at += length
        prepare(PrepareOptions([str(folder / f"{part}.jsonl")], str(folder / part), "bytes", 64, workers=1))
    return folder


@pytest.fixture(scope="module")
def folder(short_documents, tmp_path_factory) -> Path:
    """Where one rank, and four beside it, have stored what came out."""
    folder = tmp_path_factory.mktemp("layouts")
    with ThreadPoolExecutor(len(LAYOUTS)) as pool:
        list(pool.map(lambda ranks: run_on_ranks(main, ranks, folder, short_documents), LAYOUTS))
    return folder


def load(folder: Path, ranks: int) -> list[dict]:
    return [torch.load(folder / f"layouts{ranks}_{rank}.pt", weights_only=False) for rank in range(ranks)]


def whole(ranks: list[dict]) -> dict[str, torch.Tensor]:
    """Every logical parameter, from the slices of all ranks; NaN where no rank has any."""
    found: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for name, shape, axis, offset, part in rank["slices"]:
            target = found.setdefault(name, torch.full(shape, torch.nan))
            target.narrow(axis, offset, part.shape[axis]).copy_(part)
    return found


@pytest.mark.parametrize("name", [name for name in LAYOUTS[4] if not name.startswith("bf16")])
def test_layout_equals_one_process(name, folder):
    alone, ranks = load(folder, 1)[0][name.split("/")[0]], [rank[name] for rank in load(folder, 4)]
    assert len(alone["rows"]) == 3 and all(rank["rows"] == ranks[0]["rows"] for rank in ranks)
    for want, have in zip(alone["rows"], ranks[0]["rows"], strict=True):
        assert have[0] == pytest.approx(want[0], rel=1e-5) and have[1] == pytest.approx(want[1], rel=1e-4)
        assert have[2] == want[2]
    expected, found = whole([alone]), whole(ranks)
    assert expected.keys() == found.keys()
    errors = {n: float((found[n] - x).norm() / x.norm().clamp_min(1e-3)) for n, x in expected.items()}
    assert max(errors.values()) < 1e-4, errors
    for rank in ranks:
        assert rank["evaluated"][1] % alone["evaluated"][1] == 0  # data ranks add their own samples
        assert torch.allclose(rank["logits"], alone["logits"], atol=1e-4), "logits after a long prompt"


def test_bf16_with_recompute_learns_like_one_process(folder):
    alone, rows = load(folder, 1)[0]["bf16"]["rows"], load(folder, 4)[0]["bf16/cp2_pp2"]["rows"]
    assert rows[-1][0] < rows[0][0] - 0.3
    assert all(have[0] == pytest.approx(want[0], rel=5e-3) for want, have in zip(alone, rows, strict=True))


def test_the_program_validates_and_looks_at_the_memory_alike(folder):
    (want,), (have,) = (metric_rows(folder / f"run{ranks}", "valid") for ranks in (1, 4))
    assert have["loss"] == pytest.approx(want["loss"], rel=1e-5) and have["tokens"] == want["tokens"]
    for layer in (1, 3):
        (want,), (have,) = (metric_rows(folder / f"run{ranks}", f"memory/layer{layer}") for ranks in (1, 4))
        for field in ("cached", "block", "sink", "gate"):
            assert have[field] == pytest.approx(want[field], rel=1e-3), (layer, field)
        assert have["cached"] > 0.01
    assert "sample | " in log_of(folder, 4, 0).read_text()


@pytest.mark.parametrize("kind", ["weight", "exp_avg", "exp_avg_sq"])
def test_its_checkpoint_is_that_of_one_process(kind, folder):
    want, have = (checkpoint_tensors(folder / f"run{ranks}/checkpoints/step_00000002", kind) for ranks in (1, 4))
    assert want.keys() == have.keys()
    for name, x in want.items():
        assert float((have[name] - x).norm()) <= 1e-4 * float(x.norm().clamp_min(1e-3)), name


@pytest.mark.parametrize(("changes", "problem"), [
    ({"parallel": {"context": 3}}, "rows of 128 tokens .* are not a multiple of parallel.context = 3"),
    ({"parallel": {"context": 4}, "train__sequence_length": 28}, "4 ranks get 14 tokens each .* and need 15")])
def test_cuts_that_cannot_be_are_named(changes, problem, tmp_path):
    with pytest.raises(RecipeError, match=problem):
        load_recipe(write_recipe(tmp_path / "r.yaml", tmp_path, **changes))
