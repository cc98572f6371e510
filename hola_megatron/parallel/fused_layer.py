"""The HOLA layer over ranks as one autograd function on Triton kernels, arranged so that messages travel under work.

    forward     chunk factors, span maps     -> all-gather of maps, under the read of own blocks (in the mixer also the
                                                copy of the output gate)
                state pass, scores           -> open block from the left, under the read of own blocks
                candidates                   -> all-gather, under the read of own blocks
                selection, rest of the read
    backward    d of the states that entered -> all-gather, under the read's backward
                read's backward              -> reduce-scatter of cached tokens' gradients, under the state's walks
                state's walks                -> the open block's gradients to the left, under the chunks' gradients
                chunks' gradients, and everything added up

What `context.hola_attention_over_ranks` composes of single operations, with the same messages in the same order.
Here the chunks' factors and the spans' maps are made once, the gradients of the two paths meet without autograd's
sums, and nothing asks the device.

What a block's tokens read of the block itself needs no state and no slots, so the forward read is split
(`triton_split_read`), and its first pass cut into runs of blocks, one for each message. Of the block that began on the
left neighbour it sees the tokens that are here; the others join with the slots.

Shapes: N rows (1 for packed documents), T tokens of a row on this rank, M = N T, S rows of the stream (`Stream`) and
L with the cached ones behind, H heads, K key and V value width, w slots, R ranks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hola_kernels.exact_cache.read_configs import read_config
from hola_kernels.exact_cache.triton_best import best_rows
from hola_kernels.exact_cache.triton_forward import launch_inverse_norms
from hola_kernels.exact_cache.triton_read import exact_read_backward, norm_mean
from hola_kernels.exact_cache.triton_select import select_slots
from hola_kernels.exact_cache.triton_split_read import (
    SplitRead,
    begin_split_read,
    launch_read_own,
    launch_read_rest,
)
from hola_kernels.gated_delta.triton_layout import Layout
from hola_kernels.gated_delta.triton_pieces import Begun, asked, begin, finish, leaving_map
from hola_kernels.gated_delta.triton_rule import gradients_of_chunks, walk_back, will_train
from hola_kernels.segments import dense_cu_seqlens
from hola_kernels.triton_attention import _rank
from hola_megatron.parallel.collectives import Pending, gather, start_reduce_scatter, start_shift
from hola_megatron.parallel.part import Part
from hola_megatron.parallel.shared_cache import Shard, check_part, merge, pack, send_shard, unpack, unpack_shards
from hola_megatron.parallel.state_fold import fold_left, fold_right, maps_between
from hola_megatron.parallel.stream import Stream

# Of the blocks' own reads, under the maps, the open block and the candidates. Counted for 65,536 tokens, 4 heads,
# K = V = 256 on an H200, where all of them take about 0.4 ms: 0.13 ms (and before it 0.03 for the norms of the keys and
# 0.13 for copies), 0.07 and 0.2. Measured since: the maps take 0.12 to 0.16 ms on the rank that waits for nobody.
SHARES = (2, 1, 3)


@dataclass(frozen=True)
class Started:
    """A layer whose states' maps are under way."""

    begun: Begun
    maps: Pending


@dataclass(frozen=True)
class Choices:
    """The exact cache's, as `hola_attention` takes them."""

    block: int
    slots: int
    score: str
    read_norm: str


@torch.no_grad()
def start(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, part: Part,
          group: dist.ProcessGroup) -> Started:
    """Make what the rule needs before any state, and send the last document's map. Tokens as in `hola_attention`."""
    flat = [x.flatten(0, 1).contiguous() for x in (q, k, v, log_decay, beta)]
    cuts = part.cuts if part.cuts is not None else _host_cuts(q.shape[0], q.shape[1])
    begun = begin(*flat, cuts, alike=part.cuts is None)
    if part.goes_on:
        both = leaving_map(flat[1], flat[2], begun)
    else:  # nobody looks at it
        both = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3] + k.shape[3], dtype=torch.float32)
    return Started(begun, gather(both, group, "state maps"))


@functools.lru_cache(maxsize=64)
def _host_cuts(rows: int, tokens: int) -> Tensor:
    """The same tensor for a shape every time: the kernels keep one layout for it."""
    return dense_cu_seqlens(rows, tokens, torch.device("cpu"))


