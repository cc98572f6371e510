"""What every JSON file that the project reads must look like.

One pydantic schema a file, all strict: 3 is no "3", true is no 1. Keys that a schema does not name are let through, so
that a newer version's file is judged by what it must hold. A field added to a file is added here.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, TypeAdapter
from pydantic import model_validator as _model_validator

from hola_megatron.files.dataset_schemas import (
    DatasetRecord,
    Index,
    JournalEnd,
    JournalHeader,
    JournalShard,
    Shard,
    TokenizerIdentity,
)
from hola_megatron.files.schema_types import Count, FileName, Positive, Schema, Sha256

MOST_AXES = 8


# ---- checkpoints: manifest.json, rank-NNNNN.json, rewind.json


def _weights_and_moments(tensors: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    if not tensors.get("weight"):
        raise ValueError("there are no weights")
    for kind in ("exp_avg", "exp_avg_sq"):
        for name, moment in tensors.get(kind, {}).items():
            if name not in tensors["weight"] or moment.shape != tensors["weight"][name].shape:
                raise ValueError(f"{kind}.{name} is not of the shape of a weight")
    return tensors


class StoredFile(Schema):
    """A file of a checkpoint in the manifest."""

    bytes: Count
    sha256: Sha256


class TensorShard(Schema):
    """`rows` along `axis` from `offset` of a logical tensor, stored as `key` in `file`."""

    file: str
    key: str
    axis: Annotated[int, Field(ge=0, lt=MOST_AXES)]
    offset: Count
    rows: Count


class StoredTensor(Schema):
    """A logical tensor: its shape and the shards that make it up."""

    shape: Annotated[list[Count], Field(min_length=1, max_length=MOST_AXES)]
    shards: Annotated[list[TensorShard], Field(min_length=1)]

    @_model_validator(mode="after")
    def _whole(self) -> Self:
        values = 0
        for shard in self.shards:
            if shard.axis >= len(self.shape) or shard.offset + shard.rows > self.shape[shard.axis]:
                raise ValueError(f"the shard {shard.key} lies outside the tensor")
            values += shard.rows * math.prod(n for axis, n in enumerate(self.shape) if axis != shard.axis)
        if values != math.prod(self.shape):
            raise ValueError(f"its shards hold {values} of {math.prod(self.shape)} values")
        return self


class TrainerRecord(Schema):
    """The trainer's state."""

    step: Count
    samples: Count
    bad_steps: Count = 0
    rewinds: Count = 0
    guard: dict[str, list[float]] = Field(default_factory=dict)
    phases: list[dict[str, Any]] = Field(default_factory=list)
    first_sample: Count = 0
    origin: str = ""


class Manifest(Schema):
    """manifest.json of a checkpoint folder; every shard is in a listed file, and no tensor is larger than its files."""

    format: int
    step: Count
    healthy: bool = True
    files: dict[FileName, StoredFile]
    sha256: Sha256
    optimizer_step: Count = 0
    trainer: TrainerRecord | None = None
    recipe: dict[str, Any] | None = None
    tensors: dict[str, dict[str, StoredTensor]] = Field(default_factory=dict)
    data_fingerprint: str | None = None
    valid_fingerprint: str | None = None
    tokenizer: TokenizerIdentity | None = None

    @_model_validator(mode="after")
    def _stored(self) -> Self:
        if self.trainer is not None and self.trainer.step != self.step:
            raise ValueError(f"trainer.step is {self.trainer.step}, step is {self.step}")
        for kind, tensors in self.tensors.items():
            for name, tensor in tensors.items():
                for shard in tensor.shards:
                    if shard.file not in self.files:
                        raise ValueError(f"tensors.{kind}.{name} lies in {shard.file}, a shard file it does not list")
                    rest = math.prod(n for axis, n in enumerate(tensor.shape) if axis != shard.axis)
                    if shard.rows * rest > self.files[shard.file].bytes:  # a value has one byte at least
                        raise ValueError(f"tensors.{kind}.{name} does not fit in {shard.file}")
        return self


