"""The gated delta rule on the GPU: seven launches, forward and backward, as one autograd function.

    forward    prepare (every chunk)        walk_forward (every span)
    backward   recompute_states (span)      walk_backward (span)         chunk_gradients (chunk: matrices, dq, dk)

two tiny ones for the score, and four more where a long sequence is split (triton_split). Two
rules shape all of it: raw q and k go into every product, their unit lengths and decays are
scales of 64 numbers applied to the results, so no normalised or decayed copy is ever written;
and the backward pass needs no state of a chunk from the forward pass.

Counted at B 16, T 2048, H 4, K = V = 256 in 16 bits (2048 chunks and heads; 67 MB a tensor of tokens):

    launch              GFLOP   read MB                            written MB
    prepare                13   q k 134                            U P 34
    walk_forward           60   q k v 201, U P 34                  o 67
    recompute_states       39   k v 134, U 17                      states 268, e 67
    walk_backward          60   q k do 201, U P 34                 dr 67, dstates 268
    matrices               13   do dr e k 268, P 17                dv 67, three matrices 50
    dq                     26   do q k 201, states 268, M 17       dq 67
    dk                     64   dr e q k 268, both states 537, 34  dk 67

Floors at 700 TFLOP/s and 4.3 TB/s: 0.11 ms forward, 0.68 ms backward (bytes, three quarters of them the states of
every chunk, written once and read twice).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hola_kernels.gated_delta.triton_gradient import chunk_gradients
from hola_kernels.gated_delta.triton_layout import CHUNK, Layout, bounded_layout, layout_of, lengths_of
from hola_kernels.gated_delta.triton_prepare import ReadNorm, prepare
from hola_kernels.gated_delta.triton_split import entering_states, leaving_gradients, span_chunks
from hola_kernels.gated_delta.triton_walk import recompute_states, span_maps, walk_backward, walk_forward
from hola_kernels.integers import cdiv
from hola_kernels.triton_config import keeps_states, launch_of


def gated_delta_triton(q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, log_decay_MH: Tensor, beta_MH: Tensor,
                       cu_seqlens: Tensor, state_NHKV: Tensor | None, chunks_a_span: int | None = None,
                       max_seqlen: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `torch_chunked.gated_delta_chunked`, but o in v's dtype; no state means zeros.

    cu_seqlens may lie on the CPU (then nothing waits for the device); its layout is made once a tensor. With
    max_seqlen it lies on the device, and is not read here. chunks_a_span: where sequences are split; None leaves it to
    the size of the GPU.
    """
    layout = layout_for(k_MHK, v_MHV, cu_seqlens, chunks_a_span, max_seqlen)
    state = None if state_NHKV is None else state_NHKV.float()
    tensors = (q_MHK, k_MHK, v_MHV, log_decay_MH, beta_MH, state)
    return _GatedDelta.apply(*tensors, layout, will_train(*tensors))


def will_train(*tensors: Tensor | None) -> bool:
    """Whether a backward pass can come. Asked outside of an autograd function: inside, grad mode is always off, and a
    function's needs_input_grad knows parameters only.
    """
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def layout_for(k_MHK: Tensor, v_MHV: Tensor, cu_seqlens: Tensor, chunks_a_span: int | None = None,
               max_seqlen: int | None = None) -> Layout:
    """The layout in which tokens of this shape are walked; with max_seqlen from shapes alone, cu_seqlens not read."""
    counts = [cdiv(max_seqlen, CHUNK)] if max_seqlen else [cdiv(n, CHUNK) for n in lengths_of(cu_seqlens)]
    longest = max([*counts, 1])
    if chunks_a_span is None:
        (tokens, heads, value_dim), key_dim = v_MHV.shape, k_MHK.shape[2]
        tile = launch_of("gated_delta_forward", key_dim, value_dim, v_MHV.element_size()).tile
        total = cdiv(tokens, CHUNK) if max_seqlen else sum(counts)
        chunks_a_span = span_chunks(longest, total, heads * (value_dim // tile), k_MHK.device)
    if max_seqlen:
        return bounded_layout(cu_seqlens, v_MHV.shape[0], chunks_a_span, split=longest > chunks_a_span)
    return layout_of(cu_seqlens, k_MHK.device, chunks_a_span)


class _GatedDelta(torch.autograd.Function):
    """The inputs are kept, and what rule_forward keeps."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None,
                layout: Layout, train: bool) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, log_decay, beta = (x.contiguous() for x in (q, k, v, log_decay, beta))
        o, square, last, kept = rule_forward(q, k, v, log_decay, beta, state, layout, train=train)
        if layout.most_spans > 1:
            last = last[layout.segment_spans.sum(1) - 1]
        score = square.sum(-1).sqrt_()
        ctx.save_for_backward(q, k, v, log_decay, beta, *kept)
        ctx.layout = layout
        ctx.mark_non_differentiable(score)
        ctx.set_materialize_grads(False)
        return o, score, last

    @staticmethod
    def backward(ctx, do: Tensor | None, _: None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, beta, *kept = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else do.contiguous()
        *gradients, dstate = rule_backward(q, k, v, log_decay, beta, kept, ctx.layout, do, dlast)
        if not ctx.needs_input_grad[5]:
            dstate = None
        elif ctx.layout.most_spans > 1:
            dstate = dstate[ctx.layout.segment_spans[:, 0]]
        return *gradients, dstate, None, None


def rule_forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None,
                 layout: Layout, *, train: bool,
                 read_norm: ReadNorm | None = None) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Contiguous inputs -> (o, |write|^2 over each tile of V [M, H, tiles], the state leaving every span [P, H, K, V],
    what the backward keeps).

    Kept: each chunk's U and P (256 bytes a token and head) and scales (32); of a split sequence also M^T of
    each span and the state entering it; if a backward pass will come (train) and `keeps_states`, every chunk's state
    and residuals.
    """
    begun = begin_rule(q, k, v, log_decay, beta, layout, read_norm)
    return finish_rule(q, k, v, begun, state, layout, train)


def begin_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
               layout: Layout, read_norm: ReadNorm | None = None) -> tuple[Tensor | None, ...]:
    """What needs no state: every chunk's scales, U and P, and where sequences are split [E | M] and M^T of every span.
    """
    precision = _precision(v)
    scales, solve, attend = prepare(q_MHK=q, k_MHK=k, log_decay_MH=log_decay, beta_MH=beta, chunks=layout.chunks,
                                    precision=precision, read_norm=read_norm)
    maps, turned = None, None
    if layout.most_spans > 1:
        maps, turned = span_maps(k_MHK=k, v_MHV=v, scales=scales, solve=solve, layout=layout, precision=precision)
    return scales, solve, attend, maps, turned


def finish_rule(q: Tensor, k: Tensor, v: Tensor, begun: tuple[Tensor | None, ...],
                state: Tensor | None, layout: Layout,
                train: bool) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, ...]]:
    """The rest of `rule_forward`, from what `begin_rule` returned and the state entering every segment."""
    scales, solve, attend, maps, turned = begun
    state = None if state is None else state.contiguous()
    if maps is not None:
        state = entering_states(maps=maps, layout=layout, state_NHKV=state, value_dim=v.shape[2])
    o, square, last, states, residual = walk_forward(
        q_MHK=q, k_MHK=k, v_MHV=v, scales=scales, solve=solve, attend=attend, layout=layout, state_PHKV=state,
        keep_states=train and keeps_states(k.shape[2], v.shape[2], v.element_size()), precision=_precision(v))
    return o, square, last, (state, scales, solve, attend, states, residual, turned)


