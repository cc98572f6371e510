"""Checkpoints to Hugging Face folders and back.

    to_hf     a checkpoint of any layout -> config.json, safetensors, tokenizer, the model's own code
    from_hf   such a folder -> a run folder from which training continues

A checkpoint has whole logical tensors under the model's public names, so both ways
stream tensor by tensor through one process without process groups, in the memory of one shard.
Neither leaves partly written folders, and by default neither reports success before the
logits of the reloaded model equal those of the Megatron model (verify.py).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from hola_megatron.checkpoint.folder import Checkpoint, find_checkpoint, open_checkpoint
from hola_megatron.checkpoint.tensors import LAYER_STATE, TensorReader, exported_index
from hola_megatron.checkpoint.weights_only import write_weights
from hola_megatron.data.tokenizer import Tokenizer, load_tokenizer
from hola_megatron.errors import CheckpointError, DataError, RecipeError
from hola_megatron.files import schemas
from hola_megatron.files.yaml_text import dump_yaml
from hola_megatron.hf import auto
from hola_megatron.hf.card import check_license, write_card
from hola_megatron.hf.code import write_code
from hola_megatron.hf.configuration_hola import HolaConfig
from hola_megatron.hf.contained import read_json
from hola_megatron.hf.fresh_folder import fresh_folder
from hola_megatron.hf.shape import config_of, differences, model_section
from hola_megatron.hf.weights import ModelReader, write_model
from hola_megatron.recipe.loading import build_recipe
from hola_megatron.recipe.schema import Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RECORD = "hola_export.json"
AUTO_MAP = {"AutoConfig": "configuration_hola.HolaConfig", "AutoModel": "modeling_hola.HolaModel",
            "AutoModelForCausalLM": "modeling_hola.HolaForCausalLM"}
Verify = Callable[[Checkpoint, Path], Any]


@dataclass(frozen=True)
class ExportOptions:
    """How an export is written. tokenizer None: the recipe's; shard_bytes: largest file; license: for the card."""

    dtype: str = "fp32"
    tokenizer: str | None = None
    shard_bytes: int = 5 * 10**9
    overwrite: bool = False
    license: str | None = None


def to_hf(source: Path, out: Path, options: ExportOptions = ExportOptions(), *,
          verify: Verify | None = None) -> Path:
    """Export a checkpoint (or a run folder's newest) to `out`; `verify` may refuse before it gets its name.

    Raises CheckpointError (source or out not usable), DataError (tokenizer).
    """
    check_license(options.license)
    checkpoint = find_checkpoint(source)
    recipe = build_recipe(checkpoint.run_manifest()["recipe"], stored=True)
    tokenizer = open_tokenizer(checkpoint.manifest, options.tokenizer or recipe.data.tokenizer)
    with fresh_folder(out, overwrite=options.overwrite, marker=RECORD) as folder:
        pad = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
        config = config_of(recipe, dtype=DTYPES[options.dtype], bos_token_id=tokenizer.bos_id,
                           eos_token_id=tokenizer.eos_id, pad_token_id=pad)
        reader = TensorReader(checkpoint.path, exported_index(checkpoint.manifest))
        if problem := auto.describe_mismatch({name: reader.shape(name) for name in reader.names()}, config):
            raise CheckpointError(f"{checkpoint.path}: does not hold the model of its recipe: {problem}")
        write_model(_as_stored(reader, DTYPES[options.dtype]), folder, options.shard_bytes)
        write_config(folder, config)
        write_tokenizer(folder, tokenizer)
        write_record(folder, _record(checkpoint))
        agreement = None if verify is None else verify(checkpoint, folder)
        write_card(folder, checkpoint, license=options.license, agreement=agreement)
    return out


def open_tokenizer(manifest: dict[str, Any], spec: str) -> Tokenizer:
    """The tokenizer named by `spec`, which must be the one the checkpoint was trained with."""
    try:
        tokenizer = load_tokenizer(spec)
    except DataError as error:
        raise DataError(f"{error} (--tokenizer names another path)") from None
    wanted, found = manifest.get("tokenizer"), tokenizer.identity()
    if wanted is not None and wanted != found:
        raise DataError(f"tokenizer {spec!r}: is {_shown(found)}; the model was trained with {_shown(wanted)}; "
                        "name that one with --tokenizer")
    return tokenizer


