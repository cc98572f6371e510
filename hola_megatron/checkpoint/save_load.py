"""Saving and restoring a run: weights and optimizer under public names, trainer state as JSON.

What is stored are the optimizer's float32 weights and both Adam moments. The model's own
weights (bf16 or float32) are derived from them exactly as the optimizer derives them after
every update, so there is one truth, and a resumed run continues bit for bit. No random
state is kept because a run has none: weights are drawn by name, samples by number.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from hola_megatron.checkpoint.folder import (
    FORMAT,
    Checkpoint,
    file_digest,
    finish_writing,
    retire,
    start_writing,
    sync_file,
)
from hola_megatron.checkpoint.tensors import TensorReader, shard_entry
from hola_megatron.engine.megatron import MegatronEngine
from hola_megatron.errors import CheckpointError
from hola_megatron.model.parameters import Piece

KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands, besides its tensors."""

    step: int
    samples: int
    bad_steps: int = 0


def save(engine: MegatronEngine, state: TrainerState, root: Path, extra: dict[str, Any]) -> Path:
    """Write one checkpoint, atomically; every rank calls it. `extra` (plain values) goes into the manifest."""
    box = [None]
    if engine.layout.is_main:
        box[0] = _attempt(lambda: str(start_writing(root, state.step)))
    dist.broadcast_object_list(box, src=0)
    temporary = Path(_unwrap(box[0], root))
    report = _attempt(lambda: _write_rank(engine, temporary))
    reports: list[Any] = [None] * engine.layout.world
    dist.all_gather_object(reports, report)
    for rank_report in reports:
        _unwrap(rank_report, root)
    if engine.layout.is_main:
        box[0] = _attempt(lambda: str(finish_writing(temporary, _manifest(engine, state, reports, extra))))
        retire(root, engine.recipe.checkpoint.keep, engine.recipe.checkpoint.keep_every)
    dist.broadcast_object_list(box, src=0)
    return Path(_unwrap(box[0], root))


def load(engine: MegatronEngine, checkpoint: Checkpoint) -> TrainerState:
    """Restore this rank's share of weights and optimizer; works for any layout the model can have."""
    readers = {kind: TensorReader(checkpoint.path, checkpoint.manifest["tensors"][kind]) for kind in KINDS}
    _check_shapes(engine.parameter_pieces(), readers["weight"])
    for parameter, its_pieces in _by_parameter(engine.parameter_pieces()):
        values = {}
        for kind, reader in readers.items():
            local = torch.empty(parameter.shape, dtype=torch.float32)
            for piece in its_pieces:
                length = piece.local_shape[piece.axis]
                piece.of(local).copy_(reader.slice(piece.name, piece.axis, piece.offset, length))
            values[kind] = local.to(parameter.device)
        engine.state.restore(parameter, values)
    engine.state.step = checkpoint.manifest["optimizer_step"]
    trainer = checkpoint.manifest["trainer"]
    return TrainerState(**trainer)


def state_hash(engine: MegatronEngine) -> str:
    """sha256 over every logical weight and moment of the whole run: equal states, equal hashes, at any layout.

    Puts whole tensors together on rank 0; meant for tests and small models.
    """
    mine: dict[str, list[tuple[int, int, Tensor]]] = {}
    for number, (parameter, its_pieces) in enumerate(_by_parameter(engine.parameter_pieces())):
        gathered = engine.state.gather(parameter, number % engine.layout.data)
        for piece in its_pieces if gathered else ():
            if not piece.replica:
                for kind in KINDS:
                    part = piece.of(gathered[kind]).cpu().clone()
                    mine.setdefault(f"{kind}/{piece.name}", []).append((piece.axis, piece.offset, part))
    everyone: list[Any] = [None] * engine.layout.world
    dist.all_gather_object(everyone, mine)
    digest = hashlib.sha256(str(engine.state.step).encode())
    names = sorted({name for held in everyone for name in held})
    for name in names:
        shards = sorted((s for held in everyone for s in held.get(name, [])), key=lambda s: s[1])
        whole = torch.cat([s[2] for s in shards], shards[0][0])
        digest.update(name.encode() + whole.numpy().tobytes())
    return digest.hexdigest()