def rule_backward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, kept: Sequence[Tensor | None],
                  layout: Layout, do: Tensor, dlast: Tensor | None, write_dv: bool = True) -> tuple[Tensor, ...]:
    """(dq, dk, dv, dlog_decay, dbeta, dstate of every span) from contiguous do and the last states' gradients; write_dv
    as below.
    """
    asked = None if kept[-1] is None else asked_of_spans(q, k, kept, layout, do)
    walked = walk_back(q, k, v, kept, layout, do, dlast, asked)
    gradients = gradients_of_chunks(q, k, v, log_decay, beta, kept, layout, do, walked, write_dv)
    return *gradients, walked[2]


def asked_of_spans(q: Tensor, k: Tensor, kept: Sequence[Tensor | None], layout: Layout, do: Tensor) -> Tensor:
    """What each span's own outputs ask of the state entering it, [P, H, K, V] fp32."""
    _, scales, solve, attend, *_ = kept
    return walk_backward(q_MHK=q, k_MHK=k, do_MHV=do, scales=scales, solve=solve, attend=attend, layout=layout,
                         dstate_PHKV=None, precision=_precision(do), every_chunk=False)[2]


def walk_back(q: Tensor, k: Tensor, v: Tensor, kept: Sequence[Tensor | None], layout: Layout, do: Tensor,
              dlast: Tensor | None, asked: Tensor | None) -> tuple[Tensor, ...]:
    """(dr, dstates, dstate, states, residual) of all chunks; asked: of the spans, where sequences are split."""
    state, scales, solve, attend, states, residual, turned = kept
    precision = _precision(v)
    dlast = None if dlast is None else dlast.contiguous()
    if turned is not None:
        dlast = leaving_gradients(turned=turned, dentering=asked, layout=layout, dstate_NHKV=dlast)
    back = walk_backward(q_MHK=q, k_MHK=k, do_MHV=do, scales=scales, solve=solve, attend=attend, layout=layout,
                         dstate_PHKV=dlast, precision=precision)
    if states is None:
        states, residual = recompute_states(k_MHK=k, v_MHV=v, scales=scales, solve=solve, layout=layout,
                                            state_PHKV=state, precision=precision)
    return *back, states, residual


def gradients_of_chunks(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
                        kept: Sequence[Tensor | None], layout: Layout, do: Tensor,
                        walked: tuple[Tensor, ...], write_dv: bool = True) -> tuple[Tensor, ...]:
    """(dq, dk, dv, dlog_decay, dbeta) from what `walk_back` returned; without write_dv dr in place of dv = beta dr."""
    dr, dstates, _, states, residual = walked
    _, scales, _, attend, *_ = kept
    return chunk_gradients(
        q_MHK=q, k_MHK=k, do_MHV=do, residual=residual, states=states, dstates=dstates, dr=dr, scales=scales,
        attend=attend, chunks=layout.chunks, log_decay_MH=log_decay, beta_MH=beta, precision=_precision(v),
        write_dv=write_dv)


def _precision(v: Tensor) -> str:
    """Of matrix products: float32 inputs get nearly float32 ones."""
    return "tf32x3" if v.dtype == torch.float32 else "tf32"
