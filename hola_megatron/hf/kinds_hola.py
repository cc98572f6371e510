"""The layer kinds that this process knows, for the exported model's code.

An exported folder has a file of this name that lists the kinds it was written with (hola_megatron/hf/code.py).
"""

from __future__ import annotations

from typing import Any

from hola_megatron.layers import registry
from hola_megatron.layers.exported.kind_hola import ExportedKind


def kinds_of(config: Any) -> list[ExportedKind]:
    """The kind of every layer of a HolaConfig. ValueError for a pattern with an unknown kind."""
    return [kind.exported() for kind in registry.expand(config.layer_pattern, config.num_hidden_layers)]
