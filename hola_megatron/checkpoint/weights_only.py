"""A checkpoint of given weights, written tensor by tensor by one process: moments of zero, no updates made."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hola_megatron.checkpoint.folder import FORMAT, file_digest, finish_writing, start_writing, sync_file
from hola_megatron.checkpoint.tensors import shard_entry

MOMENTS = ("exp_avg", "exp_avg_sq")
ZERO_ROWS = 4096  # of the one tensor of zeros that all moments point at


def write_weights(root: Path, weights: Iterable[tuple[str, Tensor]], manifest: dict[str, Any], *,
                  shard_bytes: int, more: dict[str, dict[str, Tensor]] | None = None) -> Path:
    """Write a checkpoint under `root`; returns its folder.

    Args:
        root: the folder of step_NNNNNNNN folders.
        weights: (public name, whole float32 tensor), as they come.
        manifest: "trainer" (with the step), "recipe", and more entries of the manifest.
        shard_bytes: largest file of weights.
        more: {kind: {name: tensor}} of other state than moments.

    Raises OSError.
    """
    temporary = start_writing(root, manifest["trainer"]["step"])
    shapes: dict[str, tuple[int, ...]] = {}

    def seen() -> Iterable[tuple[str, Tensor]]:
        for name, value in weights:
            shapes[name] = tuple(value.shape)
            yield name, value

    written = write_shards(seen(), temporary, "weights-{:05d}.safetensors", shard_bytes)
    tensors = {"weight": {name: _entry(file, name, shapes[name]) for file, names in written.items() for name in names}}
    moments = _zero_moments(shapes, temporary / "optimizer-00000.safetensors")
    for kind, values in (more or {}).items():
        file = f"{kind}-00000.safetensors"
        save_file(values, temporary / file)
        tensors[kind] = {name: _entry(file, name, tuple(value.shape)) for name, value in values.items()}
    files = {}
    for file in sorted(temporary.iterdir()):
        sync_file(file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": file_digest(file)}
    return finish_writing(temporary, {
        "format": FORMAT, "step": manifest["trainer"]["step"], "optimizer_step": 0,
        "layout": {"tensor": 1, "pipeline": 1, "data": 1}, "files": files,
        "tensors": {**tensors, **dict.fromkeys(MOMENTS, moments)}, **manifest})


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, name: str, limit: int) -> dict[str, list[str]]:
    """Write tensors as they come into files of at most `limit` bytes (or one tensor); file -> its tensors' names.

    name: the file's name with a format field for its number, as in "weights-{:05d}.safetensors".
    """
    written: dict[str, list[str]] = {}
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        if pending:
            file = name.format(len(written))
            save_file(pending, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # the library makes files only their owner can read
            written[file] = list(pending)
            pending.clear()

    for key, tensor in tensors:
        if pending and sum(x.nbytes for x in pending.values()) + tensor.nbytes > limit:
            flush()
        pending[key] = tensor.contiguous()
    flush()
    return written


def _entry(file: str, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """A tensor that is one shard, as the manifest lists it."""
    return {"shape": list(shape), "shards": [shard_entry(file, name, 0, 0, shape[0])]}


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
