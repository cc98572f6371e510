"""The initial state of a rank from earlier ranks, and the gradient of its final state from later ranks.

Over a rank's tokens of one document the delta rule is an affine map S_out = M S_in + E. The ranks all-gather (M, E)
and each composes those of the ranks before it:

    S_in = E_f;  S_in = M_j S_in + E_j  for the ranks j in between    (f: rank where the document starts)

With S_in the local rule gives outputs and scores. In the backward pass, autograd of the local rule lacks one input:
the gradient of the rank's final state, which depends on all later ranks. Every rank computes the gradient of its
outputs with respect to its initial state, d_j; the ranks all-gather those and compose them from the right:

    dS_out = d_l;  dS_out = d_j + M_j^T dS_out  for the ranks j in between  (l: rank where the document ends)

The M are those of the forward pass. A plain sum of the E_j would be correct only without decay and delta rule.

Two identities in the autograd graph do this: `ReceiveStateGradient` after the rule, `SendStateGradient` on the layer's
output. The latter's backward runs first, so the exchange of d overlaps with the backward pass of the cache attention.

Shapes: N rows (1 for packed documents), T tokens of a row on this rank, H heads, K key and V value width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hola_kernels import entering_gradient, state_map
from hola_kernels.stages import first_order
from hola_megatron.parallel.collectives import Pending, gather
from hola_megatron.parallel.sequence_shard import SequenceShard


@torch.no_grad()
def send_map(k_NTHK: Tensor, v_NTHV: Tensor, log_decay_NTH: Tensor, beta_NTH: Tensor, shard: SequenceShard,
             group: dist.ProcessGroup, backend: str) -> Pending:
    """Start the all-gather of [E | M] [N, H, K, V + K] over the last document's tokens: H K (K + V) values per row."""
    if shard.continues:
        tokens = [x[:, shard.tokens - shard.tail:] for x in (k_NTHK, v_NTHV, log_decay_NTH, beta_NTH)]
        matrix, addition = state_map(**dict(zip(("k", "v", "log_decay", "beta"), tokens, strict=True)), backend=backend)
        both = torch.cat([addition, matrix], -1)
    else:  # no rank reads it
        (rows, _, heads, key_dim), value_dim = k_NTHK.shape, v_NTHV.shape[-1]
        accumulate_dtype = torch.promote_types(v_NTHV.dtype, torch.float32)
        both = torch.zeros(rows, heads, key_dim, value_dim + key_dim, dtype=accumulate_dtype, device=k_NTHK.device)
    return gather(both, group, "state maps")


def fold_left(maps_RNHKW: Tensor, shard: SequenceShard) -> Tensor:
    """The initial state of this rank [N, H, K, V] from the maps [E | M] of all ranks."""
    key_dim = maps_RNHKW.shape[-2]
    addition, matrix = maps_RNHKW.split([maps_RNHKW.shape[-1] - key_dim, key_dim], -1)
    if not shard.before:
        return torch.zeros_like(addition[0])
    state = addition[shard.first_rank]
    for j in range(shard.first_rank + 1, shard.rank):
        state = matrix[j] @ state + addition[j]
    return state


def fold_right(d_RNHKV: Tensor, matrix_JNHKK: Tensor, shard: SequenceShard) -> Tensor:
    """The gradient of this rank's final state [N, H, K, V]; matrix: M of the ranks in between."""
    if not shard.continues:
        return torch.zeros_like(d_RNHKV[0])
    gradient = d_RNHKV[shard.last_rank]
    for j in range(shard.last_rank - 1, shard.rank, -1):
        gradient = d_RNHKV[j] + matrix_JNHKK[j - shard.rank - 1].mT @ gradient
    return gradient


def maps_between(maps_RNHKW: Tensor, shard: SequenceShard) -> Tensor:
    """The M of the ranks between this one and the end of its last document [J, N, H, K, K], a copy."""
    between = maps_RNHKW[shard.rank + 1: max(shard.last_rank, shard.rank + 1)]
    return between[..., -maps_RNHKW.shape[-2]:].clone()


@dataclass
class Exchange:
    """State gradients of one layer: `SendStateGradient` starts the all-gather, `ReceiveStateGradient` waits for it."""

    shard: SequenceShard
    group: dist.ProcessGroup
    backend: str
    matrix: Tensor
    pending: Pending | None = field(default=None)

    @classmethod
    def after(cls, maps_RNHKW: Tensor, shard: SequenceShard, group: dist.ProcessGroup, backend: str) -> Exchange:
        """With a copy of those maps of the forward pass that the gradient needs."""
        return cls(shard, group, backend, maps_between(maps_RNHKW, shard))


class ReceiveStateGradient(torch.autograd.Function):
    """Identity of o; backward gives the local rule the gradient of its final state, from later ranks' outputs."""

    @staticmethod
    def forward(ctx, o: Tensor, final_state: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange, ctx.documents = exchange, final_state.shape[0]
        return o.view_as(o)

    @staticmethod
    @first_order
    def backward(ctx, do: Tensor) -> tuple[Tensor, Tensor, None]:
        exchange = ctx.exchange
        gradient = fold_right(exchange.pending.wait(), exchange.matrix, exchange.shard)
        exchange.pending = None
        earlier = ctx.documents - gradient.shape[0]  # packed documents that end on this rank
        return do, F.pad(gradient, (0, 0, 0, 0, 0, 0, earlier, 0)), None


class SendStateGradient(torch.autograd.Function):
    """Identity of o; backward starts the all-gather of the initial state's gradient: H K V values per row."""

    @staticmethod
    def forward(ctx, o: Tensor, q: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        ctx.save_for_backward(q, k, log_decay, beta)
        return o.view_as(o)

    @staticmethod
    @first_order
    def backward(ctx, do: Tensor) -> tuple[Tensor | None, ...]:
        exchange, head = ctx.exchange, ctx.exchange.shard.head
        q, k, log_decay, beta = (x[:, :head] for x in ctx.saved_tensors)
        if exchange.shard.before:
            d_initial = entering_gradient(q=q, k=k, log_decay=log_decay, beta=beta, do=do[:, :head],
                                          backend=exchange.backend)
        else:  # the first document starts on this rank
            accumulate_dtype = torch.promote_types(do.dtype, torch.float32)
            d_initial = torch.zeros(k.shape[0], *k.shape[2:], do.shape[-1], dtype=accumulate_dtype, device=k.device)
        exchange.pending = gather(d_initial, exchange.group, "state gradients")
        return do, None, None, None, None, None
