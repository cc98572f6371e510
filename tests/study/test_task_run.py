"""Runs on a generated task: the engine sees the task's tokens, losses and scores, and is measured by its own logits."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers import run_tool

from hola_kernels import exact_read, gated_delta_rule, hola_attention
from hola_kernels.stages import CacheOptions
from hola_megatron.engine.build import build_engine
from hola_megatron.layers.given_score import SCORE, given_score
from hola_megatron.startup.start import start, stop
from hola_megatron.study.kept import kept_shares
from hola_megatron.study.table import load_study
from hola_megatron.study.task_run import answers, run_task


def test_a_given_score_selects_the_cache():
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q, k, v = draw(2, 40, 2, 8), draw(2, 40, 2, 8), draw(2, 40, 2, 4)
    tokens = {"q": q, "k": k, "v": v, "log_decay": -draw(2, 40, 2).abs(), "beta": draw(2, 40, 2).sigmoid()}
    read = {"gamma_q": draw(8), "gamma_k": draw(8), "sink": draw(2)}
    gate, score, sizes = draw(2), draw(2, 40), {"block": 8, "slots": 3}
    o_state, _, _ = gated_delta_rule(**tokens)
    o_cache, _ = exact_read(q=q, k=k, v=v, score=score[..., None].expand(-1, -1, 2), **read, **sizes)
    with given_score(score):
        found = hola_attention(**tokens, **read, gate=gate, score=SCORE, **sizes)
        other = hola_attention(**tokens, **read, gate=gate, score="betae", **sizes)
    torch.testing.assert_close(found, o_state + gate.sigmoid()[:, None] * o_cache, rtol=1e-9, atol=1e-9)
    assert other.equal(hola_attention(**tokens, **read, gate=gate, score="betae", **sizes))  # a layer's own score
    assert not found.allclose(hola_attention(**tokens, **read, gate=gate, score=SCORE, **sizes))
    assert CacheOptions(score=SCORE).score == SCORE


@pytest.mark.parametrize("name", ["gdn", "oracle"])
def test_a_run_repeats_and_writes_what_it_measures(make, tmp_path, name):
    study = load_study(make())
    arm = study.arm(name)
    folders = [tmp_path / "a", tmp_path / "b"]
    found = []
    for folder in folders:
        folder.mkdir()
        found.append(run_task(study.recipe_of(arm, 1), study.task, folder, by_task_score=name == "oracle"))
    kept = {"gdn": [], "oracle": ["kept/layer_1/pairs_2", "kept/layer_1/pairs_4"]}[name]
    assert found[0] == found[1] and list(found[0]) == [
        "loss", "accuracy/length_64/pairs_2", "accuracy/length_64/pairs_4", "accuracy/length_64/mean", *kept]
    assert all(found[0][measure] == 1 for measure in kept)  # 4 slots, at most 4 values: an oracle holds all
    texts = [(folder / "metrics.jsonl").read_text() for folder in folders]
    rows = [json.loads(line) for line in texts[0].splitlines()]
    assert texts[0] == texts[1]
    assert [(row["step"], row["kind"]) for row in rows] == [(2, "task"), (3, "train"), (3, "task")]
    assert rows[1]["loss"] == found[0]["loss"]


def test_the_checkpoint_is_a_run_folder_s_which_other_tools_read(make, tmp_path, capsys):
    """Exported, the model gives the accuracies that the study has measured."""
    study = load_study(make(overrides={"model.vocab_size": 320, "train.steps": 30, "train.learning_rate": 2e-2}))
    found = run_task(study.recipe_of(study.arm("betae"), 1), study.task, tmp_path)
    done = run_tool("evaluate", [str(tmp_path), "--far-mqar", "64", "--pairs", "2", "4", "--samples", "4", "--json",
                                 str(tmp_path / "found.json")], capsys)
    assert done.code == 0, done.output
    text = (tmp_path / "found.json").read_text()
    for pairs in (2, 4):
        accuracy = found[f"accuracy/length_64/pairs_{pairs}"]
        assert re.search(rf'"far_mqar/64/{pairs}_pairs".*?"accuracy".*?{accuracy}\b', text, re.S), (accuracy, text)


def test_kept_shares_count_the_values_in_the_slots(make):
    """Of a layer that keeps the newest tokens: those among the last ones before its last block."""
    study = load_study(make(arms=[{"name": "a", "overrides": {"model.cache.score": "recency", "model.layers": 2}}],
                            rules=[]))
    recipe = study.recipe_of(study.arms[0], 1)
    engine = build_engine(recipe, start(recipe))
    try:
        drawn = study.task.test(length=64, vocabulary=64, pairs=4, first=0, rows=3)
        near = drawn._replace(stored=drawn.stored.copy())
        near.stored[:, :3] = [[44, 47, 43]] * 3  # of 48 tokens before the questions, the slots hold 44 to 47
        assert kept_shares(engine, drawn) == [0.0, 0.0] and kept_shares(engine, near) == [0.5, 0.5]
    finally:
        stop()


def test_answers_are_the_model_s_own_first_choices(make):
    study = load_study(make())
    recipe = study.recipe_of(study.arm("betae"), 1)
    engine = build_engine(recipe, start(recipe))
    try:
        with torch.no_grad():
            drawn = study.task.test(length=128, vocabulary=64, pairs=4, first=0, rows=3)
            for chunk in engine.model:
                chunk.eval()
            logits = engine.model[0](torch.from_numpy(drawn.tokens), None, None)
            wanted = logits.float().argmax(-1).gather(1, torch.from_numpy(drawn.asked))
            assert answers(engine, drawn).equal(wanted)
    finally:
        stop()
