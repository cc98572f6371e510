"""Safetensors shards with an index, written and read tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from hola_megatron.checkpoint.tensors import shard_entry
from hola_megatron.checkpoint.weights_only import write_shards
from hola_megatron.errors import CheckpointError
from hola_megatron.files import FileProblem, MissingFile, schemas
from hola_megatron.files.tensors import TensorFile
from hola_megatron.hf.contained import contained, read_json

INDEX = "model.safetensors.index.json"
ALONE = "model.safetensors"


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
        """Open every shard; CheckpointError names the one that is missing, damaged or outside the folder."""
        self.folder = folder
        self._files: dict[str, TensorFile] = {}
        self._where: dict[str, str] = {}
        for file, listed in self._shards().items():
            self._files[file] = _open(contained(folder, file))
            present = set(self._files[file].names)
            if listed is not None and present != listed:
                name = min(present ^ listed)
                raise CheckpointError(f"{folder / file}: {name} is {'not ' if name in listed else ''}in this file, the "
                                      f"index {INDEX} lists others; get the folder again, or export again")
            self._where |= dict.fromkeys(present, file)

    def _shards(self) -> dict[str, set[str] | None]:
        """{file: names of its tensors in the index}; None where there is no index."""
        index = read_json(self.folder, INDEX, schemas.MAPPING)
        if index is None:
            return {ALONE: None}
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{self.folder / INDEX}: damaged (no weight_map); export again")
        shards: dict[str, set[str] | None] = {}
        for name, file in weight_map.items():
            contained(self.folder, file)
            shards.setdefault(file, set()).add(name)
        return dict(sorted(shards.items()))

    def names(self) -> list[str]:
        return sorted(self._where)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._files[file].shape(name) for name, file in self._where.items()}

    def index(self) -> dict[str, dict[str, Any]]:
        """The tensors as a checkpoint's manifest lists them, for `TensorReader`: each is one shard."""
        return {name: {"shape": list(shape), "shards": [shard_entry(self._where[name], name, 0, 0, shape[0])]}
                for name, shape in self.shapes().items()}

    def read(self, name: str) -> Tensor:
        file = self._files[self._where[name]]
        try:
            return file.whole(name)
        except FileProblem as problem:
            raise CheckpointError(f"{file.path}: {problem}; export again") from None


def _open(path: Path) -> TensorFile:
    try:
        return TensorFile(path)
    except MissingFile:
        raise CheckpointError(f"{path}: missing; copy it there, or export again") from None
    except FileProblem as problem:
        raise CheckpointError(f"{path}: {problem}; export again") from None
