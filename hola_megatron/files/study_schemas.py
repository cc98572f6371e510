"""Schemas of the files in a study's folder (hola_megatron/study)."""

from __future__ import annotations

from pydantic import TypeAdapter

from hola_megatron.files.schema_types import Schema, Sha256


class DoneRecord(Schema):
    """done.json of a finished run.

    fingerprint: of recipe, task and commands. commands: as they ran. measures: numbers by name. graph: why there was no
    CUDA graph; null where there was one or none was asked for. code, device, versions: what it ran on.
    """

    fingerprint: Sha256
    commands: list[str]
    measures: dict[str, float | int]
    seconds: float
    code: str
    device: str
    versions: dict[str, str]
    graph: str | None = None


class FailedRecord(Schema):
    """failed.json: the last line of the error, and the log that has more."""

    problem: str
    log: str


DONE, FAILED = TypeAdapter(DoneRecord), TypeAdapter(FailedRecord)
