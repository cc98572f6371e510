"""Documents out of text files, in a fixed order.

Text is not changed: line ends are kept, and invalid Unicode is an error.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from hola_megatron.data.duplicates import SeenTexts
from hola_megatron.data.sources import BUNDLED, BUNDLED_PARTS, Source
from hola_megatron.errors import DataError

# Lengths, in characters, at which one bundled document ends and the next begins, in turn: short
# scenes and long ones, so that packed samples hold from one to many documents.
_BUNDLED_LENGTHS = (200, 2000, 600, 6000, 1200, 400, 3500)
_BUFFER = 1 << 20


class Mark(NamedTuple):
    """A place between two documents, from which reading can begin, and what was counted before it.

    Attributes:
        source: number of the file among the sources.
        item: what comes before it in the file: lines (txt with a separator, jsonl), rows (parquet) or documents.
        documents, empty, duplicates: documents given out, and left out because they had no text or were there before.
        text_bytes: UTF-8 bytes of the documents given out.
    """

    source: int = 0
    item: int = 0
    documents: int = 0
    empty: int = 0
    duplicates: int = 0
    text_bytes: int = 0


BEGINNING = Mark()


class Document(NamedTuple):
    """A text, and the mark before it."""

    mark: Mark
    text: str


class DocumentReader:
    """Iterates the documents of `sources` in order.

    Documents without text are left out and counted, since `[bos] [eos]` teaches nothing.

    Args:
        sources: from `find_sources`.
        text_field: key or column of the text in jsonl and parquet.
        split_on: for txt, the separator line between documents ("" for blank lines); None makes
            each file one document.
        start: where to begin.
        seen: tells which documents were there before; they are counted, and with `drop_duplicates` left out.
        began: called with the number of each source when its reading begins.

    Attributes:
        mark: its counts are those of the input so far.
        bytes_read: bytes of the input files consumed, of all the sizes together.
    """

    def __init__(self, sources: Sequence[Source], text_field: str = "text", split_on: str | None = None, *,
                 start: Mark = BEGINNING, seen: SeenTexts | None = None, drop_duplicates: bool = False,
                 began: Callable[[int], None] = lambda number: None):
        self.sources = list(sources)
        self.mark = start
        self._sizes = [source.bytes_of_range() for source in self.sources]
        self.bytes_read = sum(self._sizes[: start.source])
        self.total_bytes = sum(self._sizes)
        self._text_field = text_field
        self._split_on = split_on
        self._began = began
        self._seen, self._drop = seen, drop_duplicates

    @property
    def documents(self) -> int:
        """Documents given out so far."""
        return self.mark.documents

    @property
    def empty(self) -> int:
        """Documents left out so far."""
        return self.mark.empty

    @property
    def duplicates(self) -> int:
        """Documents so far that were there before."""
        return self.mark.duplicates

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the documents given out."""
        return self.mark.text_bytes

    def __iter__(self) -> Iterator[str]:
        """Yield the documents' texts; errors as `marked`."""
        return (document.text for document in self.marked())

    def marked(self) -> Iterator[Document]:
        """Yield documents with their marks.

        Raises:
            DataError: naming the file (and line or row): damaged, not UTF-8, not JSON, text missing.
        """
        readers = {"txt": self._txt, "jsonl": self._jsonl, "parquet": self._parquet}
        readers |= {f"bundled-{part}": self._bundled for part in BUNDLED_PARTS}
        first, skip = self.mark.source, self.mark.item
        before = self.bytes_read
        for number in range(first, len(self.sources)):
            source = self.sources[number]
            self._began(number)
            for begin, where, text, position in readers[source.form](source, skip if number == first else 0):
                self.bytes_read = before + position
                _, _, documents, empty, duplicates, text_bytes = self.mark
                if not text:
                    self.mark = Mark(number, begin, documents, empty + 1, duplicates, text_bytes)
                    continue
                data = _encoded(text, where)
                known = self._seen is not None and self._seen.add(data)
                if known and self._drop:
                    self.mark = Mark(number, begin, documents, empty, duplicates + 1, text_bytes)
                    continue
                self.mark = Mark(number, begin, documents + 1, empty, duplicates + known, text_bytes + len(data))
                yield Document(Mark(number, begin, documents, empty, duplicates, text_bytes), text)
            before += self._sizes[number]
            self.bytes_read = before

    # Each reader below leaves out the first `skip` items of the file and yields (items before the document, where it
    # is for messages, text, bytes of the file consumed).

    def _txt(self, source: Source, skip: int) -> Iterator[tuple[int, str, str, int]]:
        if self._split_on is None:
            text = "".join(line for _, line, _ in _lines(source, 0))
            yield 0, str(source.path), text, source.size()
            return
        document: list[str] = []
        begin, number, position = skip, skip, 0
        for number, line, position in _lines(source, skip):
            if line.rstrip("\r\n") != self._split_on:
                document.append(line)
            elif document:
                yield begin, f"{source.path} before line {number}", "".join(document), position
                document, begin = [], number
        if document:
            yield begin, f"{source.path} at line {number}", "".join(document), position

    def _jsonl(self, source: Source, skip: int) -> Iterator[tuple[int, str, str, int]]:
        for number, line, position in _lines(source, skip):
            if line.strip():
                where = f"{source.path} line {number}" if source.begin == 0 else \
                    f"{source.path} line {number} after byte {source.begin}"
                yield number - 1, where, _text_of(_parsed(line, where), self._text_field, where), position

    def _bundled(self, source: Source, skip: int) -> Iterator[tuple[int, str, str, int]]:
        size = source.size()
        for number, document in enumerate(_bundled_documents(source.form.removeprefix("bundled-"))):
            if number >= skip:
                yield number, str(source.path), document, size

    def _parquet(self, source: Source, skip: int) -> Iterator[tuple[int, str, str, int]]:
        import pyarrow
        import pyarrow.parquet

        size = source.bytes_of_range()
        try:
            with pyarrow.parquet.ParquetFile(source.parquet()) as file:
                names = file.schema_arrow.names
                if self._text_field not in names:
                    raise DataError(f"{source.path}: no column {self._text_field!r}, it has {', '.join(names)}; choose "
                                    "by --text-field")
                for row, value, rows in _rows(file, source, self._text_field, skip):
                    where = f"{source.path} row {row}"
                    text = _text_of({self._text_field: value}, self._text_field, where)
                    yield row - 1, where, text, size * row // max(rows, 1)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # text in it need not be UTF-8
            raise DataError(
                f"{source.path}: cannot be read as parquet ({' '.join(str(error).split())[:200]}); make the file again"
            ) from error


