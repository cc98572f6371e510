"""Attention to kept tokens in plain torch: kept tokens compacted per document and head, queries in chunks.

Heads keep different numbers of tokens: a document's lists are as long as the longest. With gradients, the chunks of a
long document are computed again in the backward pass, so that one chunk's weights are all that is held of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hola_kernels.kept_attention.kept_tokens import KeptTokens
from hola_kernels.norms import compute_dtype

CHUNK = 256  # queries


def kept_attention_chunks(q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, keep_MH: Tensor, sink_H: Tensor | None,
                          log_weight_MH: Tensor | None, scale: float, cu_seqlens: Tensor,
                          state: KeptTokens | None) -> Tensor:
    """Same contract as `reference.kept_attention_reference`. Waits for the device: how many tokens a document keeps."""
    compute, bounds = compute_dtype(v_MHV), cu_seqlens.tolist()
    sink = None if sink_H is None else sink_H.to(compute)
    outputs = [v_MHV[:0].to(compute)]
    for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if start == end:
            continue
        q, k, v = (x[start:end].to(compute) for x in (q_MHK, k_MHK, v_MHV))
        weight = None if log_weight_MH is None else log_weight_MH[start:end].to(compute)
        past = _Past.of(k, v, weight, keep_MH[start:end], None if state is None else (state, n))
        for first in range(0, end - start, CHUNK):
            last = min(first + CHUNK, end - start)
            given = (q[first:last], k[first:last], v[first:last], sink, scale, past.before_TH[first:last],
                     *past.head(int(past.before_TH[last - 1].max())))
            if end - start > CHUNK and torch.is_grad_enabled():
                outputs.append(checkpoint(_read_chunk, *given, use_reentrant=False, preserve_rng_state=False))
            else:
                outputs.append(_read_chunk(*given))
    return torch.cat(outputs)


class _Past:
    """What a document's tokens may read besides themselves, in order: k [E, H, K], v [E, H, V], log weights [E, H].

    before_TH [T, H]: token t of the document reads the first before[t, h] of head h.
    """

    def __init__(self, k: Tensor, v: Tensor, weight: Tensor | None, before_TH: Tensor):
        self.k, self.v, self.weight, self.before_TH = k, v, weight, before_TH

    @classmethod
    def of(cls, k: Tensor, v: Tensor, weight: Tensor | None, keep: Tensor,
           held: tuple[KeptTokens, int] | None) -> _Past:
        tokens = k.shape[0]
        if held is not None:
            state, n = held
            k, v = torch.cat([state.k[n].to(k.dtype), k]), torch.cat([state.v[n].to(v.dtype), v])
            new = k.new_zeros(keep.shape) if weight is None else weight
            weight = torch.cat([state.log_weight[n].to(k.dtype), new])
            filled = torch.arange(state.capacity, device=k.device)[:, None] < state.count[n]
            keep = torch.cat([filled, keep])
        total = keep.long().cumsum(0)
        most = int(total[-1].max())
        order = torch.sort(~keep, dim=0, stable=True).indices[:most]  # kept ones first, in order of position

        def pick(x: Tensor) -> Tensor:
            if x.ndim == 2:
                return x.gather(0, order)
            return x.gather(0, order[..., None].expand(-1, -1, x.shape[2]))

        # what is not kept by a shorter list lies at its end: no number of it may reach a product
        real = torch.arange(most, device=k.device)[:, None] < total[-1]
        k, v = (torch.where(real[..., None], pick(x), 0) for x in (k, v))
        weight = None if weight is None else torch.where(real, pick(weight), 0)
        return cls(k, v, weight, (total - keep.long())[-tokens:])

    def head(self, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.k[:count], self.v[:count], None if self.weight is None else self.weight[:count]


def _read_chunk(q: Tensor, own_k: Tensor, own_v: Tensor, sink: Tensor | None, scale: float, before_TH: Tensor,
                k: Tensor, v: Tensor, weight: Tensor | None) -> Tensor:
    """o [t, H, V] of t queries over E kept tokens, themselves and the sink."""
    logits = torch.einsum("thk,ehk->hte", q, k) * scale
    if weight is not None:
        logits = logits + weight.T[:, None]
    index = torch.arange(k.shape[0], device=k.device)
    logits = logits.masked_fill(index >= before_TH.T[..., None], -torch.inf)
    own = (q * own_k).sum(-1).T[..., None] * scale
    sinks = [] if sink is None else [sink[:, None, None].expand_as(own)]
    weights = torch.cat([logits, own, *sinks], -1).softmax(-1)
    kept = k.shape[0]
    listed = torch.einsum("hte,ehv->thv", weights[..., :kept], v)
    return listed + weights[..., kept].T[..., None] * own_v
