"""Bytes, text and JSON of a file; every fault is a `FileProblem` of one line.

Separate types, since callers handle them differently: a file that is missing may be normal, one that cannot be read now
(permission, I/O error) may be complete, and one that is damaged never becomes usable.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hola_megatron.errors import SHOWN_CHARACTERS, one_line, shown

KIB, MIB = 1 << 10, 1 << 20
TEXT_LIMIT = 4 * MIB  # of a small file: a recipe, a configuration, a record
JSON_LIMIT = 1 << 30  # a manifest or an index of a large run has hundreds of MiB
DEPTH_LIMIT = 64  # of nested lists and mappings; Python's own limit is about 1,000 and ends in RecursionError


class FileProblem(Exception):
    """A file that gives nothing usable; the text is one line without the path."""


class MissingFile(FileProblem, FileNotFoundError):
    """There is no such file."""


class UnreadableFile(FileProblem, OSError):
    """The system refuses to read it now (permission, I/O error); it may be complete."""

    def __init__(self, error: BaseException):
        super().__init__(f"cannot be read ({one_line(error)})")
        self.strerror = one_line(error)


class DamagedFile(FileProblem):
    """Its bytes were read and are not what the format needs, or it is a folder, a pipe or a device."""


def read_bytes(path: str | Path, *, limit: int = JSON_LIMIT) -> bytes:
    """All bytes of a regular file of at most `limit` bytes; a pipe or a device is refused without waiting for it."""
    handle = open_regular(path)
    try:
        with os.fdopen(handle, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UnreadableFile(error) from None
    if len(data) > limit:
        raise DamagedFile(f"damaged (more than {limit:,} bytes, which no such file has)")
    return data


def open_regular(path: str | Path) -> int:
    """A file descriptor of a regular file, open for reading."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise MissingFile("missing") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, OSError) and error.errno == errno.ENOTDIR:
            raise MissingFile("missing") from None
        raise UnreadableFile(error) from None
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise DamagedFile(f"not a file (it is {kind})")
    return handle


def read_text(path: str | Path, *, limit: int = TEXT_LIMIT) -> str:
    """UTF-8 text, with or without a byte order mark."""
    return _decode(read_bytes(path, limit=limit))


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DamagedFile(f"damaged (not UTF-8 text: {error.reason} at byte {error.start:,})") from None


def read_json(path: str | Path, schema: TypeAdapter[Any], *, limit: int = JSON_LIMIT) -> Any:
    """The JSON value in a file, as stored, after the schema has accepted it."""
    return parse_json(read_bytes(path, limit=limit), schema)


def parse_json(data: bytes | str, schema: TypeAdapter[Any] | None = None) -> Any:
    """A JSON value without repeated keys, NaN, infinities, lone surrogates or deep nesting.

    The value is returned as stored: schemas are strict, so what they accept needs no conversion.
    """
    text = _decode(data) if isinstance(data, bytes) else data
    if not text.strip():
        raise DamagedFile("damaged (it is empty)")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise DamagedFile(f"damaged (nested more than {DEPTH_LIMIT} deep)") from None
    except ValueError as error:
        raise DamagedFile(f"damaged (not valid JSON: {one_line(error)})") from None
    _check_values(value)
    if schema is not None:
        check_schema(value, schema)
    return value


def check_schema(value: Any, schema: TypeAdapter[Any]) -> None:
    """DamagedFile with the first thing that the schema refuses."""
    try:
        schema.validate_python(value)
    except ValidationError as error:
        raise DamagedFile(f"damaged ({describe(error)})") from None
    except OverflowError as error:
        raise DamagedFile(f"damaged (a number that is too large: {one_line(error)})") from None


def describe(error: ValidationError) -> str:
    """The first problem with its dotted path, and how many more there are."""
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    path = ".".join(_plain(part) for part in first["loc"])
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        text = "is missing"
    else:
        text = text[0].lower() + text[1:]
        if not (first["type"] == "value_error" and isinstance(first["input"], (dict, list))):  # it names the part
            text += f", found {shown(first['input'])}"
    more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
    return " ".join(f"{path + ': ' if path else ''}{text}{more}".split())


def _plain(part: int | str) -> str:
    text = str(part)
    return text if text.isprintable() and len(text) <= SHOWN_CHARACTERS else shown(text)


def parse_json_lines(text: str, schema: TypeAdapter[Any]) -> Iterator[Any]:
    """The JSON value of every line that the schema accepts; a line cut short or damaged is left out."""
    for line in text.split("\n"):
        try:
            value = json.loads(line, parse_constant=_no_constant)
            schema.validate_python(value)
        except (ValueError, RecursionError, OverflowError):  # ValidationError is a ValueError
            continue
        yield value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise ValueError(f"the key {shown(twice)} is there twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _check_values(value: Any) -> None:
    """DamagedFile for nesting, text or numbers that would fail only where they are used."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEPTH_LIMIT:
            raise DamagedFile(f"damaged (nested more than {DEPTH_LIMIT} deep)")
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.keys()
                inner += item.values()
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str):
                if not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
                    raise DamagedFile(f"damaged (a lone surrogate in {ascii(item)[:SHOWN_CHARACTERS]})")
            elif isinstance(item, float) and not math.isfinite(item):
                raise DamagedFile("damaged (a number too large for a float)")
        level = inner
