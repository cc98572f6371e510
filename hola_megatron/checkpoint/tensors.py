"""Logical tensors in and out of safetensors shards, at any parallel layout.

Every rank writes the slices it owns; the manifest says, for each logical tensor, its shape
and which file holds which rows along which axis. A reader asks for any slice of any tensor
and gets it from whatever shards overlap it, so a checkpoint has no layout of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hola_megatron.errors import CheckpointError


def shard_entry(file: str, key: str, axis: int, offset: int, rows: int) -> dict[str, Any]:
    """One shard of a logical tensor: `rows` along `axis` from `offset`, stored as `key` in `file`."""
    return {"file": file, "key": key, "axis": axis, "offset": offset, "rows": rows}


class TensorReader:
    """Reads slices of logical tensors from one checkpoint folder."""

    def __init__(self, folder: Path, index: dict[str, Any]):
        self.folder, self.index = folder, index
        self._files: dict[str, Any] = {}

    def names(self) -> list[str]:
        return sorted(self.index)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name)["shape"])

    def whole(self, name: str) -> Tensor:
        """The whole logical tensor, float32."""
        shape = self.shape(name)
        return self.slice(name, 0, 0, shape[0] if shape else 1)

    def slice(self, name: str, axis: int, offset: int, rows: int) -> Tensor:
        """Rows [offset, offset + rows) along `axis`; the shards may be cut along another axis."""
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
        """Copy the part of a shard that lies in the wanted slice; returns how many values."""
        begin, end = [0] * len(shape), list(shape)
        begin[shard["axis"]], end[shard["axis"]] = shard["offset"], shard["offset"] + shard["rows"]
        low = [max(b, offset) if i == axis else b for i, b in enumerate(begin)]
        high = [min(e, offset + rows) if i == axis else e for i, e in enumerate(end)]
        if any(h <= l for l, h in zip(low, high, strict=True)):
            return 0
        source = tuple(slice(l - b, h - b) for l, h, b in zip(low, high, begin, strict=True))
        origin = [offset if i == axis else 0 for i in range(len(shape))]
        target = tuple(slice(l - o, h - o) for l, h, o in zip(low, high, origin, strict=True))
        part = self._open(shard["file"]).get_slice(shard["key"])[source]
        result[target] = part
        return part.numel()

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self.index:
            raise CheckpointError(f"{self.folder}: has no tensor {name}; it belongs to a model of another shape")
        return self.index[name]

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.folder / file}: cannot be read ({error})") from None
        return self._files[file]
