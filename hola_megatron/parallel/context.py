"""Context parallelism: the layers' operations over tokens that are cut over ranks.

Every operation here takes this rank's tokens, its `Part` of the row and the context-parallel group, and gives
this rank's share of what one rank would compute over the whole row, with exact gradients. What travels:

    short convolution    its last W - 1 inputs to the right neighbour
    state                one all-gather of affine maps, back one of gradients          (state_fold)
    exact cache          C - 1 tokens to the right neighbour, one all-gather of the
                         best tokens; back the same, and a reduce-scatter              (shared_cache)
    softmax attention    all keys and values: the one thing that grows with T

The idea of all of them: compute the memory that is there at this rank's first token, with gradients
through it, and then run the one-rank operation with that memory.

Shapes: N rows (1 for packed documents), T tokens of a row on this rank, H heads, K key and V value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hola_kernels import HolaState, exact_read_only, gated_delta_rule, short_conv
from hola_kernels.attention import combine, is_fused, rank_tokens
from hola_kernels.checks import segments_of
from hola_megatron.parallel.collectives import ArriveLeft, Gather, LeaveRight, Pending, Shifting
from hola_megatron.parallel.part import Part
from hola_megatron.parallel.shared_cache import entering_memory
from hola_megatron.parallel.state_fold import AskLeft, Exchange, TakeRight, fold_left, send_map

if TYPE_CHECKING:
    from hola_megatron.parallel.fused_layer import Started


@dataclass(frozen=True)
class OverRanks:
    """A part of the row and the group that shares it."""

    part: Part
    group: dist.ProcessGroup


@dataclass(frozen=True)
class LeavingTail:
    """A convolution's last inputs on their way to the right neighbour."""

    sent: Tensor
    shifting: Shifting


def send_conv_tail(x_NTD: Tensor, width: int, columns: int, over: OverRanks) -> tuple[Tensor, LeavingTail | None]:
    """Send the last inputs of a convolution of this width over x's first columns; go on with the x returned."""
    if width == 1:
        return x_NTD, None
    shifting = Shifting(over.group, "convolution")
    x_NTD, sent = LeaveRight.apply(x_NTD, width - 1, columns, shifting)
    return x_NTD, LeavingTail(sent, shifting)


def conv_tail(leaving: LeavingTail | None, width: int, rows: int, over: OverRanks) -> Tensor | None:
    """The inputs before the documents of N rows here, [documents, W - 1, D], for `short_conv`; None at width 1."""
    if leaving is None:
        return None
    part, before = over.part, width - 1
    tail = ArriveLeft.apply(leaving.sent, leaving.shifting)
    missing = max(before - part.before, 0)  # of another document, or of nobody
    tail = F.pad(tail[:, missing:], (0, 0, missing, 0))
    return F.pad(tail, (0, 0, 0, 0, 0, _documents(part, rows) - rows))


def short_conv_over_ranks(*, x: Tensor, weight: Tensor, over: OverRanks, backend: str = "auto") -> Tensor:
    """`hola_kernels.short_conv` of x [N, T, D]; weight [D, W], at most T + 1 taps."""
    width = weight.shape[1]
    x, leaving = send_conv_tail(x, width, x.shape[2], over)
    tail = conv_tail(leaving, width, x.shape[0], over)
    return short_conv(x=x, weight=weight, cu_seqlens=over.part.cuts, tail=tail, backend=backend)


def start_state_exchange(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, over: OverRanks,
                         score: str | None = None, backend: str = "auto") -> Started | Pending:
    """Send what this rank's tokens do to a state; what needs no state can go on.

    score: what the exact cache ranks by, None for a layer without one. The operations below, called with the same
    tokens, take the result as `maps`; without it they start the exchange themselves, and wait.
    """
    if score is not None and is_fused(backend, score, q, k, v):
        from hola_megatron.parallel import fused_layer  # on first use: triton may be missing

        return fused_layer.start(q, k, v, log_decay, beta, over.part, over.group)
    return send_map(k, v, log_decay, beta, over.part, over.group, backend)


