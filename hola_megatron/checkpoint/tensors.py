"""Reading of logical tensors from safetensors shards, at any parallel layout.

Every rank writes its own slices. The manifest lists, for each logical tensor, its shape and the file and rows of each
shard. A reader assembles any slice of any tensor from the shards that overlap it, so a checkpoint is independent of
the layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hola_megatron.checkpoint.reading import read_with_retries
from hola_megatron.errors import CheckpointError
from hola_megatron.files import DamagedFile, FileProblem
from hola_megatron.files.tensors import TensorFile

LAYER_STATE = "layer_state"  # the kind of tensor of `LayerKind.states`, beside "weight" and the moments


def exported_index(manifest: dict[str, Any]) -> dict[str, Any]:
    """The index of what an export holds: weights, and states of layers."""
    return manifest["tensors"]["weight"] | manifest["tensors"].get(LAYER_STATE, {})


def with_layer_states(index: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """{kind: {name: entry}} in which states of layers that are listed as weights, as an export lists them, are a kind
    of their own."""
    found = {name: entry for name, entry in index["weight"].items() if name in names}
    rest = {name: entry for name, entry in index["weight"].items() if name not in names}
    return {**index, "weight": rest, LAYER_STATE: index.get(LAYER_STATE, {}) | found}


def shard_entry(file: str, key: str, axis: int, offset: int, rows: int) -> dict[str, Any]:
    """One shard of a logical tensor: `rows` along `axis` from `offset`, stored as `key` in `file`."""
    return {"file": file, "key": key, "axis": axis, "offset": offset, "rows": rows}


class TensorReader:
    """Reads slices of logical tensors from one checkpoint folder."""

    def __init__(self, folder: Path, index: dict[str, Any]):
        self.folder, self.index = folder, index
        self._files: dict[Path, TensorFile] = {}

    def names(self) -> list[str]:
        return sorted(self.index)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name)["shape"])

    def whole(self, name: str) -> Tensor:
        """The whole logical tensor, float32."""
        shape = self.shape(name)
        return self.slice(name, 0, 0, shape[0] if shape else 1)

    def slice(self, name: str, axis: int, offset: int, rows: int) -> Tensor:
        """Rows [offset, offset + rows) along `axis`, float32; the shards may be sliced along another axis.

        Raises CheckpointError.
        """
        entry = self._entry(name)
        shape = list(entry["shape"])
        shape[axis] = rows
        result = torch.empty(shape, dtype=torch.float32)
        filled = 0
        for shard in entry["shards"]:
            filled += self._copy_overlap(result, shard, entry["shape"], axis, offset, rows)
        if filled != result.numel():
            raise CheckpointError(f"{self.folder}: shards of {name} hold {filled} of {result.numel()} values; "
                                  "the manifest is incomplete, use another checkpoint")
        return result

    def _copy_overlap(self, result: Tensor, shard: dict[str, Any], shape: list[int], axis: int, offset: int,
                      rows: int) -> int:
        """Copy the overlap of a shard and the slice to `result`; returns its number of values."""
        start, end = [0] * len(shape), list(shape)
        start[shard["axis"]], end[shard["axis"]] = shard["offset"], shard["offset"] + shard["rows"]
        low = [max(s, offset) if i == axis else s for i, s in enumerate(start)]
        high = [min(e, offset + rows) if i == axis else e for i, e in enumerate(end)]
        if any(h <= l for l, h in zip(low, high, strict=True)):
            return 0
        source = tuple(slice(l - s, h - s) for l, h, s in zip(low, high, start, strict=True))
        origin = [offset if i == axis else 0 for i in range(len(shape))]
        target = tuple(slice(l - o, h - o) for l, h, o in zip(low, high, origin, strict=True))
        path = self.folder / shard["file"]
        try:
            overlap = self._open(path).slice(shard["key"], source)
            if overlap.shape != result[target].shape:
                raise DamagedFile(f"damaged (the shape of {shard['key']} is not that of the manifest)")
        except FileProblem as problem:
            raise CheckpointError(f"{path}: {problem}; use another checkpoint") from None
        result[target] = overlap
        return overlap.numel()

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self.index:
            raise CheckpointError(f"{self.folder}: has no tensor {name}; it belongs to a model of another shape")
        return self.index[name]

    def _open(self, path: Path) -> TensorFile:
        if path not in self._files:
            self._files[path] = read_with_retries(path, lambda: TensorFile(path))
        return self._files[path]
