"""`init.from`: the start of a new run from another run's checkpoint or from an exported Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hola_megatron.checkpoint.folder import Checkpoint, find_checkpoint
from hola_megatron.checkpoint.save_load import KINDS, TrainerState
from hola_megatron.checkpoint.starting import MOMENTS, load_start
from hola_megatron.checkpoint.tensors import LAYER_STATE, TensorReader, with_layer_states
from hola_megatron.data.opening import Data
from hola_megatron.data.phases import Phases
from hola_megatron.engine.base import Engine
from hola_megatron.errors import CheckpointError, RecipeError
from hola_megatron.files import shown
from hola_megatron.log.console import short
from hola_megatron.parallel.groups import run_on_rank0
from hola_megatron.recipe.old_names import with_present_names
from hola_megatron.recipe.schema import Recipe

SHOWN_NAMES = 4


@dataclass(frozen=True)
class Source:
    """What a run starts from.

    folder: where the tensors lie. index: {kind: {logical tensor: shape and shards}}, as in a manifest. updates: of the
    optimizer; None where there are no moments. model: its recipe's model section. tokenizer: its identity; None where
    it is not recorded. trainer: the trainer's state; None where there is none. origin: for people.
    """

    folder: Path
    index: dict[str, Any]
    updates: int | None
    model: dict[str, Any]
    tokenizer: dict[str, Any] | None
    trainer: dict[str, Any] | None
    origin: str


def start_from(engine: Engine, data: Data) -> TrainerState:
    """Load the weights of `init.from` and continue its streams; returns the new run's state. A collective.

    Raises CheckpointError (no usable weights there, or of another model), RecipeError (another tokenizer, moments that
    are not there).
    """
    recipe, layout = engine.recipe, engine.layout
    source = run_on_rank0(layout, lambda: find_source(Path(recipe.init.source)))
    _check_source(recipe, source, data.tokenizer.identity())
    index = with_layer_states(source.index, recipe.model.layer_states)
    kept = KINDS if recipe.init.optimizer == "keep" else KINDS[:1]
    readers = {kind: TensorReader(source.folder, index.get(kind, {})) for kind in kept}
    fresh = load_start(engine, readers, source.updates if recipe.init.optimizer == "keep" else 0)
    for kind, restore in (("router", engine.restore_biases), (LAYER_STATE, engine.layer_states.restore)):
        reader = TensorReader(source.folder, index.get(kind, {}))
        restore({name: reader.whole(name) for name in reader.names()})
    state = _position(recipe, source, data)
    if layout.is_main:
        print("\n".join(_lines(recipe, source, fresh, data, state)), flush=True)
    return state


def find_source(path: Path) -> Source:
    """The weights at a path: of a run folder, one checkpoint, or an exported folder. Raises CheckpointError."""
    if not path.is_dir():
        raise CheckpointError(f"init.from: {path}: no such folder; give a run folder, a step_NNNNNNNN folder or an "
                              "exported Hugging Face folder")
    try:
        return _exported(path) if (path / "config.json").is_file() else _checkpoint(find_checkpoint(path))
    except CheckpointError as problem:
        raise CheckpointError(f"init.from: {problem}") from None


def _checkpoint(found: Checkpoint) -> Source:
    manifest = found.run_manifest()
    recipe = with_present_names(manifest["recipe"])
    if not isinstance(recipe.get("model"), dict):
        raise CheckpointError(f"{found.path}: its manifest has no recipe of a model; use another checkpoint")
    if not found.healthy:
        raise CheckpointError(f"{found.path}: was saved during bad steps; give the folder of another checkpoint")
    return Source(found.path, manifest["tensors"], manifest["optimizer_step"], recipe["model"],
                  manifest.get("tokenizer"), manifest["trainer"],
                  f"{found.path}, sha256 {manifest['sha256'][:12]}")


def _exported(folder: Path) -> Source:
    from hola_megatron.hf import auto  # imports transformers, which takes seconds
    from hola_megatron.hf.convert import read_record
    from hola_megatron.hf.shape import model_section
    from hola_megatron.hf.weights import ModelReader

    config, reader, record = auto.read_config(folder), ModelReader(folder), read_record(folder)
    if problem := auto.describe_mismatch(reader.shapes(), config):
        raise CheckpointError(f"{folder}: does not hold the model of its config.json: {problem}")
    return Source(folder, {"weight": reader.index()}, None, model_section(config), record.get("tokenizer"),
                  record.get("trainer"), str(folder))


def _check_source(recipe: Recipe, source: Source, tokenizer: dict[str, Any]) -> None:
    """RecipeError where the recipe asks for what the source has not."""
    if recipe.init.optimizer == "keep":
        if not source.updates:
            raise RecipeError(f"init.optimizer: keep, and {source.folder} has weights without moments; set it to fresh")
        if not any(source.index.get(kind) for kind in MOMENTS):
            raise RecipeError(f"init.optimizer: keep, and {source.folder} lists no moments; set it to fresh")
    if source.tokenizer is not None and source.tokenizer != tokenizer:
        differing = [f"{name} {shown(source.tokenizer.get(name))} there, {shown(tokenizer[name])} here"
                     for name in tokenizer if source.tokenizer.get(name) != tokenizer[name]]
        raise RecipeError(f"data.tokenizer: {recipe.data.tokenizer} is not the one of init.from ({source.folder}): "
                          f"{'; '.join(differing)}; its weights mean other tokens, name the tokenizer they were "
                          "trained with")


def _position(recipe: Recipe, source: Source, data: Data) -> TrainerState:
    """The new run's state: its first step, at the source's position in the data or at the first sample.

    Sets `data.mixture` to the one that goes on from there.
    """
    trainer = source.trainer or {}
    phases, samples = trainer.get("phases"), trainer.get("samples", 0)
    if recipe.init.data == "fresh" or not phases or not samples:
        return TrainerState(step=0, samples=0, origin=source.origin)
    data.mixture = data.mixture.going_on(Phases.from_dicts(phases), samples, begin=samples)
    return TrainerState(step=0, samples=samples, first_sample=samples, origin=source.origin)


def _lines(recipe: Recipe, source: Source, fresh: list[str], data: Data, state: TrainerState) -> list[str]:
    """What was taken from the source, and what of the model differs."""
    updates = f"moments of {source.updates:,} updates" if recipe.init.optimizer == "keep" else "moments of zero"
    if recipe.init.data == "fresh":
        position = "streams from their first sample"
    elif state.samples:
        position = f"streams go on after {short(data.mixture.tokens(state.samples))} tokens"
    else:
        position = "no position in the data is recorded there, streams from their first sample"
    lines = [f"init | {source.origin} | {updates} | {position}"]
    if source.tokenizer is None:
        lines.append(f"init | {source.folder} records no tokenizer: that it is data.tokenizer is not checked")
    if fresh:
        more = f" and {len(fresh) - SHOWN_NAMES} more" if len(fresh) > SHOWN_NAMES else ""
        lines.append(f"init | not there, drawn as for a new model | {', '.join(fresh[:SHOWN_NAMES])}{more}")
    before, now = _flat(source.model), _flat(recipe.to_dict()["model"])
    return lines + [f"init | model.{name}: {before[name]} -> {now[name]}" for name in sorted(before.keys() & now.keys())
                    if before[name] != now[name]]


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in section.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
