"""What a checkpoint or a run folder holds, as text for people."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from hola_megatron.checkpoint.folder import MANIFEST, Checkpoint, list_steps, open_checkpoint
from hola_megatron.data.phases import Phases
from hola_megatron.errors import CheckpointError

GB = 1e9


def describe_run(root: Path, *, verify: bool) -> list[str]:
    """A table of the checkpoints under `root`, oldest first. verify: hash every file.

    Raises CheckpointError where there is none.
    """
    steps = list_steps(root)
    if not steps:
        raise CheckpointError(f"{root}: no checkpoint here (looked for step_NNNNNNNN folders); give a run folder or "
                              "one checkpoint's folder")
    lines = [f"{'step':>12} {'tokens':>16} {'GB':>8}  written           state"]
    for step, path in reversed(steps):
        try:
            checkpoint = open_checkpoint(path, verify=verify)
        except CheckpointError as problem:
            lines.append(f"{step:>12,} {'':>16} {'':>8}  {'':16}  not usable: {problem}")
            continue
        size = sum(file["bytes"] for file in checkpoint.manifest["files"].values())
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime((path / MANIFEST).stat().st_mtime))
        state = "healthy" if checkpoint.healthy else "saved during bad steps"
        lines.append(f"{step:>12,} {_tokens(checkpoint):>16} {size / GB:>8.3f}  {written}  {state}, "
                     f"{'every hash is right' if verify else 'sizes are right'}")
    return lines


def describe_checkpoint(checkpoint: Checkpoint, *, tensors: bool) -> list[str]:
    """One line for each fact of a checkpoint. tensors: and one for each tensor."""
    manifest = checkpoint.manifest
    trainer, recipe, stored = (manifest.get(name) or {} for name in ("trainer", "recipe", "tensors"))
    weights = stored.get("weight", {})
    size = sum(file["bytes"] for file in manifest["files"].values())
    facts: dict[str, Any] = {
        "folder": checkpoint.path, "recipe": recipe.get("name", "none"), "step": f"{checkpoint.step:,}",
        "tokens": _tokens(checkpoint), "origin": trainer.get("origin") or "its own first step",
        "healthy": "yes" if checkpoint.healthy else "no: saved during bad steps",
        "updates": f"{manifest.get('optimizer_step', 0):,} of the optimizer",
        "parameters": f"{sum(math.prod(tensor['shape']) for tensor in weights.values()):,} in {len(weights)} tensors",
        "moments": ", ".join(f"{kind} of {len(found)}" for kind, found in sorted(stored.items()) if kind != "weight")
                   or "none",
        "files": f"{len(manifest['files'])}, {size / GB:.3f} GB",
        "layout": ", ".join(f"{name} {ranks}" for name, ranks in (manifest.get("layout") or {}).items()),
        "code": manifest.get("code") or "not recorded", "data": manifest.get("data_fingerprint") or "not recorded",
        "tokenizer": " ".join(str(value)[:12] for value in (manifest.get("tokenizer") or {}).values())
                     or "not recorded",
        "sha256": manifest["sha256"]}
    lines = [f"{name:>10}  {value}" for name, value in facts.items()]
    lines += [f"{'stream':>10}  {name}: {tokens:,} tokens" for name, tokens in _streams(trainer)]
    if tensors:
        lines += [f"{' x '.join(map(str, tensor['shape'])):>16}  {name}" for name, tensor in sorted(weights.items())]
    return lines


def _phases(trainer: dict[str, Any]) -> Phases | None:
    try:
        return Phases.from_dicts(trainer["phases"]) if trainer.get("phases") else None
    except CheckpointError:
        return None


def _tokens(checkpoint: Checkpoint) -> str:
    trainer = checkpoint.manifest.get("trainer") or {}
    phases = _phases(trainer)
    if phases is None:
        return "not recorded"
    return f"{sum(tokens for _, tokens in phases.read(trainer['samples']).values()):,}"


def _streams(trainer: dict[str, Any]) -> list[tuple[str, int]]:
    """(name, tokens read) of every stream."""
    phases = _phases(trainer)
    if phases is None:
        return []
    names = {stream.number: stream.name for phase in phases.phases for stream in phase.streams}
    return [(names[number], tokens) for number, (_, tokens) in sorted(phases.read(trainer["samples"]).items())]
