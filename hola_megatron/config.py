"""Recipes: one YAML file describes a run completely.

`load_recipe` reads a file, applies `a.b=c` overrides, refuses unknown keys and wrong
values (all problems at once, each with its dotted path) and returns a frozen `Recipe`.
A recipe may name a `base:` recipe beside it and state only what differs.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hola_megatron.errors import RecipeError
from hola_megatron.recipe_checks import check_recipe

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
ALIASES = {"train.lr": "train.learning_rate", "train.min_lr": "train.min_learning_rate"}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CacheConfig:
    """The bounded exact memory of a HOLA layer (method: "The exact cache", "The read")."""

    block: int = Field(256, ge=1, description="tokens a cache block (C): every token sees its own block exactly")
    slots: int = Field(64, ge=1, description="tokens kept exactly per head (w)")
    score: Literal["betae", "e", "betav", "recency", "random"] = Field(
        "betae", description="what ranks tokens: size of the state update (betae) or an ablation")
    read_norm: Literal["rms", "l2"] = Field("rms", description="norm of q and k in the exact read: sharp or flat")
    sink: bool = Field(True, description="one learned logit per head with value zero")
    gate_init: float = Field(-4.0, description="start of the read gate before its sigmoid")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MoeConfig:
    """Experts in place of every layer's MLP: Megatron-core's router, dispatch and experts."""

    experts: int | None = Field(None, ge=2, description="experts of a layer; null: one MLP, no router")
    top_k: int = Field(2, ge=1, description="experts that a token goes to")
    hidden_size: int | None = Field(None, ge=8, description=(
        "width inside one expert's SwiGLU; null: model.mlp_hidden_size"))
    balancing: Literal["aux_loss", "bias", "none"] = Field("aux_loss", description=(
        "what keeps experts evenly used: a loss beside the model's (softmax scores); a bias on the choice that follows "
        "their use, without a loss (sigmoid scores); nothing"))
    aux_loss_weight: float = Field(1e-2, ge=0, description="aux_loss: its weight")
    bias_rate: float = Field(1e-3, gt=0, description="bias: what it moves by after a step (kept in checkpoints)")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """Shape of the network."""

    layers: int = Field(ge=1, description="number of layers")
    hidden_size: int = Field(ge=8, description="width of the residual stream")
    pattern: str = Field("H", pattern="^[HGA]+$", description=(
        "layer kinds, repeated to fill all layers: H HOLA, G Gated DeltaNet (no exact cache), A softmax attention"))
    heads: int = Field(ge=1, description="heads of H and G layers")
    key_dim: int = Field(ge=8, description="key and query width of one head")
    value_dim: int = Field(ge=8, description="value width of one head")
    conv_width: int = Field(4, ge=1, description="width of the short convolution, in tokens")
    decay: bool = Field(True, description="decaying state; off gives DeltaNet")
    attention_heads: int = Field(16, ge=1, description="heads of A layers")
    rope_theta: float | None = Field(10000.0, gt=0, description="rotary base of A layers; null for no positions")
    mlp_hidden_size: int = Field(ge=8, description="width inside the SwiGLU MLP")
    vocab_size: int = Field(ge=2, description="rows of the embedding; at least the tokenizer's vocabulary")
    tie_embeddings: bool = Field(True, description="use the embedding as output projection")
    norm_eps: float = Field(1e-6, gt=0, description="epsilon of all RMSNorms outside the kernels")
    init_std: float = Field(0.02, gt=0, description="standard deviation of the normal initialisation")
    cache: CacheConfig = Field(default_factory=CacheConfig, description="exact memory of H layers")
    moe: MoeConfig = Field(default_factory=MoeConfig, description="experts in place of MLPs")
    backend: Literal["auto", "reference", "torch", "triton"] = Field(
        "auto", description="our kernels: those of H and G layers, of norms, of the MLP and of the loss")
    layer_spec: Literal["auto", "local", "te"] = Field(
        "auto", description="linear layers: Megatron's own, or Transformer Engine's; auto takes te on a GPU")

    @property
    def layer_kinds(self) -> str:
        """One letter a layer."""
        return (self.pattern * self.layers)[: self.layers]

    @property
    def expert_hidden_size(self) -> int:
        """Width inside one expert."""
        return self.moe.hidden_size or self.mlp_hidden_size


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataSource:
    """One stream of a mixture."""

    path: str = Field(description="folder (or URL) written by tools/prepare_data.py")
    weight: float = Field(1.0, gt=0, description="share of samples, relative to the other streams")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """What is read."""

    train: str | list[DataSource] = Field(description="a folder written by tools/prepare_data.py, or a weighted list")
    valid: str | None = Field(None, description="folder for validation; null for none")
    tokenizer: str = Field(description="'bytes', a tokenizer.json, GPT-2 files' folder, or a sentencepiece model")
    documents: Literal["separate", "joined"] = Field(
        "separate", description="separate: state, cache and loss stop at document ends; joined: one long text")
    cache: str | None = Field(None, description="local folder for shards of remote data")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """How it is trained."""

    sequence_length: int = Field(ge=1, description="tokens a sample")
    global_batch_size: int = Field(ge=1, description="samples a step, over all ranks")
    micro_batch_size: int = Field(1, ge=1, description="samples a forward pass on one rank")
    steps: int = Field(ge=1, description="optimizer steps of the whole run")
    learning_rate: float = Field(gt=0, description="peak learning rate (alias: lr)")
    min_learning_rate: float = Field(0.0, ge=0, description="learning rate at the end (alias: min_lr)")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="shape after warm-up")
    weight_decay: float = Field(0.01, ge=0, description="decoupled; not on vectors (norms, decay, gates)")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description=(
        "adamw for all; muon: the layers' matrices by Muon with updates of AdamW's size, all else by AdamW"))
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum (Nesterov)")
    muon_steps: int = Field(5, ge=1, description="Muon's Newton-Schulz steps")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="Adam's second moment")
    adam_eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    clip_grad_norm: float = Field(1.0, ge=0, description="global gradient norm limit; 0 for none")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="weights and activations; the optimizer is fp32")
    recompute: Literal["none", "full"] = Field("none", description="activations kept, or recomputed layer by layer")
    cuda_graph: bool = Field(False, description=(
        "forward and backward pass of a micro-batch as one CUDA graph: for few tokens a rank, where launching takes "
        "longer than computing; without pipeline and context ranks, experts and fp8"))
    cuda_graph_documents: int | None = Field(None, ge=1, description=(
        "documents of a micro-batch that its graph has room for; one with more runs without; null: one for each 256 "
        "tokens, at least 4 a sample"))
    logits_budget_gb: float | None = Field(2.0, gt=0, description=(
        "GB (10^9 bytes) that logits may take on a rank: where they and the loss's copy of them take more, they are "
        "made and used up a piece of tokens at a time; null: never"))
    seed: int = Field(1234, ge=0, description="of weights and data order")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Fp8Config:
    """8-bit matrix products of every layer's linears (Transformer Engine). All else stays bf16 or float32: embedding,
    output projection and loss, norms, convolutions, state and exact cache, stored weights, gradients, optimizer."""

    recipe: Literal["delayed", "current", "blockwise"] | None = Field(None, description=(
        "what scales a tensor before its cast: one number from earlier steps (delayed), one from itself (current), one "
        "for each 128 numbers (blockwise); null: bf16. Gradients are e5m2, all else e4m3; blockwise e4m3 throughout"))
    first_layers_bf16: int = Field(0, ge=0, description="layers at the start that stay bf16; not with delayed")
    last_layers_bf16: int = Field(0, ge=0, description="layers at the end that stay bf16; not with delayed")
    amax_history: int = Field(1024, ge=1, description=(
        "delayed: micro-batches whose largest number sets the scale (kept in checkpoints)"))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ParallelConfig:
    """How the model and the batch are cut over ranks; data parallelism takes the ranks left over."""

    tensor: int = Field(1, ge=1, description="ranks that share every layer's heads and widths")
    sequence: bool = Field(False, description="also cut norms and residuals over the tensor ranks")
    pipeline: int = Field(1, ge=1, description="ranks that share the layers")
    virtual_pipeline: int = Field(1, ge=1, description="model chunks a pipeline rank (interleaved schedule)")
    context: int = Field(1, ge=1, description="ranks that share one sequence")
    expert: int = Field(1, ge=1, description=(
        "ranks that share a layer's experts, each holding some of them whole; of tensor, context and data ranks"))
    distributed_optimizer: bool = Field(True, description="cut optimizer state over data-parallel ranks")
    zero_stage: Literal[1, 2, 3] = Field(1, description=(
        "engine deepspeed: what is cut over data ranks: 1 the optimizer's state, 2 gradients as well; 3 is refused"))
    overlap: bool = Field(True, description="reduce gradients and gather parameters while computing")
    timeout_minutes: float = Field(30.0, gt=0, description="a collective that waits longer ends the run")
    hang_seconds: float | None = Field(900.0, gt=0, description=(
        "no sign of progress for so long ends all ranks with code 76 and names the one that hangs; null: never"))

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """What is kept on disk."""

    every: int = Field(1000, ge=1, description="steps between checkpoints (the last step always makes one)")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_every: int | None = Field(None, ge=1, description="checkpoints at multiples of this step are kept for good")
    background: bool = Field(True, description=(
        "write while training goes on, from a copy in host memory; false saves that memory"))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GuardConfig:
    """When a step's numbers are bad, and what is done: skip it, then rewind, then stop with code 4."""

    window: int = Field(128, ge=8, description="good steps the median is taken over")
    warmup: int = Field(32, ge=8, description="good steps before spikes are judged (non-finite numbers always are)")
    loss_mads: float | None = Field(12.0, gt=0, description="deviations over the median that are a spike; null: none")
    grad_mads: float | None = Field(100.0, gt=0, description="the same for the gradient norm")
    max_skips: int = Field(3, ge=0, description="bad steps in a row that are skipped")
    max_rewinds: int = Field(2, ge=0, description=(
        "times one run then goes back to its newest healthy checkpoint, and on past the bad samples"))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogConfig:
    """What is said while it runs."""

    every: int = Field(10, ge=1, description="steps between lines")
    tensorboard: bool = Field(True, description="write TensorBoard events to the run folder")
    wandb_project: str | None = Field(None, description="Weights & Biases project; null for none")
    sample_every: int | None = Field(None, ge=1, description="steps between sample texts; null for none")
    sample_prompt: str = Field("The ", description="how a sample text begins")
    sample_tokens: int = Field(64, ge=1, description="tokens of a sample text")
    memory_health: bool = Field(True, description="log what the exact memory does at every validation")
    peak_tflops: float | None = Field(None, gt=0, description="peak of the device for MFU, if it is not a known one")
    straggler_ratio: float = Field(1.25, gt=1, description=(
        "a rank whose own work takes so many times its peers' median is named"))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ValidConfig:
    """Validation inside the run."""

    every: int = Field(1000, ge=1, description="steps between validations (also at the end)")
    samples: int = Field(1024, ge=1, description="samples of the validation set used at most")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="names the run folder")
    run_dir: str | None = Field(None, description="run folder; null for runs/NAME")
    engine: Literal["megatron", "deepspeed"] = Field("megatron", description=(
        "what reduces gradients and updates weights: Megatron-core, or DeepSpeed's ZeRO around the same model"))
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    fp8: Fp8Config = Field(default_factory=Fp8Config)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    valid: ValidConfig = Field(default_factory=ValidConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)

    @property
    def folder(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.train.sequence_length

    @property
    def least_part(self) -> int:
        """Tokens of a row that every context-parallel rank needs: a cache block or a window spans two ranks at most."""
        model, kinds = self.model, set(self.model.layer_kinds)
        return max(1, model.conv_width - 1 if kinds & set("HG") else 1, model.cache.block - 1 if "H" in kinds else 1)

    def data_ranks(self, world_size: int) -> int:
        """Data-parallel size: the ranks left when each copy of the model has its own."""
        return world_size // self.parallel.model_ranks

    def micro_batches(self, world_size: int) -> int:
        """Forward passes a rank makes for one step."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.data_ranks(world_size))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML or JSON can hold them."""
        return asdict(self)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override and check a recipe; RecipeError lists every problem at once."""
    values = _read_with_base(Path(path), seen=[])
    problems = [p for text in overrides or [] if (p := _apply_override(values, text))]
    return build_recipe(values, problems)


def build_recipe(values: dict[str, Any], problems: list[str] | None = None) -> Recipe:
    """A recipe from plain values, checked; `problems` found earlier are reported together with new ones."""
    problems = list(problems or [])
    values = _resolve_aliases(values, problems)
    problems += _unknown_keys(values)
    recipe = None
    try:
        # JSON mode: strict about types, yet dataclasses may be given as mappings
        recipe = TypeAdapter(Recipe).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        problems += [p for p in map(_describe, error.errors()) if p]
    except TypeError as error:
        problems.append(f"recipe: holds a value that is not plain YAML ({error})")
    problems += check_recipe(recipe) if recipe is not None else _problems_beside(values)
    if problems:
        raise RecipeError(problems)
    return recipe


def _problems_beside(values: dict[str, Any]) -> list[str]:
    """What does not go together in a recipe, but for what a wrong key or value has a part in."""
    values, wrong = _merge(values, {}), []
    for _ in range(2):  # what was wrong may have hidden more
        try:
            recipe = TypeAdapter(Recipe).validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            for loc in {tuple(part for part in e["loc"] if not _is_union_tag(part)) for e in error.errors()}:
                wrong.append(".".join(map(str, loc)))
                _drop(values, loc)
        except TypeError:
            return []
        else:
            return [problem for problem in check_recipe(recipe) if not any(path in problem for path in wrong)]
    return []


def _drop(at: Any, path: tuple[Any, ...]) -> None:
    for part in path[:-1]:
        at = at[part] if isinstance(at, list) or part in at else {}
    if isinstance(at, dict) and path:
        at.pop(path[-1], None)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 3e-4 as a string, and of two values of one key takes the last; everybody who writes the first
    means a number, and nobody means the second."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, (key, _) in enumerate(node.value):
            if isinstance(key, yaml.ScalarNode) and key.value in keys[:number]:
                raise yaml.constructor.ConstructorError(
                    problem=f"line {key.start_mark.line + 1}: {key.value} is given twice; keep one")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        first = str(error).splitlines()
        raise RecipeError(f"{where}: not valid YAML ({'; '.join(x.strip() for x in first[:3])})") from None


def _read_with_base(path: Path, seen: list[Path]) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else "; give the path of a .yaml recipe"
        raise RecipeError(f"{path}: no such recipe{hint}")
    if path.resolve() in seen:
        raise RecipeError(f"{path}: base: leads back to itself")
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path}: cannot be read as text ({error})") from None
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(f"{path}: a recipe is a mapping of sections (name, model, data, train, ...)")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise RecipeError(f"{path}: base: {base!r} must be the file name of another recipe")
    return _merge(_read_with_base(path.parent / base, [*seen, path.resolve()]), values)


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


def _unknown_keys(values: dict[str, Any]) -> list[str]:
    known = _all_keys(Recipe)
    problems = []

    def walk(at: Any, cls: type, prefix: str) -> None:
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key, value in at.items():
            path = f"{prefix}{key}"
            if key not in fields:
                near = _nearest(path, known)
                problems.append(f"{path}: no such key" + (f" (did you mean {near}?)" if near else ""))
            elif isinstance(value, dict) and (inner := _section_class(cls, key)):
                walk(value, inner, f"{path}.")

    walk(values, Recipe, "")
    return problems


def _nearest(path: str, known: list[str]) -> str | None:
    """The known key most like `path`; within its own section first."""
    section, _, last = path.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    names = difflib.get_close_matches(last, [k.rpartition(".")[2] for k in siblings], n=1, cutoff=0.5)
    if names:
        return f"{section}.{names[0]}" if section else names[0]
    same = [k for k in known if k.rpartition(".")[2] == last]
    return (same or difflib.get_close_matches(path, known, n=1, cutoff=0.7) or [None])[0]


def _section_class(cls: type, key: str) -> type | None:
    sections = {(Recipe, "model"): ModelConfig, (Recipe, "data"): DataConfig, (Recipe, "train"): TrainConfig,
                (Recipe, "parallel"): ParallelConfig, (Recipe, "checkpoint"): CheckpointConfig,
                (Recipe, "log"): LogConfig, (Recipe, "valid"): ValidConfig, (Recipe, "guard"): GuardConfig,
                (Recipe, "fp8"): Fp8Config, (ModelConfig, "cache"): CacheConfig,
                (ModelConfig, "moe"): MoeConfig}
    return sections.get((cls, key))


def _all_keys(cls: type, prefix: str = "") -> list[str]:
    keys = []
    for f in dataclasses.fields(cls):
        inner = _section_class(cls, f.name)
        keys += _all_keys(inner, f"{prefix}{f.name}.") if inner else [f"{prefix}{f.name}"]
    return keys


def _describe(error: dict[str, Any]) -> str | None:
    """One line for one pydantic error: where, what, allowed."""
    path = ".".join(str(part) for part in error["loc"] if not _is_union_tag(part)) or "recipe"
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return None  # told by _unknown_keys, with a suggestion
    if error["type"] == "string_type" and isinstance(error["input"], list):
        return None  # a list where text or a list may stand: what is wrong inside the list is told on its own
    if error["type"] == "missing":
        return f"{path}: missing; every recipe must give it"
    return f"{path}: {error['input']!r} is not allowed; {error['msg'][0].lower()}{error['msg'][1:]}"


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and (part.startswith("list[") or part in ("str", "int", "float"))


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
        inner = _section_class(cls, name)
        if inner:
            yield from _every_field(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info
