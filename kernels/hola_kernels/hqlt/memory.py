"""The state of an HQLT layer between calls, and the calls that go on from it: constant size at any length.

The last W tokens are in a ring, token n at index n mod W, with keys as projected: they are rotated when they are read.
With delayed_stream the token that leaves the ring is the one that the state takes next, so nothing is stored twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hola_kernels.checks import check_tokens, segments_of
from hola_kernels.gated_delta import gated_delta_rule
from hola_kernels.gated_delta.step import gated_delta_step
from hola_kernels.hqlt import check_hqlt, mixed
from hola_kernels.hqlt.window import Bands, rope_dtype
from hola_kernels.norms import compute_dtype
from hola_kernels.operation import operation
from hola_kernels.packed import PackedDocuments, documents_of
from hola_kernels.positions import angles, rotated
from hola_kernels.state import SequenceState
from hola_kernels.state_delay_memory import ExtendedTokens, chunk_reads, chunk_step


@dataclass
class HqltState(SequenceState):
    """Memory of N sequences.

    state   [N, H, K, V] float32 (float64 in float64 calls): S after the newest token; delayed_stream: after the newest
            that left the ring
    read    [N, H, K, V]: S before the open chunk (delayed_chunk; the others have a copy of no use, of H = 0)
    keys    [N, W, H, K] as projected, values [N, W, H, V] after SiLU, strength [N, W, H]: the ring, zero where empty
    length  [N] int64: tokens seen
    """

    state: Tensor
    read: Tensor
    keys: Tensor
    values: Tensor
    strength: Tensor
    length: Tensor

    @classmethod
    def empty(cls, sequences: int, heads: int, key_dim: int, value_dim: int, *, window: int, blend: str,
              dtype: torch.dtype, device: torch.device | str) -> HqltState:
        """The memory before the first token; dtype: of k and v."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        read = heads if blend == "delayed_chunk" else 0
        return cls(zeros(sequences, heads, key_dim, value_dim, dtype=compute),
                   zeros(sequences, read, key_dim, value_dim, dtype=compute), zeros(sequences, window, heads, key_dim),
                   zeros(sequences, window, heads, value_dim), zeros(sequences, window, heads, dtype=compute),
                   zeros(sequences, dtype=torch.int64))

    @property
    def window(self) -> int:
        return self.keys.shape[1]


@operation
@torch.no_grad()
def hqlt_attention_onward(*, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, mix: Tensor | None, memory: HqltState,
                          blend: str, mixing: str, rope_theta: float = 10000.0,
                          cu_seqlens: Tensor | PackedDocuments | None = None,
                          backend: str = "auto") -> tuple[Tensor, HqltState]:
    """`hqlt_attention` of tokens that go on from a memory of their N sequences; o [B, T, H, V] and the memory after."""
    check_tokens(q, k, v, beta=beta)
    window = memory.window
    check_hqlt(blend, mixing, window, rope_theta, q, v, mix)
    documents = documents_of(q, cu_seqlens)
    bounds = segments_of(q, documents)
    ext = ExtendedTokens.of(bounds, q.shape[0] * q.shape[1], memory.length, window)
    value = F.silu(v)
    keys, values = ext.join(k.flatten(0, 1), memory.keys), ext.join(value.flatten(0, 1), memory.values)
    strength = ext.join(beta.flatten(0, 1).to(memory.strength.dtype), memory.strength)
    bands = Bands.of(ext.document, ext.position, window=window, chunked=blend == "delayed_chunk",
                     key_dim=q.shape[-1], rope_theta=rope_theta, dtype=rope_dtype(q))
    queries = torch.zeros_like(keys).index_copy(0, ext.new, q.flatten(0, 1))
    o_soft = bands.attend(queries, keys, values)[ext.new].view(v.shape)
    written = {"k": keys, "v": values, "beta": strength}
    indices = ext.leaving if blend == "delayed_stream" else ext.new  # what the state takes in this call
    moved = {name: x[indices].view(*q.shape[:2], *x.shape[1:]) for name, x in written.items()}
    rule = {"q": F.silu(q), "k": F.silu(moved["k"]), "v": moved["v"], "log_decay": torch.zeros_like(beta),
            "beta": moved["beta"].to(beta.dtype)}
    if blend == "delayed_chunk":
        o_state, state, read = chunk_reads(rule, memory.state, memory.read, memory.length, window, bounds, backend)
    else:
        o_state, _, state = gated_delta_rule(**rule, cu_seqlens=documents, initial_state=memory.state, backend=backend)
        read = memory.read
    after = HqltState(state, read, *(x[ext.ring] for x in (keys, values, strength)), memory.length + bounds.diff())
    return mixed(o_state, o_soft, mix, mixing, backend), after


@operation
@torch.no_grad()
def hqlt_attention_step(*, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, mix: Tensor | None, memory: HqltState,
                        blend: str, mixing: str, rope_theta: float = 10000.0, backend: str = "auto") -> Tensor:
    """One token for each of N sequences; `memory` is updated in place, and nothing is read on the host.

    q, k [N, H, K], v [N, H, V], beta [N, H], mix [N, H, 2], [N, H, V] or None. Returns o [N, H, V] in v's dtype.
    """
    check_hqlt(blend, mixing, memory.window, rope_theta, q, v, mix)
    value, row = F.silu(v), torch.arange(q.shape[0], device=q.device)
    index = memory.length % memory.window
    token = {"k": F.silu(k), "v": value, "log_decay": torch.zeros_like(beta), "beta": beta}
    if blend == "delayed_stream":  # what leaves the ring is written; an empty entry writes nothing
        token |= {"k": F.silu(memory.keys[row, index]), "v": memory.values[row, index],
                  "beta": memory.strength[row, index].to(beta.dtype)}
    if blend == "delayed_chunk":
        o_state = chunk_step(F.silu(q), token, memory.state, memory.read, index, backend)
    else:
        o_state, _ = gated_delta_step(q=F.silu(q), **token, state=memory.state, backend=backend)
    for held, new in ((memory.keys, k), (memory.values, value), (memory.strength, beta)):
        held[row, index] = new.to(held.dtype)
    o_soft = _read_ring(q, memory, rope_theta, blend == "delayed_chunk")
    memory.length += 1
    return mixed(o_state, o_soft.to(v.dtype), mix, mixing, backend)


def _read_ring(q_NHK: Tensor, memory: HqltState, rope_theta: float, chunked: bool) -> Tensor:
    """o_soft [N, H, V] of the token at position `length`, which lies in the ring already."""
    compute, window, now = compute_dtype(q_NHK), memory.window, memory.length[:, None]
    position = now - (now - torch.arange(window, device=q_NHK.device)) % window
    visible = position >= (now // window * window if chunked else 0)
    width = q_NHK.shape[-1]
    q = rotated(q_NHK, *angles(memory.length, width, rope_theta, compute)).to(compute)
    k = rotated(memory.keys, *angles(position.clamp_min(0), width, rope_theta, compute)).to(compute)
    logits = (q[:, None] * k).sum(-1) * width ** -0.5
    weights = logits.masked_fill(~visible[..., None], -torch.inf).softmax(1)
    return (weights[..., None] * memory.values.to(compute)).sum(1)


__all__ = ["HqltState", "hqlt_attention_onward", "hqlt_attention_step"]
