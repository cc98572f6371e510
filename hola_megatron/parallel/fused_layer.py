"""The HOLA layer over context-parallel ranks as one autograd function on Triton kernels: messages overlap with work.

               computes                        starts the message                      and overlaps it with
    forward    intra-chunk terms, span maps    all-gather of state maps                local attention (in the mixer
                                                                                       also the copy of the output gate)
               chunk state pass, scores        incomplete block from the left          local attention
               candidates                      all-gather of candidates                local attention
               selection, cache attention
    backward   gradients of initial states     all-gather                              backward of both attentions
               backward of both attentions     reduce-scatter of cached tokens' grads  backward chunk state pass
               backward chunk state pass       incomplete block's grads to the left    intra-chunk gradients
               intra-chunk gradients, sums

It computes what `context.hola_attention_over_ranks` composes of single operations, with the same messages in the same
order. Here intra-chunk terms and span maps are computed once, gradients of the two paths are added in place, and the
host does not wait for the device.

Local attention (a token to its own block) needs no state and no cache slots. So the forward attention has two passes
(`triton_split_read`), and the first is launched in runs of blocks, one for each message. Of a block that starts on the
left neighbour the first pass sees the tokens of this rank; the second adds the others and the slots.

Shapes: N rows (1 for packed documents), T tokens of a row on this rank, M = N T, S tokens of the `TokenBuffer` and
L with the cached ones after them, H heads, K key and V value width, w slots, R ranks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hola_kernels.stages import CacheOptions, dense_cu_seqlens, first_order, mark_constant
from hola_kernels.triton_stages import (
    IntraChunk,
    Layout,
    SavedTensors,
    SplitRead,
    allocate_split_read,
    best_rows,
    cache_attention_backward,
    final_map,
    grad_initial_state,
    intra_chunk,
    intra_chunk_backward,
    launch_cached_read,
    launch_inverse_norms,
    launch_local_read,
    norm_mean,
    rank_scores,
    read_config,
    select_slots,
    state_pass,
    state_pass_backward,
    will_train,
)
from hola_megatron.parallel.cache_candidates import (
    CacheCandidates,
    check_shard,
    merge,
    pack,
    send_candidates,
    unpack,
    unpack_candidates,
)
from hola_megatron.parallel.collectives import Pending, gather, start_reduce_scatter, start_shift
from hola_megatron.parallel.sequence_shard import SequenceShard
from hola_megatron.parallel.state_fold import fold_left, fold_right, maps_between
from hola_megatron.parallel.token_buffer import TokenBuffer

# Shares of local attention that overlap with the state maps, the incomplete block and the candidates. Measured for
# 65,536 tokens, 4 heads, K = V = 256 on an H200, where all of it takes about 0.4 ms: 0.13 ms (with 0.03 ms of key norms
# and 0.13 ms of copies before it), 0.07 ms and 0.2 ms. The maps take 0.12 to 0.16 ms on the rank that waits for none.
SHARES = (2, 1, 3)


@dataclass(frozen=True)
class InFlightMaps:
    """Handle of a layer's state maps in flight, with the intra-chunk terms they were computed from."""

    intra: IntraChunk
    maps: Pending


@torch.no_grad()
def start(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, shard: SequenceShard,
          group: dist.ProcessGroup) -> InFlightMaps:
    """Compute the intra-chunk terms and start the all-gather of the last document's map.

    q, k, v, log_decay, beta: as in `hola_attention`, of this rank.
    """
    flat = [x.flatten(0, 1).contiguous() for x in (q, k, v, log_decay, beta)]
    cu_seqlens = _host_cu_seqlens(q.shape[0], q.shape[1]) if shard.documents is None else shard.documents.host()
    intra = intra_chunk(*flat, cu_seqlens, equal_length=shard.documents is None)
    if shard.continues:
        both = final_map(flat[1], flat[2], intra)
    else:  # no rank reads it
        both = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3] + k.shape[3], dtype=torch.float32)
    return InFlightMaps(intra, gather(both, group, "state maps"))


@functools.lru_cache(maxsize=64)
def _host_cu_seqlens(rows: int, tokens: int) -> Tensor:
    """cu_seqlens of equal rows; cached, since the kernels keep one layout per tensor."""
    return mark_constant(dense_cu_seqlens(rows, tokens, torch.device("cpu")))


