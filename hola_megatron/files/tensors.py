"""Safetensors files: only regular files are opened; every error is a `FileProblem`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hola_megatron.files.reading import DamagedFile, UnreadableFile, one_line, open_regular, shown

if TYPE_CHECKING:
    from torch import Tensor

# dtypes of weights and optimizer moments
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


class TensorFile:
    """The tensors of one safetensors file, by name. `names` is sorted."""

    def __init__(self, path: Path):
        """Raises MissingFile, UnreadableFile or DamagedFile (a wrong header, or a size that does not match it)."""
        from safetensors import SafetensorError, safe_open

        self.path = path
        os.close(open_regular(path))  # the library would block on a pipe
        try:
            self._file = safe_open(path, framework="pt")
            self.names = sorted(self._file.keys())
        except OSError as error:
            raise UnreadableFile(error) from None
        except SafetensorError as error:
            raise DamagedFile(f"damaged ({one_line(error)})") from None

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors calls it: F32, BF16, I64, ..."""
        return self._slice(name).get_dtype()

    def whole(self, name: str) -> Tensor:
        """The tensor, floating point, in its own dtype."""
        return self.slice(name, ...)

    def slice(self, name: str, index: Any) -> Tensor:
        """A slice of the tensor, floating point, in its own dtype."""
        stored, dtype = self._slice(name), self.dtype(name)
        if dtype not in FLOATS:
            raise DamagedFile(f"damaged ({name} is {dtype}, not floating-point numbers)")
        return stored[index]

    def _slice(self, name: str) -> Any:
        if name not in self.names:
            raise DamagedFile(f"damaged (it has no tensor {shown(name)})")
        return self._file.get_slice(name)
