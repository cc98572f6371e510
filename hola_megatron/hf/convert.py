"""Checkpoints to Hugging Face folders and back.

    to_hf     a checkpoint of any layout -> config.json, safetensors, tokenizer, the model's own code
    from_hf   such a folder -> a run folder from which training goes on

A checkpoint already holds whole logical tensors under the model's public names, so both ways
stream tensor by tensor through one process without process groups, in the memory of one shard.
Neither leaves anything half-written, and unless told otherwise neither says "done" before the
reloaded model has given the Megatron model's logits (verify.py).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from hola_megatron.checkpoint.folder import (
    FORMAT,
    Checkpoint,
    file_digest,
    find_checkpoint,
    finish_writing,
    open_checkpoint,
    start_writing,
    sync_file,
)
from hola_megatron.checkpoint.tensors import TensorReader, shard_entry
from hola_megatron.config import Recipe, build_recipe
from hola_megatron.data.tokenizer import Tokenizer, load_tokenizer
from hola_megatron.errors import CheckpointError, DataError, RecipeError
from hola_megatron.hf import auto, cache_hola, configuration_hola, decoding_hola, modeling_hola
from hola_megatron.hf.bundle import bundle
from hola_megatron.hf.configuration_hola import HolaConfig
from hola_megatron.hf.fresh_folder import fresh_folder
from hola_megatron.hf.shape import config_of, differences, model_section
from hola_megatron.hf.weights import ModelReader, write_model, write_shards

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RECORD = "hola_export.json"
CODE = (configuration_hola, decoding_hola, cache_hola, modeling_hola)
AUTO_MAP = {"AutoConfig": "configuration_hola.HolaConfig", "AutoModel": "modeling_hola.HolaModel",
            "AutoModelForCausalLM": "modeling_hola.HolaForCausalLM"}
Verify = Callable[[Checkpoint, Path], Any]
MOMENTS = ("exp_avg", "exp_avg_sq")
ZERO_ROWS = 4096  # of the one tensor of zeros that all moments point at


@dataclass(frozen=True)
class ExportOptions:
    """How an export is written. tokenizer None: the recipe's; shard_bytes: largest safetensors file."""

    dtype: str = "fp32"
    tokenizer: str | None = None
    shard_bytes: int = 5 * 10**9
    overwrite: bool = False


def to_hf(source: Path, out: Path, options: ExportOptions = ExportOptions(), *,
          verify: Verify | None = None) -> Path:
    """Export a checkpoint (or a run folder's newest) to `out`; `verify` may refuse before it gets its name.

    Raises CheckpointError (source or out not usable), DataError (tokenizer).
    """
    checkpoint = find_checkpoint(source)
    recipe = build_recipe(checkpoint.manifest["recipe"])
    tokenizer = open_tokenizer(checkpoint.manifest, options.tokenizer or recipe.data.tokenizer)
    with fresh_folder(out, overwrite=options.overwrite, marker=RECORD) as folder:
        config = config_of(recipe, dtype=DTYPES[options.dtype], bos_token_id=tokenizer.bos_id,
                           eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.eos_id)
        reader = TensorReader(checkpoint.path, checkpoint.manifest["tensors"]["weight"])
        if problem := auto.describe_mismatch({name: reader.shape(name) for name in reader.names()}, config):
            raise CheckpointError(f"{checkpoint.path}: does not hold the model of its recipe: {problem}")
        write_model(_as_stored(reader, DTYPES[options.dtype]), folder, options.shard_bytes)
        write_config(folder, config)
        write_tokenizer(folder, tokenizer)
        write_record(folder, _record(checkpoint))
        if verify is not None:
            verify(checkpoint, folder)
    return out