def hola_layer(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma_q: Tensor, gamma_k: Tensor,
               gate: Tensor, sink: Tensor | None, started: Started, part: Part, group: dist.ProcessGroup,
               choices: Choices) -> Tensor:
    """o [N, T, H, V]; arguments as in `hola_attention`. Raises KernelError where a block could span three ranks."""
    check_part(part, choices.block)
    tensors = (q, k, v, log_decay, beta, gamma_q, gamma_k, gate, sink)
    return HolaLayer.apply(*tensors, started, part, group, choices, will_train(*tensors))


class HolaLayer(torch.autograd.Function):
    """Saves q, k and v in the stream, the decays, what rule and read keep, and which tokens crossed ranks."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma_q: Tensor,
                gamma_k: Tensor, gate: Tensor, sink: Tensor | None, started: Started, part: Part,
                group: dist.ProcessGroup, choices: Choices, train: bool) -> Tensor:
        stream, shape = Stream(part, q.shape[0], choices.block, choices.slots), v.shape
        q, k, v, log_decay, beta = (x.flatten(0, 1).contiguous() for x in (q, k, v, log_decay, beta))
        mean, blocks = norm_mean(choices.read_norm, q.shape[2]), stream.blocks(q.device)
        k_LHK, v_LHV = (stream.lay(x, behind=True) for x in (k, v))  # from here on while the maps travel
        read = begin_split_read(
            q_MHK=stream.lay(q), k_RHK=k_LHK, v_RHV=v_LHV, gamma_q=gamma_q, gamma_k=gamma_k, sink_H=sink,
            key_norm_RH=stream.lay(launch_inverse_norms(x_MHD=k, mean=mean), behind=True), units=blocks.units,
            mean=mean, tile=read_config(k.shape[-1], v.shape[-1], k.dtype).forward, opened=stream.opened,
            opened_segments=stream.rows)
        under_maps, under_open, under_shards = read.runs(SHARES)
        launch_read_own(read, under_maps)
        maps = started.maps.wait()
        state = fold_left(maps, part)
        state = F.pad(state, (0, 0, 0, 0, 0, 0, 0, stream.documents - state.shape[0]))
        o_state, square, kept = finish(q, k, v, started.begun, state, train)
        score_SH = _with_open_block(stream, k, v, _rank(choices.score, square, v, beta), read, under_open, group)
        crossed = _exchange_candidates(stream, read, score_SH, under_shards, group)
        slots_UHw = select_slots(score_MH=score_SH, plan=blocks.plan, slots=choices.slots, **crossed.incoming)
        y, o_cache, lse, query_norm = launch_read_rest(
            read, gate_H=gate, o_state_MHV=stream.lay(o_state), slots_UHw=slots_UHw, incoming=blocks.incoming)
        ctx.save_for_backward(q, k_LHK, v_LHV, log_decay, beta, gamma_q, gamma_k, gate, sink, read.key_norm_RH,
                              o_cache, lse, query_norm, slots_UHw, crossed.sent_rows, crossed.places,
                              maps_between(maps, part), *kept)
        ctx.stream, ctx.group, ctx.blocks, ctx.mean = stream, group, blocks, mean
        ctx.layout, ctx.alike = started.begun.layout, started.begun.alike  # and not its maps: their transposes are kept
        return stream.local(y).reshape(shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (q, k_LHK, v_LHV, log_decay, beta, gamma_q, gamma_k, gate, sink, key_norm, o_cache, lse, query_norm,
         slots_UHw, sent_rows, places, between, *kept) = ctx.saved_tensors
        stream, group, layout, part = ctx.stream, ctx.group, ctx.layout, ctx.stream.part
        k, v, do = stream.flat(k_LHK), stream.flat(v_LHV), dy.flatten(0, 1).contiguous()
        asked_left, of_spans = _asked(q, k, kept, layout, ctx.alike, part, do)
        pending = gather(asked_left, group, "state gradients")
        dq_SHK, dk_LHK, dv_LHV, *rest = exact_read_backward(
            q=stream.lay(q), k=k_LHK, v=v_LHV, gamma_q=gamma_q, gamma_k=gamma_k, sink=sink, gate=gate,
            key_norm=key_norm, o_cache=o_cache, lse=lse, query_norm=query_norm, slots_UHw=slots_UHw,
            blocks=ctx.blocks, mean=ctx.mean, dy=stream.lay(do))
        returning = _return_cached(stream, dk_LHK, dv_LHV, places, group)
        leaving = fold_right(pending.wait(), between, part)
        leaving = F.pad(leaving, (0, 0, 0, 0, 0, 0, stream.documents - leaving.shape[0], 0))
        walked = walk_back(q, k, v, kept, layout, do, leaving, of_spans)
        _add_returned(returning.wait(), sent_rows, dk_LHK, dv_LHV)
        leftward = _return_open_block(stream, dk_LHK, dv_LHV, group)
        dq, dk, dv, dlog_decay, dbeta = gradients_of_chunks(q, k, v, log_decay, beta, kept, layout, do, walked)
        dq, dk, dv = (_rows(stream, x).add_(stream.local(y))
                      for x, y in ((dq, dq_SHK), (dk, dk_LHK), (dv, dv_LHV)))
        if leftward is not None:
            for x, more in zip((dk, dv), unpack(leftward.wait(), [dk, dv]), strict=True):
                x[:, x.shape[1] - more.shape[1]:] += more
        dgamma_q, dgamma_k, dsink, dgate = rest
        return (dq, dk, dv, _rows(stream, dlog_decay), _rows(stream, dbeta), dgamma_q, dgamma_k, dgate, dsink,
                None, None, None, None, None)


def _rows(stream: Stream, x: Tensor) -> Tensor:
    return x.unflatten(0, (stream.rows, -1))


def _with_open_block(stream: Stream, k_MHK: Tensor, v_MHV: Tensor, score_MH: Tensor, read: SplitRead,
                     run: tuple[int, int], group: dist.ProcessGroup) -> Tensor:
    """Scores [S, H] of the stream; the left neighbour's open tokens are in them and in what `read` takes."""
    halo = stream.block - 1
    if not halo:
        launch_read_own(read, run)
        return stream.lay(score_MH)
    last = [_rows(stream, x)[:, stream.part.tokens - halo:] for x in (k_MHK, v_MHV, score_MH[..., None])]
    pending = start_shift(pack(last), 1, group, "open block")
    score_SH = stream.lay(score_MH)  # while it travels
    launch_read_own(read, run)
    came = unpack(pending.wait(), last)
    if stream.opened:
        k, v, score = (x[:, halo - stream.opened:] for x in came)
        norm = _rows(stream, launch_inverse_norms(x_MHD=k.flatten(0, 1), mean=read.mean))
        for laid, x in ((read.k_RHK, k), (read.v_RHV, v), (score_SH, score[..., 0]), (read.key_norm_RH, norm)):
            stream.open(laid).copy_(x)
    return score_SH


