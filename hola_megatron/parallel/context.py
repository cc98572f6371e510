"""Context parallelism: the layers' operations over sequences that are sharded over ranks.

Every operation takes this rank's tokens, its `SequenceShard` and the context-parallel group, and returns this rank's
shard of the result over the whole sequence, with exact gradients. Messages:

    short convolution    the last W - 1 inputs to the right neighbour
    state                one all-gather of affine maps; backward one of gradients             (state_fold)
    exact cache          C - 1 tokens to the right neighbour, one all-gather of candidates;
                         backward the same, and a reduce-scatter                              (cache_candidates)
    softmax attention    all keys and values: the only message that grows with T
    sliding window       the last W - 1 keys and values to the right neighbour

Each computes the state before this rank's first token, differentiably, and then runs the one-rank operation from it.

Shapes: N rows (1 for packed documents), T tokens of a row on this rank, H heads, K key and V value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hola_kernels import HolaState, KernelError, PackedDocuments, exact_read_only, gated_delta_rule, short_conv
from hola_kernels.softmax_attention import softmax_attention
from hola_kernels.stages import (
    POSITION_SCORES,
    CacheOptions,
    gated_delta_residual,
    is_fused,
    merge_outputs,
    rank_tokens,
    routed_values,
    segments_of,
    with_positions,
)
from hola_megatron.parallel.cache_candidates import entering_memory, open_tokens
from hola_megatron.parallel.collectives import Gather, NeighbourExchange, Pending, ReceiveLeft, SendRight
from hola_megatron.parallel.sequence_shard import SequenceShard
from hola_megatron.parallel.state_fold import Exchange, ReceiveStateGradient, SendStateGradient, fold_left, send_map

if TYPE_CHECKING:
    from hola_megatron.parallel.fused_layer import InFlightMaps


@dataclass(frozen=True)
class ContextParallel:
    """A rank's shard of the sequence, and the context-parallel group."""

    shard: SequenceShard
    group: dist.ProcessGroup


@dataclass(frozen=True)
class InFlightTail:
    """Handle of a convolution's last inputs, in flight to the right neighbour."""

    sent: Tensor
    exchange: NeighbourExchange


def send_conv_tail(x_NTD: Tensor, width: int, columns: int, cp: ContextParallel) -> tuple[Tensor, InFlightTail | None]:
    """Start to send the last width - 1 inputs of a convolution over x's first `columns`; use the x returned."""
    if width == 1:
        return x_NTD, None
    exchange = NeighbourExchange(cp.group, "convolution")
    x_NTD, sent = SendRight.apply(x_NTD, width - 1, columns, exchange)
    return x_NTD, InFlightTail(sent, exchange)


def conv_tail(in_flight: InFlightTail | None, width: int, rows: int, cp: ContextParallel) -> Tensor | None:
    """`short_conv`'s tail [documents, W - 1, D]: inputs before every document of this rank; None at width 1."""
    if in_flight is None:
        return None
    shard, before = cp.shard, width - 1
    tail = ReceiveLeft.apply(in_flight.sent, in_flight.exchange)
    missing = max(before - shard.before, 0)  # of another document, or before the sequence
    tail = F.pad(tail[:, missing:], (0, 0, missing, 0))
    return F.pad(tail, (0, 0, 0, 0, 0, shard.sequences(rows) - rows))


def short_conv_over_ranks(*, x: Tensor, weight: Tensor, cp: ContextParallel, backend: str = "auto") -> Tensor:
    """`hola_kernels.short_conv` of x [N, T, D]; weight [D, W], at most T + 1 taps."""
    width = weight.shape[1]
    x, in_flight = send_conv_tail(x, width, x.shape[2], cp)
    tail = conv_tail(in_flight, width, x.shape[0], cp)
    return short_conv(x=x, weight=weight, cu_seqlens=cp.shard.documents, tail=tail, backend=backend)


def start_state_exchange(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, cp: ContextParallel,
                         options: CacheOptions | None = None, backend: str = "auto") -> InFlightMaps | Pending:
    """Start the all-gather of the ranks' state maps, so that work that needs no state overlaps with it.

    options: of a layer with an exact cache, None without one. The operations below take the result as
    `maps`, with the same tokens; without it they start the exchange themselves and wait.
    """
    if options is not None and is_fused(backend, options, q, k, v, over_ranks=True):
        from hola_megatron.parallel import fused_layer  # imported here: Triton may not be installed

        return fused_layer.start(q, k, v, log_decay, beta, cp.shard, cp.group)
    return send_map(k, v, log_decay, beta, cp.shard, cp.group, backend)


