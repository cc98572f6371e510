"""Rows taken by a table, whose gradient is taken by the table of the way back.

The gradient of torch's index_select adds rows one by one, with atomic additions: slow, and on a GPU in no fixed order.
Where it is known to which rows a row went, it can be gathered like the rows themselves.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

Way = tuple[Tensor, Tensor | None]  # index [R] int64 of the row that is taken, valid [R] bool (None: all): else zero


def moved_rows(x: Tensor, way: Way, *back: Way) -> Tensor:
    """y [R, ...] of x [M, ...]: y_i = x[index_i], or zero.

    back: the ways by which x's gradient is taken from y's, [M] each, and added: together they name every row of y that
    a row of x went to, once.
    """
    return _Moved.apply(x, way, back)


class _Moved(torch.autograd.Function):
    """The tables are held, not saved: they are the same for all layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, way: Way, back: tuple[Way, ...]) -> Tensor:
        ctx.back = back
        return _taken(x, way)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return functools.reduce(torch.add, [_taken(dy, way) for way in ctx.back]), None, None


def _taken(x: Tensor, way: Way) -> Tensor:
    index, valid = way
    rows = x.index_select(0, index)
    return rows if valid is None else rows.masked_fill(~valid.view(-1, *[1] * (rows.ndim - 1)), 0.0)
