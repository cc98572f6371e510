"""Safetensors shards with an index, written and read tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hola_megatron.errors import CheckpointError

INDEX = "model.safetensors.index.json"
ALONE = "model.safetensors"


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, name: str, limit: int) -> dict[str, list[str]]:
    """Write tensors as they come into files of at most `limit` bytes (or one tensor); file -> its tensors' names.

    name: the file's name with a place for its number, as in "weights-{:05d}.safetensors".
    """
    written: dict[str, list[str]] = {}
    held: dict[str, Tensor] = {}

    def flush() -> None:
        if held:
            file = name.format(len(written))
            save_file(held, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # the library makes files only their owner can read
            written[file] = list(held)
            held.clear()

    for key, tensor in tensors:
        if held and sum(x.nbytes for x in held.values()) + tensor.nbytes > limit:
            flush()
        held[key] = tensor.contiguous()
    flush()
    return written


def write_model(tensors: Iterable[tuple[str, Tensor]], folder: Path, limit: int) -> None:
    """model.safetensors, or numbered shards and their index, as transformers names them."""
    total = 0

    def counted() -> Iterator[tuple[str, Tensor]]:
        nonlocal total
        for key, tensor in tensors:
            total += tensor.nbytes
            yield key, tensor

    written = write_shards(counted(), folder, "part-{:05d}.tmp", limit)
    final = {file: f"model-{n + 1:05d}-of-{len(written):05d}.safetensors" for n, file in enumerate(written)}
    if len(written) == 1:
        final = dict.fromkeys(written, ALONE)
    for file, name in final.items():
        (folder / file).rename(folder / name)
    if len(written) > 1:
        weight_map = {key: final[file] for file, keys in written.items() for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class ModelReader:
    """The tensors of an exported folder, by name."""

    def __init__(self, folder: Path):
        """Open every shard; CheckpointError names the one that is missing or damaged."""
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        names = self._shard_names()
        for file in names:
            try:
                self._files[file] = safe_open(folder / file, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(f"{folder / file}: missing; copy it there, or export again") from None
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{folder / file}: damaged ({error}); export again") from None
            self._where |= dict.fromkeys(self._files[file].keys(), file)

    def _shard_names(self) -> list[str]:
        if not (self.folder / INDEX).is_file():
            return [ALONE]
        try:
            weight_map = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            return sorted(set(weight_map.values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{self.folder / INDEX}: damaged ({error}); export again") from None

    def names(self) -> list[str]:
        return sorted(self._where)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self._files[file].get_slice(name).get_shape()) for name, file in self._where.items()}

    def read(self, name: str) -> Tensor:
        return self._files[self._where[name]].get_tensor(name)
