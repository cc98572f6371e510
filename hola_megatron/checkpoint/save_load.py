"""Saving and restoring a run: weights and optimizer under public names, trainer state as JSON.

What is stored are the optimizer's float32 weights and both Adam moments. The model's own
weights (bf16 or float32) are derived from them exactly as the optimizer derives them after
every update, so there is one truth, and a resumed run continues bit for bit. No random
state is kept because a run has none: weights are drawn by name, samples by number.

`Saver.begin` copies what this rank owns to host memory (collectives, on the training thread)
and leaves the writing to `writer.BackgroundWriter`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hola_megatron.checkpoint.folder import FORMAT, Checkpoint, start_writing
from hola_megatron.checkpoint.tensors import TensorReader, shard_entry
from hola_megatron.checkpoint.writer import BackgroundWriter, Held, refusal
from hola_megatron.engine.base import Engine
from hola_megatron.errors import CheckpointError
from hola_megatron.model.parameters import Piece
from hola_megatron.parallel.groups import on_main

KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands, besides its tensors."""

    step: int
    samples: int
    bad_steps: int = 0
    rewinds: int = 0
    guard: dict[str, list[float]] = field(default_factory=dict)


class Saver:
    """Begins checkpoints of an engine, one at a time; host buffers are kept for the next one."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.writer = BackgroundWriter(engine.layout.rank, engine.layout.world)
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def begin(self, state: TrainerState, root: Path, extra: dict[str, Any],
              afterwards: Sequence[Callable[[], object]] = ()) -> None:
        """Copy this rank's share and start writing it under `root`; every rank calls it.

        `extra` (plain values) goes into the manifest; rank 0 calls `afterwards` when the checkpoint is whole.
        Raises CheckpointError, on every rank, when the folder cannot be made.
        """
        try:
            folder = on_main(self.engine.layout, lambda: start_writing(root, state.step))
        except OSError as error:
            raise refusal(root, error) from None
        held = self._copy()
        if not self.engine.recipe.checkpoint.background:
            self._buffers = {}
        self.writer.start(held, folder, {**_manifest(self.engine, state), **extra}, afterwards)

    @torch.no_grad()
    def _copy(self) -> Held:
        """What this rank owns, in host memory."""
        engine = self.engine
        rank = engine.layout.rank
        names = {"weight": f"weights-{rank:05d}.safetensors", "optimizer": f"optimizer-{rank:05d}.safetensors"}
        files: dict[str, dict[str, Tensor]] = {name: {} for name in names.values()}
        index: dict[str, Any] = {kind: {} for kind in KINDS}
        finite = torch.ones((), dtype=torch.bool, device=engine.layout.device)
        for number, (parameter, its_pieces) in enumerate(_by_parameter(engine.parameter_pieces())):
            # the writer of a parameter rotates over data ranks, so all of them write their share
            gathered = engine.state.gather(parameter, number % engine.state.ranks)
            for piece in its_pieces if gathered else ():
                if piece.replica:
                    continue
                for kind in gathered:
                    file = names["weight" if kind == "weight" else "optimizer"]
                    key = piece.name if kind == "weight" else f"{kind}.{piece.name}"
                    value = piece.of(gathered[kind])
                    finite &= value.isfinite().all()
                    files[file][key] = self._to_host(file, key, value)
                    length = piece.local_shape[piece.axis]
                    shard = shard_entry(file, key, piece.axis, piece.offset, length)
                    index[kind][piece.name] = {"shape": list(piece.shape), "shards": [shard]}
        layout = engine.layout
        if layout.tensor_rank == layout.data_rank == layout.context_rank == 0:
            for kind, tensors in _besides(engine).items():
                index[kind] = self._copy_besides(kind, tensors, files[names["optimizer"]], names["optimizer"])
        return Held(files, index, bool(finite))

    def _copy_besides(self, kind: str, tensors: dict[str, Tensor], held: dict[str, Tensor],
                      file: str) -> dict[str, Any]:
        index = {}
        for name, value in tensors.items():
            key = f"{kind}.{name}"
            held[key] = self._to_host(file, key, value)
            index[name] = {"shape": list(value.shape), "shards": [shard_entry(file, key, 0, 0, len(value))]}
        return index

    def _to_host(self, file: str, key: str, value: Tensor) -> Tensor:
        buffer = self._buffers.get((file, key))
        if buffer is None:
            buffer = self._buffers[file, key] = torch.empty(value.shape, dtype=value.dtype)
        return buffer.copy_(value)


def load(engine: Engine, checkpoint: Checkpoint) -> TrainerState:
    """Restore this rank's share of weights and optimizer; works for any layout the model can have."""
    readers = {kind: TensorReader(checkpoint.path, checkpoint.manifest["tensors"][kind]) for kind in KINDS}
    _check_shapes(engine.parameter_pieces(), readers["weight"])
    _check_moments(engine, readers, checkpoint.manifest["optimizer_step"] > 0)
    for parameter, its_pieces in _by_parameter(engine.parameter_pieces()):
        values = {}
        for kind in engine.state.kinds(parameter):
            reader = readers[kind]
            local = torch.zeros(parameter.shape, dtype=torch.float32)  # zero is what padding holds
            for piece in its_pieces:
                length = piece.local_shape[piece.axis]
                piece.of(local).copy_(reader.slice(piece.name, piece.axis, piece.offset, length))
            values[kind] = local.to(parameter.device)
        engine.state.restore(parameter, values)
    for kind, restore in (("fp8", engine.restore_fp8), ("router", engine.restore_biases)):
        reader = TensorReader(checkpoint.path, checkpoint.manifest["tensors"].get(kind, {}))
        restore({name: reader.whole(name) for name in reader.names()})
    engine.state.step = checkpoint.manifest["optimizer_step"]
    trainer = checkpoint.manifest["trainer"]
    return TrainerState(**trainer)


