"""Input files: which ones the given names stand for, and how each is read.

A file's format is recognised by its suffix: `.txt` (one document, or several divided by a separator line),
`.jsonl` (one JSON object a line) and `.parquet`; the first two also packed as .gz, .xz or .zst.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hola_megatron.data.urls import UrlFile, find_files, is_url
from hola_megatron.errors import DataError, one_line

FORMATS = ("txt", "jsonl", "parquet")
PACKINGS = ("gz", "xz", "zst")
ALLOWED = ".txt, .jsonl (each also .gz, .xz, .zst), .parquet"

BUNDLED = Path(__file__).parent / "bundled" / "shakespeare.txt.xz"
BUNDLED_PARTS = ("train", "valid")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Source:
    """One input file, or a range of one.

    Attributes:
        path: of the file, which may lie at a URL.
        form: of FORMATS, or "bundled-" and a part.
        packing: of PACKINGS, or "".
        begin, end: the range: bytes of an unpacked jsonl file (the lines that begin in it), row groups of a parquet
            file; end None is the end of the file.
    """

    path: Path | UrlFile
    form: str
    packing: str
    begin: int = 0
    end: int | None = None

    @property
    def whole(self) -> bool:
        return self.begin == 0 and self.end is None

    def open(self) -> BinaryIO:
        return self.path.open() if isinstance(self.path, UrlFile) else self.path.open("rb")

    def parquet(self) -> Any:
        """The file as pyarrow takes it."""
        return self.open() if isinstance(self.path, UrlFile) else self.path

    def size(self) -> int:
        """Bytes of the file."""
        return self.path.bytes if isinstance(self.path, UrlFile) else self.path.stat().st_size

    def bytes_of_range(self) -> int:
        """Bytes of the range, for the progress; of a range of row groups their share of the file."""
        size = self.size()
        if self.form == "parquet" and not self.whole:
            groups = self.row_groups()
            return size * ((groups if self.end is None else self.end) - self.begin) // groups
        return (size if self.end is None else self.end) - self.begin

    def row_groups(self) -> int:
        """Row groups of a parquet file.

        Raises:
            DataError: it is none.
        """
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_metadata(self.parquet()).num_row_groups
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.path}: cannot be read as parquet ({one_line(error)}); make the file again"
                            ) from error

    def stamp(self) -> list[Any]:
        """What tells that the file is still the same, without reading it."""
        if isinstance(self.path, UrlFile):
            return [self.path.url, self.path.bytes, self.path.version, self.begin, self.end]
        about = self.path.stat()
        return [str(self.path), about.st_size, about.st_mtime_ns, self.begin, self.end]

    def describe(self, sha256: str | None) -> dict[str, Any]:
        """Name, size and hash of the file, and the range, for the dataset's record."""
        found: dict[str, Any] = {"name": self.path.name, "bytes": self.size()}
        if not self.whole:
            found["row_groups" if self.form == "parquet" else "range"] = [self.begin, self.end]
        if isinstance(self.path, UrlFile) and self.path.version:
            found["version"] = self.path.version
        return found | ({"sha256": sha256} if sha256 else {})

    def sha256(self) -> str | None:
        """Hash (hex) of the file, or of the range of bytes; None for a range of row groups, and at a URL."""
        if isinstance(self.path, UrlFile):
            return None
        if self.form == "parquet" and not self.whole:
            return None
        digest = hashlib.sha256()
        with self.open() as file:
            file.seek(self.begin)
            left = (self.size() if self.end is None else self.end) - self.begin
            while left > 0 and (block := file.read(min(left, _BLOCK))):
                digest.update(block)
                left -= len(block)
        return digest.hexdigest()


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """The files that `inputs` name, in the order given; a folder's files by sorted relative path.

    Args:
        inputs: files, folders (searched whole; files of other suffixes and hidden ones are left out)
            or glob patterns.

    Raises:
        DataError: nothing matched, a named file has an unknown suffix, or a file is named twice.
    """
    sources: list[Source] = []
    for given in inputs:
        found = _expand(given)
        if not found:
            raise DataError(f"input {given!r}: no file matched; give files, folders or patterns of {ALLOWED}")
        sources += found
    seen: set[Path | UrlFile] = set()
    for source in sources:
        resolved = source.path if isinstance(source.path, UrlFile) else source.path.resolve()
        if resolved in seen:
            raise DataError(f"input {source.path}: named twice, its documents would be counted double; name it once")
        seen.add(resolved)
    return sources


def bundled_source(part: str) -> Source:
    """The text that comes with the project, `part` "train" (first 95 % of the lines) or "valid".

    It is read as documents of 200 to 8,000 characters, each some whole speeches.
    """
    return Source(BUNDLED, f"bundled-{part}", "xz")


def _expand(given: str) -> list[Source]:
    if is_url(given):
        found = find_files(given)
        return [source for file in found if (source := _classify(file) if len(found) > 1 else _required(file))]
    path = Path(given)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
        return [source for p in files if (source := _classify(p))]
    paths = [path] if path.is_file() else [Path(p) for p in sorted(glob.glob(given, recursive=True))]
    return [_required(file) for file in paths if file.is_file()]


def _required(file: Path | UrlFile) -> Source:
    source = _classify(file)
    if source is None:
        raise DataError(f"input {file}: unknown suffix {''.join(Path(file.name).suffixes)!r}; allowed are {ALLOWED}")
    return source


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _classify(path: Path | UrlFile) -> Source | None:
    """The source at `path`, or None where its suffix says nothing we read."""
    parts = path.name.lower().split(".")[1:]
    packing = parts.pop() if parts and parts[-1] in PACKINGS else ""
    form = parts[-1] if parts else ""
    known = form in FORMATS and not (packing and form == "parquet")
    return Source(path, form, packing) if known else None
