"""The code that is copied into every export: one folder of flat modules, which transformers loads on request.

The sources are those that this process runs, with imports rewritten to the flat folder. The files of the layer kinds
(layers/*/export.py) become layer_NAME.py, and kinds_hola.py is written to list them.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from hola_megatron.hf import (
    cache_hola,
    configuration_hola,
    decoding_hola,
    layers_hola,
    modeling_hola,
)
from hola_megatron.hf.bundle import bundle
from hola_megatron.layers.exported import kind_hola, memory_hola, packing_hola
from hola_megatron.layers.registry import KINDS

MODULES = (configuration_hola, kind_hola, memory_hola, packing_hola, decoding_hola, cache_hola, layers_hola,
           modeling_hola)
IMPORTS = ((re.compile(r"\bfrom hola_megatron\.layers\.exported\.(\w+) import"), r"from .\1 import"),
           (re.compile(r"\bfrom hola_megatron\.layers\.(\w+)\.export import"), r"from .layer_\1 import"))

# what AutoConfig and AutoModel load first
ENTRIES = ("configuration_hola.py", "modeling_hola.py")
OPERATIONS = """try:
    import hola_kernels  # noqa: F401
except ImportError:
    from .hola_ops import HolaState  # noqa: F401
"""

KINDS_MODULE = '''"""The layer kinds that this folder was written with."""

from __future__ import annotations

import re
from typing import Any

{imports}
from .kind_hola import ExportedKind

KINDS = ({names},)
_ENTRY = re.compile(r"(?P<name>[A-Za-z][A-Za-z0-9_]*)(?:\\*(?P<times>[1-9][0-9]{{0,3}}))?")


def kinds_of(config: Any) -> list[ExportedKind]:
    """The kind of every layer of a HolaConfig. ValueError for a pattern with an unknown kind."""
    kinds = _parsed(config.layer_pattern)
    return (kinds * -(-config.num_hidden_layers // len(kinds)))[: config.num_hidden_layers]


def _parsed(pattern: str) -> list[ExportedKind]:
    letters = {{kind.letter: kind for kind in KINDS if kind.letter}}
    if pattern and set(pattern) <= set(letters):
        return [letters[letter] for letter in pattern]
    named = letters | {{kind.name: kind for kind in KINDS}}
    found: list[ExportedKind] = []
    for entry in pattern.split(","):
        match = _ENTRY.fullmatch(entry.strip())
        if match is None or match["name"] not in named:
            raise ValueError(f"{{entry.strip()!r}} in {{pattern!r}} is no layer kind; allowed: {{', '.join(named)}}")
        found += [named[match["name"]]] * int(match["times"] or 1)
    return found
'''


def write_code(folder: Path) -> None:
    """Every module into `folder`, operations included."""
    for module in MODULES:
        path = Path(module.__file__)
        (folder / path.name).write_text(_flat(path.read_text(encoding="utf-8"), path.name), encoding="utf-8")
    files = {name: Path(_source_of(name)) for name in KINDS}
    for name, path in files.items():
        (folder / f"layer_{name}.py").write_text(_flat(path.read_text(encoding="utf-8")), encoding="utf-8")
    (folder / "kinds_hola.py").write_text(KINDS_MODULE.format(imports=_imports(), names=", ".join(KINDS)),
                                          encoding="utf-8")
    (folder / "hola_ops.py").write_text(bundle(), encoding="utf-8")


def _source_of(name: str) -> str:
    """The file that defines a kind's exported mixer."""
    return inspect.getsourcefile(KINDS[name].exported().mixer)


def _imports() -> str:
    return "\n".join(f"from .layer_{name} import KIND as {name}" for name in KINDS)


def _flat(source: str, name: str = "") -> str:
    """A module's source with imports from the flat folder.

    transformers 4 copies only the files that an entry module names itself, so the two entry modules name all of them.
    """
    for pattern, replacement in IMPORTS:
        source = pattern.sub(replacement, source)
    if name not in ENTRIES:
        return source
    others = [f"from .{Path(module.__file__).stem} import annotations  # noqa: F401"
              for module in (kind_hola, memory_hola, packing_hola)]
    others += [f"{line}  # noqa: F401" for line in _imports().splitlines()]
    first = "from .kinds_hola import"
    return source.replace(first, "\n".join([OPERATIONS, *others, first]), 1)
