"""Documents out of text files, in a fixed order.

A file's form is told by its suffix: `.txt` (one document, or several parted by a separator line),
`.jsonl` (one JSON object a line) and `.parquet`; the first two also packed as .gz, .xz or .zst.
Text is passed on exactly as stored: line ends are kept, and what is not valid Unicode is an error.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hola_megatron.errors import DataError

FORMATS = ("txt", "jsonl", "parquet")
PACKINGS = ("gz", "xz", "zst")
ALLOWED = ".txt, .jsonl (each also .gz, .xz, .zst), .parquet"

BUNDLED = Path(__file__).parent / "bundled" / "shakespeare.txt.xz"
BUNDLED_PARTS = ("train", "valid")
# Lengths, in characters, at which one bundled document ends and the next begins, in turn: short
# scenes and long ones, so that packed samples hold from one to many documents.
_BUNDLED_LENGTHS = (200, 2000, 600, 6000, 1200, 400, 3500)


@dataclass(frozen=True)
class Source:
    """One input file: its path, form (of FORMATS, or "bundled-" and a part) and packing (of PACKINGS, or "")."""

    path: Path
    form: str
    packing: str

    def describe(self) -> dict[str, Any]:
        """Name, size and sha256 of the file, for the dataset's record."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"name": self.path.name, "bytes": self.path.stat().st_size, "sha256": digest}


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
    seen: set[Path] = set()
    for source in sources:
        resolved = source.path.resolve()
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
    path = Path(given)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
        return [source for p in files if (source := _classify(p))]
    paths = [path] if path.is_file() else [Path(p) for p in sorted(glob.glob(given, recursive=True))]
    sources = []
    for file in (p for p in paths if p.is_file()):
        source = _classify(file)
        if source is None:
            raise DataError(f"input {file}: unknown suffix {''.join(file.suffixes)!r}; allowed are {ALLOWED}")
        sources.append(source)
    return sources


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _classify(path: Path) -> Source | None:
    """The source at `path`, or None where its suffix says nothing we read."""
    parts = path.name.lower().split(".")[1:]
    packing = parts.pop() if parts and parts[-1] in PACKINGS else ""
    form = parts[-1] if parts else ""
    known = form in FORMATS and not (packing and form == "parquet")
    return Source(path, form, packing) if known else None


class DocumentReader:
    """Iterates the documents of `sources` in order.

    Documents without text are left out and counted, since `[bos] [eos]` teaches nothing.

    Args:
        sources: from `find_sources`.
        text_field: key or column of the text in jsonl and parquet.
        split_on: for txt, the separator line between documents ("" for blank lines); None makes
            each file one document.

    Attributes:
        documents: documents given out so far.
        empty: documents left out so far.
        text_bytes: UTF-8 bytes of the documents given out.
        bytes_read: bytes of the input files consumed, of all the sizes together.
    """

    def __init__(self, sources: Sequence[Source], text_field: str = "text", split_on: str | None = None):
        self.documents = self.empty = self.text_bytes = self.bytes_read = 0
        self.sources = list(sources)
        self._text_field = text_field
        self._split_on = split_on

    def __iter__(self) -> Iterator[str]:
        """Yield documents.

        Raises:
            DataError: naming the file (and line or row): damaged, not UTF-8, not JSON, text missing.
        """
        readers = {"txt": self._txt, "jsonl": self._jsonl, "parquet": self._parquet}
        readers |= {f"bundled-{part}": self._bundled for part in BUNDLED_PARTS}
        before = 0
        for source in self.sources:
            for where, text, position in readers[source.form](source):
                self.bytes_read = before + position
                if not text:
                    self.empty += 1
                    continue
                self.text_bytes += len(_encoded(text, where))
                self.documents += 1
                yield text
            before += source.path.stat().st_size
            self.bytes_read = before

    def _txt(self, source: Source) -> Iterator[tuple[str, str, int]]:
        if self._split_on is None:
            text = "".join(line for _, line, _ in _lines(source))
            yield str(source.path), text, source.path.stat().st_size
            return
        document: list[str] = []
        number = position = 0
        for number, line, position in _lines(source):
            if line.rstrip("\r\n") != self._split_on:
                document.append(line)
            elif document:
                yield f"{source.path} before line {number}", "".join(document), position
                document = []
        if document:
            yield f"{source.path} at line {number}", "".join(document), position

    def _jsonl(self, source: Source) -> Iterator[tuple[str, str, int]]:
        for number, line, position in _lines(source):
            if line.strip():
                where = f"{source.path} line {number}"
                yield where, _text_of(_parsed(line, where), self._text_field, where), position

    def _bundled(self, source: Source) -> Iterator[tuple[str, str, int]]:
        document, lengths = "", itertools.cycle(_BUNDLED_LENGTHS)
        length, size = next(lengths), source.path.stat().st_size
        for speech in _bundled_speeches(source.form.removeprefix("bundled-")):
            document += speech + "\n\n"
            if len(document) >= length:
                yield str(source.path), document, size
                document, length = "", next(lengths)
        if document:
            yield str(source.path), document, size

    def _parquet(self, source: Source) -> Iterator[tuple[str, str, int]]:
        import pyarrow
        import pyarrow.parquet

        size, row = source.path.stat().st_size, 0
        try:
            file = pyarrow.parquet.ParquetFile(source.path)
            names = file.schema_arrow.names
            if self._text_field not in names:
                raise DataError(
                    f"{source.path}: no column {self._text_field!r}, it has {', '.join(names)}; choose by --text-field"
                )
            for batch in file.iter_batches(batch_size=1024, columns=[self._text_field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    where = f"{source.path} row {row}"
                    text = _text_of({self._text_field: value}, self._text_field, where)
                    yield where, text, size * row // file.metadata.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{source.path}: cannot be read as parquet ({' '.join(str(error).split())[:200]}); make the file again"
            ) from error


def _lines(source: Source) -> Iterator[tuple[int, str, int]]:
    """(line number from 1, line with its end, bytes of the file consumed) of an unpacked text file."""
    number = 0
    with source.path.open("rb") as raw:
        try:
            # Only "\n" ends a line: a document may hold "\r" or U+2028 in the middle.
            for line in io.TextIOWrapper(_unpacked(raw, source.packing), encoding="utf-8-sig", newline="\n"):
                number += 1
                yield number, line, raw.tell()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{source.path} after line {number}: not UTF-8 ({error.reason}); convert the file to UTF-8"
            ) from error
        except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, _ZstdError) as error:
            raise DataError(
                f"{source.path} after line {number}: cannot be unpacked as .{source.packing} ({error});"
                " the file is damaged or cut short, get it again"
            ) from error