def json_records(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it is, for messages; record) of every line of a jsonl file that is not blank. Raises DataError."""
    for number, line, _ in _lines(source, 0):
        if line.strip():
            where = f"{source.path} line {number}"
            yield where, _parsed(line, where)


def _rows(file: Any, source: Source, column: str, skip: int) -> Iterator[tuple[int, Any, int]]:
    """(row from 1 within the range, value, rows of the range); row groups before `skip` are not read."""
    groups = list(range(file.num_row_groups))[source.begin : source.end]
    sizes = [file.metadata.row_group(group).num_rows for group in groups]
    total, row = sum(sizes), 0
    while groups and row + sizes[0] <= skip:
        row += sizes.pop(0)
        groups.pop(0)
    if not groups:
        return
    for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[column]):
        if row + batch.num_rows <= skip:
            row += batch.num_rows
            continue
        for value in batch.column(0).to_pylist():
            row += 1
            if row > skip:
                yield row, value, total


def _lines(source: Source, skip: int) -> Iterator[tuple[int, str, int]]:
    """(line number from 1 within the range, line with its end, bytes consumed of the range) after `skip` lines."""
    number = 0
    with source.open() as raw:
        try:
            position = _to_line(raw, source.begin)
            length = None if source.end is None else source.end - source.begin
            # Only "\n" ends a line: a document may hold "\r" or U+2028 in the middle.
            for line in _unpacked(raw, source.packing):
                if length is not None and position >= length:
                    return  # it begins behind the range
                position = raw.tell() if source.packing else position + len(line)
                number += 1
                if number > skip:
                    # a byte order mark is no text
                    yield number, line.decode("utf-8-sig" if number == 1 and not source.begin else "utf-8"), position
        except UnicodeDecodeError as error:
            raise DataError(
                f"{source.path} after line {number - 1}: not UTF-8 ({error.reason}); convert the file to UTF-8"
            ) from error
        except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, _ZstdError) as error:
            raise DataError(
                f"{source.path} after line {number}: cannot be unpacked as .{source.packing} ({error});"
                " the file is damaged or cut short, get it again"
            ) from error


def _to_line(raw: BinaryIO, begin: int) -> int:
    """Go to the first line that begins at byte `begin` or later; returns how far behind `begin` that is."""
    if not begin:
        return 0
    raw.seek(begin - 1)
    return len(raw.readline()) - 1


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
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), _BUFFER)
    if packing == "xz":
        return io.BufferedReader(lzma.LZMAFile(raw), _BUFFER)
    if packing == "zst":
        return io.BufferedReader(_ZstdReader(raw), _BUFFER)
    return raw


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
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


def _bundled_documents(part: str) -> Iterator[str]:
    """Whole speeches together, each document as long as it must be for the next of _BUNDLED_LENGTHS."""
    document, lengths = "", itertools.cycle(_BUNDLED_LENGTHS)
    length = next(lengths)
    for speech in _bundled_speeches(part):
        document += speech + "\n\n"
        if len(document) >= length:
            yield document
            document, length = "", next(lengths)
    if document:
        yield document
