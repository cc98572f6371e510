"""The definition of attention to kept tokens, token by token.

Token t of a document reads, per head, every earlier token j of the document with keep_j, and always itself. With
l_tj = scale q_t . k_j,

    o_t = (sum_{j < t, keep_j} exp(l_tj + w_j) v_j + exp(l_tt) v_t) / (the same sums without v + exp(sink))

w_j is the log weight of token j. A token reads itself once and without its weight, whether it is kept or not: the
choice and its weight decide what later tokens see of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hola_kernels.kept_attention.kept_tokens import KeptTokens
from hola_kernels.norms import compute_dtype


def kept_attention_reference(q_MHK: Tensor, k_MHK: Tensor, v_MHV: Tensor, keep_MH: Tensor, sink_H: Tensor | None,
                             log_weight_MH: Tensor | None, scale: float, cu_seqlens: Tensor,
                             state: KeptTokens | None) -> Tensor:
    """o [M, H, V] in the precision of v (at least float32); tokens of `state` precede each document's first."""
    compute = compute_dtype(v_MHV)
    q, k, v = (x.to(compute) for x in (q_MHK, k_MHK, v_MHV))
    weight = k.new_zeros(k.shape[:2]) if log_weight_MH is None else log_weight_MH.to(compute)
    bounds, outputs = cu_seqlens.tolist(), []
    for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        for t in range(start, end):
            heads = []
            for h in range(q.shape[1]):
                past = start + torch.nonzero(keep_MH[start:t, h]).squeeze(1)
                seen = [(k[past, h], v[past, h], weight[past, h])]
                if state is not None:
                    count = int(state.count[n, h])
                    seen.insert(0, tuple(x[n, :count, h].to(compute) for x in (state.k, state.v, state.log_weight)))
                seen.append((k[t:t + 1, h], v[t:t + 1, h], k.new_zeros(1)))
                heads.append(_read_one(q[t, h], *(torch.cat(x) for x in zip(*seen, strict=True)),
                                       None if sink_H is None else sink_H[h].to(compute), scale))
            outputs.append(torch.stack(heads))
    return torch.stack(outputs) if outputs else v


def _read_one(q_K: Tensor, k_EK: Tensor, v_EV: Tensor, log_weight_E: Tensor, sink: Tensor | None,
              scale: float) -> Tensor:
    logits = scale * (k_EK @ q_K) + log_weight_E
    if sink is not None:
        logits = torch.cat([logits, sink[None]])
    return logits.softmax(0)[: k_EK.shape[0]] @ v_EV
