"""The messages of docs/troubleshooting.md are those that the code prints: their fixed words are in its strings."""

from __future__ import annotations

import ast
import builtins
import functools
import re
from pathlib import Path

import pytest

from hola_megatron import errors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^\| `(.+?)`(?: \(a line\))? \|", PAGE, re.M)
VALUE = "\0"  # stands for a value in a message


def template(node: ast.AST) -> str:
    """The text of a string, an f-string or a sum of them, with VALUE where it is not fixed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return VALUE


@functools.cache
def templates() -> tuple[str, ...]:
    """All of the code's strings, the whole before its parts."""
    files = [path for folder in ("hola_megatron", "kernels/hola_kernels") for path in (ROOT / folder).rglob("*.py")]
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return tuple(dict.fromkeys(text for node in nodes if len(text := template(node)) > 10))


def is_printed(message: str) -> bool:
    """Whether one string of the code has all fixed words of the message, in order."""
    words = [words.strip(" :;,().?") for words in message.split("...")]
    pattern = re.compile(".*".join(re.escape(part) for part in words), re.S)
    return any(pattern.search(text) for text in templates())


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_is_in_the_source(message):
    kind, colon, rest = message.partition(": ")
    if colon and kind.endswith("Error"):
        assert hasattr(errors, kind) or hasattr(builtins, kind), kind
        message = rest
    assert len(re.sub(r"[^a-z]", "", message)) >= 7, "too few fixed words to tell"
    assert is_printed(message)


def test_a_message_that_nobody_prints_is_found():
    assert len(MESSAGES) >= 20 and is_printed("...: no such data folder; make it with tools/prepare_data.py")
    assert not is_printed("...: no such data folder; make it with tools/prepare_data.sh")
    assert not is_printed("make it with tools/prepare_data.py ... no such data folder")


def test_the_other_line_of_the_page_is_printed():
    assert is_printed("hola_kernels: backend")