def hola_layer(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma_q: Tensor, gamma_k: Tensor,
               gate: Tensor, sink: Tensor | None, in_flight: InFlightMaps, shard: SequenceShard,
               group: dist.ProcessGroup, options: CacheOptions, rank: Tensor | None = None) -> Tensor:
    """o [N, T, H, V]. Arguments as in `hola_attention`; rank [N, T, H] float32: what the cache ranks by, None for what
    the state's kernels write. Raises KernelError where a block could span three ranks."""
    check_shard(shard, options)
    tensors = (q, k, v, log_decay, beta, gamma_q, gamma_k, gate, sink)
    rank = None if rank is None else rank.flatten(0, 1).contiguous()
    return HolaLayer.apply(*tensors, rank, in_flight, shard, group, options, will_train(*tensors))


class HolaLayer(torch.autograd.Function):
    """Saves q, k and v (in the token buffer), decays, intermediate results of both paths, and the exchanged indices."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma_q: Tensor,
                gamma_k: Tensor, gate: Tensor, sink: Tensor | None, rank: Tensor | None, in_flight: InFlightMaps,
                shard: SequenceShard, group: dist.ProcessGroup, options: CacheOptions, train: bool) -> Tensor:
        buffer, shape = TokenBuffer(shard, q.shape[0], options), v.shape
        q, k, v, log_decay, beta = (x.flatten(0, 1).contiguous() for x in (q, k, v, log_decay, beta))
        mean, blocks = norm_mean(options.read_norm, q.shape[2]), buffer.blocks(q.device)
        k_LHK, v_LHV = (buffer.concat(x, with_cached=True) for x in (k, v))  # overlaps with the maps from here on
        read = allocate_split_read(
            q_MHK=buffer.concat(q), k_RHK=k_LHK, v_RHV=v_LHV, gamma_q=gamma_q, gamma_k=gamma_k, sink_H=sink,
            key_norm_RH=buffer.concat(launch_inverse_norms(x_MHD=k, mean=mean), with_cached=True), table=blocks.table,
            mean=mean, tile=read_config(k.shape[-1], v.shape[-1], k.dtype).forward, carried_tokens=buffer.carried,
            carried_segments=buffer.rows)
        under_maps, under_open, under_shards = read.runs(SHARES)
        launch_local_read(read, under_maps)
        maps = in_flight.maps.wait()
        state = fold_left(maps, shard)
        state = F.pad(state, (0, 0, 0, 0, 0, 0, 0, buffer.documents - state.shape[0]))
        o_state, square, saved = state_pass(q, k, v, in_flight.intra, state, train)
        score_MH = rank_scores(options.score, square, v, beta) if rank is None else rank
        score_SH = _receive_open_block(buffer, k, v, score_MH, read, under_open, group)
        exchanged = _exchange_candidates(buffer, read, score_SH, under_shards, group)
        slots_UHw = select_slots(score_MH=score_SH, plan=blocks.plan, slots=options.slots, **exchanged.incoming)
        y, o_cache, lse, query_norm = launch_cached_read(
            read, gate_H=gate, o_state_MHV=buffer.concat(o_state), slots_UHw=slots_UHw, incoming=blocks.incoming)
        ctx.save_for_backward(q, k_LHK, v_LHV, log_decay, beta, gamma_q, gamma_k, gate, sink, read.key_norm_RH,
                              o_cache, lse, query_norm, slots_UHw, exchanged.sent_rows, exchanged.received,
                              maps_between(maps, shard), *saved)
        ctx.buffer, ctx.group, ctx.blocks, ctx.mean = buffer, group, blocks, mean
        # not in_flight itself: it holds the span maps, and the backward pass needs their transposes only
        ctx.layout, ctx.equal_length = in_flight.intra.layout, in_flight.intra.equal_length
        return buffer.local(y).reshape(shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (q, k_LHK, v_LHV, log_decay, beta, gamma_q, gamma_k, gate, sink, key_norm, o_cache, lse, query_norm,
         slots_UHw, sent_rows, received, between, *rule) = ctx.saved_tensors
        saved = SavedTensors(*rule)
        buffer, group, layout, shard = ctx.buffer, ctx.group, ctx.layout, ctx.buffer.shard
        k, v, do = buffer.flat(k_LHK), buffer.flat(v_LHV), dy.flatten(0, 1).contiguous()
        d_initial, d_spans = _initial_state_gradient(q, k, saved, layout, ctx.equal_length, shard, do)
        pending = gather(d_initial, group, "state gradients")
        dq_SHK, dk_LHK, dv_LHV, *rest = cache_attention_backward(
            q=buffer.concat(q), k=k_LHK, v=v_LHV, gamma_q=gamma_q, gamma_k=gamma_k, sink=sink, gate=gate,
            key_norm=key_norm, o_cache=o_cache, lse=lse, query_norm=query_norm, slots_UHw=slots_UHw,
            blocks=ctx.blocks, mean=ctx.mean, dy=buffer.concat(do))
        cached_grads = _send_cached_gradients(buffer, dk_LHK, dv_LHV, received, group)
        d_final = fold_right(pending.wait(), between, shard)
        d_final = F.pad(d_final, (0, 0, 0, 0, 0, 0, buffer.documents - d_final.shape[0], 0))
        d_states = state_pass_backward(q, k, v, saved, layout, do, d_final, d_spans)
        _add_sent_gradients(cached_grads.wait(), sent_rows, dk_LHK, dv_LHV)
        open_grads = _send_open_block_gradients(buffer, dk_LHK, dv_LHV, group)
        dq, dk, dv, dlog_decay, dbeta = intra_chunk_backward(q, k, v, log_decay, beta, saved, layout, do, d_states)
        dq, dk, dv = (_rows(buffer, x).add_(buffer.local(y))
                      for x, y in ((dq, dq_SHK), (dk, dk_LHK), (dv, dv_LHV)))
        if open_grads is not None:
            for x, gradient in zip((dk, dv), unpack(open_grads.wait(), [dk, dv]), strict=True):
                x[:, x.shape[1] - gradient.shape[1]:] += gradient
        dgamma_q, dgamma_k, dsink, dgate = rest
        return (dq, dk, dv, _rows(buffer, dlog_decay), _rows(buffer, dbeta), dgamma_q, dgamma_k, dgate, dsink,
                None, None, None, None, None, None)


def _rows(buffer: TokenBuffer, x: Tensor) -> Tensor:
    return x.unflatten(0, (buffer.rows, -1))


def _receive_open_block(buffer: TokenBuffer, k_MHK: Tensor, v_MHV: Tensor, score_MH: Tensor, read: SplitRead,
                        run: tuple[int, int], group: dist.ProcessGroup) -> Tensor:
    """Scores [S, H] of the buffer; the carried tokens are written to it and to the inputs of `read`."""
    halo = buffer.block - 1
    if not halo:
        launch_local_read(read, run)
        return buffer.concat(score_MH)
    last = [_rows(buffer, x)[:, buffer.shard.tokens - halo:] for x in (k_MHK, v_MHV, score_MH[..., None])]
    pending = start_shift(pack(last), 1, group, "open block")
    score_SH = buffer.concat(score_MH)  # overlaps with the message
    launch_local_read(read, run)
    received = unpack(pending.wait(), last)
    if buffer.carried:
        k, v, score = (x[:, halo - buffer.carried:] for x in received)
        norm = _rows(buffer, launch_inverse_norms(x_MHD=k.flatten(0, 1), mean=read.mean))
        for whole, x in ((read.k_RHK, k), (read.v_RHV, v), (score_SH, score[..., 0]), (read.key_norm_RH, norm)):
            buffer.carried_tokens(whole).copy_(x)
    return score_SH


@dataclass(frozen=True)
class ExchangedCandidates:
    """Result of the exchange of cache candidates.

    sent_rows  [N, H, w] buffer rows of this rank's candidates, -1 where there are fewer than w
    received   [N, H, w] indices of the cached tokens among the earlier ranks' J * w candidates; None on the first rank
               of a document
    incoming   the received cache, as arguments of `select_slots`
    """

    sent_rows: Tensor
    received: Tensor | None
    incoming: dict[str, Tensor]


def _exchange_candidates(buffer: TokenBuffer, read: SplitRead, score_SH: Tensor, run: tuple[int, int],
                         group: dist.ProcessGroup) -> ExchangedCandidates:
    """All-gather the ranks' candidates; the received cache is written to the end of the inputs of `read`."""
    k_LHK, v_LHV = read.k_RHK, read.v_RHV
    rows = best_rows(score_SH, buffer.closed_runs(), buffer.slots)
    at, empty = _row_head_index(rows), rows < 0
    own = CacheCandidates(k_LHK.flatten(0, 1)[at], v_LHV.flatten(0, 1)[at],
                          score_SH.flatten()[at].masked_fill(empty, -torch.inf), buffer.position_of(rows))
    in_flight = send_candidates(own, group)
    launch_local_read(read, run)
    gathered, shard = unpack_candidates(*in_flight), buffer.shard
    if not shard.before:
        return ExchangedCandidates(rows, None, {})
    earlier = slice(shard.first_rank, shard.rank)
    cache, received = merge(gathered.k[earlier], gathered.v[earlier], gathered.score[earlier],
                            gathered.position[earlier], buffer.slots)
    buffer.cached(k_LHK).copy_(cache.k)
    buffer.cached(v_LHV).copy_(cache.v)
    read.key_norm_RH[buffer.tokens:] = launch_inverse_norms(x_MHD=k_LHK[buffer.tokens:], mean=read.mean)
    return ExchangedCandidates(rows, received, _incoming(buffer, cache))


