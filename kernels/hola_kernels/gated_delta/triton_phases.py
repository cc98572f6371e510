"""The rule over one rank's tokens, in the phases between which ranks exchange messages.

    intra_chunk          every chunk's terms, every span's map; the map of the last segment goes to the other ranks
    state_pass           the pass over chunks, from the initial states
    grad_initial_state   gradient of the outputs for the initial states; that of the first segment goes to other ranks
                         (then `triton_rule.state_pass_backward` and `intra_chunk_backward`, from the gradient of the
                         final states)

A long shard is processed in parallel spans, as `triton_split` does inside one GPU; the spans' maps and gradients
that the rule needs anyway are multiplied up to one a shard, so the ranks' exchange costs no second pass.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from hola_kernels.gated_delta.affine_maps import compose
from hola_kernels.gated_delta.triton_layout import Layout
from hola_kernels.gated_delta.triton_rule import (
    ChunkTerms,
    SavedTensors,
    _precision,
    chunk_states_and_outputs,
    chunk_terms,
    grad_span_states,
    layout_for,
)
from hola_kernels.gated_delta.triton_split import leaving_gradients
from hola_kernels.gated_delta.triton_state_pass import span_maps


@dataclass(frozen=True)
class IntraChunk:
    """What needs no initial state. equal_length: all segments are of one length, and each is first and last."""

    layout: Layout
    terms: ChunkTerms
    equal_length: bool


def intra_chunk(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, cu_seqlens: Tensor, *,
                equal_length: bool) -> IntraChunk:
    """Contiguous q, k [M, H, K], v [M, H, V], log_decay, beta [M, H]; cu_seqlens [N + 1] best on the CPU."""
    layout = layout_for(k, v, cu_seqlens)
    return IntraChunk(layout, chunk_terms(q, k, v, log_decay, beta, layout), equal_length)


def final_map(k: Tensor, v: Tensor, intra: IntraChunk) -> Tensor:
    """[E | M] of the last segment (of every one with equal_length), [N, H, K, V + K] fp32."""
    layout, terms, maps = intra.layout, intra.terms, intra.terms.maps
    spans = layout.span_count if intra.equal_length else layout.end_spans[1]
    first = layout.span_count - spans
    if maps is None:
        maps, _ = span_maps(k_MHK=k, v_MHV=v, scales=terms.scales, solve=terms.solve, precision=_precision(v),
                            layout=dataclasses.replace(layout, spans=layout.spans[first:]))
    else:
        maps = maps[first:]
    return compose(maps.unflatten(0, (layout.segment_count if intra.equal_length else 1, -1)))


def state_pass(q: Tensor, k: Tensor, v: Tensor, intra: IntraChunk, state: Tensor,
               train: bool) -> tuple[Tensor, Tensor, SavedTensors]:
    """(o, |write|^2 over each tile of V, tensors saved for backward) from the initial states [N, H, K, V]."""
    o, square, _, saved = chunk_states_and_outputs(q, k, v, intra.terms, state, intra.layout, train)
    return o, square, saved


def grad_initial_state(q: Tensor, k: Tensor, saved: SavedTensors, layout: Layout, equal_length: bool,
                       do: Tensor) -> tuple[Tensor, Tensor | None]:
    """(gradient of the first segment's initial state, with equal_length of every one's, [N, H, K, V] fp32; of all
    spans').

    The latter, which `state_pass_backward` takes, is None unless sequences are split.
    """
    M_T = saved.M_T
    if M_T is None:
        spans = layout.span_count if equal_length else layout.end_spans[0]
        only = dataclasses.replace(layout, spans=layout.spans[:spans])
        return grad_span_states(q, k, saved, only, do), None
    entering = grad_span_states(q, k, saved, layout, do)
    leaving = leaving_gradients(M_T=M_T, dentering=entering, layout=layout, dstate_NHKV=None)
    step = layout.span_count // layout.segment_count if equal_length else layout.span_count
    first = slice(None, None, step)  # the first span of every piece
    return entering[first] + M_T[first] @ leaving[first], entering


def piece_maps(k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[E | M] of every piece, [B, H, K, V + K] fp32; the pieces are of one length."""
    k, v, log_decay, beta = (x.contiguous() for x in (k, v, log_decay, beta))
    return final_map(k, v, intra_chunk(k, k, v, log_decay, beta, cu_seqlens, equal_length=True))


def piece_gradient(q: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor, do: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The gradient entering every piece, [B, H, K, V] fp32; the pieces are of one length."""
    q, k, log_decay, beta, do = (x.contiguous() for x in (q, k, log_decay, beta, do))
    intra = intra_chunk(q, k, do, log_decay, beta, cu_seqlens, equal_length=True)
    terms = intra.terms
    saved = SavedTensors(None, terms.scales, terms.solve, terms.attend, None, None, terms.M_T)
    return grad_initial_state(q, k, saved, intra.layout, True, do)[0]
