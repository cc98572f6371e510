"""The rule over one rank's tokens, cut into the steps between which ranks talk.

    begin      every chunk's factors, every span's map; the map of the last segment goes to the other ranks
    finish     the walk, from the states that enter
    asked      what the outputs ask of the states entering; that of the first segment goes to the other ranks
               (then `triton_rule.walk_back` and `gradients_of_chunks`, from the gradient of the states that leave)

A long piece is walked in spans side by side, as `triton_split` does inside one GPU; the spans' maps and gradients
that the rule needs anyway are multiplied up to one a piece, so the ranks' exchange costs no second walk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hola_kernels.gated_delta.state_map import compose
from hola_kernels.gated_delta.triton_layout import Layout
from hola_kernels.gated_delta.triton_rule import (
    _precision,
    asked_of_spans,
    begin_rule,
    finish_rule,
    layout_for,
)
from hola_kernels.gated_delta.triton_split import leaving_gradients
from hola_kernels.gated_delta.triton_walk import span_maps


@dataclass(frozen=True)
class Begun:
    """factors: what `begin_rule` returned. alike: all segments are of one length, and each is first and last."""

    layout: Layout
    factors: tuple[Tensor | None, ...]
    alike: bool


def begin(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, cuts: Tensor, alike: bool) -> Begun:
    """Contiguous q, k [M, H, K], v [M, H, V], log_decay, beta [M, H]; cuts [N + 1] best on the CPU."""
    layout = layout_for(k, v, cuts)
    return Begun(layout, begin_rule(q, k, v, log_decay, beta, layout), alike)


def leaving_map(k: Tensor, v: Tensor, begun: Begun) -> Tensor:
    """[E | M] of the last segment (of every one where they are alike), [N, H, K, V + K] fp32."""
    layout, (scales, solve, _, maps, _) = begun.layout, begun.factors
    spans = layout.span_count if begun.alike else layout.end_spans[1]
    first = layout.span_count - spans
    if maps is None:
        maps, _ = span_maps(k_MHK=k, v_MHV=v, scales=scales, solve=solve, precision=_precision(v),
                            layout=dataclasses.replace(layout, spans=layout.spans[first:]))
    else:
        maps = maps[first:]
    return compose(maps.unflatten(0, (layout.segment_count if begun.alike else 1, -1)))


def finish(q: Tensor, k: Tensor, v: Tensor, begun: Begun, state: Tensor,
           train: bool) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """(o, |write|^2 over each tile of V, what the backward keeps) from the states entering [N, H, K, V]."""
    o, square, _, kept = finish_rule(q, k, v, begun.factors, state, begun.layout, train)
    return o, square, kept


def asked(q: Tensor, k: Tensor, kept: Sequence[Tensor | None], layout: Layout, alike: bool,
          do: Tensor) -> tuple[Tensor, Tensor | None]:
    """(gradient entering the first segment, or every one where they are alike, [N, H, K, V] fp32; that of all spans).

    The latter, which `walk_back` takes, is there where sequences are split.
    """
    turned = kept[-1]
    if turned is None:
        spans = layout.span_count if alike else layout.end_spans[0]
        only = dataclasses.replace(layout, spans=layout.spans[:spans])
        return asked_of_spans(q, k, kept, only, do), None
    entering = asked_of_spans(q, k, kept, layout, do)
    leaving = leaving_gradients(turned=turned, dentering=entering, layout=layout, dstate_NHKV=None)
    step = layout.span_count // layout.segment_count if alike else layout.span_count
    first = slice(None, None, step)  # the first span of every piece
    return entering[first] + turned[first] @ leaving[first], entering


def piece_maps(k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, cuts: Tensor) -> Tensor:
    """[E | M] of every piece, [B, H, K, V + K] fp32; the pieces are of one length."""
    k, v, log_decay, beta = (x.contiguous() for x in (k, v, log_decay, beta))
    return leaving_map(k, v, begin(k, k, v, log_decay, beta, cuts, alike=True))


def piece_gradient(q: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor, do: Tensor, cuts: Tensor) -> Tensor:
    """The gradient entering every piece, [B, H, K, V] fp32; the pieces are of one length."""
    q, k, log_decay, beta, do = (x.contiguous() for x in (q, k, log_decay, beta, do))
    begun = begin(q, k, do, log_decay, beta, cuts, alike=True)
    return asked(q, k, (None, *begun.factors), begun.layout, True, do)[0]
