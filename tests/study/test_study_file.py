"""Studies' files: every problem in one line, arms of later versions by name, what a finished run depends on."""

from __future__ import annotations

from pathlib import Path

import pytest

from hola_megatron.errors import RecipeError
from hola_megatron.study.table import load_study

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("changes", "line"), [
    ({"arm": []}, "arm: no such key (did you mean arms?)"),
    ({"seeds": "1"}, "seeds: '1' is not allowed"),
    ({"arms": [{"name": "a"}, {"name": "a"}]}, "arms: a is given twice"),
    ({"rules": [{"name": "r", "arm": "none", "than": ["gdn"], "measure": "m", "by": 0.1, "in_seeds": 1}]},
     "rules: r: no arm none; allowed: gdn, betae, later, oracle"),
    ({"arms": [{"name": "a", "overrides": {"model.cache.slotz": 3}}]}, "arm a: model.cache.slotz: no such key"),
    ({"arms": [{"name": "a", "overrides": {"train.sequence_length": 66}}]}, "arm a: task: 4 pairs need"),
    ({"baseline": "none"}, "baseline: no arm none; allowed: gdn"),
    ({"task": None}, "arms: oracle: given_score belongs to a study with a task"),
    ({"recipe": "nowhere.yaml", "arms": [{"name": "a"}]}, "nowhere.yaml: no such recipe"),
])
def test_problems_are_named(make, changes, line):
    with pytest.raises(RecipeError) as error:
        load_study(make(**changes))
    assert any(line in problem for problem in error.value.problems), error.value.problems


def test_arms_of_later_versions_are_named_and_typing_errors_are_not_taken_for_them(make):
    study = load_study(make())
    assert [arm.name for arm in study.supported()] == ["gdn", "betae", "oracle"]
    assert "model.cache.score: 'nothing' is not allowed" in study.unsupported(study.arm("later"))
    with pytest.raises(RecipeError, match="arm later: model.cache.score"):
        load_study(make(arms=[{"name": "later", "overrides": {"model.cache.score": "nothing"}}]))


def test_the_small_form_changes_what_it_names(make):
    path = make(overrides={"train.steps": 9, "model.heads": 2}, smoke={
        "seeds": [7], "overrides": {"train.steps": 1}, "arms": {"gdn": {"model.conv_width": 2}}})
    study = load_study(path, smoke=True, settings=["train.learning_rate=5e-3"])
    recipe = study.recipe_of(study.arm("gdn"), 7)
    assert study.seeds == [7] and [arm.name for arm in study.arms] == ["gdn", "betae", "later", "oracle"]
    assert (recipe.train.steps, recipe.model.conv_width, recipe.train.learning_rate) == (1, 2, 5e-3)
    assert recipe.model.pattern == "G" and recipe.train.seed == 7
    with pytest.raises(RecipeError, match=r"smoke.arms: .*none"):
        load_study(make(smoke={"arms": {"none": {}}}), smoke=True)
    with pytest.raises(RecipeError, match="smoke: missing"):
        load_study(make(), smoke=True)


def test_a_run_is_known_by_what_decides_its_numbers(make):
    def of(seed: int = 1, **changes) -> str:
        study = load_study(make(**changes))
        return study.fingerprint(study.arm("betae"), seed)

    base = of()
    assert base == of(title="Another title") == of(rules=[])
    task = {"pairs": [2], "test_pairs": [2, 4], "test_samples": 5, "every": 2}
    assert len({base, of(2), of(overrides={"train.steps": 4}), of(task=task)}) == 4


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_of_the_project_can_be_read(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for smoke in (False, True):
        study = load_study(path, smoke=smoke)
        assert study.supported() and study.rules and study.is_smoke == smoke
