"""Saving and restoring a run: weights and optimizer under public names, trainer state as JSON.

Stored are the optimizer's float32 weights and both Adam moments. The model's own weights (bf16 or float32) are derived
from them exactly as the optimizer does after every update, so a resumed run continues bitwise. No random state is
stored, because a run has none: weights are drawn by name, samples by index.

`Saver.begin` copies this rank's tensors to host memory (collectives, on the training thread) and starts
`writer.BackgroundWriter`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hola_megatron.checkpoint.folder import FORMAT, Checkpoint, start_writing
from hola_megatron.checkpoint.tensors import LAYER_STATE, TensorReader, shard_entry
from hola_megatron.checkpoint.writer import BackgroundWriter, HostSnapshot, refusal
from hola_megatron.engine.base import Engine
from hola_megatron.errors import CheckpointError
from hola_megatron.model.parameters import ParamShard
from hola_megatron.parallel.groups import run_on_rank0

KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainerState:
    """The state of a run without its tensors.

    step, samples: finished steps, and global samples consumed. bad_steps: consecutive ones, up to this step. rewinds:
    number so far. guard: `NumberGuard.history`. phases: of the data, as plain values (data/phases.py); empty in older
    checkpoints. first_sample: global samples that were read before this run's first step, by the run of `init.from`.
    origin: what the run's first weights were, for people; empty where they were drawn.
    """

    step: int
    samples: int
    bad_steps: int = 0
    rewinds: int = 0
    guard: dict[str, list[float]] = field(default_factory=dict)
    phases: list[dict[str, Any]] = field(default_factory=list)
    first_sample: int = 0
    origin: str = ""


class Saver:
    """Starts checkpoints of an engine, one at a time; host buffers are reused for the next one."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.writer = BackgroundWriter(engine.layout.rank, engine.layout.world)
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def begin(self, state: TrainerState, root: Path, extra: dict[str, Any],
              afterwards: Sequence[Callable[[], object]] = (), snapshot: HostSnapshot | None = None) -> None:
        """Start to write this rank's shard of a checkpoint. A collective.

        Args:
            state: written to the manifest.
            root: the folder of step_NNNNNNNN folders.
            extra: more plain values for the manifest.
            afterwards: called on rank 0 when the checkpoint is complete.
            snapshot: what to write; None: a copy made here.

        Raises CheckpointError, on every rank, when the folder cannot be created.
        """
        try:
            folder = run_on_rank0(self.engine.layout, lambda: start_writing(root, state.step))
        except OSError as error:
            raise refusal(root, error) from None
        snapshot = snapshot or self.copy()
        if not self.engine.recipe.checkpoint.background:
            self._buffers = {}
        self.writer.start(snapshot, folder, {**_manifest(self.engine, state), **extra}, afterwards)

    @torch.no_grad()
    def copy(self) -> HostSnapshot:
        """A copy of this rank's tensors in host memory. A collective."""
        engine = self.engine
        rank = engine.layout.rank
        names = {"weight": f"weights-{rank:05d}.safetensors", "optimizer": f"optimizer-{rank:05d}.safetensors"}
        files: dict[str, dict[str, Tensor]] = {name: {} for name in names.values()}
        index: dict[str, Any] = {kind: {} for kind in KINDS}
        finite: dict[str, Tensor] = {}
        for number, (parameter, its_shards) in enumerate(shards_by_parameter(engine.param_shards())):
            # the writing rank of a parameter rotates over data ranks, so that all of them write
            gathered = engine.state.gather(parameter, number % engine.state.ranks)
            for shard in its_shards if gathered else ():
                if shard.replica:
                    continue
                for kind in gathered:
                    file = names["weight" if kind == "weight" else "optimizer"]
                    key = shard.name if kind == "weight" else f"{kind}.{shard.name}"
                    value = shard.of(gathered[kind])
                    finite[f"{kind} of {shard.name}"] = value.isfinite().all()
                    files[file][key] = self._to_host(file, key, value)
                    length = shard.local_shape[shard.axis]
                    entry = shard_entry(file, key, shard.axis, shard.offset, length)
                    index[kind][shard.name] = {"shape": list(shard.shape), "shards": [entry]}
        layout = engine.layout
        if layout.tensor_rank == layout.data_rank == layout.context_rank == 0:
            for kind, tensors in extra_state(engine).items():
                index[kind] = self._copy_extra_state(kind, tensors, files[names["optimizer"]], names["optimizer"])
        # one read at the end: each read synchronises with the device
        fine = torch.stack(list(finite.values())).tolist() if finite else []
        nonfinite = tuple(name for name, is_finite in zip(finite, fine, strict=True) if not is_finite)
        return HostSnapshot(files, index, nonfinite)

    def _copy_extra_state(self, kind: str, tensors: dict[str, Tensor], content: dict[str, Tensor],
                          file: str) -> dict[str, Any]:
        index = {}
        for name, value in tensors.items():
            key = f"{kind}.{name}"
            content[key] = self._to_host(file, key, value)
            index[name] = {"shape": list(value.shape), "shards": [shard_entry(file, key, 0, 0, len(value))]}
        return index

    def _to_host(self, file: str, key: str, value: Tensor) -> Tensor:
        buffer = self._buffers.get((file, key))
        if buffer is None:
            buffer = self._buffers[file, key] = torch.empty(value.shape, dtype=value.dtype)
        return buffer.copy_(value)