def _incoming(buffer: TokenBuffer, cache: CacheCandidates) -> dict[str, Tensor]:
    """Initial caches of all documents: received ones for the first document of every row, empty ones for the others."""
    count, device = buffer.rows * buffer.slots, cache.k.device
    row = torch.arange(buffer.tokens, buffer.tokens + count, dtype=torch.int32, device=device)
    row = torch.where(cache.position >= 0, row.view(buffer.rows, 1, buffer.slots), -1)
    others = (0, 0, 0, 0, 0, buffer.documents - buffer.rows)
    return {"incoming_rows": F.pad(row, others, value=-1), "incoming_score": F.pad(cache.score, others)}


def _row_head_index(rows_NHw: Tensor) -> Tensor:
    """Index of (row, head) in [rows * H]; that of row 0 for empty slots."""
    heads = rows_NHw.shape[1]
    return rows_NHw.clamp_min(0).long() * heads + torch.arange(heads, device=rows_NHw.device)[:, None]


def _initial_state_gradient(q: Tensor, k: Tensor, saved: SavedTensors, layout: Layout, equal_length: bool,
                            shard: SequenceShard, do: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of this rank's outputs for its initial states [N, H, K, V], and for the initial states of spans."""
    if shard.before or saved.M_T is not None:
        return grad_initial_state(q, k, saved, layout, equal_length, do)
    rows = layout.segment_count if equal_length else 1
    # the first document starts on this rank
    return do.new_zeros(rows, *k.shape[1:], do.shape[2], dtype=torch.float32), None


def _send_cached_gradients(buffer: TokenBuffer, dk_LHK: Tensor, dv_LHV: Tensor, received: Tensor | None,
                           group: dist.ProcessGroup) -> Pending:
    """Start the reduce-scatter of the cached tokens' gradients [R, N, H, w, K + V] to the tokens' ranks."""
    shard, (_, heads, key_dim), value_dim = buffer.shard, dk_LHK.shape, dv_LHV.shape[2]
    all_ranks = dk_LHK.new_zeros(shard.ranks, buffer.rows, heads, buffer.slots, key_dim + value_dim,
                                 dtype=torch.float32)
    if received is not None:
        both = torch.cat([buffer.cached(dk_LHK), buffer.cached(dv_LHV)], -1).float()
        earlier = all_ranks[shard.first_rank: shard.rank]
        by_candidate = both.new_zeros(buffer.rows, heads, earlier.shape[0] * buffer.slots, both.shape[-1])
        by_candidate.scatter_(2, received[..., None].expand_as(both), both)
        earlier.copy_(by_candidate.unflatten(2, (-1, buffer.slots)).movedim(2, 0))
    return start_reduce_scatter(all_ranks, group, "cache shard gradients")


def _add_sent_gradients(both_NHwD: Tensor, rows_NHw: Tensor, dk_LHK: Tensor, dv_LHV: Tensor) -> None:
    """Add the other ranks' gradients to this rank's candidates (zeros for empty slots)."""
    at = _row_head_index(rows_NHw).flatten()
    sections = both_NHwD.flatten(0, 2).split([dk_LHK.shape[2], dv_LHV.shape[2]], -1)
    for gradient, section in zip((dk_LHK, dv_LHV), sections, strict=True):
        gradient.flatten(0, 1).index_add_(0, at, section.to(gradient.dtype))


def _send_open_block_gradients(buffer: TokenBuffer, dk_LHK: Tensor, dv_LHV: Tensor,
                               group: dist.ProcessGroup) -> Pending | None:
    """Start to send the carried tokens' gradients to the left neighbour."""
    halo = buffer.block - 1
    if not halo:
        return None
    gradients = [F.pad(buffer.carried_tokens(x), (0, 0, 0, 0, halo - buffer.carried, 0)) for x in (dk_LHK, dv_LHV)]
    return start_shift(pack(gradients), -1, group, "open block gradients")
