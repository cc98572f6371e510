"""Loading recipes: one YAML file describes a run completely.

`load_recipe` reads a file, applies `a.b=c` overrides, refuses unknown keys and wrong
values (all problems at once, each with its dotted path) and returns a frozen `Recipe`.
A recipe may name a `base:` recipe beside it and state only what differs.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hola_megatron.errors import RecipeError, one_line
from hola_megatron.files import DamagedFile, FileProblem, MissingFile, read_text
from hola_megatron.files.yaml_text import parse_yaml
from hola_megatron.recipe.checks import check_recipe, check_without_effect
from hola_megatron.recipe.fields import unknown_keys
from hola_megatron.recipe.old_names import with_present_names
from hola_megatron.recipe.problems import describe, drop, field_path, stream_problems, too_large, valid_problems
from hola_megatron.recipe.schema import Recipe

ALIASES = {"train.lr": "train.learning_rate", "train.min_lr": "train.min_learning_rate", "init.from": "init.source"}


def load_recipe(path: str | Path, overrides: list[str] | None = None, *, world_size: int | None = None) -> Recipe:
    """Read a recipe file and its base recipes, apply overrides, and check the result once.

    Args:
        path: a .yaml file.
        overrides: "section.key=value" each; the value is YAML.
        world_size: number of processes; None: what depends on it is not checked.

    Raises:
        RecipeError: lists every problem.
    """
    values = _read_with_base(Path(path), seen=[])
    problems = [p for text in overrides or [] if (p := _apply_override(values, text))]
    return build_recipe(values, problems, world_size=world_size)


def build_recipe(values: dict[str, Any], problems: list[str] | None = None, *,
                 world_size: int | None = None, stored: bool = False) -> Recipe:
    """Build a recipe from plain values and check it.

    Args:
        values: {section: {key: value}}, as YAML has it.
        problems: found earlier; they are reported together with new ones.
        world_size: number of processes; None: what depends on it is not checked.
        stored: they are of a checkpoint or an export, where a field without effect may have any value.

    Raises:
        RecipeError: lists every problem.
    """
    problems = list(problems or [])
    values = with_present_names(_resolve_aliases(values, problems), problems)
    problems += unknown_keys(values)
    problems += [*stream_problems(values), *valid_problems(values)]
    problems += too_large(values)
    recipe = None
    try:
        # JSON mode: strict about types, yet dataclasses may be given as mappings
        recipe = TypeAdapter(Recipe).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        problems += describe(error)
        problems = problems or [f"recipe: not usable ({one_line(error)})"]
    except (TypeError, ValueError) as error:
        problems.append(f"recipe: holds a value that is not plain YAML ({one_line(error)})")
    if recipe is None:
        problems += _problems_beside(values)
    elif not problems:
        problems += check_recipe(recipe, world_size=world_size)
        problems += [] if stored else check_without_effect(recipe)
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    return recipe


def _problems_beside(values: dict[str, Any]) -> list[str]:
    """Problems of incompatible fields, without those that involve a wrong key or value."""
    values, wrong = _merge(values, {}), []
    if any(too_large(values)):  # the arithmetic below is not for such numbers
        return []
    for _ in range(2):  # what was wrong may have hidden more
        try:
            recipe = TypeAdapter(Recipe).validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            for loc in {field_path(e["loc"]) for e in error.errors()}:
                wrong.append(".".join(map(str, loc)))
                drop(values, loc)
        except (TypeError, ValueError):
            return []
        else:
            return [problem for problem in check_recipe(recipe) if not any(path in problem for path in wrong)]
    return []


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return parse_yaml(text)
    except DamagedFile as problem:
        raise RecipeError(f"{where}: {problem}") from None


def _read_with_base(path: Path, seen: list[Path]) -> dict[str, Any]:
    try:
        text = read_text(path)
        resolved = path.resolve()
    except MissingFile:
        raise RecipeError(f"{path}: no such recipe{_near_recipe(path)}") from None
    except DamagedFile as problem:
        raise RecipeError(f"{path}: cannot be read as text ({problem}); give the path of a .yaml recipe") from None
    except (FileProblem, OSError, RuntimeError) as problem:  # RuntimeError: links in a circle
        raise RecipeError(f"{path}: {problem}; give the path of a .yaml recipe") from None
    if resolved in seen:
        raise RecipeError(f"{path}: base: leads back to itself")
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(f"{path}: a recipe is a mapping of sections (name, model, data, train, ...)")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise RecipeError(f"{path}: base: {base!r} must be the file name of another recipe")
    return _merge(_read_with_base(path.parent / base, [*seen, resolved]), values)


def _near_recipe(path: Path) -> str:
    try:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
    except OSError:  # a folder that may not be listed
        near = []
    return f"; did you mean {path.parent / near[0]}?" if near else "; give the path of a .yaml recipe"


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(values: dict[str, Any], text: str) -> str | None:
    """Set a.b=c in place; returns the problem, if any."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        return f"{text!r}: an override is written section.key=value, for example train.steps=100"
    *sections, last = ALIASES.get(key, key).split(".")
    at = values
    for section in sections:
        if at.get(section) is None:
            at[section] = {}
        at = at[section]
        if not isinstance(at, dict):
            return f"{key}: {section} is a value, not a section"
    try:
        at[last] = _parse_yaml(value, key)
    except RecipeError as error:
        return str(error)
    return None


def _resolve_aliases(values: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    values = _merge(values, {})
    for alias, full in ALIASES.items():
        section, short = alias.split(".")
        long = full.split(".")[1]
        at = values.get(section)
        if isinstance(at, dict) and short in at:
            at = values[section] = dict(at)
            value = at.pop(short)
            if at.setdefault(long, value) != value:
                problems.append(f"{alias}: given together with {full}, with another value; keep one")
    return values
