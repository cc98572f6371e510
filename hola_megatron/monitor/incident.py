"""What is kept of steps with bad numbers, so that they can be understood and run again.

    runs/NAME/incidents/step_NNNNNNNN_sample_M/     the first bad step of a streak, and its first sample
        incident.json                      each bad step: why, loss, gradient norm, samples, first non-finite place
        step_MMMMMMMM/                     the exact state before it, when the streak ended in a rewind or a stop
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
from hola_megatron.model.parameters import place_name

FILE = "incident.json"


@dataclass(frozen=True)
class BadStep:
    """One step that was not made. Numbers are text, as JSON has no NaN; samples are global, both ends included."""

    step: int
    reason: str
    loss: str
    grad_norm: str
    first_sample: int
    last_sample: int
    first_nonfinite: str | None


def incident_folder(run: Path, first: BadStep) -> Path:
    """Named by the samples too: after a rewind the same step comes again with others."""
    return run / "incidents" / f"{folder_name(first.step)}_sample_{first.first_sample}"


def write_incident(folder: Path, steps: list[BadStep]) -> None:
    """RunFolderError when the disk refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps([asdict(step) for step in steps], indent=1))
    except OSError as error:
        raise RunFolderError(f"{folder / FILE}: cannot be written ({error}); checkpoints are untouched, free the disk "
                             "or mend the folder and start the run again") from None


def read_incident(folder: Path) -> list[BadStep]:
    """RecipeError when this is no incident's folder."""
    try:
        return [BadStep(**entry) for entry in json.loads((folder / FILE).read_text())]
    except FileNotFoundError:
        raise RecipeError(f"--replay {folder}: no {FILE} there; give a folder of RUN/incidents") from None
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"--replay {folder / FILE}: cannot be read ({error})") from None


def first_nonfinite(engine: Engine, batches: list[Batch]) -> str | None:
    """Where the first value that is not finite arises, the same on every rank: a weight, else the output of a
    module in the forward pass of these micro-batches, else a gradient (as the last backward pass left it)."""
    found = [(0, *_in_weights(engine)), (2, *_in_gradients(engine)), (1, *_in_forward(engine, batches))]
    everyone: list[Any] = [None] * engine.layout.world
    dist.all_gather_object(everyone, [(kind, order, name) for kind, order, name in found if name])
    candidates = sorted(candidate for held in everyone for candidate in held)
    return candidates[0][2] if candidates else None


def _in_weights(engine: Engine) -> tuple[int, str | None]:
    for order, piece in enumerate(engine.parameter_pieces()):
        if not _finite(piece.of(piece.parameter.data)):
            return order, f"weight {piece.name}"
    return 0, None


def _in_gradients(engine: Engine) -> tuple[int, str | None]:
    """The gradient of the latest layer: backward passes go from the last layer to the first."""
    stage = engine.layout.pipeline_rank
    for order, piece in enumerate(reversed(engine.parameter_pieces())):
        gradient = engine.gradient(piece.parameter)
        if gradient is not None and not _finite(piece.of(gradient)):
            return order - stage * 1_000_000, f"gradient of {piece.name}"
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
        handles += [module.register_forward_hook(look(place_name(name, inner)))
                    for name, module in inner.named_modules() if name]
    try:
        engine.evaluate(batches)
    finally:
        for handle in handles:
            handle.remove()
    return engine.layout.pipeline_rank, f"output of {seen[0]}" if seen else None


def _finite(tensor: Tensor) -> bool:
    return math.isfinite(float(tensor.detach().abs().sum(dtype=torch.float32)))