class RunManifest(Manifest):
    """The manifest of a checkpoint from which a run resumes or a model is exported."""

    optimizer_step: Count
    trainer: TrainerRecord
    recipe: dict[str, Any]
    tensors: Annotated[dict[str, dict[str, StoredTensor]], AfterValidator(_weights_and_moments)]


class RankReport(Schema):
    """rank-NNNNN.json: what one rank has written of a checkpoint."""

    files: dict[FileName, StoredFile]
    index: dict[str, dict[str, Any]]
    finite: bool


class Rewind(Schema):
    """rewind.json of a run folder."""

    step: Count
    samples: Count
    rewinds: Count
    phases: list[dict[str, Any]] = Field(default_factory=list)


class BadStepRecord(Schema):
    """One entry of incident.json."""

    model_config = ConfigDict(extra="forbid")

    step: Count
    reason: str
    loss: str
    grad_norm: str
    first_sample: Count
    last_sample: Count
    first_nonfinite: str | None

    @_model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.last_sample < self.first_sample:
            raise ValueError(f"last_sample is {self.last_sample}, first_sample {self.first_sample}")
        return self


# ---- exported models: config.json, hola_export.json, model.safetensors.index.json, ...

Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
Layers = Annotated[int, Field(ge=1, le=10_000)]
Above = Annotated[float, Field(gt=0)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)] | None
Dtype = str


class TransformersConfig(Schema):
    """What transformers itself takes from a config.json, of what both kinds of models here have."""

    architectures: list[str] | None = None
    auto_map: dict[str, str] | None = None
    bos_token_id: TokenId = None
    dtype: Dtype | None = None
    eos_token_id: TokenId = None
    hidden_size: Size
    initializer_range: Above = 0.02
    max_position_embeddings: Size = 2048
    model_type: str
    norm_eps: Above = 1e-6
    num_hidden_layers: Layers
    pad_token_id: TokenId = None
    tie_word_embeddings: bool = True
    torch_dtype: Dtype | None = None
    use_cache: bool = True
    vocab_size: Size


class HolaConfigFile(TransformersConfig):
    """config.json of a model of ours; HolaConfig's arguments, with its defaults."""

    hidden_size: Size = 1024
    num_hidden_layers: Layers = 24
    vocab_size: Size = 32000
    intermediate_size: Size = 2816
    layer_pattern: Annotated[str, StringConstraints(min_length=1, max_length=10000)] = "H"
    num_heads: Size = 4
    key_dim: Size = 256
    value_dim: Size = 256
    conv_width: Size = 4
    rule: Literal["gdn", "delta", "none"] | None = None
    decay: bool | None = None
    beta_range: Literal[1, 2] = 1
    delta_steps: Size = 2
    state_delay: Count = 0
    state_delay_mode: Literal["stream", "chunk"] = "stream"
    num_attention_heads: Size = 16
    num_key_value_heads: Size | None = None
    attention_qk_norm: bool = False
    attention_window: Size = 1024
    rope_theta: Above | None = 10000.0
    cache_block: Size = 256
    cache_slots: Count = 64
    cache_local: Literal["block", "window", "none"] = "block"
    cache_window: Size | None = None
    cache_score: Literal["betae", "e", "betav", "recency", "random", "cosine", "learned"] = "betae"
    cache_router_width: Size = 64
    cache_read_norm: Literal["rms", "l2", "none"] = "rms"
    cache_rope_theta: Above | None = None
    cache_merge: Literal["add", "convex", "two"] = "add"
    cache_sink: bool = True
    cache_gate_init: float = -4.0
    hqlt_blend: Literal["sync", "delayed_stream", "delayed_chunk"] = "sync"
    hqlt_window: Size = 64
    hqlt_rope_theta: Above = 10000.0
    hqlt_mixing: Literal["sum", "scalar", "vector"] = "vector"
    ham_router: Literal["cosine", "learned"] = "learned"
    ham_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    ham_threshold: float = 0.5
    ham_rate: Annotated[float, Field(ge=0)] = 0.01
    ham_freeze_steps: Count = 0
    ham_router_width: Size = 64
    backend: Literal["auto", "torch", "triton", "reference"] = "auto"
    cuda_graph: bool = False