def _write_rank(engine: MegatronEngine, folder: Path) -> dict[str, Any]:
    """Write the slices this rank owns; returns its files and index entries."""
    rank = engine.layout.rank
    files = {"weight": f"weights-{rank:05d}.safetensors", "optimizer": f"optimizer-{rank:05d}.safetensors"}
    stored: dict[str, dict[str, Tensor]] = {name: {} for name in files.values()}
    index: dict[str, Any] = {kind: {} for kind in KINDS}
    for number, (parameter, its_pieces) in enumerate(_by_parameter(engine.parameter_pieces())):
        # the writer of a parameter rotates over data ranks, so all of them write their share
        gathered = engine.state.gather(parameter, number % engine.layout.data)
        for piece in its_pieces if gathered else ():
            if piece.replica:
                continue
            for kind in KINDS:
                file = files["weight" if kind == "weight" else "optimizer"]
                key = piece.name if kind == "weight" else f"{kind}.{piece.name}"
                stored[file][key] = piece.of(gathered[kind]).contiguous().cpu().clone()
                length = piece.local_shape[piece.axis]
                index[kind][piece.name] = {
                    "shape": list(piece.shape), "shards": [shard_entry(file, key, piece.axis, piece.offset, length)]}
    about = {}
    for name, tensors in stored.items():
        if tensors:
            save_file(tensors, folder / name)
            sync_file(folder / name)
            about[name] = {"bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)}
    return {"files": about, "index": index}


def _manifest(engine: MegatronEngine, state: TrainerState, reports: list[dict[str, Any]],
              extra: dict[str, Any]) -> dict[str, Any]:
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {kind: {} for kind in KINDS}
    for report in reports:
        files |= report["files"]
        for kind in KINDS:
            for name, entry in report["index"][kind].items():
                known = tensors[kind].setdefault(name, {"shape": entry["shape"], "shards": []})
                known["shards"] += entry["shards"]
    layout = engine.layout
    return {
        "format": FORMAT, "step": state.step, "optimizer_step": engine.state.step, "trainer": vars(state),
        "layout": {"tensor": layout.tensor, "pipeline": layout.pipeline, "data": layout.data},
        "recipe": engine.recipe.to_dict(), "files": files, "tensors": tensors, **extra}


def _check_shapes(wanted: list[Piece], stored: TensorReader) -> None:
    problems = [f"{p.name} is {list(stored.shape(p.name))} in the checkpoint, {list(p.shape)} in the recipe's model"
                for p in wanted if p.name in stored.index and stored.shape(p.name) != p.shape]
    problems += [f"{p.name} is not in the checkpoint" for p in wanted if p.name not in stored.index]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"{stored.folder}: belongs to another model: {problems[0]}{more}; "
                              "use the recipe it was made with")


def _by_parameter(all_pieces: list[Piece]) -> list[tuple[torch.nn.Parameter, list[Piece]]]:
    grouped: dict[int, tuple[torch.nn.Parameter, list[Piece]]] = {}
    for piece in all_pieces:
        grouped.setdefault(id(piece.parameter), (piece.parameter, []))[1].append(piece)
    return list(grouped.values())


def _attempt(action: Any) -> Any:
    """The result, or the OSError as a value: all ranks must learn of it before any of them leaves."""
    try:
        return action()
    except OSError as error:
        return error


def _unwrap(result: Any, root: Path) -> Any:
    if isinstance(result, OSError):
        raise CheckpointError(f"{root}: the checkpoint could not be written ({result}); earlier ones are untouched, "
                              "free the disk or mend the folder and start the run again")
    return result
