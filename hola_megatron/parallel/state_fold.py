"""The state that earlier ranks leave for this one, and the gradient that later ranks send back.

Over its tokens of one document every rank is an affine map S_out = M S_in + E. The ranks exchange (M, E) once
and each folds those of the ranks before it:

    S_in = E_f;  S_in = M_j S_in + E_j  for the ranks j in between          (f: where the document begins)

With S_in in place the ordinary local rule gives outputs and scores. Backward, its own autograd is exact but for
one thing: the gradient of the state that leaves the rank, which depends on all later ranks. Every rank finds
what its outputs ask of the state entering it, d_j, the ranks exchange those, and each folds from the right:

    dS_out = d_l;  dS_out = d_j + M_j^T dS_out  for the ranks j in between  (l: where the document ends)

The M are those of the forward pass. A plain sum of the E_j would be right without gate and delta rule only.

Two identities in the graph do this: `TakeRight` right behind the rule, `AskLeft` on the layer's result. The
latter's backward runs first of all, so the exchange of d travels while the exact read's backward computes.

Shapes: N rows (1 for packed documents), T tokens of a row on this rank, H heads, K key and V value width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hola_kernels import entering_gradient, state_map
from hola_megatron.parallel.collectives import Pending, gather
from hola_megatron.parallel.part import Part


@torch.no_grad()
def send_map(k_NTHK: Tensor, v_NTHV: Tensor, log_decay_NTH: Tensor, beta_NTH: Tensor, part: Part,
             group: dist.ProcessGroup, backend: str) -> Pending:
    """Start the all-gather of [E | M] [N, H, K, V + K] over the last document's tokens: H K (K + V) numbers a row."""
    if part.goes_on:
        tokens = [x[:, part.tokens - part.tail:] for x in (k_NTHK, v_NTHV, log_decay_NTH, beta_NTH)]
        matrix, addition = state_map(**dict(zip(("k", "v", "log_decay", "beta"), tokens, strict=True)), backend=backend)
        both = torch.cat([addition, matrix], -1)
    else:  # nobody looks at it
        (rows, _, heads, key_dim), value_dim = k_NTHK.shape, v_NTHV.shape[-1]
        wide = torch.promote_types(v_NTHV.dtype, torch.float32)
        both = torch.zeros(rows, heads, key_dim, value_dim + key_dim, dtype=wide, device=k_NTHK.device)
    return gather(both, group, "state maps")


def fold_left(maps_RNHKW: Tensor, part: Part) -> Tensor:
    """The state entering this rank [N, H, K, V] from the maps [E | M] of all ranks."""
    key_dim = maps_RNHKW.shape[-2]
    addition, matrix = maps_RNHKW.split([maps_RNHKW.shape[-1] - key_dim, key_dim], -1)
    if not part.before:
        return torch.zeros_like(addition[0])
    state = addition[part.first_rank]
    for j in range(part.first_rank + 1, part.rank):
        state = matrix[j] @ state + addition[j]
    return state


def fold_right(d_RNHKV: Tensor, matrix_JNHKK: Tensor, part: Part) -> Tensor:
    """The gradient of the state leaving this rank [N, H, K, V]; matrix: M of the ranks in between."""
    if not part.goes_on:
        return torch.zeros_like(d_RNHKV[0])
    gradient = d_RNHKV[part.last_rank]
    for j in range(part.last_rank - 1, part.rank, -1):
        gradient = d_RNHKV[j] + matrix_JNHKK[j - part.rank - 1].mT @ gradient
    return gradient


def maps_between(maps_RNHKW: Tensor, part: Part) -> Tensor:
    """The M of the ranks between this one and the end of its last document [J, N, H, K, K], a copy."""
    between = maps_RNHKW[part.rank + 1: max(part.last_rank, part.rank + 1)]
    return between[..., -maps_RNHKW.shape[-2]:].clone()


@dataclass
class Exchange:
    """One layer's exchange of gradients: what `AskLeft` starts and `TakeRight` ends."""

    part: Part
    group: dist.ProcessGroup
    backend: str
    matrix: Tensor
    pending: Pending | None = field(default=None)

    @classmethod
    def after(cls, maps_RNHKW: Tensor, part: Part, group: dist.ProcessGroup, backend: str) -> Exchange:
        """Keeps of the forward pass's maps what the gradient needs."""
        return cls(part, group, backend, maps_between(maps_RNHKW, part))


class TakeRight(torch.autograd.Function):
    """o itself; backward hands the local rule the gradient of its final states as later ranks' outputs have it."""

    @staticmethod
    def forward(ctx, o: Tensor, final_state: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange, ctx.documents = exchange, final_state.shape[0]
        return o.view_as(o)

    @staticmethod
    def backward(ctx, do: Tensor) -> tuple[Tensor, Tensor, None]:
        exchange = ctx.exchange
        gradient = fold_right(exchange.pending.wait(), exchange.matrix, exchange.part)
        exchange.pending = None
        earlier = ctx.documents - gradient.shape[0]  # packed documents that end on this rank
        return do, F.pad(gradient, (0, 0, 0, 0, 0, 0, earlier, 0)), None


class AskLeft(torch.autograd.Function):
    """o itself; backward starts the all-gather of what it asks of the state that entered: H K V numbers a row."""

    @staticmethod
    def forward(ctx, o: Tensor, q: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        ctx.save_for_backward(q, k, log_decay, beta)
        return o.view_as(o)

    @staticmethod
    def backward(ctx, do: Tensor) -> tuple[Tensor | None, ...]:
        exchange, head = ctx.exchange, ctx.exchange.part.head
        q, k, log_decay, beta = (x[:, :head] for x in ctx.saved_tensors)
        if exchange.part.before:
            asked = entering_gradient(q=q, k=k, log_decay=log_decay, beta=beta, do=do[:, :head],
                                      backend=exchange.backend)
        else:  # nothing entered
            wide = torch.promote_types(do.dtype, torch.float32)
            asked = torch.zeros(k.shape[0], *k.shape[2:], do.shape[-1], dtype=wide, device=k.device)
        exchange.pending = gather(asked, exchange.group, "state gradients")
        return do, None, None, None, None, None