def open_tokenizer(manifest: dict[str, Any], spec: str) -> Tokenizer:
    """The tokenizer named by `spec`, which must be the one the checkpoint was trained with."""
    try:
        tokenizer = load_tokenizer(spec)
    except DataError as error:
        raise DataError(f"{error} (--tokenizer names another place)") from None
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
    for module in CODE:
        shutil.copyfile(module.__file__, folder / Path(module.__file__).name)
    (folder / "hola_ops.py").write_text(bundle(), encoding="utf-8")


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """The tokenizer's Hugging Face form; batches for generation are padded on the left with eos."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {"pad_token": settings["eos_token"], "padding_side": "left"}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_record(folder: Path, record: dict[str, Any]) -> None:
    (folder / RECORD).write_text(json.dumps({"format": 1, **record}, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _record(checkpoint: Checkpoint) -> dict[str, Any]:
    """What training knows of these weights: enough to go on from them."""
    manifest = checkpoint.manifest
    kept = ("step", "trainer", "tokenizer", "data_fingerprint", "code")
    # the run folder is a place on this machine, which no other needs to know
    return {name: manifest.get(name) for name in kept} | {"recipe": manifest["recipe"] | {"run_dir": None}}


def _as_stored(reader: TensorReader, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name in reader.names():
        yield name, auto.stored(name, reader.whole(name), dtype)


def from_hf(folder: Path, run: Path, recipe: Recipe | None = None, *, shard_bytes: int = 5 * 10**9,
            verify: Verify | None = None) -> Path:
    """Make the run folder `run` with one checkpoint of the exported weights; returns the checkpoint's folder.

    With a recipe a new run starts from these weights, at step 0. Without one the run that was exported
    goes on: its recipe, its step, its place in the data. Adam's moments start at zero either way.
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
        (partial / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")
        written = _write_checkpoint(reader, partial / "checkpoints", recipe, trainer, extra, shard_bytes)
        if verify is not None:
            verify(open_checkpoint(written), folder)
    return run / "checkpoints" / written.name


def read_record(folder: Path) -> dict[str, Any]:
    """What an export says of its training; empty where it says nothing (an imported model)."""
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / RECORD}: damaged ({error}); export again") from None


def _own_recipe(folder: Path, record: dict[str, Any]) -> Recipe:
    if not record.get("recipe") or not record.get("trainer"):
        raise RecipeError(f"{folder}: carries no recipe (it was not exported from a run); name one with --recipe")
    return build_recipe(record["recipe"])


def _write_checkpoint(reader: ModelReader, root: Path, recipe: Recipe, trainer: dict[str, int], extra: dict[str, Any],
                      shard_bytes: int) -> Path:
    temporary = start_writing(root, trainer["step"])
    shapes = reader.shapes()
    written = write_shards(((name, reader.read(name).float()) for name in reader.names()), temporary,
                           "weights-{:05d}.safetensors", shard_bytes)
    weight = {name: {"shape": list(shapes[name]), "shards": [shard_entry(file, name, 0, 0, shapes[name][0])]}
              for file, names in written.items() for name in names}
    moments = _zero_moments(shapes, temporary / "optimizer-00000.safetensors")
    files = {}
    for file in sorted(temporary.iterdir()):
        sync_file(file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": file_digest(file)}
    return finish_writing(temporary, {
        "format": FORMAT, "step": trainer["step"], "optimizer_step": 0, "trainer": trainer,
        "layout": {"tensor": 1, "pipeline": 1, "data": 1}, "recipe": recipe.to_dict(), "files": files,
        "tensors": {"weight": weight, **dict.fromkeys(MOMENTS, moments)}, **extra})


def _zero_moments(shapes: dict[str, tuple[int, ...]], file: Path) -> dict[str, Any]:
    """Write zeros once for each number of axes; every tensor's shards are slices of them."""
    zeros = {}
    for axes in {len(shape) for shape in shapes.values()}:
        largest = [max(sizes) for sizes in zip(*(s for s in shapes.values() if len(s) == axes), strict=True)]
        zeros[f"zeros{axes}"] = torch.zeros(min(largest[0], ZERO_ROWS), *largest[1:])
    save_file(zeros, file)
    index = {}
    for name, shape in shapes.items():
        key, total = f"zeros{len(shape)}", shape[0]
        rows = zeros[key].shape[0]
        shards = [shard_entry(file.name, key, 0, at, min(rows, total - at)) for at in range(0, total, rows)]
        index[name] = {"shape": list(shape), "shards": shards}
    return index
