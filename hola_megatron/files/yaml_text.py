"""YAML of recipes: plain values only, and none that mean something else than they look like.

YAML 1.1 (PyYAML's version) reads 3e-4 as text, 010 as 8, 1:30 as 90, 2024-01-01 as a date, and of two values of one key
takes the last. Here 3e-4 is a number, a date is text, and the others are refused by a line that says what to write.
Merge keys (<<) and aliases work; a text that unfolds without end is refused before it is unfolded.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from hola_megatron.files.reading import DEPTH_LIMIT, KIB, DamagedFile, one_line, shown

LIMIT = 256 * KIB  # of a recipe's text; the parser takes a second for it
NODES = 20_000  # of the unfolded document
PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")}
_MISREAD = re.compile(r"^[-+]?0[0-9_]+$|^[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?$")


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; DamagedFile, one line, where it is none."""
    if len(text) > LIMIT:
        raise DamagedFile(f"not usable (more than {LIMIT:,} characters)")
    loader = None
    try:
        loader = _Loader(text)  # it looks for unprintable characters
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise DamagedFile(f"not valid YAML ({_message(error)})") from None
    finally:
        if loader is not None:
            loader.dispose()


def _message(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}: " if mark else ""
    problem = getattr(error, "problem", None) or one_line(error)
    hint = "; indent with spaces" if "'\\t'" in problem else ""
    return f"{where}{' '.join(str(problem).split())[:200]}{hint}"


class _Loader(yaml.SafeLoader):
    """Checks every node while the tree is composed, where the dotted path to it is known."""

    def __init__(self, text: str):
        super().__init__(text)
        self._path: list[str] = []
        self._nodes = 0
        self._unfolded: dict[int, int] = {}  # nodes in a finished node, aliases unfolded

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        """As the base class, with limits of depth and size: its own end is RecursionError, or none.

        index: the key's node for a value of a mapping, a number in a list, None for a key and at the top.
        """
        event = self.peek_event()
        step = index.value if isinstance(index, yaml.ScalarNode) else index
        self._path.append("" if step is None else str(step))
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._unfolded:
                raise self._refuse(event, f"*{event.anchor} lies inside itself")
            self._count(self._unfolded[id(node)], event)
        else:
            before = self._nodes
            if len(self._path) > DEPTH_LIMIT:
                self._path = self._path[:3]
                raise self._refuse(event, f"nested more than {DEPTH_LIMIT} deep")
            self._count(1, event)
            node = super().compose_node(parent, index)
            self._check(node, is_key=index is None and isinstance(parent, yaml.MappingNode))
            self._unfolded[id(node)] = self._nodes - before
        self._path.pop()
        return node

    def _refuse(self, at: Any, problem: str) -> yaml.MarkedYAMLError:
        path = ".".join(part if part.isprintable() else shown(part) for part in self._path if part)
        return yaml.composer.ComposerError(problem=f"{problem}; at {path}" if path else problem,
                                           problem_mark=at.start_mark)

    def _count(self, nodes: int, event: Any) -> None:
        self._nodes += nodes
        if self._nodes > NODES:
            raise self._refuse(event, f"more than {NODES:,} values, aliases unfolded")

    def _check(self, node: yaml.Node, is_key: bool) -> None:
        if node.tag == "tag:yaml.org,2002:timestamp":
            node.tag = "tag:yaml.org,2002:str"
        if node.tag not in PLAIN and not (is_key and node.tag == "tag:yaml.org,2002:merge"):
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise self._refuse(node, f"{tag} is not possible; give plain text, numbers, lists and sections")
        if isinstance(node, yaml.ScalarNode):
            self._check_scalar(node)
        elif isinstance(node, yaml.MappingNode):
            self._check_keys(node)

    def _check_scalar(self, node: yaml.ScalarNode) -> None:
        kind, value = node.tag.rpartition(":")[2], shown(node.value)[1:-1]
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in node.value):
            raise self._refuse(node, f"{value} holds a character that text cannot have")
        if kind in ("int", "float") and _MISREAD.match(node.value):
            raise self._refuse(node, f"{value} would not be read as it looks (YAML takes a leading 0 as octal and a "
                                     "colon as base 60); write the number plainly, or text in quotes")
        if kind == "int" and len(node.value) > 100:
            raise self._refuse(node, f"{value} is too large a number")
        try:
            if kind != "merge":
                self.construct_object(node)
        except (yaml.YAMLError, ValueError, KeyError, AttributeError, IndexError, OverflowError):
            raise self._refuse(node, f"{value!r} is no value of the type {kind}") from None

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._refuse(key, "a key is a list or a section; give a name")
            if key.value in seen:
                self._path.append(key.value)
                raise self._refuse(key, f"{shown(key.value)[1:-1]} is given twice; keep one")
            seen.add(key.value)


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what `_Loader` would take for a number: the text 1e-3."""


def dump_yaml(value: Any) -> str:
    """A YAML text that `parse_yaml` reads as `value` (plain values), keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(  # copies the base class's table first
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))
