"""What the schemas of JSON files are made of."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

LARGEST = 2**63 - 1  # of a count: what an int64 holds


def _shard_name(name: str) -> str:
    """The name of a file in the folder, or in one of its folders part-IIIII-of-NNNNN."""
    part, _, inner = name.rpartition("/")
    if part and re.fullmatch(r"part-[0-9]{5}-of-[0-9]{5}", part):
        _file_name(inner)
        return name
    return _file_name(name)


def _file_name(name: str) -> str:
    if name in ("", ".", "..") or any(c in name for c in "/\\\0") or not name.isprintable() or len(name) > 255:
        raise ValueError("lies outside its folder: must be the name of a file in it")
    return name


Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
FileName = Annotated[str, AfterValidator(_file_name)]
ShardName = Annotated[str, AfterValidator(_shard_name)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Schema(BaseModel):
    """Base of all: strict, finite numbers, unknown keys let through."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
