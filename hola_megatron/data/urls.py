"""Files at URLs (s3://, gs://, hf://, ...) for preparation, by fsspec."""

from __future__ import annotations

import contextlib
import io
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from hola_megatron.errors import DataError, RecipeError, UserError

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "az": "adlfs",
             "abfs": "adlfs"}
_VERSIONS = ("ETag", "etag", "md5Hash", "blob_id")  # what storages call the identity of a file's content
_ATTEMPTS, _FIRST_DELAY_S = 5, 1.0
_BUFFER = 16 << 20


def is_url(given: str) -> bool:
    """Whether `given` names a place that is read and written by fsspec; file:// is none, a path needs no scheme."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", given) is not None and not given.startswith("file:")


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec's file system, the path there).

    Raises:
        RecipeError: a package is missing, or the scheme is unknown.
    """
    import fsspec

    scheme = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError:
        package = _PACKAGES.get(scheme, scheme)
        raise RecipeError(f"{url}: {scheme}:// needs the package {package}: pip install {package}") from None
    except ValueError:
        raise RecipeError(f"{url}: unknown scheme {scheme}://; allowed are s3://, gs://, hf:// and the others of fsspec"
                          ) from None


@contextlib.contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """DataError for whatever the storage's client raises; each has errors of its own."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise DataError(f"{url}: no such file or folder; check the path") from None
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise DataError(f"{url}: the storage failed ({said}); check the path, the credentials and the network"
                        ) from error


@dataclass(frozen=True)
class UrlFile:
    """A file at a URL; it has what preparation uses of a `Path`.

    Attributes:
        url: of the file.
        bytes: its size.
        version: what the storage calls the identity of its content, or "".
    """

    url: str
    bytes: int
    version: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def open(self) -> BinaryIO:
        """The file for reading; a read that fails is tried again."""
        return io.BufferedReader(_UrlReader(self), _BUFFER)


def find_files(url: str) -> list[UrlFile]:
    """The files that a URL of a file, a folder (searched whole, without hidden files) or a pattern names, sorted.

    Raises:
        RecipeError: as `filesystem`.
        DataError: the storage failed.
    """
    system, path = filesystem(url)
    with storage_errors(url):
        if any(character in path for character in "*?["):
            found = {name: about for name, about in system.glob(path, detail=True).items()
                     if not name.rpartition("/")[2].startswith(".")}  # as a shell's pattern
        elif system.isdir(path):
            found = system.find(path, detail=True)
            inner = len(path.rstrip("/")) + 1
            found = {name: about for name, about in found.items() if not re.search(r"(^|/)\.", name[inner:])}
        else:
            found = {path: system.info(path)}
    return [UrlFile(system.unstrip_protocol(name), int(about["size"]), _version(about))
            for name, about in sorted(found.items()) if about["type"] == "file"]


def _version(about: dict[str, Any]) -> str:
    return next((str(about[key]).strip('"') for key in _VERSIONS if about.get(key)), "")


class _UrlReader(io.RawIOBase):
    """Bytes of a URL in order, and from any position."""

    def __init__(self, file: UrlFile):
        self._of, self._position, self._file = file, 0, None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._of.bytes}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._read(min(len(buffer), max(self._of.bytes - self._position, 0)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read(self, size: int) -> bytes:
        for attempt in range(_ATTEMPTS):
            try:
                if self._file is None:
                    system, path = filesystem(self._of.url)
                    self._file = system.open(path, "rb", cache_type="none")
                self._file.seek(self._position)
                return self._file.read(size)
            except (UserError, FileNotFoundError):
                raise
            except Exception as error:  # each storage's client has errors of its own
                self._file = None
                if attempt == _ATTEMPTS - 1:
                    raise OSError(f"{self._of.url}: {type(error).__name__}: {error}") from error
                time.sleep(_FIRST_DELAY_S * 2**attempt)
        raise AssertionError