@dataclass(frozen=True)
class Crossed:
    """What the ranks' exchange of candidates left.

    sent_rows  [N, H, w] rows of the stream that this rank offered, -1 where it had no more
    places     [N, H, w] where the cached tokens lie among the earlier ranks' J * w candidates; None if nothing enters
    incoming   the entering caches, as `select_slots` takes them
    """

    sent_rows: Tensor
    places: Tensor | None
    incoming: dict[str, Tensor]


def _exchange_candidates(stream: Stream, read: SplitRead, score_SH: Tensor, run: tuple[int, int],
                         group: dist.ProcessGroup) -> Crossed:
    """Offer this rank's best tokens; the entering cache is filled in behind the tokens that `read` takes."""
    k_LHK, v_LHV = read.k_RHK, read.v_RHV
    rows = best_rows(score_SH, stream.closed_runs(), stream.slots)
    at, empty = _places_of(rows), rows < 0
    shard = Shard(k_LHK.flatten(0, 1)[at], v_LHV.flatten(0, 1)[at],
                  score_SH.flatten()[at].masked_fill(empty, -torch.inf), stream.position_of(rows))
    under_way = send_shard(shard, group)
    launch_read_own(read, run)
    everyone, part = unpack_shards(*under_way), stream.part
    if not part.before:
        return Crossed(rows, None, {})
    earlier = slice(part.first_rank, part.rank)
    cache, places = merge(everyone.k[earlier], everyone.v[earlier], everyone.score[earlier],
                          everyone.position[earlier], stream.slots)
    stream.cached(k_LHK).copy_(cache.k)
    stream.cached(v_LHV).copy_(cache.v)
    read.key_norm_RH[stream.tokens:] = launch_inverse_norms(x_MHD=k_LHK[stream.tokens:], mean=read.mean)
    return Crossed(rows, places, _incoming(stream, cache))


