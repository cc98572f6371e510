"""A state that is read late, from one call to the next: what it stores, tokens that go on from there, and one token.

Stream: S_{t-W} and the W tokens after it, which the state has not taken yet. Chunk: S_t and the state before the open
chunk. Constant size at any length.

Shapes: M tokens of N sequences, flat; H heads, K key and V value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hola_kernels.checks import check_tokens, segments_of
from hola_kernels.gated_delta import gated_delta_rule
from hola_kernels.gated_delta.step import gated_delta_step
from hola_kernels.operation import operation
from hola_kernels.packed import PackedDocuments, documents_of
from hola_kernels.state import DelayedState
from hola_kernels.state_delay import check_delay, doubled_table

WRITTEN = ("k", "v", "log_decay", "beta")


@operation
def delayed_delta_onward(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, memory: DelayedState,
                         delay: int, mode: str, cu_seqlens: Tensor | PackedDocuments | None = None,
                         scale: float | None = None, backend: str = "auto") -> tuple[Tensor, DelayedState]:
    """o [B, T, H, V] of `delayed_delta_rule` for tokens that go on from a memory, and the memory after them.

    scale: as in gated_delta_rule; of mode "stream".
    """
    check_tokens(q, k, v, log_decay=log_decay, beta=beta)
    check_delay(delay, mode)
    documents = documents_of(q, cu_seqlens)
    bounds = segments_of(q, documents)
    tokens = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta}
    length = memory.length + bounds.diff()
    if mode == "chunk":
        o, state, read = chunk_reads(tokens, memory.state, memory.read, memory.length, delay, bounds, backend)
        return o, DelayedState(state, read, memory.k, memory.v, memory.log_decay, memory.beta, length)
    ext = ExtendedTokens.of(bounds, q.shape[0] * q.shape[1], memory.length, delay)
    joined = {name: ext.join(tokens[name].flatten(0, 1), getattr(memory, name)) for name in WRITTEN}
    moved = {name: x[ext.leaving].view(tokens[name].shape) for name, x in joined.items()}
    o, _, state = gated_delta_rule(q=q, **moved, cu_seqlens=documents, initial_state=memory.state, scale=scale,
                                   backend=backend)
    rings = {name: x[ext.ring].to(getattr(memory, name).dtype) for name, x in joined.items()}
    return o, DelayedState(state, memory.read, **rings, length=length)


@operation
@torch.no_grad()
def delayed_delta_step(*, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, memory: DelayedState,
                       delay: int, mode: str, backend: str = "auto") -> Tensor:
    """o [N, H, V], float32 (float64), of one token for each of N sequences; `memory` is updated in place.

    q, k [N, H, K], v [N, H, V], log_decay, beta [N, H]. Nothing is read on the host.
    """
    token = {"k": k, "v": v, "log_decay": log_decay, "beta": beta}
    index = memory.length % delay
    if mode == "chunk":
        o = chunk_step(q, token, memory.state, memory.read, index, backend)
    else:  # the token that is W back is written now; an empty entry writes nothing
        row = torch.arange(q.shape[0], device=q.device)
        leaving = {name: getattr(memory, name)[row, index].to(x.dtype) for name, x in token.items()}
        o, _ = gated_delta_step(q=q, **leaving, state=memory.state, backend=backend)
        for name, x in token.items():
            held = getattr(memory, name)
            held[row, index] = x.to(held.dtype)
    memory.length += 1
    return o


def chunk_step(q: Tensor, token: dict[str, Tensor], state: Tensor, read: Tensor, index: Tensor,
               backend: str) -> Tensor:
    """One token of chunk mode: o [N, H, V] from `read`, the token into `state`, in place; index [N]: in its chunk."""
    read.copy_(torch.where((index == 0)[:, None, None, None], state, read))
    still = {"beta": torch.zeros_like(token["beta"]), "log_decay": torch.zeros_like(token["log_decay"])}
    o, _ = gated_delta_step(q=q, **token | still, state=read, backend=backend)
    gated_delta_step(q=q, **token, state=state, backend=backend)
    return o


def chunk_reads(tokens: dict[str, Tensor], state: Tensor, read: Tensor, seen: Tensor, window: int, bounds: Tensor,
                backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """(o [B, T, H, V], S after the last token, S before the open chunk) of tokens q, k, v, log_decay, beta.

    state, read: after and before the chunk that is open at the start of the call; seen [N]: tokens before the call.
    The doubled row is right for all but the tokens of that chunk, which read an earlier state.
    """
    flat = {name: x.flatten(0, 1) for name, x in tokens.items()}
    table = doubled_table(bounds, flat["q"].shape[0], window, seen)
    row = {name: x[table.source][None] for name, x in flat.items()}
    for name in ("log_decay", "beta"):
        row[name] = row[name].masked_fill(~table.writes[None, :, None], 0.0)
    o, _, after = gated_delta_rule(**row, cu_seqlens=2 * bounds, initial_state=state, backend=backend)
    o = o[0, table.read_at]
    head, head_bounds = _parts(bounds, torch.minimum((-seen) % window, bounds.diff()))  # those that fill the open chunk
    if head.numel():
        reads = {name: x[head][None] for name, x in flat.items()}
        reads |= {name: torch.zeros_like(reads[name]) for name in ("log_decay", "beta")}
        late, _, _ = gated_delta_rule(**reads, cu_seqlens=head_bounds, initial_state=read, backend=backend)
        o = o.index_copy(0, head, late[0])
    last = (seen + bounds.diff()) // window * window - seen  # start of the last chunk, counted in this call
    body, body_bounds = _parts(bounds, last.clamp_min(0))
    before = state
    if body.numel():
        before = gated_delta_rule(**{name: x[body][None] for name, x in flat.items()}, cu_seqlens=body_bounds,
                                  initial_state=state, backend=backend)[2]
    has_chunk = (last >= 0)[:, None, None, None]
    return o.view(tokens["v"].shape), after, torch.where(has_chunk, before, read)


def _parts(bounds: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Flat numbers of the first `count` [N] tokens of every document, and the cumulative lengths between them."""
    ends = F.pad(count.cumsum(0), (1, 0))
    index = torch.arange(int(ends[-1]), device=bounds.device)
    document = torch.searchsorted(ends, index, right=True) - 1
    return index - ends[document] + bounds[:-1][document], ends


