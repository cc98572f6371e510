"""Memory of the logits, and the chunk size of the loss under `train.logits_budget_gb`. Imports without torch."""

from __future__ import annotations

import math

GB = 1e9
ROWS = 64  # chunks are multiples of this many tokens, where the budget allows it


def logits_copies(number: int, transformer_engine: bool) -> float:
    """Peak memory of the unchunked loss, in copies of the logits. number: bytes of one logit.

    Transformer Engine's loss has the logits and their gradient; Megatron's own makes a float32 copy of 16-bit logits.
    """
    if transformer_engine:
        return 2.0
    return 1.0 if number == 4 else 1.0 + 4 / number


def chunk_rows(tokens: int, columns: int, number: int, copies: float, budget_gb: float | None) -> int | None:
    """Tokens per chunk of the loss; None: not chunked, since all logits fit the budget.

    tokens, columns: of one rank's logits. number: bytes of one logit. copies: as from `logits_copies`. budget_gb: of
    all logits, in GB. A chunk needs its logits once: the gradient overwrites them.
    """
    size = tokens * columns * number
    if budget_gb is None or copies * size <= budget_gb * GB:
        return None
    most = max(int(budget_gb * GB) // (columns * number), 1)
    most = most // ROWS * ROWS or most
    rows = math.ceil(tokens / math.ceil(tokens / most))
    return min(math.ceil(rows / ROWS) * ROWS, most) if most >= ROWS else rows
