"""results/TASK-KEY.json of `tools/evaluate.py --out`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from hola_megatron.files.schema_types import Count, Schema, Sha256


class StoredMeasure(Schema):
    """A number with its interval; null where it is not finite, or there is no interval."""

    model_config = Schema.model_config | {"extra": "forbid"}

    value: float | None
    low: float | None
    high: float | None
    how: Literal["", "wilson", "bootstrap"]


class Cell(Schema):
    model_config = Schema.model_config | {"extra": "forbid"}

    length: Count
    depth: Annotated[float, Field(ge=0, le=1)]
    value: float


class StoredOutcome(Schema):
    model_config = Schema.model_config | {"extra": "forbid"}

    task: str
    metrics: Annotated[dict[str, StoredMeasure], Field(min_length=1)]
    items: Count
    seconds: Annotated[float, Field(ge=0)]
    settings: dict[str, Any]
    cells: list[Cell] | None = None


class EvaluatedModel(Schema):
    name: str
    digest: Sha256


class TaskResultFile(Schema):
    format: Literal[1]
    model: EvaluatedModel
    outcome: StoredOutcome


TASK_RESULT = TypeAdapter(TaskResultFile)
