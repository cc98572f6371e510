"""Exact caches that rank tokens by scores from outside, such as those of an oracle."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SCORE = "recency"  # what a layer's recipe must say: a score that comes from rank_tokens in every operation
_WHERE = "hola_kernels.attention"  # where operations call rank_tokens


@contextmanager
def given_score(score_BT: Tensor) -> Iterator[None]:
    """Within the context, layers with the score `SCORE` keep the tokens of largest `score_BT`, the same in all heads.

    score_BT: [B, T], as the tokens of a call from the first position on; ties stay with the earlier token. Only whole
    sequences, no decoding.
    """
    module = importlib.import_module(_WHERE)
    before = module.rank_tokens

    def ranked(name: str, written: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if name != SCORE:
            return before(name, written, *arguments, **options)
        return score_BT.reshape(*written.shape[:2], 1).to(written).expand_as(written)

    module.rank_tokens = ranked
    try:
        yield
    finally:
        module.rank_tokens = before
