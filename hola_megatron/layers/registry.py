"""The registered layer kinds, and the patterns of a recipe that name them.

To add a kind: a folder beside this file with a `LayerKind`, and one line in KINDS.
"""

from __future__ import annotations

import functools
import re

from hola_megatron.layers.attention import ATTENTION
from hola_megatron.layers.deltaproduct import DELTAPRODUCT
from hola_megatron.layers.gdn import GDN
from hola_megatron.layers.ham import HAM
from hola_megatron.layers.hola import HOLA
from hola_megatron.layers.hqlt import HQLT
from hola_megatron.layers.spec import LayerKind
from hola_megatron.layers.swa import SWA

KINDS: dict[str, LayerKind] = {kind.name: kind for kind in (HOLA, GDN, ATTENTION, HQLT, HAM, SWA, DELTAPRODUCT)}

_ENTRY = re.compile(r"(?P<name>[A-Za-z][A-Za-z0-9_]*)(?:\*(?P<times>[1-9][0-9]{0,3}))?")


def kind_named(name: str) -> LayerKind:
    """The kind of this name or letter. ValueError for an unknown one."""
    for kind in KINDS.values():
        if name in (kind.name, kind.letter):
            return kind
    raise ValueError(f"unknown layer kind {name!r}; allowed: {describe_kinds()}")


def describe_kinds() -> str:
    """hola (H), gdn (G), attention (A), hqlt, ham, swa (W), deltaproduct."""
    return ", ".join(kind.name + (f" ({kind.letter})" if kind.letter else "") for kind in KINDS.values())


def parse_pattern(pattern: str) -> tuple[LayerKind, ...]:
    """The kinds of a pattern, by letter ("HHHA") or by name ("hola*3, attention"). Raises ValueError."""
    return _parsed(pattern, tuple(KINDS))


@functools.lru_cache(maxsize=256)
def _parsed(pattern: str, known: tuple[str, ...]) -> tuple[LayerKind, ...]:
    letters = {kind.letter for kind in KINDS.values()}
    if pattern and set(pattern) <= letters:
        return tuple(kind_named(letter) for letter in pattern)
    found: list[LayerKind] = []
    for entry in pattern.split(","):
        match = _ENTRY.fullmatch(entry.strip())
        if match is None:
            raise ValueError(f"{pattern!r} is not a layer pattern; write letters (HHHA) or names (hola*3, attention), "
                             f"allowed: {describe_kinds()}")
        found += [kind_named(match["name"])] * int(match["times"] or 1)
    return tuple(found)


def expand(pattern: str, layers: int) -> tuple[LayerKind, ...]:
    """The kind of every layer: the pattern, repeated up to `layers`. Raises ValueError for an invalid pattern."""
    kinds = parse_pattern(pattern)
    return (kinds * -(-layers // len(kinds)))[:layers]


def kind_with_role(role: str) -> LayerKind:
    """The kind with this `LayerKind.fla_role`."""
    return next(kind for kind in KINDS.values() if kind.fla_role == role)


def distinct(kinds: tuple[LayerKind, ...]) -> tuple[LayerKind, ...]:
    """Each kind once, in the order of its first layer."""
    return tuple(dict.fromkeys(kinds))


def unused_fields(kinds: tuple[LayerKind, ...]) -> set[str]:
    """Fields of the model section that are used by other kinds and by none of these."""
    every = {field for kind in KINDS.values() for field in kind.recipe_fields}
    return every - {field for kind in kinds for field in kind.recipe_fields}
