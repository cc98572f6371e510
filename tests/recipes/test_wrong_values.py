"""Values that YAML or a mapping lets through and a recipe does not: one line each, with the dotted path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers import MICRO

from hola_megatron.config import load_recipe
from hola_megatron.errors import RecipeError
from hola_megatron.files.yaml_text import dump_yaml

# (override, how its only line begins)
WRONG = [
    ("data.train=[{path: a, wieght: 2}]", "data.train.0.wieght: no such key (did you mean data.train.0.weight?)"),
    ("data.train=[{path: a}, {paht: b, path: b}]", "data.train.1.paht: no such key (did you mean data.train.1.path?)"),
    ("data.train=[A]", "data.train.0: 'A' is not allowed; a stream is a mapping, write {path: A, weight: 1}"),
    ("data.train=[[a]]", "data.train.0: ['a'] is not allowed; a stream is a mapping"),
    ("data.train=[]", "data.train: [] names no stream"), ("data.train=null", "data.train: None is not allowed; give"),
    ("data.train={path: a}", "data.train: {'path': 'a'} is not allowed; give a folder, or a list of streams"),
    ("data.train=[{path: 3}]", "data.train.0.path: 3 is not allowed"),
    ("data.train=[{path: a, weight: yes}]", "data.train.0.weight: True is not allowed; give a number"),
    ("data.train=[{path: a, weight: 1e300}]", "data.train.0.weight: 1e+300 is too large"),
    ("name=[a]", "name: ['a'] is not allowed; give text"), ("model.pattern=[H, G]", "model.pattern: ['H', 'G']"),
    ("name=on", "name: True is not allowed; give text, in quotes"), ("name=1e3", "name: 1000.0 is not allowed"),
    ("name=..", "name: '..' is not allowed"), ("train.steps=010", "train.steps: not valid YAML (line 1: 010 would"),
    ("train.steps=1:30", "train.steps: not valid YAML (line 1: 1:30 would"),
    ("train.steps=1e3", "train.steps: 1000.0 is not allowed; give a whole number"),
    ("train.steps=yes", "train.steps: True is not allowed"), ("train=5", "train: 5 is not allowed; give a section"),
    ("model=[1]", "model: [1] is not allowed; give a section"), ("model.cache=[]", "model.cache: [] is not allowed"),
    ("model.layers=1000000000", "model.layers: 1000000000 is too large"),
    ("train.steps=99999999999999999999", "train.steps: 99999999999999999999 is too large"),
    ("parallel.timeout_minutes=1e300", "parallel.timeout_minutes: 1e+300 is too large"),
    ("train.learning_rate=1e400", "train.learning_rate: inf is not allowed"),
    ("log.sample_prompt=5", "log.sample_prompt: 5 is not allowed; give text, in quotes")]


@pytest.fixture
def recipe(tmp_path) -> Path:
    values = json.loads(json.dumps(MICRO))
    values["data"]["train"] = "x"
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize(("override", "said"), WRONG)
def test_a_wrong_value_is_one_line(recipe, override, said):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, [override])
    assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith(said), caught.value.problems
    assert len(str(caught.value).splitlines()) == 1


def test_no_section_may_be_a_list_or_a_number(recipe):
    for section in ("model", "data", "train", "fp8", "parallel", "checkpoint", "log", "valid", "guard", "model.cache",
                    "model.moe"):
        for value in ("[]", "[1]", "5", "text", "null", "[{a: 1}]"):
            with pytest.raises(RecipeError) as caught:
                load_recipe(recipe, [f"{section}={value}"])
            assert any(problem.startswith(f"{section}: ") for problem in caught.value.problems), (section, value)


def test_a_key_that_is_no_text_is_told(recipe):
    for key in ("1", "null", "true", "'a\\nb'", "''", "2024-01-01"):
        with pytest.raises(RecipeError) as caught:
            load_recipe(recipe, [f"train={{{key}: 1}}"])
        assert all("\n" not in problem for problem in caught.value.problems)


@pytest.mark.parametrize("name", ["1e3", "010", "2024-01-01", "yes", "null", "0x1F"])
def test_a_name_that_looks_like_a_number_survives_the_run_folder(recipe, name):
    """recipe.yaml of a run folder is itself a recipe."""
    made = load_recipe(recipe, [f"name='{name}'"])
    recipe.write_text(dump_yaml(made.to_dict()))
    assert load_recipe(recipe).name == name
    assert yaml.safe_load(recipe.read_text())["train"] == made.to_dict()["train"]