def load(engine: Engine, checkpoint: Checkpoint) -> TrainerState:
    """Restore this rank's shard of weights and optimizer state, from a checkpoint of any layout.

    Raises CheckpointError where the checkpoint is of another model or optimizer, or damaged.
    """
    manifest = checkpoint.run_manifest()
    readers = {kind: TensorReader(checkpoint.path, manifest["tensors"].get(kind, {})) for kind in KINDS}
    _check_shapes(engine.param_shards(), readers["weight"])
    check_moments(engine, readers, manifest["optimizer_step"] > 0)
    for parameter, its_shards in shards_by_parameter(engine.param_shards()):
        values = {}
        for kind in engine.state.kinds(parameter):
            reader = readers[kind]
            local = torch.zeros(parameter.shape, dtype=torch.float32)  # padding is zero
            for shard in its_shards:
                length = shard.local_shape[shard.axis]
                shard.of(local).copy_(reader.slice(shard.name, shard.axis, shard.offset, length))
            values[kind] = local.to(parameter.device)
        engine.state.restore(parameter, values)
    for kind, restore in (("fp8", engine.restore_fp8), ("router", engine.restore_biases),
                          (LAYER_STATE, engine.layer_states.restore)):
        reader = TensorReader(checkpoint.path, manifest["tensors"].get(kind, {}))
        restore({name: reader.whole(name) for name in reader.names()})
    engine.state.step = manifest["optimizer_step"]
    try:
        return TrainerState(**manifest["trainer"])
    except TypeError as error:
        raise CheckpointError(f"{checkpoint.path}: the trainer's state is of another version ({error}); use the code "
                              "that saved it") from None


def state_hash(engine: Engine) -> str:
    """sha256 over every logical weight and moment of the whole run, independent of the layout. A collective.

    Gathers whole tensors on every rank; meant for tests and small models.
    """
    mine: dict[str, list[tuple[int, int, Tensor]]] = {}
    for number, (parameter, its_shards) in enumerate(shards_by_parameter(engine.param_shards())):
        gathered = engine.state.gather(parameter, number % engine.state.ranks)
        for shard in its_shards if gathered else ():
            if not shard.replica:
                for kind in gathered:
                    value = shard.of(gathered[kind]).cpu().clone()
                    mine.setdefault(f"{kind}/{shard.name}", []).append((shard.axis, shard.offset, value))
    if engine.layout.tensor_rank == engine.layout.data_rank == engine.layout.context_rank == 0:
        for kind, tensors in extra_state(engine).items():
            mine |= {f"{kind}/{name}": [(0, 0, value.cpu().clone())] for name, value in tensors.items()}
    all_ranks: list[Any] = [None] * engine.layout.world
    dist.all_gather_object(all_ranks, mine)
    digest = hashlib.sha256(str(engine.state.step).encode())
    names = sorted({name for tensors in all_ranks for name in tensors})
    for name in names:
        shards = sorted((s for tensors in all_ranks for s in tensors.get(name, [])), key=lambda s: s[1])
        whole = torch.cat([s[2] for s in shards], shards[0][0])
        digest.update(name.encode() + whole.numpy().tobytes())
    return digest.hexdigest()


def _manifest(engine: Engine, state: TrainerState) -> dict[str, Any]:
    """The manifest's entries, without files and tensors."""
    layout = engine.layout
    return {
        "format": FORMAT, "step": state.step, "optimizer_step": engine.state.step, "trainer": dict(vars(state)),
        "healthy": state.bad_steps == 0,
        "layout": {"tensor": layout.tensor, "pipeline": layout.pipeline,
                   "context": engine.recipe.parallel.context, "data": layout.data},
        "recipe": engine.recipe.to_dict()}


def _check_shapes(wanted: list[ParamShard], stored: TensorReader) -> None:
    problems = [f"{p.name} is {list(stored.shape(p.name))} in the checkpoint, {list(p.shape)} in the recipe's model"
                for p in wanted if p.name in stored.index and stored.shape(p.name) != p.shape]
    problems += [f"{p.name} is not in the checkpoint" for p in wanted if p.name not in stored.index]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"{stored.folder}: belongs to another model: {problems[0]}{more}; "
                              "use the recipe it was saved with")


def extra_state(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """State in addition to parameters and moments, equal on every rank of a pipeline stage."""
    return {"fp8": engine.fp8_tensors(), "router": engine.router_biases(), LAYER_STATE: engine.layer_states.tensors()}


def check_moments(engine: Engine, stored: dict[str, TensorReader], used: bool,
                  without: Collection[str] = ()) -> None:
    """CheckpointError where moments are of another optimizer.

    used: the optimizer has made updates; imported weights have zero moments, which suit any optimizer. without: names
    of parameters that the checkpoint has not.
    """
    for shard in engine.param_shards():
        if shard.name in without:
            continue
        wanted = engine.state.kinds(shard.parameter)
        for kind, reader in stored.items():
            has = shard.name in reader.index
            if (kind in wanted and not has) or (kind not in wanted and has and used):
                raise CheckpointError(f"{reader.folder}: has {'an' if has else 'no'} {kind} of {shard.name}; it was "
                                      f"saved by another optimizer than {engine.recipe.train.optimizer}; set "
                                      "train.optimizer to that one, or start a new run from its weights "
                                      "(init.from, with init.optimizer: fresh)")


def shards_by_parameter(all_shards: list[ParamShard]) -> list[tuple[torch.nn.Parameter, list[ParamShard]]]:
    """(parameter, its shards), in the order of the shards."""
    grouped: dict[int, tuple[torch.nn.Parameter, list[ParamShard]]] = {}
    for shard in all_shards:
        grouped.setdefault(id(shard.parameter), (shard.parameter, []))[1].append(shard)
    return list(grouped.values())
