"""Reading a row of a `Layout`'s tables in a kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_chunk(chunks, chunk):
    """(first token, number of tokens) of a chunk; chunks [U, 2]."""
    return tl.load(chunks + chunk * 2), tl.load(chunks + chunk * 2 + 1)


@triton.jit
def load_span(spans, span):
    """(first token, end token, first chunk) of a span; spans [P, 3]."""
    return tl.load(spans + span * 3), tl.load(spans + span * 3 + 1), tl.load(spans + span * 3 + 2)
