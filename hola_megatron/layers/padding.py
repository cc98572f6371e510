"""Zero padding of the fused input projection to a multiple of 64 rows per rank.

q, k, v, g, b and a of one rank's heads have widths such as 4104 (4 heads of 256) or 2052 (on two tensor ranks). fp8
matrix products need multiples of 16; fast 16-bit ones, and vector loads of a token's row, need rows aligned to 128
bytes. Tiles of matrix products are 64 or wider, so the padding costs no time. Its output is not used: its gradient is
zero and it stays zero. Padding is part of no logical tensor: parameter counts, checkpoints and exports do not contain
it, and a checkpoint loads at any tensor-parallel size, with other padding.
"""

from __future__ import annotations

from typing import Any, Protocol

from hola_megatron.layers.recipe_view import ModelConfig

PROJECTION_MULTIPLE = 64


class CountedKind(Protocol):
    """The part of `LayerKind` (spec.py) that counting uses."""

    def heads(self, model: ModelConfig) -> int: ...

    def parameters(self, model: ModelConfig) -> tuple[Any, ...]: ...


def projection_padding(rows: int) -> int:
    """Number of padding rows after a rank's `rows` of the fused input projection."""
    return -rows % PROJECTION_MULTIPLE


def projection_rows(kind: CountedKind, model: ModelConfig, ranks: int) -> int:
    """Rows of one tensor rank's fused input projection in a layer of a kind, without padding."""
    return sum(row.shape[0] for row in kind.parameters(model) if row.stored_in == "in_proj.weight") // ranks
