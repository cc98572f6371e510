"""Every layout equals one process: AdamW, Muon and DeepSpeed, with experts, loss in pieces, recomputation, in bf16.

The table is ROWS in layout_rows.py. Each row is a run of the whole program on documents of 1 to 400 bytes in samples of
64, so that cuts fall anywhere in them.

Losses and the norm of all gradients hide what is wrong with one small parameter. So some rows also put every
parameter's gradient together from all ranks and compare it with that of one process, and so what it alone adds to the
norm that clips. Known of other code: the output norm's gradient, a partial sum on each tensor rank, not summed without
sequence parallelism; sinks, gates and decay of the heads of the other tensor ranks missing from the norm, or weights
that all of them hold counted several times; experts missing where expert ranks are tensor ranks; a final norm that
differs from rank to rank under sequence parallelism.
"""

from __future__ import annotations

import importlib.util
import json
import lzma
import random
from pathlib import Path

import pytest
import torch
from distributed.layout_rows import (
    LAST,
    PLAIN,
    REFERENCES,
    ROWS,
    STEPS,
    Probed,
    Row,
    finished,
    probed,
    run_rows,
    wanted,
)
from distributed.same_run import assert_same_steps, assert_same_tensors
from helpers import ROOT, metric_rows

from hola_megatron.data.prepare import PrepareOptions, prepare

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]  # all rows run in one fixture
CLIP = 0.5  # below the norm of every step
BY_HEAD = ("sink", "gate", "A_log", "dt_bias")
OF_A_STATE = BY_HEAD[1:]
PROBED = ("adamw", "one_sample", "experts", "windows", "late", "stateless", "routed")
ONE = {name: Row(1, PLAIN, reference=name, gradients=name in PROBED) for name in REFERENCES}
PACKAGES = {"deepspeed": "deepspeed", "muon": "emerging_optimizers"}
MISSING = {kind for kind, package in PACKAGES.items() if importlib.util.find_spec(package) is None}


def absent(name: str) -> bool:
    return any(name.startswith(kind) for kind in MISSING)


def rows(such=lambda row: True) -> list:
    return [pytest.param(name, marks=[pytest.mark.long] if row.only_long else []) for name, row in ROWS.items()
            if such(row)]


in_fp32 = pytest.mark.parametrize("name", rows(lambda row: row.reference != "bf16"))


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
def runs(short_documents, tmp_path_factory, request) -> Path:
    """The folder of the runs that the chosen tests look at, a row's or a reference's under its name."""
    folder = tmp_path_factory.mktemp("layouts")
    names = wanted(request, tuple(REFERENCES))
    names |= {ROWS[name].reference for name in names if name in ROWS}
    chosen = {name: row for name, row in {**ONE, **ROWS}.items()
              if name in names and not absent(name) and row.chosen}
    run_rows(chosen, folder, short_documents, data__valid=str(short_documents / "valid"),
             train__clip_grad_norm=CLIP, valid={"every": 100, "samples": 9}, log__sample_every=100,
             log__sample_tokens=4, log__sample_prompt="A long prompt: what is behind the first rank's part")
    return folder


@pytest.fixture
def pair(name, runs) -> tuple[Path, Path]:
    """(a row's run, its reference's)."""
    if absent(name):
        pytest.skip("its package is not installed")
    return of(runs, name), of(runs, ROWS[name].reference)


def of(runs: Path, name: str) -> Path:
    return finished(runs, name, {**ONE, **ROWS}[name])


@in_fp32
def test_losses_norms_and_tokens_of_every_step(name, pair):
    assert_same_steps(*pair, STEPS)


@in_fp32
def test_every_parameter_and_moment(name, pair):
    """As the checkpoint holds them."""
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    assert_same_tensors(*(run / LAST for run in pair), kinds)


