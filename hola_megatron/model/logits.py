"""What logits cost, and how many are made at once under `train.logits_budget_gb`. No torch: plan asks too."""

from __future__ import annotations

import math

GB = 1e9
ROWS = 64  # pieces are multiples of this many tokens, where the budget allows one


def logits_copies(number: int, transformer_engine: bool) -> float:
    """How much the uncut loss holds at once, in copies of the logits; number: bytes of one logit.

    Transformer Engine's keeps the logits and their gradient; Megatron's own works on a float32 copy, if they are not.
    """
    if transformer_engine:
        return 2.0
    return 1.0 if number == 4 else 1.0 + 4 / number


def piece_rows(tokens: int, columns: int, number: int, copies: float, budget_gb: float | None) -> int | None:
    """Tokens whose logits are made at once; None: all of them, by the uncut loss, which fits the budget.

    tokens and columns: of one rank's logits. A piece holds its logits once: the gradient is written over them.
    """
    size = tokens * columns * number
    if budget_gb is None or copies * size <= budget_gb * GB:
        return None
    most = max(int(budget_gb * GB) // (columns * number), 1)
    most = most // ROWS * ROWS or most
    rows = math.ceil(tokens / math.ceil(tokens / most))
    return min(math.ceil(rows / ROWS) * ROWS, most) if most >= ROWS else rows
