"""The facts that must be equal on all ranks of a run, and a message that names the ranks where they are not.

A rank's facts are {dotted name: (value, text)}. Not compared is what may differ between nodes: paths of datasets and
tokenizers (their content is compared), the cache of remote data, host and device names.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hola_megatron.recipe.schema import Recipe

NODE_PATHS = ("data.train", "data.phases", "data.valid", "data.tokenizer", "data.cache")
PACKAGES = ("torch", "megatron-core", "triton", "transformer-engine", "deepspeed", "flash-attn", "numpy",
            "mosaicml-streaming", "tokenizers", "sentencepiece")
# settings of the environment that change what is computed
SETTINGS = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TRITON_INTERPRET", "TORCHDYNAMO_DISABLE")
SETTING_PREFIXES = ("NVTE_",)
SHOWN_NAMES, SHOWN_VALUES, SHOWN_RANGES = 6, 4, 8
ABSENT = "absent"
COMMIT = "code (commit)"  # unknown in a copy without git, which is no difference

Facts = Mapping[str, tuple[Any, str]]  # {name: (value to compare, text to show)}


def run_facts(recipe: Recipe, *, world: int, device: str, command: Mapping[str, Any]) -> Facts:
    """The facts compared before data is read: recipe, command, code, versions, devices."""
    facts = {"WORLD_SIZE": world, "device": device, **command, **recipe_facts(recipe), **code_facts(),
             **{f"version of {name}": version for name, version in versions().items()}}
    facts |= {name: value for name, value in os.environ.items()
              if name in SETTINGS or name.startswith(SETTING_PREFIXES)}
    return {name: (value, _shown(value)) for name, value in facts.items()}


def recipe_facts(recipe: Recipe) -> dict[str, Any]:
    """{dotted field: value} of a whole recipe, without paths that may differ from node to node."""
    train, valid = recipe.data.train, recipe.data.valid
    flat = {key: value for key, value in _flat(recipe.to_dict()).items() if not key.startswith(NODE_PATHS)}
    weights = None if isinstance(train, str) else [source.weight for source in train]
    budgets = [[stream.tokens for stream in phase.streams] for phase in recipe.data.phases or ()]
    return flat | {"weights of data.train": weights, "tokens of data.phases": budgets,
                   "data.valid given": sorted(valid) if isinstance(valid, dict) else valid is not None}


def data_facts(train: Sequence[tuple[str, str]], valid: dict[str, tuple[str, str]], tokenizer: dict[str, Any]) -> Facts:
    """The facts of the data. train, valid: (path, fingerprint) of each; tokenizer: `Tokenizer.identity()`."""
    named = {f"data.train[{number}]" if len(train) > 1 else "data.train": found for number, found in enumerate(train)}
    named |= {f"data.valid.{name}".rstrip("."): found for name, found in valid.items()}
    facts = {name: (fingerprint, f"{fingerprint[:12]} ({path})") for name, (path, fingerprint) in named.items()}
    shown = " ".join(str(value)[:12] for value in tokenizer.values())
    return {**facts, "data.tokenizer": (tokenizer, shown)}


def code_facts() -> dict[str, Any]:
    """Hash of both packages' sources, and the git commit where there is one."""
    return {"code (hash of the sources)": source_hash(), COMMIT: _commit()}


def source_hash() -> str:
    """sha256 over the Python files of hola_megatron and hola_kernels, names and contents."""
    total = hashlib.sha256()
    for package in ("hola_megatron", "hola_kernels"):
        spec = importlib.util.find_spec(package)
        root = Path(spec.origin).parent if spec and spec.origin else None
        for path in sorted(root.rglob("*.py")) if root else ():
            data = path.read_bytes()
            total.update(f"{package}/{path.relative_to(root).as_posix()} {len(data)}\n".encode() + data)
    return total.hexdigest()[:16]


def _commit() -> str | None:
    try:
        found = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=10", "HEAD"],
                               capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def versions() -> dict[str, str | None]:
    """{package: version} of Python and PACKAGES; None for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def digest(facts: Facts) -> str:
    """sha256 of all facts."""
    return hashlib.sha256(json.dumps({name: value for name, (value, _) in facts.items()}, sort_keys=True,
                                     default=str).encode()).hexdigest()


def describe_differences(groups: Sequence[tuple[Sequence[int], str, Facts]]) -> str:
    """One line with the ranks that differ and the facts; empty where the only difference is an unknown commit.

    groups: (ranks, host of the first rank, facts), one per group of equal ranks; at least two groups.
    """
    majority = max(groups, key=lambda group: (len(group[0]), -min(group[0])))
    ordered = [majority, *(group for group in groups if group is not majority)]
    names = sorted({name for _, _, facts in groups for name in facts},
                   key=lambda name: (name.startswith("version"), name.startswith("code"), name))
    differences = []
    for name in names:
        ranks_of: dict[str, list[int]] = defaultdict(list)
        shown: dict[str, str] = {}
        for ranks, _, facts in ordered:
            value, text = facts.get(name, (None, ABSENT))
            key = json.dumps(value, sort_keys=True, default=str) if name in facts else ABSENT
            ranks_of[key] += ranks
            shown.setdefault(key, text)
        if name == COMMIT:
            ranks_of.pop("null", None)
        if len(ranks_of) > 1:
            values = [f"{shown[key]} on {name_ranks(ranks)}" for key, ranks in ranks_of.items()]
            more = len(values) - SHOWN_VALUES
            others = f" and {more} other values" if more > 0 else ""
            differences.append(f"{name}: {', '.join(values[:SHOWN_VALUES])}{others}")
    if not differences:
        return ""
    more = len(differences) - SHOWN_NAMES
    odd = [rank for ranks, _, _ in ordered[1:] for rank in ranks]
    host = f" (on {ordered[1][1]})" if len(ordered) == 2 and len(odd) == 1 else ""
    return (f"{name_ranks(odd)}{host} {'is' if len(odd) == 1 else 'are'} not the same run as "
            f"{name_ranks(majority[0])}: {'; '.join(differences[:SHOWN_NAMES])}"
            + (f"; and {more} more differences" if more > 0 else ""))


def name_ranks(ranks: Sequence[int]) -> str:
    """rank 3; ranks 0-2, 5."""
    ordered, ranges = sorted(ranks), []
    for rank in ordered:
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in ranges[:SHOWN_RANGES]]
    left = sum(b - a + 1 for a, b in ranges[SHOWN_RANGES:])
    return ("rank " if len(ordered) == 1 else "ranks ") + ", ".join(shown) + (f" and {left} more" if left else "")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."
