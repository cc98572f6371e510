"""Rows of the fused input projection that hold nothing, so that its width suits every matrix product.

q, k, v, g, b and a of one rank's heads make odd widths (4 heads of 256: 4104; on two tensor ranks 2052 each). 8-bit
products want multiples of 16, fast 16-bit ones and vector loads of a token's row want rows that begin at multiples of
128 bytes. So every rank's share ends in rows of zeros up to a multiple of 64. Tiles of matrix products are 64 or wider:
the rows cost nothing there. What they put out is not read, so their gradient is zero and they stay zero.
No logical tensor holds them: parameter counts, checkpoints and exported models know nothing of padding, and a
checkpoint goes from any tensor-parallel size to any other, whose padding differs.
"""

from __future__ import annotations

from hola_megatron.config import ModelConfig

PROJECTION_MULTIPLE = 64


def projection_padding(rows: int) -> int:
    """Zero rows behind a rank's `rows` of the fused input projection."""
    return -rows % PROJECTION_MULTIPLE


def projection_rows(model: ModelConfig, kind: str, ranks: int) -> int:
    """Rows of one tensor rank's fused input projection in a layer of a kind (H, G or A), without padding."""
    if kind == "A":
        return 3 * model.hidden_size // ranks
    heads = model.heads // ranks
    return heads * (2 * model.key_dim + 2 * model.value_dim + (2 if model.decay else 1))
