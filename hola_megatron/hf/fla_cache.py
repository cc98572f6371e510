"""HOLA in flash-linear-attention's layout: a Gated DeltaNet with `use_gdn_swa`, as checkpoints are published.

The configuration names the exact cache by `gdn_swa_*`; its few tensors of a layer are stored with those of the Gated
DeltaNet. Their names are not documented, so they are recognised by the words in them and by their shapes. What is not
recognised is refused by name, with the option to state its meaning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hola_megatron.errors import CheckpointError, RecipeError
from hola_megatron.recipe.schema import CacheConfig

SWITCH = "use_gdn_swa"
PREFIX = "gdn_swa_"
# their setting -> field of ours, its default, and their value -> ours (None: numbers, taken as they are)
SETTINGS: dict[str, tuple[str, dict[str, str] | None]] = {
    "gdn_swa_window": ("slots", None), "gdn_swa_chunk": ("block", None), "gdn_swa_gate_init": ("gate_init", None),
    "gdn_swa_evict": ("score", {name: name for name in ("betae", "e", "betav", "recency", "random")}),
    "gdn_swa_cache_norm": ("read_norm", {"rms": "rms", "rmsnorm": "rms", "l2": "l2"})}
REQUIRED = ("gdn_swa_window", "gdn_swa_chunk", "gdn_swa_evict", "gdn_swa_cache_norm")
OURS = ("gate", "sink", "gamma_q", "gamma_k")
# words of a tensor's name that mark it as the cache's, and the meanings of other words
BELONGING = {"attn", "gdn", "swa", "hola", "cache", "exact", "read", "window", "local", "weight", "param", "logit",
             "logits", "mix", "out"}
MEANING = {("gate",): "gate", ("lambda",): "gate", ("lam",): "gate", ("alpha",): "gate", ("sink",): "sink",
           ("sinks",): "sink"} | {
    tuple(sorted((side, word))): f"gamma_{side}" for side in "qk" for word in ("norm", "gamma", "scale", "rms")}


def has_cache(values: dict[str, Any]) -> bool:
    """Whether a configuration of theirs is one of a HOLA."""
    return bool(values.get(SWITCH))


def cache_of(folder: Path, values: dict[str, Any]) -> CacheConfig:
    """The exact cache of their configuration. CheckpointError names every setting that is missing or not ours."""
    problems = [f"{name} is missing" for name in REQUIRED if values.get(name) is None]
    found: dict[str, Any] = {}
    for name, value in sorted(values.items()):
        if not name.startswith(PREFIX) or value is None or value is False:
            continue
        if name not in SETTINGS:
            problems.append(f"{name} is {value!r}, which is not known here")
            continue
        field, allowed = SETTINGS[name]
        if allowed is not None and value not in allowed:
            problems.append(f"{name} is {value!r}, not one of {', '.join(allowed)}")
        elif allowed is None and (isinstance(value, bool) or not isinstance(value, int | float)
                                  or (field != "gate_init" and (value < 1 or value != int(value)))):
            problems.append(f"{name} is {value!r}, not a number that is possible")
        else:
            found[field] = value if allowed is None else allowed[value]
    if problems:
        raise CheckpointError(f"{folder / 'config.json'}: {'; '.join(problems)}; such an exact cache cannot be "
                              "imported")
    return CacheConfig(**{name: int(x) if name in ("slots", "block") else x for name, x in found.items()})


def meanings(folder: Path, shapes: dict[str, tuple[int, ...]], known: Iterable[str], heads: int, key_dim: int,
             given: dict[str, str]) -> dict[str, str]:
    """Their tensors that a Gated DeltaNet has not, `model.layers.N.attn.NAME` -> gate, sink, gamma_q or gamma_k.

    known: names of the Gated DeltaNet's tensors. given: NAME (without the layer) -> what it is, by the user. Raises
    CheckpointError that names each tensor without a meaning and each meaning that has no or two tensors.
    """
    one, key_width = {(heads,), (1,), ()}, {(key_dim,)}
    sizes = {"gate": one, "sink": one, "gamma_q": key_width, "gamma_k": key_width}
    found, problems, used = {}, [], set()
    for name in sorted(shapes.keys() - set(known)):
        layer = re.fullmatch(r"model\.layers\.\d+\.attn\.(.+)", name)
        inner = layer.group(1) if layer else name
        meaning = given.get(inner) or (_meaning(inner) if layer else None)
        used.add(inner)
        if meaning is None:
            problems.append(f"{name} {list(shapes[name])} has no counterpart here")
        elif shapes[name] not in sizes[meaning]:
            problems.append(f"{name} is {list(shapes[name])}, a {meaning} is {list(max(sizes[meaning]))}")
        else:
            found[name] = meaning
    problems += [f"--tensor {name}: the folder has no tensor of this name" for name in sorted(given.keys() - used)]
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise CheckpointError(f"{folder}: {'; '.join(problems[:4])}{more}; --tensor NAME=MEANING states what a layer's "
                              f"tensor is: {', '.join(OURS)}")
    _check_complete(folder, found)
    return found


def _check_complete(folder: Path, found: dict[str, str]) -> None:
    """Every layer has the same meanings, each once, and a gate among them."""
    layers: dict[str, list[str]] = {}
    for name, meaning in found.items():
        layers.setdefault(".".join(name.split(".")[:3]), []).append(meaning)
    kinds = {tuple(sorted(meanings_of_layer)) for meanings_of_layer in layers.values()}
    for layer, meanings_of_layer in sorted(layers.items()):
        if doubled := {meaning for meaning in meanings_of_layer if meanings_of_layer.count(meaning) > 1}:
            raise CheckpointError(f"{folder}: {layer} has two tensors that mean {min(doubled)}; state which by "
                                  "--tensor NAME=MEANING")
    if len(kinds) > 1 or not any("gate" in meanings_of_layer for meanings_of_layer in kinds):
        raise CheckpointError(f"{folder}: {SWITCH} is true, and not every layer has a gate and the same other tensors "
                              "of an exact cache; it cannot be imported")


def parse_meanings(arguments: list[str]) -> dict[str, str]:
    """{name: meaning} from NAME=MEANING of the command line. Raises RecipeError."""
    given = {}
    for text in arguments:
        name, _, meaning = text.partition("=")
        if meaning not in OURS:
            raise RecipeError(f"--tensor: {text!r} must be NAME=MEANING with one of {', '.join(OURS)}")
        given[name] = meaning
    return given


def _meaning(inner: str) -> str | None:
    """The meaning of a tensor's name; None where it has none, or none of a cache."""
    words = [word for word in re.split(r"[._]", inner) if word]
    rest = tuple(sorted(word for word in words if word not in BELONGING))
    return MEANING.get(rest) if len(rest) < len(words) else None
