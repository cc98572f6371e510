"""What is shown of the exact memory: the age of cached tokens, counted one by one; and the panel of a small run."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import metric_rows, run_ranks, write_recipe

from hola_kernels import cache_ages, exact_attention, hola_attention, select_cache
from hola_kernels.options import SCORES, STATELESS_SCORES, CacheOptions
from hola_megatron.layers.hola.health import FIELDS, measure
from hola_megatron.layers.inspection import recorded_reads
from hola_megatron.log.memory_health import panel

BLOCK, SLOTS = 8, 3


@pytest.mark.parametrize("cuts", [None, [0, 5, 5, 30, 47, 60]])
def test_ages_are_counted_from_the_blocks_first_token(cuts):
    torch.manual_seed(0)
    score = torch.rand(2 if cuts is None else 1, 30 if cuts is None else 60, 2)
    bounds = cuts or [0, 30, 60]
    cu_seqlens = None if cuts is None else torch.tensor(cuts)
    starts = [start + first for start, end in zip(bounds[:-1], bounds[1:], strict=True)
              for first in range(0, end - start, BLOCK)]
    chosen = select_cache(score=score, block=BLOCK, slots=SLOTS, cu_seqlens=cu_seqlens, backend="torch")
    want = sorted(start - token for start, rows in zip(starts, chosen.flatten(1).tolist(), strict=True)
                  for token in rows if token >= 0)
    have = cache_ages(score=score, block=BLOCK, slots=SLOTS, cu_seqlens=cu_seqlens)
    assert sorted(have.tolist()) == want and min(want) >= 1 and max(want) > BLOCK


def test_ages_in_two_calls_are_those_of_one():
    torch.manual_seed(0)
    score = torch.rand(1, 60, 2)
    x, gate = torch.randn(1, 20, 2, 4), -torch.rand(1, 20, 2)
    _, memory = hola_attention(q=x, k=x, v=x, log_decay=gate, beta=score[:, :20], gamma_q=torch.ones(4),
                               gamma_k=torch.ones(4), gate=torch.zeros(2), sink=None, block=BLOCK, slots=SLOTS,
                               score="betav", return_state=True)
    ranked = score[:, :20] * x.norm(dim=-1)
    whole = cache_ages(score=torch.cat([ranked, score[:, 20:]], 1), block=BLOCK, slots=SLOTS)
    first = cache_ages(score=ranked[:, :16], block=BLOCK, slots=SLOTS)
    later = cache_ages(score=score[:, 20:], block=BLOCK, slots=SLOTS, memory=memory)
    assert sorted([*first.tolist(), *later.tolist()]) == sorted(whole.tolist())


def test_nothing_cached_has_no_age():
    assert cache_ages(score=torch.rand(1, BLOCK, 2), block=BLOCK, slots=SLOTS).numel() == 0


def test_the_panel_has_a_column_for_every_field():
    lines = panel({3: dict.fromkeys(FIELDS, 1.5), 1: dict.fromkeys(FIELDS, math.nan)}).splitlines()
    assert len(lines) == 3 and lines[0].split()[2:] == list(FIELDS)
    assert lines[1].split() == ["1", *["nan"] * len(FIELDS)] and lines[2].split() == ["3", *["1.5000"] * len(FIELDS)]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("cuts", [None, [0, 5, 5, 30, 47, 60]])
def test_the_score_that_is_shown_is_the_one_that_ranks(score, cuts):
    torch.manual_seed(0)
    rows, length = (2, 30) if cuts is None else (1, 60)
    tokens = {"q": torch.randn(rows, length, 2, 4), "k": torch.randn(rows, length, 2, 4),
              "v": torch.randn(rows, length, 2, 4), "log_decay": -torch.rand(rows, length, 2) / 50,
              "beta": torch.rand(rows, length, 2), "gate": torch.zeros(2)}
    if score == "learned":
        tokens["route"] = torch.randn(rows, length, 2)
    gains, cu_seqlens = torch.ones(4), None if cuts is None else torch.tensor(cuts)
    with recorded_reads() as reads:
        hola_attention(**tokens, gamma_q=gains, gamma_k=gains, sink=None, block=BLOCK, slots=SLOTS, score=score,
                       cu_seqlens=cu_seqlens, backend="torch")
    mixer = SimpleNamespace(options=CacheOptions(BLOCK, SLOTS, score), model=SimpleNamespace(backend="torch"),
                            read_parameters=lambda: {"gamma_q": gains, "gamma_k": gains, "sink": None})
    shown = measure(mixer, tokens, cu_seqlens)
    assert shown["score_median"] == pytest.approx(float(reads[0]["score"].median()), rel=1e-6)
    assert shown["cached"] > 0.1 and shown["age_median"] >= 1 and shown["gate"] == 0.5


@pytest.mark.parametrize("score", STATELESS_SCORES)
def test_a_layer_without_a_state_shows_its_read_and_neither_gate_nor_decay(score):
    torch.manual_seed(0)
    tokens = {name: torch.randn(2, 30, 2, 4) for name in "qkv"}
    if score == "learned":
        tokens["route"] = torch.randn(2, 30, 2)
    gains, options = torch.ones(4), CacheOptions(BLOCK, SLOTS, score)
    with recorded_reads() as reads:
        exact_attention(**tokens, gamma_q=gains, gamma_k=gains, sink=None, **options.without_state, backend="torch")
    mixer = SimpleNamespace(options=options, model=SimpleNamespace(backend="torch"),
                            read_parameters=lambda: {"gamma_q": gains, "gamma_k": gains, "sink": None})
    shown = measure(mixer, tokens, None)
    assert shown["score_median"] == pytest.approx(float(reads[0]["score"].median()), rel=1e-6)
    assert shown["cached"] > 0.1 and shown["age_median"] >= 1 and tuple(shown) == FIELDS
    assert {name for name, value in shown.items() if math.isnan(value)} == {"gate", "decay_median", "decay_p01"}


@pytest.mark.distributed
def test_the_layers_of_all_pipeline_stages_are_shown(text_data, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"), train__steps=1,
                          train__warmup_steps=0, data__valid=str(text_data / "valid"), model__pattern="HGHH",
                          model__layers=4, parallel={"pipeline": 2}, valid={"every": 1, "samples": 8})
    done = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=2)
    assert done.code == 0, done.output[-3000:]
    assert [len(metric_rows(tmp_path / "run", f"memory/layer{n}")) for n in (1, 2, 3, 4, 5)] == [1, 0, 1, 1, 0]