def _incoming(stream: Stream, cache: Shard) -> dict[str, Tensor]:
    """The caches of all documents: those of the first of every row, and empty ones."""
    count, device = stream.rows * stream.slots, cache.k.device
    row = torch.arange(stream.tokens, stream.tokens + count, dtype=torch.int32, device=device)
    row = torch.where(cache.position >= 0, row.view(stream.rows, 1, stream.slots), -1)
    others = (0, 0, 0, 0, 0, stream.documents - stream.rows)
    return {"incoming_rows": F.pad(row, others, value=-1), "incoming_score": F.pad(cache.score, others)}


def _places_of(rows_NHw: Tensor) -> Tensor:
    """Where (row, head) lies in [rows * H]; row 0 for empty places."""
    heads = rows_NHw.shape[1]
    return rows_NHw.clamp_min(0).long() * heads + torch.arange(heads, device=rows_NHw.device)[:, None]


def _asked(q: Tensor, k: Tensor, kept: list[Tensor | None], layout: Layout, alike: bool, part: Part,
           do: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the outputs ask of the states that entered this rank [N, H, K, V], and of those that enter the spans."""
    if part.before or kept[-1] is not None:
        return asked(q, k, kept, layout, alike, do)
    rows = layout.segment_count if alike else 1
    return do.new_zeros(rows, *k.shape[1:], do.shape[2], dtype=torch.float32), None  # nothing entered


def _return_cached(stream: Stream, dk_LHK: Tensor, dv_LHV: Tensor, places: Tensor | None,
                   group: dist.ProcessGroup) -> Pending:
    """Start the reduce-scatter of the cached tokens' gradients [R, N, H, w, K + V] to the ranks that offered them."""
    part, (_, heads, key_dim), value_dim = stream.part, dk_LHK.shape, dv_LHV.shape[2]
    every = dk_LHK.new_zeros(part.ranks, stream.rows, heads, stream.slots, key_dim + value_dim, dtype=torch.float32)
    if places is not None:
        both = torch.cat([stream.cached(dk_LHK), stream.cached(dv_LHV)], -1).float()
        earlier = every[part.first_rank: part.rank]
        by_place = both.new_zeros(stream.rows, heads, earlier.shape[0] * stream.slots, both.shape[-1])
        by_place.scatter_(2, places[..., None].expand_as(both), both)
        earlier.copy_(by_place.unflatten(2, (-1, stream.slots)).movedim(2, 0))
    return start_reduce_scatter(every, group, "cache shard gradients")


def _add_returned(both_NHwD: Tensor, rows_NHw: Tensor, dk_LHK: Tensor, dv_LHV: Tensor) -> None:
    """Add what other ranks' reads give to the tokens that this rank offered (nothing to empty places)."""
    at = _places_of(rows_NHw).flatten()
    parts = both_NHwD.flatten(0, 2).split([dk_LHK.shape[2], dv_LHV.shape[2]], -1)
    for gradient, part in zip((dk_LHK, dv_LHV), parts, strict=True):
        gradient.flatten(0, 1).index_add_(0, at, part.to(gradient.dtype))


def _return_open_block(stream: Stream, dk_LHK: Tensor, dv_LHV: Tensor, group: dist.ProcessGroup) -> Pending | None:
    """Start the message with the gradients of the open block's tokens to the left neighbour."""
    halo = stream.block - 1
    if not halo:
        return None
    opened = [F.pad(stream.open(x), (0, 0, 0, 0, halo - stream.opened, 0)) for x in (dk_LHK, dv_LHV)]
    return start_shift(pack(opened), -1, group, "open block gradients")