def _shown(identity: dict[str, Any]) -> str:
    return f"{identity['kind']} of {identity['vocab_size']} tokens, sha256 {identity['sha256'][:12]}"


def write_config(folder: Path, config: HolaConfig) -> None:
    """config.json, generation_config.json and the model's code, operations included."""
    config.auto_map = AUTO_MAP
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id,
                     pad_token_id=config.pad_token_id).save_pretrained(folder)
    write_code(folder)


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """The tokenizer's Hugging Face form."""
    tokenizer.save_pretrained(folder)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write an export's training record (hola_export.json)."""
    (folder / RECORD).write_text(json.dumps({"format": 1, **record}, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _record(checkpoint: Checkpoint) -> dict[str, Any]:
    """The training state in an export's record, from which training can continue."""
    manifest = checkpoint.manifest
    entries = ("step", "trainer", "tokenizer", "data_fingerprint", "code")
    # without the run folder, a path of this machine
    return {name: manifest.get(name) for name in entries} | {"recipe": manifest["recipe"] | {"run_dir": None}}


def _as_stored(reader: TensorReader, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Each weight in the export's dtype. Raises CheckpointError for one that is not finite."""
    for name in reader.names():
        whole = reader.whole(name)
        if not whole.isfinite().all():
            raise CheckpointError(f"{reader.folder}: {name} holds values that are not finite; give the folder of an "
                                  "earlier checkpoint")
        yield name, auto.stored(name, whole, dtype)


def from_hf(folder: Path, run: Path, recipe: Recipe | None = None, *, shard_bytes: int = 5 * 10**9,
            verify: Verify | None = None) -> Path:
    """Make the run folder `run` with one checkpoint of the exported weights; returns the checkpoint's folder.

    With a recipe a new run starts from these weights, at step 0. Without one the run that was exported
    continues: its recipe, its step, its position in the data. Adam's moments start at zero either way.
    Raises CheckpointError (folder or run not usable), RecipeError (recipe of another model).
    """
    config, reader, record = auto.read_config(folder), ModelReader(folder), read_record(folder)
    if problem := auto.describe_mismatch(reader.shapes(), config):
        raise CheckpointError(f"{folder}: does not hold the model of its config.json: {problem}")
    given = recipe
    recipe = dataclasses.replace(given or _own_recipe(folder, record), run_dir=str(run))
    if problems := differences(asdict(recipe.model), model_section(config)):
        raise RecipeError([f"{problem} (recipe {recipe.name}, {folder})" for problem in problems])
    if given is not None and record.get("tokenizer"):
        open_tokenizer(record, recipe.data.tokenizer)
    trainer = {"step": 0, "samples": 0, "bad_steps": 0} if given else record["trainer"]
    extra = {"data_fingerprint": None if given else record.get("data_fingerprint"),
             "tokenizer": record.get("tokenizer"), "code": record.get("code"), "imported_from": folder.name}
    with fresh_folder(run) as partial:
        (partial / "recipe.yaml").write_text(dump_yaml(recipe.to_dict()), encoding="utf-8")
        states = recipe.model.layer_states
        weights = ((name, reader.read(name).float()) for name in reader.names() if name not in states)
        more = {LAYER_STATE: {name: reader.read(name).float() for name in sorted(states)}} if states else None
        written = write_weights(partial / "checkpoints", weights, {"trainer": trainer, "recipe": recipe.to_dict(),
                                                                   **extra}, shard_bytes=shard_bytes, more=more)
        if verify is not None:
            verify(open_checkpoint(written), folder)
    return run / "checkpoints" / written.name


def read_record(folder: Path) -> dict[str, Any]:
    """The training record of an export; empty where there is none (an imported model)."""
    return read_json(folder, RECORD, schemas.EXPORT_RECORD) or {}


def _own_recipe(folder: Path, record: dict[str, Any]) -> Recipe:
    if not record.get("recipe") or not record.get("trainer"):
        raise RecipeError(f"{folder}: carries no recipe (it was not exported from a run); name one with --recipe")
    return build_recipe(record["recipe"], stored=True)
