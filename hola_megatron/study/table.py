"""The YAML file of a study: arms (a recipe with overrides) x seeds, and decision rules.

Every field is described here; `load_study` reports all problems at once. Importable without torch.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hola_megatron.errors import RecipeError, one_line, shown
from hola_megatron.files import DamagedFile, FileProblem, read_text
from hola_megatron.files.yaml_text import parse_yaml
from hola_megatron.recipe.loading import load_recipe
from hola_megatron.recipe.schema import Recipe
from hola_megatron.study.far_mqar import FarMqar

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}$")]
Value = str | int | float | bool | list[Any] | None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Arm:
    """One row of the table.

    name: names the arm's folder and its rows in the report.
    recipe: its recipe, relative to the study's file; null: the study's.
    overrides: {"section.key": value}, after those of the study.
    seeds: its own seeds; null: the study's.
    if_supported: an arm that this version's recipes do not know is named in the report; otherwise it is an error.
    given_score: "task": the exact cache ranks tokens by the task's own scores (an oracle); null: by the recipe's.
    note: one line for the report.
    """

    name: Name
    recipe: str | None = None
    overrides: dict[str, Value] = Field(default_factory=dict)
    seeds: list[int] | None = None
    if_supported: bool = False
    given_score: str | None = Field(None, pattern="^task$")
    note: str = ""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Rule:
    """A decision rule: the measure of `arm` is better than that of each of `than` by `by`, in `in_seeds` seeds.

    The arms are compared seed by seed. higher_is_better: false where the measure is a loss.
    """

    name: str = Field(min_length=1)
    arm: Name
    than: list[Name] = Field(min_length=1)
    measure: str = Field(min_length=1)
    by: float = Field(ge=0)
    in_seeds: int = Field(ge=1)
    higher_is_better: bool = True


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Study:
    """A study.

    recipe: of every arm that names none, relative to the study's file.
    overrides: of every arm.
    task: a generated task that the runs train on; null: the recipe's own data, by the trainer.
    cuda_graph: train.cuda_graph on a GPU, for arms whose layers allow it; the report names the others.
    before: commands that make the data, once, before the first run; {out} is the study's folder.
    after: commands after the trainer, with {run}, {arm} and {seed}; each may write measures to {run}/measures/*.json.
    baseline: an arm; the report has the differences of all others from it, seed by seed.
    tables: measures that the report shows, by the start of their names; empty: all.
    smoke: fields that replace those above with --smoke. overrides and task are merged; arms is {name: overrides}.
    """

    name: Name
    title: str
    question: str
    arms: list[Arm] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    recipe: str | None = None
    overrides: dict[str, Value] = Field(default_factory=dict)
    task: FarMqar | None = None
    cuda_graph: bool = False
    before: list[str] = Field(default_factory=list)
    after: list[str] = Field(default_factory=list)
    baseline: Name | None = None
    tables: list[str] = Field(default_factory=list)
    rules: list[Rule] = Field(default_factory=list)
    smoke: dict[str, Any] = Field(default_factory=dict)
    file: Path = Field(Path(), exclude=True)
    is_smoke: bool = Field(False, exclude=True)

    def seeds_of(self, arm: Arm) -> list[int]:
        return self.seeds if arm.seeds is None else arm.seeds

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def recipe_path(self, arm: Arm) -> Path:
        return self.file.parent / (arm.recipe or self.recipe)

    def settings(self, arm: Arm, seed: int, *more: str) -> list[str]:
        """The overrides of a run, as the trainer takes them."""
        values = {**self.overrides, **arm.overrides, "train.seed": seed}
        return [*(f"{key}={json.dumps(value)}" for key, value in values.items()), *more]

    def recipe_of(self, arm: Arm, seed: int, *more: str) -> Recipe:
        """The resolved recipe of a run. Raises RecipeError."""
        return load_recipe(self.recipe_path(arm), self.settings(arm, seed, *more))

    def unsupported(self, arm: Arm) -> str | None:
        """Why the recipe of an arm with if_supported cannot be used; None if it can. RecipeError for another arm."""
        if not (arm.recipe or self.recipe) or not self.seeds_of(arm):
            return None  # `_problems` names it
        try:
            recipe = self.recipe_of(arm, self.seeds_of(arm)[0])
            if self.task is not None and (problems := self.task.problems(recipe, arm.given_score is not None)):
                raise RecipeError(problems)
        except RecipeError as error:
            if arm.if_supported:
                return error.problems[0]
            raise RecipeError([f"{self.file}: arm {arm.name}: {problem}" for problem in error.problems]) from None
        return None

    def supported(self) -> list[Arm]:
        return [arm for arm in self.arms if self.unsupported(arm) is None]

    def fingerprint(self, arm: Arm, seed: int) -> str:
        """sha256 (hex) of all that decides the numbers of a run: recipe, task, score, commands."""
        content = {"recipe": self.recipe_of(arm, seed).to_dict(), "score": arm.given_score, "after": self.after,
                   "task": None if self.task is None else self.task.to_dict()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_study(path: Path, *, smoke: bool = False, settings: list[str] | None = None) -> Study:
    """Read and check a study.

    Args:
        path: a .yaml file.
        smoke: the small form, by the file's section smoke.
        settings: "section.key=value" for every arm's recipe, after the study's own overrides.

    Raises:
        RecipeError: lists every problem, also those of the arms' recipes.
    """
    values = _read(path)
    if smoke:
        if not values.get("smoke"):
            raise RecipeError(f"{path}: smoke: missing, and --smoke asks for it; add the section or leave --smoke away")
        values = _merged(values, values["smoke"])
    for text in settings or []:
        key, equals, value = text.partition("=")
        if not equals or "." not in key:
            raise RecipeError(f"--set: {shown(text)} is not section.key=value")
        values.setdefault("overrides", {})[key] = parse_yaml(value)
    try:
        study = TypeAdapter(Study).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise RecipeError([f"{path}: {line}" for line in _described(error)]) from None
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{path}: holds a value that is not plain YAML ({one_line(error)})") from None
    study = replace(study, file=path, is_smoke=smoke)
    problems = [f"{path}: {problem}" for problem in _problems(study)]
    for arm in study.arms:
        try:
            study.unsupported(arm)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return study


def _read(path: Path) -> dict[str, Any]:
    try:
        values = parse_yaml(read_text(path))
    except (DamagedFile, FileProblem) as problem:
        raise RecipeError(f"{path}: {problem}; give the path of a study (.yaml)") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a study is a mapping (name, title, question, arms, seeds, ...)")
    for name in ("file", "is_smoke"):
        if name in values:
            raise RecipeError(f"{path}: {name}: no such key")
    return values


def _merged(values: dict[str, Any], change: Any) -> dict[str, Any]:
    if not isinstance(change, dict):
        raise RecipeError("smoke: must be a section (key: value)")
    merged = {**values, **change}
    for name in ("overrides", "task"):
        if isinstance(values.get(name), dict) and isinstance(change.get(name), dict):
            merged[name] = {**values[name], **change[name]}
    if isinstance(change.get("arms"), dict):
        merged["arms"] = _with_overrides(values.get("arms"), change["arms"])
    return merged


def _with_overrides(arms: Any, changes: dict[str, Any]) -> Any:
    """The list of arms with further overrides for those named in `changes`; what is no such list is left as it is."""
    if not isinstance(arms, list) or not all(isinstance(arm, dict) for arm in arms):
        return arms
    unknown = sorted(changes.keys() - {arm.get("name") for arm in arms})
    if unknown or not all(isinstance(change, dict) for change in changes.values()):
        raise RecipeError(f"smoke.arms: {shown(unknown or changes)} is not allowed; give {{name of an arm: overrides}}")
    return [{**arm, "overrides": {**arm.get("overrides", {}), **changes.get(arm.get("name"), {})}} for arm in arms]


def _described(error: ValidationError) -> list[str]:
    lines = []
    for found in error.errors(include_url=False):
        path = ".".join(str(part) for part in found["loc"] if part not in ("str", "int", "float", "bool")) or "study"
        if found["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = difflib.get_close_matches(path.split(".")[-1], list(Study.__dataclass_fields__), n=1)
            lines.append(f"{path}: no such key" + (f" (did you mean {known[0]}?)" if known else ""))
        elif found["type"] == "missing":
            lines.append(f"{path}: missing; every study must give it")
        else:
            lines.append(f"{path}: {shown(found['input'])} is not allowed ({found['msg']})")
    return list(dict.fromkeys(lines))


def _problems(study: Study) -> list[str]:
    """Names that are used twice or that nothing has."""
    names = [arm.name for arm in study.arms]
    problems = [f"arms: {name} is given twice; keep one" for name in sorted({n for n in names if names.count(n) > 1})]
    if study.recipe is None:
        problems += [f"arms: {arm.name} has no recipe, and the study has none" for arm in study.arms
                     if arm.recipe is None]
    for arm in study.arms:
        if not study.seeds_of(arm):
            problems.append(f"arms: {arm.name}: seeds is empty; give one or more")
        if arm.given_score and study.task is None:
            problems.append(f"arms: {arm.name}: given_score belongs to a study with a task; leave it out")
    if study.baseline is not None and study.baseline not in names:
        problems.append(f"baseline: no arm {study.baseline}; allowed: {', '.join(names)}")
    for rule in study.rules:
        problems += [f"rules: {rule.name}: no arm {name}; allowed: {', '.join(names)}"
                     for name in (rule.arm, *rule.than) if name not in names]
    if study.task is not None and study.after:
        problems.append("after: belongs to studies without a task; leave it out")
    return problems