@in_fp32
def test_validation_and_sample_text(name, pair):
    (have,), (want,) = (metric_rows(run, "valid") for run in pair)
    assert have["loss"] == pytest.approx(want["loss"], rel=1e-5) and have["tokens"] == want["tokens"]
    (have,), (want,) = (metric_rows(run, "sample") for run in pair)
    assert have["text"] == want["text"] and len(have["text"]) > 4


@pytest.mark.parametrize("name", rows(lambda row: "context" in row.parallel and row.reference != "bf16"))
def test_the_memory_is_looked_at_alike(name, pair):
    for layer in (1, 3):
        (have,), (want,) = (metric_rows(run, f"memory/layer{layer}") for run in pair)
        for field in ("cached", "block", "sink", "gate"):
            # no gate of the layer's own where the merge takes it from the token
            assert have[field] == (want[field] and pytest.approx(want[field], rel=1e-3)), (layer, field)
        assert have["cached"] > 0.01


@pytest.mark.parametrize("name", rows(lambda row: row.gradients))
def test_every_gradient_and_its_part_of_the_norm(name, pair, runs):
    want, have = (probed(runs, *key) for key in ((ROWS[name].reference, 1), (name, ROWS[name].ranks)))
    assert want.gradients.keys() == have.gradients.keys() == have.norms.keys()
    wrong = differing(want, have)
    assert not wrong, "\n".join(wrong)
    stateless = ROWS[name].reference == "stateless"
    assert not stateless or not any(key.endswith((*OF_A_STATE, "b_proj.weight")) for key in have.norms)
    for parameter in ("sink", "route_out", "route_bias") if stateless else BY_HEAD:
        if parameter == "gate" and ROWS[name].reference in ("windows", "routed"):
            parameter = "mix_proj.weight"
        seen = [norm for key, norm in have.norms.items() if key.endswith(f".{parameter}")]
        assert seen and min(seen) > 0, f"no gradient of {parameter} seen"
    assert any(parameter.endswith("o_norm.weight") for parameter in have.gradients)
    assert torch.allclose(have.logits, want.logits, atol=1e-4), "logits after a long prompt"
    for mine, theirs in zip(have.scores, want.scores, strict=True):  # of three rows, 2 to 40 tokens of each
        assert mine == (pytest.approx(theirs[0], rel=1e-4), theirs[1]) and theirs[0] < -1


def differing(want: Probed, have: Probed) -> list[str]:
    wrong = [f"{name}: gradient off by {float(off):.1e}" for name, gradient in want.gradients.items()
             if (off := (have.gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-7)) > 2e-4]
    return wrong + [f"{name}: adds {have.norms[name]:.4e} to the norm, not {norm:.4e}"
                    for name, norm in want.norms.items()
                    if have.norms[name] != pytest.approx(norm, rel=2e-4, abs=1e-9)]


@pytest.mark.parametrize("name", rows(lambda row: row.reference == "bf16"))
def test_bf16_with_recompute_learns_like_one_process(name, pair):
    have, want = (metric_rows(run) for run in pair)
    assert have[-1]["loss"] < have[0]["loss"] - 0.3
    assert all(mine["loss"] == pytest.approx(theirs["loss"], rel=5e-3)
               for mine, theirs in zip(have, want, strict=True))
    (have,), (want,) = (metric_rows(run, "valid") for run in pair)
    assert have["loss"] == pytest.approx(want["loss"], rel=5e-3)


def test_gradients_are_clipped_here_and_every_reference_is_another(runs):
    """Else these comparisons would not see clipping, and a change of the recipe that does nothing."""
    rows = {name: metric_rows(of(runs, name)) for name in REFERENCES if not absent(name)}
    assert min(row["grad_norm"] for row in rows["adamw"]) > CLIP
    assert rows["one_sample"][-1]["loss"] == pytest.approx(rows.pop("adamw")[-1]["loss"], rel=1e-5)
    assert {row["loss_tokens"] for row in rows["joined"]} == {8 * 64}
    last = [found[STEPS - 1]["loss"] for found in rows.values()]
    assert len(set(last)) == len(last)