def gated_delta_over_ranks(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, over: OverRanks,
                           maps: Pending | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`hola_kernels.gated_delta_rule`: o [N, T, H, V] and score [N, T, H]."""
    o, score, _, exchange = _state_pass(q, k, v, log_decay, beta, over, maps, backend)
    return AskLeft.apply(o, q, k, log_decay, beta, exchange), score


def hola_attention_over_ranks(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma_q: Tensor,
                              gamma_k: Tensor, gate: Tensor, sink: Tensor | None, over: OverRanks, block: int = 256,
                              slots: int = 64, score: str = "betae", read_norm: str = "rms",
                              maps: Started | Pending | None = None, backend: str = "auto") -> Tensor:
    """`hola_kernels.hola_attention`: o [N, T, H, V]. Raises KernelError also where T is less than block - 1."""
    tokens = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta}
    maps = maps or start_state_exchange(**tokens, over=over, score=score, backend=backend)
    if not isinstance(maps, Pending):
        from hola_megatron.parallel import fused_layer

        return fused_layer.hola_layer(
            **tokens, gamma_q=gamma_q, gamma_k=gamma_k, gate=gate, sink=sink, started=maps, part=over.part,
            group=over.group, choices=fused_layer.Choices(block, slots, score, read_norm))
    o_state, written, state, exchange = _state_pass(q, k, v, log_decay, beta, over, maps, backend)
    rank, memory = _memory(k, v, beta, written, state, over, block, slots, score)
    arguments = {"gamma_q": gamma_q, "gamma_k": gamma_k, "sink": sink, "block": block, "slots": slots,
                 "read_norm": read_norm, "backend": backend, "opened": over.part.before % block}
    parts = [exact_read_only(**tokens, **arguments, cu_seqlens=cuts, memory=memory)
             for tokens, cuts, memory in split_read({"q": q, "k": k, "v": v, "score": rank}, memory, over.part)]
    o = combine(o_state, torch.cat(parts, 1) if len(parts) > 1 else parts[0], gate)
    return AskLeft.apply(o, q, k, log_decay, beta, exchange)


@torch.no_grad()
def scores_and_memory(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, over: OverRanks, block: int,
                      slots: int, score: str = "betae", backend: str = "auto") -> tuple[Tensor, HolaState]:
    """What the cache ranks by [N, T, H] and the memory of the documents that enter, for looking at a layer."""
    _, written, state, _ = _state_pass(q, k, v, log_decay, beta, over, None, backend)
    return _memory(k, v, beta, written, state, over, block, slots, score)


def split_read(tokens: dict[str, Tensor], memory: HolaState,
               part: Part) -> list[tuple[dict[str, Tensor], Tensor | None, HolaState | None]]:
    """(tokens, cuts, memory) of the first document of every row, and of those that begin later on this rank.

    The latter are read without a memory: giving each an empty one would cost a block of zeros a document.
    """
    if part.is_one_document:
        return [(tokens, None, memory)]
    first = {name: x[:, : part.head] for name, x in tokens.items()}
    later = {name: x[:, part.head:] for name, x in tokens.items()}
    return [(first, None, memory), (later, part.later, None)]


def attention_over_ranks(*, q: Tensor, k: Tensor, v: Tensor, over: OverRanks) -> Tensor:
    """Causal softmax attention within documents: q, k [N, T, H, K] with positions applied, v [N, T, H, V] -> like v.

    Keys and values of all ranks are gathered in one message and their gradients return by a reduce-scatter.
    """
    part, width = over.part, k.shape[-1]
    everyone = Gather.apply(torch.cat([k, v], -1), over.group, "keys and values")
    row = everyone.movedim(0, 1).flatten(1, 2)[:, part.start - part.before: part.start + part.head]
    first = _causal(q[:, : part.head], row[..., :width], row[..., width:])
    if part.later is None:
        return first
    lengths = part.later.diff().tolist()
    later = zip(*(x[:, part.head:].split(lengths, 1) for x in (q, k, v)), strict=True)
    return torch.cat([first, *(_causal(*document) for document in later)], 1)


def _causal(q_NTHK: Tensor, k_NSHK: Tensor, v_NSHV: Tensor) -> Tensor:
    """The last query sees all keys."""
    from torch.nn.attention.bias import causal_lower_right  # it imports the compiler, which takes seconds

    q, k, v = (x.transpose(1, 2) for x in (q_NTHK, k_NSHK, v_NSHV))
    mask = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _state_pass(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, over: OverRanks,
                pending: Pending | None, backend: str) -> tuple[Tensor, Tensor, Tensor, Exchange]:
    """(o, score, state entering the first documents, exchange): o's result must still go through `AskLeft`."""
    part, group = over.part, over.group
    maps = (pending or send_map(k, v, log_decay, beta, part, group, backend)).wait()
    state = fold_left(maps, part)
    every = F.pad(state, (0, 0, 0, 0, 0, 0, 0, _documents(part, q.shape[0]) - state.shape[0]))
    o, written, final = gated_delta_rule(q=q, k=k, v=v, log_decay=log_decay, beta=beta, cu_seqlens=part.cuts,
                                         initial_state=every, backend=backend)
    exchange = Exchange.after(maps, part, group, backend)
    return TakeRight.apply(o, final, exchange), written, state, exchange


def _memory(k: Tensor, v: Tensor, beta: Tensor, written: Tensor, state: Tensor, over: OverRanks, block: int,
            slots: int, score: str) -> tuple[Tensor, HolaState]:
    part = over.part
    length = torch.zeros(_documents(part, k.shape[0]), dtype=torch.int64, device=k.device)
    length[: k.shape[0]] = part.before
    rank = rank_tokens(score, written, v, beta, segments_of(k, part.cuts), length)
    return rank, entering_memory(k, v, rank, state, part, over.group, block, slots)


def _documents(part: Part, rows: int) -> int:
    """Sequences on this rank: the rows, or the packed documents of the one row."""
    return rows if part.cuts is None else part.cuts.numel() - 1