@dataclass(frozen=True)
class ExtendedTokens:
    """Every document with the W entries of its ring before it, E = M + N W tokens in all.

    source [E] int64: of the new tokens, followed by the rings; document [E] (-1 where an entry is empty), position [E].
    new [M], leaving [M]: the indices of the new tokens, and the first ones of each document; ring [N, W]: those that
    the ring holds afterwards.
    """

    source: Tensor
    document: Tensor
    position: Tensor
    new: Tensor
    leaving: Tensor
    ring: Tensor

    @classmethod
    def of(cls, bounds: Tensor, tokens: int, seen: Tensor, window: int) -> ExtendedTokens:
        """bounds [N + 1] of the new tokens; seen [N]: tokens before them; window: W."""
        count, device = seen.numel(), bounds.device
        begins = bounds + window * torch.arange(count + 1, device=device)
        index = torch.arange(tokens + count * window, device=device)
        document = torch.searchsorted(begins, index, right=True) - 1
        offset = index - begins[document]
        position = seen[document] + offset - window
        slot = tokens + document * window + position % window
        source = torch.where(offset < window, slot, bounds[document] + offset - window)
        at = torch.arange(tokens, device=device)
        leaving = at + window * (torch.searchsorted(bounds, at, right=True) - 1)
        total = (seen + bounds.diff())[:, None]
        newest = total - 1 - (total - 1 - torch.arange(window, device=device)) % window  # position in every entry
        ring = begins[:-1, None] + newest - seen[:, None] + window
        return cls(source, torch.where(position < 0, -1, document), position, leaving + window, leaving, ring)

    def join(self, new_MH: Tensor, ring_NWH: Tensor) -> Tensor:
        """Of the new tokens [M, H, ...] and the ring [N, W, H, ...], [E, H, ...]."""
        return torch.cat([new_MH, ring_NWH.flatten(0, 1).to(new_MH.dtype)])[self.source]


__all__ = ["ExtendedTokens", "chunk_reads", "chunk_step", "delayed_delta_onward", "delayed_delta_step"]
