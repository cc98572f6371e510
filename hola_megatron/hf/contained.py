"""Files of a model's folder of unknown origin: read by name, and only from inside the folder.

An index that names `../elsewhere/x.safetensors` and a symbolic link that leads out of the folder look alike to
`open`. Both are refused here, and so is what is no regular file, such as a named pipe, which would never end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from hola_megatron import files
from hola_megatron.errors import CheckpointError
from hola_megatron.files import FileProblem, MissingFile, check_schema, schemas


def contained(folder: Path, name: str) -> Path:
    """The path of the file `name` in `folder`, which may be missing.

    Raises CheckpointError where `name` is no plain file name, or the file lies elsewhere or is no regular file.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or "\0" in name or Path(name).name != name:
        raise CheckpointError(f"{folder}: names the file {name!r}, which is not in this folder; only plain file names "
                              "are read; get the folder again, or export again")
    path = folder / name
    try:
        real, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        raise CheckpointError(f"{path}: cannot be followed ({error}); put the file itself there") from None
    if not real.is_relative_to(home):
        raise CheckpointError(f"{path}: is a link to {real}, outside the folder, and is not read; put the file itself "
                              "there (cp -rL copies a folder with what its links lead to)")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: is not a regular file; put the file itself there")
    return path


def read_json(folder: Path, name: str, schema: TypeAdapter[Any] | None = None) -> dict[str, Any] | None:
    """The mapping in a JSON file of the folder, or None where there is no such file. Raises CheckpointError."""
    path = contained(folder, name)
    try:
        values = files.read_json(path, schemas.MAPPING)
        if schema is not None:
            check_schema(values, schema)
        return values
    except MissingFile:
        return None
    except FileProblem as problem:
        raise CheckpointError(f"{path}: {problem}; get it again, or export again") from None
