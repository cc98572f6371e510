"""The fields of a recipe by dotted key: names, defaults, descriptions, and the field most like a wrong key."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any

from hola_megatron.recipe.problems import plain
from hola_megatron.recipe.schema import (
    CacheConfig,
    CheckpointConfig,
    DataConfig,
    DataPhase,
    DataSource,
    Fp8Config,
    GuardConfig,
    HamConfig,
    HqltConfig,
    InitConfig,
    LogConfig,
    ModelConfig,
    MoeConfig,
    ParallelConfig,
    PhaseStream,
    RampStage,
    Recipe,
    TrainConfig,
    ValidConfig,
)

# fields that are lists of sections
LISTS = {"data.train": DataSource, "data.phases": DataPhase, "data.phases.streams": PhaseStream,
         "train.batch_ramp": RampStage}


def unknown_keys(values: dict[str, Any]) -> list[str]:
    """Problems of keys that no section has, with the nearest known key."""
    known = _all_keys(Recipe)
    problems = []

    def check(at: Any, cls: type, prefix: str) -> None:
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key, value in at.items():
            path = f"{prefix}{plain(key)}"
            if key not in fields:
                near = _nearest(path, known)
                problems.append(f"{path}: no such key" + (f" (did you mean {near}?)" if near else ""))
            elif isinstance(value, dict) and (inner := section_class(cls, key)):
                check(value, inner, f"{path}.")
            elif (inner := LISTS.get(_without_numbers(path))) and isinstance(value, list):
                for number, section in enumerate(value):
                    check(section if isinstance(section, dict) else {}, inner, f"{path}.{number}.")

    check(values, Recipe, "")
    return problems


def _nearest(path: str, known: list[str]) -> str | None:
    """The known key most like `path`; within its own section first."""
    section, _, last = path.rpartition(".")
    if inner := LISTS.get(_without_numbers(section)):
        names = difflib.get_close_matches(last, [f.name for f in dataclasses.fields(inner)], n=1, cutoff=0.5)
        return f"{section}.{names[0]}" if names else None
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    names = difflib.get_close_matches(last, [k.rpartition(".")[2] for k in siblings], n=1, cutoff=0.5)
    if names:
        return f"{section}.{names[0]}" if section else names[0]
    same = [k for k in known if k.rpartition(".")[2] == last]
    return (same or difflib.get_close_matches(path, known, n=1, cutoff=0.7) or [None])[0]


def _without_numbers(path: str) -> str:
    """data.phases.0.train.1 -> data.phases.train"""
    return ".".join(part for part in path.split(".") if not part.isdigit())


def section_class(cls: type, key: str) -> type | None:
    """The class of a section's subsection `key`; None where it has none."""
    sections = {(Recipe, "model"): ModelConfig, (Recipe, "data"): DataConfig, (Recipe, "train"): TrainConfig,
                (Recipe, "init"): InitConfig,
                (Recipe, "parallel"): ParallelConfig, (Recipe, "checkpoint"): CheckpointConfig,
                (Recipe, "log"): LogConfig, (Recipe, "valid"): ValidConfig, (Recipe, "guard"): GuardConfig,
                (Recipe, "fp8"): Fp8Config, (ModelConfig, "cache"): CacheConfig, (ModelConfig, "hqlt"): HqltConfig,
                (ModelConfig, "ham"): HamConfig,
                (ModelConfig, "moe"): MoeConfig}
    return sections.get((cls, key))


def _all_keys(cls: type, prefix: str = "") -> list[str]:
    keys = []
    for f in dataclasses.fields(cls):
        inner = section_class(cls, f.name)
        keys += _all_keys(inner, f"{prefix}{f.name}.") if inner else [f"{prefix}{f.name}"]
    return keys


def describe_fields() -> list[tuple[str, str, str]]:
    """(dotted key, default, description) of every field, for documentation and tests."""
    return [(key, "required" if info.is_required() else repr(info.get_default(call_default_factory=True)),
             info.description or "") for key, info in _every_field(Recipe)]


def default_values() -> dict[str, Any]:
    """{dotted key: default} of every field that has one."""
    return {key: info.get_default(call_default_factory=True) for key, info in _every_field(Recipe)
            if not info.is_required()}


def _every_field(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, pydantic's account of it) of every field that is no section."""
    for name, info in cls.__pydantic_fields__.items():
        inner = section_class(cls, name)
        if inner:
            yield from _every_field(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info