def state_hash(engine: Engine) -> str:
    """sha256 over every logical weight and moment of the whole run: equal states, equal hashes, at any layout.

    Puts whole tensors together on rank 0; meant for tests and small models.
    """
    mine: dict[str, list[tuple[int, int, Tensor]]] = {}
    for number, (parameter, its_pieces) in enumerate(_by_parameter(engine.parameter_pieces())):
        gathered = engine.state.gather(parameter, number % engine.state.ranks)
        for piece in its_pieces if gathered else ():
            if not piece.replica:
                for kind in gathered:
                    part = piece.of(gathered[kind]).cpu().clone()
                    mine.setdefault(f"{kind}/{piece.name}", []).append((piece.axis, piece.offset, part))
    if engine.layout.tensor_rank == engine.layout.data_rank == engine.layout.context_rank == 0:
        for kind, tensors in _besides(engine).items():
            mine |= {f"{kind}/{name}": [(0, 0, value.cpu().clone())] for name, value in tensors.items()}
    everyone: list[Any] = [None] * engine.layout.world
    dist.all_gather_object(everyone, mine)
    digest = hashlib.sha256(str(engine.state.step).encode())
    names = sorted({name for held in everyone for name in held})
    for name in names:
        shards = sorted((s for held in everyone for s in held.get(name, [])), key=lambda s: s[1])
        whole = torch.cat([s[2] for s in shards], shards[0][0])
        digest.update(name.encode() + whole.numpy().tobytes())
    return digest.hexdigest()


def _manifest(engine: Engine, state: TrainerState) -> dict[str, Any]:
    """What the manifest says besides files and tensors."""
    layout = engine.layout
    return {
        "format": FORMAT, "step": state.step, "optimizer_step": engine.state.step, "trainer": dict(vars(state)),
        "healthy": state.bad_steps == 0,
        "layout": {"tensor": layout.tensor, "pipeline": layout.pipeline,
                   "context": engine.recipe.parallel.context, "data": layout.data},
        "recipe": engine.recipe.to_dict()}


def _check_shapes(wanted: list[Piece], stored: TensorReader) -> None:
    problems = [f"{p.name} is {list(stored.shape(p.name))} in the checkpoint, {list(p.shape)} in the recipe's model"
                for p in wanted if p.name in stored.index and stored.shape(p.name) != p.shape]
    problems += [f"{p.name} is not in the checkpoint" for p in wanted if p.name not in stored.index]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"{stored.folder}: belongs to another model: {problems[0]}{more}; "
                              "use the recipe it was made with")


def _besides(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """What a resume needs beside parameters and moments, the same on every rank of a pipeline stage."""
    return {"fp8": engine.fp8_tensors(), "router": engine.router_biases()}


def _check_moments(engine: Engine, stored: dict[str, TensorReader], used: bool) -> None:
    """used: the optimizer has moved; imported weights come with zero moments that suit any."""
    for piece in engine.parameter_pieces():
        wanted = engine.state.kinds(piece.parameter)
        for kind, reader in stored.items():
            has = piece.name in reader.index
            if (kind in wanted and not has) or (kind not in wanted and has and used):
                raise CheckpointError(f"{reader.folder}: has {'an' if has else 'no'} {kind} of {piece.name}; it was "
                                      f"saved by another optimizer than {engine.recipe.train.optimizer}; set "
                                      "train.optimizer to that one, or start a new run from its weights "
                                      "(tools/convert.py to-hf, from-hf --recipe)")


def _by_parameter(all_pieces: list[Piece]) -> list[tuple[torch.nn.Parameter, list[Piece]]]:
    grouped: dict[int, tuple[torch.nn.Parameter, list[Piece]]] = {}
    for piece in all_pieces:
        grouped.setdefault(id(piece.parameter), (piece.parameter, []))[1].append(piece)
    return list(grouped.values())
