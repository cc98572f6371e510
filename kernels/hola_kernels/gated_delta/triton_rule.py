"""The gated delta rule on the GPU: seven launches, forward and backward, as one autograd function.

    forward    prepare (every chunk)      state pass (every span)
    backward   recompute_states (span)    state pass (span)    chunk_gradients (chunk: matrices, dq, dk)

two tiny ones for the score, and four more where a long sequence is split (triton_split). Two
rules shape all of it: raw q and k go into every product, their unit lengths and decays are
scales of 64 numbers applied to the results, so no normalised or decayed copy is ever written;
and the backward pass needs no state of a chunk from the forward pass.

Counted at B 16, T 2048, H 4, K = V = 256 in 16 bits (2048 chunks and heads; 67 MB a tensor of tokens):

    launch              GFLOP   read MB                            written MB
    prepare                13   q k 134                            U P 34
    state pass             60   q k v 201, U P 34                  o 67
    recompute_states       39   k v 134, U 17                      states 268, e 67
    state pass, backward   60   q k do 201, U P 34                 dr 67, dstates 268
    matrices               13   do dr e k 268, P 17                dv 67, three matrices 50
    dq                     26   do q k 201, states 268, M 17       dq 67
    dk                     64   dr e q k 268, both states 537, 34  dk 67

Floors at 700 TFLOP/s and 4.3 TB/s: 0.11 ms forward, 0.68 ms backward (bytes, three quarters of them the states of
every chunk, written once and read twice).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hola_kernels.gated_delta.triton_gradient import chunk_gradients
from hola_kernels.gated_delta.triton_layout import CHUNK, Layout, bounded_layout, layout_of, lengths_of
from hola_kernels.gated_delta.triton_prepare import ReadNorm, prepare
from hola_kernels.gated_delta.triton_split import entering_states, leaving_gradients, span_chunks
from hola_kernels.gated_delta.triton_state_pass import (
    launch_state_pass,
    launch_state_pass_backward,
    recompute_states,
    span_maps,
)
from hola_kernels.integers import cdiv
from hola_kernels.operation import first_order
from hola_kernels.triton_config import keeps_states, launch_of


class ChunkTerms(NamedTuple):
    """What the chunks and spans contribute without any state.

    scales, solve, attend: the 32 bytes a token and head of scales, and each chunk's U and P.
    maps, M_T: of a split sequence, [E | M] [P, H, K, V + K] and M^T [P, H, K, K] of every span, fp32; else None.
    """

    scales: Tensor
    solve: Tensor
    attend: Tensor
    maps: Tensor | None
    M_T: Tensor | None


class SavedTensors(NamedTuple):
    """What the forward pass saves for the backward pass besides the inputs; a tuple, as save_for_backward takes it.

    state: entering every span, or None. scales, solve, attend, M_T: as in `ChunkTerms`.
    states, residual: of every chunk, where `keeps_states` and a backward pass may come; else they are recomputed.
    """

    state: Tensor | None
    scales: Tensor
    solve: Tensor
    attend: Tensor
    states: Tensor | None
    residual: Tensor | None
    M_T: Tensor | None


class StateGradients(NamedTuple):
    """Result of `state_pass_backward`.

    dr [M, H, V]: gradient of a chunk's writes after the solve. dstates: of every chunk's outgoing state.
    dstate: of the state entering every span. states, residual: of every chunk, saved or recomputed.
    """

    dr: Tensor
    dstates: Tensor
    dstate: Tensor
    states: Tensor
    residual: Tensor


def gated_delta_triton(q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, log_decay_MH: Tensor, beta_MH: Tensor,
                       cu_seqlens: Tensor, state_NHKV: Tensor | None, chunks_a_span: int | None = None,
                       max_seqlen: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `torch_chunked.gated_delta_chunked`, but o in v's dtype; no state means zeros.

    cu_seqlens may lie on the CPU (then nothing waits for the device); the layout of a constant tensor is made once.
    With max_seqlen it lies on the device, and is not read here. chunks_a_span: where sequences are split; None: by the
    size of the GPU.
    """
    layout = layout_for(k_MHK, v_MHV, cu_seqlens, chunks_a_span, max_seqlen)
    state = None if state_NHKV is None else state_NHKV.float()
    tensors = (*(x.contiguous() for x in (q_MHK, k_MHK, v_MHV, log_decay_MH, beta_MH)), state)
    return _GatedDelta.apply(*tensors, layout, will_train(*tensors))