def gated_delta_over_ranks(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, cp: ContextParallel,
                           maps: Pending | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`hola_kernels.gated_delta_rule`: o [N, T, H, V] and score [N, T, H]."""
    o, score, _, exchange = _state_pass(q, k, v, log_decay, beta, cp, maps, backend)
    return SendStateGradient.apply(o, q, k, log_decay, beta, exchange), score


def hola_attention_over_ranks(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma_q: Tensor,
                              gamma_k: Tensor, gate: Tensor, sink: Tensor | None, cp: ContextParallel,
                              options: CacheOptions, route: Tensor | None = None,
                              maps: InFlightMaps | Pending | None = None, backend: str = "auto") -> Tensor:
    """`hola_kernels.hola_attention`: o [N, T, H, V].

    Raises KernelError also where T is less than `cache_candidates.least_tokens`.
    """
    tokens = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta}
    maps = maps or start_state_exchange(**tokens, cp=cp, options=options, backend=backend)
    if not isinstance(maps, Pending):
        from hola_megatron.parallel import fused_layer

        rank = None
        if options.score in POSITION_SCORES:
            rank = rank_tokens(options.score, beta.float(), v, beta, segments_of(k, cp.shard.documents),
                               _tokens_before(cp.shard, k))
        return fused_layer.hola_layer(
            **tokens, rank=rank, gamma_q=gamma_q, gamma_k=gamma_k, gate=gate, sink=sink, in_flight=maps, shard=cp.shard,
            group=cp.group, options=options)
    o_state, written, state, exchange = _state_pass(q, k, v, log_decay, beta, cp, maps, backend)
    rank = _rank(**{n: x for n, x in tokens.items() if n != "q"}, written=written, state=state, route=route, cp=cp,
                 options=options, backend=backend)
    arguments = {**options.of_the_read, **tokens_at_positions(q, k, gamma_q, gamma_k, options, cp), "sink": sink,
                 "backend": backend, "open_tokens": open_tokens(cp.shard, options)}
    read = {"q": arguments.pop("q"), "k": arguments.pop("k"), "v": routed_values(v, route), "score": rank}
    memory = entering_memory(read["k"], read["v"], rank, state, cp.shard, cp.group, options)
    reads = [exact_read_only(**tokens, **arguments, cu_seqlens=cu_seqlens, memory=memory)
             for tokens, cu_seqlens, memory in split_read(read, memory, cp.shard)]
    o_cache = torch.cat(reads, 1) if len(reads) > 1 else reads[0]
    if options.merge == "add":  # the gradient of the output is that of the state's output: it is sent first
        o = merge_outputs(o_state, o_cache, gate, options.merge, backend)
        return SendStateGradient.apply(o, q, k, log_decay, beta, exchange)
    o_state = SendStateGradient.apply(o_state, q, k, log_decay, beta, exchange)
    return merge_outputs(o_state, o_cache, gate, options.merge, backend)


@torch.no_grad()
def scores_and_memory(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, cp: ContextParallel,
                      options: CacheOptions, read_k: Tensor | None = None, route: Tensor | None = None,
                      backend: str = "auto") -> tuple[Tensor, HolaState]:
    """The cache score [N, T, H] and the state before this rank's first token, for diagnostics of a layer.

    read_k: keys of the cache attention [N, T, H, K] where they are not k (`tokens_at_positions`).
    """
    _, written, state, _ = _state_pass(q, k, v, log_decay, beta, cp, None, backend)
    rank = _rank(k=k, v=v, log_decay=log_decay, beta=beta, written=written, state=state, route=route, cp=cp,
                 options=options, backend=backend)
    return rank, entering_memory(k if read_k is None else read_k, v, rank, state, cp.shard, cp.group, options)


def tokens_at_positions(q: Tensor, k: Tensor, gamma_q: Tensor, gamma_k: Tensor, options: CacheOptions,
                        cp: ContextParallel) -> dict[str, Tensor | str]:
    """q, k, gamma_q, gamma_k and read_norm of the cache attention over this rank's tokens (`positions.read_tokens`)."""
    bounds, length = segments_of(k, cp.shard.documents), _tokens_before(cp.shard, k)
    return with_positions(q, k, gamma_q, gamma_k, options, bounds, length)


def split_read(tokens: dict[str, Tensor], memory: HolaState,
               shard: SequenceShard) -> list[tuple[dict[str, Tensor], PackedDocuments | None, HolaState | None]]:
    """(tokens, cu_seqlens, memory) of the first document of every row, and of the documents after it on this rank.

    The latter have no memory: an empty one would cost a block of zeros per document.
    """
    if shard.is_one_document:
        return [(tokens, None, memory)]
    first = {name: x[:, : shard.head] for name, x in tokens.items()}
    later = {name: x[:, shard.head:] for name, x in tokens.items()}
    return [(first, None, memory), (later, shard.later, None)]


def attention_over_ranks(*, q: Tensor, k: Tensor, v: Tensor, cp: ContextParallel, window: int | None = None,
                         backend: str = "auto") -> Tensor:
    """Causal softmax attention within documents: q [N, T, H, K], k [N, T, G, K] with positions applied, v [N, T, G, V]
    -> [N, T, H, V].

    Without a window the keys and values of all ranks are gathered in one message, and their gradients return by a
    reduce-scatter. In a window of W tokens the last W - 1 of them go to the right neighbour, and T is at least W - 1.
    """
    shard, width, own = cp.shard, k.shape[-1], torch.cat([k, v], -1)
    if window is None:
        everyone = Gather.apply(own, cp.group, "keys and values")
        first = everyone.movedim(0, 1).flatten(1, 2)[:, shard.start - shard.before: shard.start + shard.head]
        earlier = shard.before
    else:
        first, earlier = _with_halo(own, window, cp)
    # of the documents that begin here nothing lies on other ranks
    read = first if shard.is_one_document else torch.cat([first, own[:, shard.head:]], 1)
    return softmax_attention(q=q, k=read[..., :width], v=read[..., width:], cu_seqlens=shard.documents,
                             earlier=earlier, window=window, backend=backend)


def _with_halo(own_NTGD: Tensor, window: int, cp: ContextParallel) -> tuple[Tensor, int]:
    """The first document's keys and values here, behind those of the left rank that the window reaches; and how many.

    Raises KernelError for parts of less than window - 1 tokens.
    """
    shard, reach = cp.shard, window - 1
    if shard.tokens < reach:
        raise KernelError(f"window = {window} reaches over more than one rank of {shard.tokens} tokens; take fewer "
                          "ranks")
    if not reach:
        return own_NTGD[:, : shard.head], 0
    exchange = NeighbourExchange(cp.group, "keys and values of a window")
    flat, sent = SendRight.apply(own_NTGD.flatten(2), reach, own_NTGD[0, 0].numel(), exchange)
    halo, earlier = ReceiveLeft.apply(sent, exchange), min(shard.before, reach)
    own = flat[:, : shard.head]
    return torch.cat([halo[:, reach - earlier:], own], 1).unflatten(2, own_NTGD.shape[2:]), earlier


def _state_pass(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, cp: ContextParallel,
                pending: Pending | None, backend: str) -> tuple[Tensor, Tensor, Tensor, Exchange]:
    """(o, score, initial state of the first documents, exchange). The caller passes o through `SendStateGradient`."""
    shard, group = cp.shard, cp.group
    maps = (pending or send_map(k, v, log_decay, beta, shard, group, backend)).wait()
    state = fold_left(maps, shard)
    initial = _of_all_documents(state, shard, q)
    o, written, final = gated_delta_rule(q=q, k=k, v=v, log_decay=log_decay, beta=beta, cu_seqlens=shard.documents,
                                         initial_state=initial, backend=backend)
    exchange = Exchange.after(maps, shard, group, backend)
    return ReceiveStateGradient.apply(o, final, exchange), written, state, exchange


def _tokens_before(shard: SequenceShard, like: Tensor) -> Tensor:
    """[N] int64: tokens of each sequence that lie on earlier ranks; like [N, T, ...] tokens of this rank."""
    length = torch.zeros(shard.sequences(like.shape[0]), dtype=torch.int64, device=like.device)
    length[: like.shape[0]] = shard.before
    return length


@torch.no_grad()
def _rank(*, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, written: Tensor, state: Tensor,
          route: Tensor | None, cp: ContextParallel, options: CacheOptions, backend: str) -> Tensor:
    """What the cache ranks this rank's tokens by; state: as `_state_pass` returns it."""
    shard, residual = cp.shard, None
    if options.score == "cosine":
        residual = gated_delta_residual(k=k, v=v, log_decay=log_decay, beta=beta, cu_seqlens=shard.documents,
                                        initial_state=_of_all_documents(state, shard, k), backend=backend)
    return rank_tokens(options.score, written, v, beta, segments_of(k, shard.documents), _tokens_before(shard, k),
                       residual=residual, route=route)


def _of_all_documents(state: Tensor, shard: SequenceShard, like: Tensor) -> Tensor:
    """The state [N, H, K, V] before every document on this rank: zero before those that begin here."""
    return F.pad(state, (0, 0, 0, 0, 0, 0, 0, shard.sequences(like.shape[0]) - state.shape[0]))
