"""The map of whole pieces and the gradient entering them, from the kernels that split long sequences.

A piece on one rank is walked in spans side by side, as `triton_split` does inside one GPU; here the
spans' maps are also multiplied up, to one map a piece.
"""

from __future__ import annotations

from torch import Tensor

from hola_kernels.gated_delta.triton_layout import Layout
from hola_kernels.gated_delta.triton_prepare import prepare
from hola_kernels.gated_delta.triton_rule import _precision, layout_for
from hola_kernels.gated_delta.triton_split import leaving_gradients
from hola_kernels.gated_delta.triton_walk import span_maps, walk_backward


def piece_maps(k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, cuts: Tensor) -> Tensor:
    """[E | M] of every span, [B, spans of a piece, H, K, V + K] fp32; the pieces are of one length."""
    k, v, log_decay, beta = (x.contiguous() for x in (k, v, log_decay, beta))
    layout, precision = layout_for(k, v, cuts), _precision(v)
    scales, solve, _ = prepare(q_MHK=k, k_MHK=k, log_decay_MH=log_decay, beta_MH=beta, chunks=layout.chunks,
                               precision=precision)
    maps = span_maps(k_MHK=k, v_MHV=v, scales=scales, solve=solve, layout=layout, precision=precision)
    return maps.unflatten(0, (layout.segment_count, -1))


def piece_gradient(q: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor, do: Tensor, cuts: Tensor) -> Tensor:
    """The gradient entering every piece, [B, H, K, V] fp32."""
    q, k, log_decay, beta, do = (x.contiguous() for x in (q, k, log_decay, beta, do))
    layout: Layout = layout_for(k, do, cuts)
    precision = _precision(do)
    scales, solve, attend = prepare(q_MHK=q, k_MHK=k, log_decay_MH=log_decay, beta_MH=beta, chunks=layout.chunks,
                                    precision=precision)
    _, _, dentering = walk_backward(q_MHK=q, k_MHK=k, do_MHV=do, scales=scales, solve=solve, attend=attend,
                                    layout=layout, dstate_PHKV=None, precision=precision, every_chunk=False)
    if layout.most_spans == 1:
        return dentering
    maps = span_maps(k_MHK=k, v_MHV=do, scales=scales, solve=solve, layout=layout, precision=precision)
    leaving = leaving_gradients(maps=maps, dentering=dentering, layout=layout, dstate_NHKV=None)
    first, key_dim, value_dim = layout.segment_spans[:, 0], k.shape[2], do.shape[2]
    matrix = maps[first][..., value_dim: value_dim + key_dim]
    return dentering[first] + matrix.mT @ leaving[first]