def will_train(*tensors: Tensor | None) -> bool:
    """Whether a backward pass can come. Called outside of an autograd function: inside, grad mode is always off, and a
    function's needs_input_grad knows parameters only.
    """
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def layout_for(k_MHK: Tensor, v_MHV: Tensor, cu_seqlens: Tensor, chunks_a_span: int | None = None,
               max_seqlen: int | None = None) -> Layout:
    """The layout in which tokens of this shape are processed; with max_seqlen from shapes alone."""
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
    """Saves the inputs and the `SavedTensors` of rule_forward."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None,
                layout: Layout, train: bool) -> tuple[Tensor, Tensor, Tensor]:
        o, square, last, saved = rule_forward(q, k, v, log_decay, beta, state, layout, train=train)
        if layout.most_spans > 1:
            last = last[layout.segment_spans.sum(1) - 1]
        score = square.sum(-1).sqrt_()
        ctx.save_for_backward(q, k, v, log_decay, beta, *saved)
        ctx.layout = layout
        ctx.mark_non_differentiable(score)
        ctx.set_materialize_grads(False)
        return o, score, last

    @staticmethod
    @first_order
    def backward(ctx, do: Tensor | None, _: None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, beta, *saved = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else do.contiguous()
        *gradients, dstate = rule_backward(q, k, v, log_decay, beta, SavedTensors(*saved), ctx.layout,
                                             do, dlast)
        if not ctx.needs_input_grad[5]:
            dstate = None
        elif ctx.layout.most_spans > 1:
            dstate = dstate[ctx.layout.segment_spans[:, 0]]
        return *gradients, dstate, None, None


def rule_forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None,
                 layout: Layout, *, train: bool,
                 read_norm: ReadNorm | None = None) -> tuple[Tensor, Tensor, Tensor, SavedTensors]:
    """Contiguous inputs -> (o, |write|^2 over each tile of V [M, H, tiles], the state leaving every span [P, H, K, V],
    tensors saved for backward). train: a backward pass may come.
    """
    terms = chunk_terms(q, k, v, log_decay, beta, layout, read_norm)
    return chunk_states_and_outputs(q, k, v, terms, state, layout, train)


def chunk_terms(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, layout: Layout,
                read_norm: ReadNorm | None = None) -> ChunkTerms:
    """What needs no state, of every chunk and, where sequences are split, of every span."""
    precision = _precision(v)
    scales, solve, attend = prepare(q_MHK=q, k_MHK=k, log_decay_MH=log_decay, beta_MH=beta, chunks=layout.chunks,
                                    precision=precision, read_norm=read_norm)
    maps, M_T = None, None
    if layout.most_spans > 1:
        maps, M_T = span_maps(k_MHK=k, v_MHV=v, scales=scales, solve=solve, layout=layout, precision=precision)
    return ChunkTerms(scales, solve, attend, maps, M_T)


def chunk_states_and_outputs(q: Tensor, k: Tensor, v: Tensor, terms: ChunkTerms, state: Tensor | None, layout: Layout,
                             train: bool) -> tuple[Tensor, Tensor, Tensor, SavedTensors]:
    """The rest of `rule_forward`, from the chunks' terms and the state entering every segment."""
    scales, solve, attend, maps, M_T = terms
    state = None if state is None else state.contiguous()
    if maps is not None:
        state = entering_states(maps=maps, layout=layout, state_NHKV=state, value_dim=v.shape[2])
    o, square, last, states, residual = launch_state_pass(
        q_MHK=q, k_MHK=k, v_MHV=v, scales=scales, solve=solve, attend=attend, layout=layout, state_PHKV=state,
        keep_states=train and keeps_states(k.shape[2], v.shape[2], v.element_size()), precision=_precision(v))
    return o, square, last, SavedTensors(state, scales, solve, attend, states, residual, M_T)


def rule_backward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, saved: SavedTensors,
                  layout: Layout, do: Tensor, dlast: Tensor | None, write_dv: bool = True) -> tuple[Tensor, ...]:
    """(dq, dk, dv, dlog_decay, dbeta, dstate of every span) from contiguous do and the last states' gradients; write_dv
    as below.
    """
    d_spans = None if saved.M_T is None else grad_span_states(q, k, saved, layout, do)
    d_states = state_pass_backward(q, k, v, saved, layout, do, dlast, d_spans)
    gradients = intra_chunk_backward(q, k, v, log_decay, beta, saved, layout, do, d_states, write_dv)
    return *gradients, d_states.dstate


def grad_span_states(q: Tensor, k: Tensor, saved: SavedTensors, layout: Layout, do: Tensor) -> Tensor:
    """Gradient of each span's own outputs with respect to the state entering it, [P, H, K, V] fp32."""
    return launch_state_pass_backward(
        q_MHK=q, k_MHK=k, do_MHV=do, scales=saved.scales, solve=saved.solve, attend=saved.attend, layout=layout,
        dstate_PHKV=None, precision=_precision(do), every_chunk=False)[2]


def state_pass_backward(q: Tensor, k: Tensor, v: Tensor, saved: SavedTensors, layout: Layout, do: Tensor,
                        dlast: Tensor | None, d_spans: Tensor | None) -> StateGradients:
    """Gradients of all chunks' states; d_spans: from `grad_span_states`, where sequences are split."""
    precision = _precision(v)
    dlast = None if dlast is None else dlast.contiguous()
    if saved.M_T is not None:
        dlast = leaving_gradients(M_T=saved.M_T, dentering=d_spans, layout=layout, dstate_NHKV=dlast)
    gradients = launch_state_pass_backward(
        q_MHK=q, k_MHK=k, do_MHV=do, scales=saved.scales, solve=saved.solve, attend=saved.attend, layout=layout,
        dstate_PHKV=dlast, precision=precision)
    states, residual = saved.states, saved.residual
    if states is None:
        states, residual = recompute_states(k_MHK=k, v_MHV=v, scales=saved.scales, solve=saved.solve, layout=layout,
                                            state_PHKV=saved.state, precision=precision)
    return StateGradients(*gradients, states, residual)


def intra_chunk_backward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, saved: SavedTensors,
                         layout: Layout, do: Tensor, d_states: StateGradients,
                         write_dv: bool = True) -> tuple[Tensor, ...]:
    """(dq, dk, dv, dlog_decay, dbeta) from `state_pass_backward`; without write_dv dr in place of dv = beta dr."""
    return chunk_gradients(
        q_MHK=q, k_MHK=k, do_MHV=do, residual=d_states.residual, states=d_states.states, dstates=d_states.dstates,
        dr=d_states.dr, scales=saved.scales, attend=saved.attend, chunks=layout.chunks, log_decay_MH=log_decay,
        beta_MH=beta, precision=_precision(v), write_dv=write_dv)


def _precision(v: Tensor) -> str:
    """Of matrix products: float32 inputs get nearly float32 ones."""
    return "tf32x3" if v.dtype == torch.float32 else "tf32"
