"""Problems of a recipe's single values, one line each: dotted path, value found, values allowed.

pydantic's errors are written here in YAML's terms. Limits on numbers are here too: beyond them no
machine gets, and the arithmetic of a step or an allocation would end in an error that names nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from hola_megatron.errors import shown

STREAMS = "a folder, or a list of streams [{path: FOLDER, weight: NUMBER}, ...]"
VALIDATION_SETS = "a folder, several by name ({NAME: FOLDER, ...}), or null"
SET_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,59}")
LARGEST_INT, LARGEST_FLOAT = 2**53, 1e15
LIMITS = {"model.layers": 10_000, "model.hidden_size": 2**20, "model.heads": 2**16, "model.key_dim": 2**16,
          "model.value_dim": 2**16, "model.conv_width": 2**12, "model.attention_heads": 2**16,
          "model.attention_kv_heads": 2**16, "model.attention_window": 2**31 - 2,
          "model.mlp_hidden_size": 2**24, "model.vocab_size": 2**27, "model.cache.block": 2**24,
          "model.cache.slots": 2**24, "model.cache.router_width": 2**16,
          "model.hqlt.window": 2**20, "model.ham.router_width": 2**16,
          "model.ham.freeze_steps": 2**24, "model.state_delay": 2**20, "model.delta_steps": 64,
          "model.moe.experts": 2**16, "model.moe.hidden_size": 2**24,
          "train.sequence_length": 2**31 - 2, "train.global_batch_size": 2**24, "train.batch_ramp.batch": 2**24,
          "train.micro_batch_size": 2**20,
          "train.muon_steps": 1000, "guard.window": 10**6,
          "parallel.timeout_minutes": 1e6, "parallel.hang_seconds": 1e9, "log.sample_tokens": 10**6}
_ADVICE = {"string_type": "give text", "int_type": "give a whole number", "int_from_float": "give a whole number",
         "float_type": "give a number", "bool_type": "give true or false",
         "dataclass_type": "give a section (key: value)", "list_type": "give a list"}


def plain(part: Any) -> str:
    """A component of a dotted path, printable."""
    text = str(part)
    return text if text.isprintable() and 0 < len(text) <= 60 else shown(text)


def is_union_tag(part: Any) -> bool:
    """Whether a part of pydantic's location is a union's tag and no field."""
    return isinstance(part, str) and (part.startswith(("list[", "dict[")) or part in ("str", "int", "float"))


def field_path(loc: tuple[Any, ...]) -> tuple[Any, ...]:
    """The path of a pydantic error, without its names for members of a union."""
    return tuple(part for part in loc if not is_union_tag(part))


def describe(error: ValidationError) -> list[str]:
    """A line for each error but unknown keys, which `unknown_keys` names with a suggestion, and `data.train`'s own."""
    problems = []
    for found in error.errors(include_url=False):
        where = field_path(found["loc"])
        path = ".".join(map(plain, where)) or "recipe"
        if found["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            continue
        if where[:2] == ("data", "valid"):
            continue  # `valid_problems` names it
        if where[:2] == ("data", "train") and (len(where) == 2 or (len(where) == 3 and found["type"] != "missing")):
            continue  # `stream_problems` names it
        if found["type"] == "missing":
            problems.append(f"{path}: missing; every recipe must give it")
            continue
        advice = _ADVICE.get(found["type"]) or found["msg"][0].lower() + found["msg"][1:]
        if found["type"] == "string_type" and isinstance(found["input"], (bool, int, float)):
            advice += ", in quotes where YAML would read it as something else"
        problems.append(f"{path}: {shown(found['input'])} is not allowed; {advice}")
    return problems


def stream_problems(values: dict[str, Any]) -> Iterator[str]:
    """Problems of `data.train` as a whole, which may be a string or a list (pydantic reports both)."""
    data = values.get("data")
    if not isinstance(data, dict) or "train" not in data:
        return
    train = data["train"]
    if not isinstance(train, (str, list)):
        yield f"data.train: {shown(train)} is not allowed; give {STREAMS}"
    elif train == []:
        yield f"data.train: [] names no stream; give {STREAMS}"
    for number, stream in enumerate(train if isinstance(train, list) else ()):
        if not isinstance(stream, dict):
            path = stream if isinstance(stream, str) else "FOLDER"
            yield (f"data.train.{number}: {shown(stream)} is not allowed; a stream is a mapping, write "
                   f"{{path: {plain(path)}, weight: 1}}")


def valid_problems(values: dict[str, Any]) -> Iterator[str]:
    """Problems of `data.valid`, which may be a string or a mapping (pydantic reports both)."""
    data = values.get("data")
    valid = data.get("valid") if isinstance(data, dict) else None
    if valid is None or isinstance(valid, str):
        return
    if not isinstance(valid, dict):
        yield f"data.valid: {shown(valid)} is not allowed; give {VALIDATION_SETS}"
    elif not valid:
        yield f"data.valid: {{}} names no validation set; give {VALIDATION_SETS}"
    for name, path in valid.items() if isinstance(valid, dict) else ():
        if not isinstance(name, str) or not SET_NAME.fullmatch(name):
            yield (f"data.valid.{plain(name)}: is no name of a validation set; take letters, digits, _, . and -, 60 at "
                   "most")
        elif not isinstance(path, str):
            yield f"data.valid.{name}: {shown(path)} is not allowed; give a folder"


def too_large(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Numbers beyond LIMITS, at any depth."""
    for key, value in values.items():
        path = f"{prefix}{plain(key)}"
        if isinstance(value, dict):
            yield from too_large(value, f"{path}.")
        elif isinstance(value, list):
            for number, item in enumerate(value):
                yield from too_large(item if isinstance(item, dict) else {}, f"{path}.{number}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            field = re.sub(r"\.[0-9]+(?=\.)", "", path)
            most = LIMITS.get(field, LARGEST_INT if isinstance(value, int) else LARGEST_FLOAT)
            if most < abs(value) < math.inf:  # NaN and infinities have an error of their own
                yield f"{path}: {shown(value)} is too large; {most:g} is the most"


def drop(at: Any, path: tuple[Any, ...]) -> None:
    """Remove the value at `path`, where there is one."""
    for part in path[:-1]:
        if isinstance(at, dict):
            at = at.get(part)
        elif isinstance(at, list) and isinstance(part, int) and part < len(at):
            at = at[part]
        else:
            return
    if isinstance(at, dict) and path:
        at.pop(path[-1], None)
