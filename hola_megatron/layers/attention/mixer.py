"""The softmax attention mixer as a Megatron module.

Shapes: S tokens on this rank, B rows (1 for packed documents), H heads and G key heads of this rank, K width of a head.
"""

from __future__ import annotations

from torch import Tensor

from hola_kernels.rms_norm import rms_norm
from hola_kernels.rotary import rotary_
from hola_kernels.softmax_attention import softmax_attention
from hola_megatron.layers.documents import Documents
from hola_megatron.layers.mixer import Mixer
from hola_megatron.layers.sections import split_sections
from hola_megatron.parallel.context import ContextParallel, attention_over_ranks


class AttentionMixer(Mixer):
    """Causal softmax attention within documents, rotary positions counted from each document's start."""

    def mix(self, projected_BSF: Tensor, documents: Documents | None, cp: ContextParallel | None) -> Tensor:
        model, packed = self.model, None if documents is None else documents.packed
        q, k, v = self._tokens(projected_BSF, documents, cp)
        how = {"window": self.kind.window(model), "backend": model.backend}
        if cp is not None:
            return attention_over_ranks(q=q, k=k, v=v, cp=cp, **how).flatten(-2)
        return softmax_attention(q=q, k=k, v=v, cu_seqlens=packed, **how).flatten(-2)

    def _tokens(self, projected_BSF: Tensor, documents: Documents | None,
                cp: ContextParallel | None) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, S, H, K] and k, v [B, S, G, K]: normed and rotated. What needs no norm is rotated in its place."""
        model, width = self.model, self.kind.head_width(self.model)
        queries, keys, values, padding = self.widths
        (qk, v, _), (room, _, _) = split_sections(projected_BSF, [queries + keys, values, padding])
        heads = [queries // width, keys // width]
        parts, rooms = [self._split_heads(qk, width)], [lambda: self._split_heads(room(), width)]
        if model.attention_qk_norm:
            norms = [(x, self._shared_by_heads(weight)) for x, weight in
                     zip(parts[0].split(heads, 2), (self.q_norm, self.k_norm), strict=True)]
            parts = [rms_norm(x=x, weight=weight, eps=model.norm_eps, backend=model.backend) for x, weight in norms]
            rooms = [None, None]
        if model.rope_theta is not None:
            where = {"cu_seqlens": None if documents is None else documents.packed,
                     "before": cp.shard.before if cp else 0, "backend": model.backend}
            parts = [rotary_(x=x, base=model.rope_theta, dx_buffer=dx_buffer, **where)
                     for x, dx_buffer in zip(parts, rooms, strict=True)]
        q, k = parts if len(parts) == 2 else parts[0].split(heads, 2)
        return q, k, self._split_heads(v, width)