class _ZstdError(Exception):
    """Stands for zstandard's error, so that the package is imported only where a .zst file is read."""


class _ZstdReader(io.RawIOBase):
    """A zstd stream of any number of frames that, unlike the library's reader, notices a cut-off file."""

    def __init__(self, raw: BinaryIO):
        try:
            import zstandard
        except ImportError as error:
            raise DataError(".zst input needs the package zstandard: pip install zstandard") from error
        self._raw = raw
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._frame = self._new()
        self._fresh = True
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if self._frame.eof:
                data, self._frame, self._fresh = self._frame.unused_data, self._new(), True
            else:
                data = b""
            data = data or self._raw.read(1 << 17)
            if not data:
                if self._fresh:
                    return 0
                raise EOFError("the last frame is cut short")
            self._fresh = False
            try:
                self._ready = self._frame.decompress(data)
            except self._error as error:
                raise _ZstdError(str(error)) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _unpacked(raw: BinaryIO, packing: str) -> BinaryIO:
    if packing == "gz":
        return gzip.GzipFile(fileobj=raw)
    if packing == "xz":
        return lzma.LZMAFile(raw)
    if packing == "zst":
        return io.BufferedReader(_ZstdReader(raw), 1 << 20)
    return raw


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error}); every line must be one JSON object") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON {type(record).__name__}; every line must be one JSON object")
    return record


def _text_of(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        found = ", ".join(map(str, record)) or "nothing"
        raise DataError(f"{where}: no text field {field!r}, it has {found}; choose with --text-field")
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} is a {type(text).__name__}, must be a string; remove the record")
    return text


def _encoded(text: str, where: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: a lone surrogate at character {error.start} is not valid Unicode; repair or remove the record"
        ) from error


def _bundled_speeches(part: str) -> list[str]:
    """The speeches (parted by blank lines) of the first 95 % of the lines ("train") or of the rest ("valid")."""
    with lzma.open(BUNDLED, "rt", encoding="utf-8") as file:
        speeches = [speech.strip("\n") for speech in file.read().split("\n\n") if speech.strip()]
    ends = list(itertools.accumulate(speech.count("\n") + 2 for speech in speeches))
    cut = sum(end <= 0.95 * ends[-1] for end in ends)
    return speeches[:cut] if part == "train" else speeches[cut:]
