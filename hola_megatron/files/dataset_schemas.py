"""Schemas of a dataset's dataset.json and index.json, and of the journal of its preparation (journal.jsonl)."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, StringConstraints
from pydantic import model_validator as _model_validator

from hola_megatron.files.schema_types import Count, Positive, Schema, Sha256, ShardName

_COLUMN_BYTES = {"int": 8, "bytes": None}  # of MDS encodings


class TokenizerIdentity(Schema):
    """What `Tokenizer.identity` gives."""

    kind: str
    vocab_size: Positive
    bos_id: Count | None
    eos_id: Count
    sha256: Sha256


class PartRecord(Schema):
    """Which part of a dataset a dataset is."""

    number: Annotated[int, Field(ge=1, le=99_999)]
    of: Annotated[int, Field(ge=1, le=99_999)]
    plan: Sha256


class DatasetRecord(Schema):
    """dataset.json."""

    format: str
    format_version: int
    tokenizer: TokenizerIdentity
    sequence_length: Annotated[int, Field(ge=1, le=2**31 - 2)]
    documents: Count
    text_bytes: Count
    tokens: Positive
    samples: Positive
    sources: list[dict[str, Any]] = Field(default_factory=list)
    part: PartRecord | None = None
    plan: Sha256 | None = None  # of the parts that were joined
    index_sha256: Sha256 | None = None  # of the index.json beside it; datasets of earlier versions have none


class ShardFile(Schema):
    """Where a shard's samples lie."""

    model_config = ConfigDict(extra="forbid")  # mosaicml-streaming takes these as arguments

    basename: ShardName
    bytes: Annotated[int, Field(ge=1, le=2**32 - 1)]  # MDS stores offsets as uint32
    hashes: dict[str, str]


class Shard(Schema):
    """One uncompressed MDS shard."""

    model_config = ConfigDict(extra="forbid")

    column_encodings: list[str]
    column_names: list[str]
    column_sizes: list[Positive | None]
    compression: None
    format: Literal["mds"]
    hashes: list[str]
    raw_data: ShardFile
    samples: Annotated[int, Field(ge=1, le=2**32 - 1)]
    size_limit: Positive | None
    version: Literal[2]
    zip_data: None

    @_model_validator(mode="after")
    def _sizes(self) -> Self:
        """A wrong size shifts the columns after it, and gives other tokens without an error."""
        if not len(self.column_names) == len(self.column_encodings) == len(self.column_sizes):
            raise ValueError("column_names, column_encodings and column_sizes differ in length")
        for encoding, size in zip(self.column_encodings, self.column_sizes, strict=True):
            if encoding in _COLUMN_BYTES:
                wanted = _COLUMN_BYTES[encoding]
            elif match := re.fullmatch(r"ndarray:uint(16|32):([1-9][0-9]{0,9})", encoding):
                wanted = int(match[1]) // 8 * int(match[2])
            else:
                continue  # ShardStore takes only those of its sequence length
            if size != wanted:
                raise ValueError(f"a column of {encoding} has the size {size}, not {wanted}")
        return self


class Index(Schema):
    """index.json, as MDSWriter makes it."""

    shards: list[Shard]
    version: Literal[2] = 2

    @_model_validator(mode="after")
    def _names_once(self) -> Self:
        names = [shard.raw_data.basename for shard in self.shards]
        if len(set(names)) < len(names):
            raise ValueError("two shards are one file")
        return self


class JournalHeader(Schema):
    """The first line of journal.jsonl."""

    journal: int
    shape: dict[str, Any]
    sources: list[list[Any]]


class PackerState(Schema):
    """What the packer held between two documents."""

    tokens: Count
    padding: Count = 0
    buffer: Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$")]
    dtype: Literal["uint16", "uint32"]
    starts: list[Count]


class JournalPoint(Schema):
    """Where packing can go on."""

    mark: Annotated[list[Count], Field(min_length=6, max_length=6)]
    samples: Count
    packer: PackerState | None


class JournalShard(Schema):
    """A finished shard."""

    shard: Shard
    point: JournalPoint
    ending: bool
    sha256: dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")], Sha256 | None]


class JournalEnd(Schema):
    """The dataset is complete."""

    finished: Sha256