class FlaAttention(Schema):
    """The softmax attention layers of a flash-linear-attention model."""

    layers: list[Count] = Field(default_factory=list)
    num_heads: Size = 1
    num_kv_heads: Size | None = None
    rope_theta: Above | None = 10000.0


class FlaConfigFile(TransformersConfig):
    """config.json of a Gated DeltaNet of flash-linear-attention; null where their code puts a value of its own."""

    hidden_size: Size = 2048
    num_hidden_layers: Layers = 21
    vocab_size: Size = 32000
    intermediate_size: Size | None = None
    hidden_ratio: Annotated[int, Field(ge=1, le=1024)] | None = 4
    num_heads: Size = 6
    num_v_heads: Size | None = None
    head_dim: Size = 256
    expand_v: Annotated[float, Field(gt=0, le=1024)] = 2.0
    conv_size: Size = 4
    attn: FlaAttention | None = None


class ExportRecord(Schema):
    """hola_export.json; an imported model has no recipe and no trainer's state."""

    format: Literal[1]
    trainer: TrainerRecord | None = None
    recipe: dict[str, Any] | None = None
    tokenizer: TokenizerIdentity | None = None
    data_fingerprint: str | None = None


class WeightsIndex(Schema):
    """model.safetensors.index.json."""

    weight_map: Annotated[dict[str, FileName], Field(min_length=1)]


class NamedToken(Schema):
    """A token as transformers writes it where it is no plain string."""

    content: str


TokenName = str | NamedToken | None
TokenIdOrIds = TokenId | list[TokenId]


class TokenizerSettings(Schema):
    """What is read of tokenizer_config.json and special_tokens_map.json."""

    bos_token: TokenName = None
    eos_token: TokenName = None
    pad_token: TokenName = None
    add_bos_token: bool | None = None


class SpecialIds(Schema):
    """The fields read from generation_config.json and config.json next to a tokenizer."""

    bos_token_id: TokenIdOrIds = None
    eos_token_id: TokenIdOrIds = None
    pad_token_id: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None


class TokenizerSource(Schema):
    """tokenizer_source.json: the tokenizer.json beside it (form_sha256) was written from another (sha256)."""

    sha256: Sha256
    form_sha256: Sha256


# ---- runs, and what tools hand to each other


class MetricsRow(Schema):
    """A line of metrics.jsonl; one of training or validation has a loss, null where it was not finite."""

    step: Count
    kind: str

    @_model_validator(mode="after")
    def _has_loss(self) -> Self:
        loss = (self.model_extra or {}).get("loss", math.nan)
        is_number = type(loss) in (int, float) and abs(loss) <= 1e300  # false for NaN, and never fails
        if self.kind.startswith(("train", "valid")) and not (is_number or loss is None):
            raise ValueError("loss is missing or no number")
        return self


class ContextNumbers(Schema):
    """One length of what tools/bench_context.py writes with --json."""

    length: Positive
    tokens_per_second_per_gpu: Above
    loss: float
    grad_norm: float


def _of(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


DATASET, INDEX, SHARD = _of(DatasetRecord), _of(Index), _of(Shard)
JOURNAL_HEADER, JOURNAL_LINE = _of(JournalHeader), _of(JournalShard | JournalEnd)
MANIFEST, RUN_MANIFEST = _of(Manifest), _of(RunManifest)
RANK_REPORT, REWIND = _of(RankReport), _of(Rewind)
INCIDENT = _of(Annotated[list[BadStepRecord], Field(min_length=1)])
HOLA_CONFIG, FLA_CONFIG = _of(HolaConfigFile), _of(FlaConfigFile)
EXPORT_RECORD, WEIGHTS_INDEX = _of(ExportRecord), _of(WeightsIndex)
TOKENIZER_SETTINGS, SPECIAL_IDS, TOKENIZER_SOURCE = _of(TokenizerSettings), _of(SpecialIds), _of(TokenizerSource)
CONTEXT_NUMBERS = _of(Annotated[list[ContextNumbers], Field(min_length=1)])
METRICS_ROW = _of(MetricsRow)
MAPPING = _of(dict[str, Any])
