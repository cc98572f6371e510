"""Records of bad steps, for diagnosis and --replay.

    runs/NAME/incidents/step_NNNNNNNN_sample_M/     the first of consecutive bad steps, and its first sample
        incident.json                      each bad step: reason, loss, gradient norm, samples, first non-finite tensor
        step_MMMMMMMM/                     the exact state before it, if a rewind or stop followed
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hola_megatron.checkpoint.folder import folder_name
from hola_megatron.data.stream import Batch
from hola_megatron.engine.base import Engine
from hola_megatron.errors import RecipeError, RunFolderError
from hola_megatron.files import FileProblem, MissingFile, read_json, schemas
from hola_megatron.model.parameters import module_label

FILE = "incident.json"


@dataclass(frozen=True)
class BadStep:
    """One step without update. Numbers are strings, since JSON has no NaN; samples are global, both ends included."""

    step: int
    reason: str
    loss: str
    grad_norm: str
    first_sample: int
    last_sample: int
    first_nonfinite: str | None


def incident_folder(run: Path, first: BadStep) -> Path:
    """The folder of an incident, named by step and sample: after a rewind a step is repeated with other samples."""
    return run / "incidents" / f"{folder_name(first.step)}_sample_{first.first_sample}"


def write_incident(folder: Path, steps: list[BadStep]) -> None:
    """Write incident.json. Raises RunFolderError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps([asdict(step) for step in steps], indent=1))
    except OSError as error:
        raise RunFolderError(f"{folder / FILE}: cannot be written ({error}), so --replay of these steps is not "
                             "possible; free the disk or mend the folder") from None


def read_incident(folder: Path) -> list[BadStep]:
    """Read incident.json. Raises RecipeError where `folder` has none."""
    try:
        return [BadStep(**entry) for entry in read_json(folder / FILE, schemas.INCIDENT)]
    except MissingFile:
        raise RecipeError(f"--replay {folder}: no {FILE} there; give a folder of RUN/incidents") from None
    except FileProblem as problem:
        raise RecipeError(f"--replay {folder / FILE}: {problem}; give another folder of RUN/incidents") from None


def first_nonfinite(engine: Engine, batches: list[Batch]) -> str | None:
    """Name of the first tensor with a value that is not finite, equal on every rank.

    A weight; else the output of a module in the forward pass of these micro-batches; else a gradient of the last
    backward pass. A collective.
    """
    found = [(0, *_in_weights(engine)), (2, *_in_gradients(engine)), (1, *_in_forward(engine, batches))]
    gathered: list[Any] = [None] * engine.layout.world
    dist.all_gather_object(gathered, [(kind, order, name) for kind, order, name in found if name])
    candidates = sorted(candidate for of_rank in gathered for candidate in of_rank)
    return candidates[0][2] if candidates else None


def _in_weights(engine: Engine) -> tuple[int, str | None]:
    for order, shard in enumerate(engine.param_shards()):
        if not _finite(shard.of(shard.parameter.data)):
            return order, f"weight {shard.name}"
    return 0, None


def _in_gradients(engine: Engine) -> tuple[int, str | None]:
    """The gradient of the latest layer: backward passes go from the last layer to the first."""
    stage = engine.layout.pipeline_rank
    for order, shard in enumerate(reversed(engine.param_shards())):
        gradient = engine.gradient(shard.parameter)
        if gradient is not None and not _finite(shard.of(gradient)):
            return order - stage * 1_000_000, f"gradient of {shard.name}"
    return 0, None


@torch.no_grad()
def _in_forward(engine: Engine, batches: list[Batch]) -> tuple[int, str | None]:
    seen: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in output if isinstance(output, tuple) else (output,):
                if not seen and isinstance(tensor, Tensor) and tensor.is_floating_point() and not _finite(tensor):
                    seen.append(name)
        return hook

    handles = []
    for chunk in engine.model:
        inner = chunk.module
        handles += [module.register_forward_hook(look(module_label(name, inner)))
                    for name, module in inner.named_modules() if name]
    try:
        engine.evaluate(batches)
    finally:
        for handle in handles:
            handle.remove()
    return engine.layout.pipeline_rank, f"output of {seen[0]}" if seen else None


def _finite(tensor: Tensor) -> bool:
    return math.isfinite(float(tensor.detach().abs().sum(dtype=torch.float32)))
