"""The HQLT mixer as a Megatron module."""

from __future__ import annotations

from torch import Tensor

from hola_kernels.gates import decay_and_strength
from hola_kernels.hqlt import hqlt_attention
from hola_kernels.rms_norm import rms_norm
from hola_megatron.layers.documents import Documents
from hola_megatron.layers.mixer import Mixer
from hola_megatron.parallel.context import ContextParallel


class HqltMixer(Mixer):
    """Projections, the two memories and their mixing, a norm per head."""

    def mix(self, projected_BSF: Tensor, documents: Documents | None, cp: ContextParallel | None) -> Tensor:
        model, hqlt = self.model, self.model.hqlt
        key, value = self.heads * model.key_dim, self.heads * model.value_dim
        mixing = {"sum": 0, "scalar": 2 * self.heads, "vector": value}[hqlt.mixing]
        q, k, v, mix, rest = projected_BSF.split([key, key, value, mixing, sum(self.widths[(4 if mixing else 3):])], -1)
        _, beta = decay_and_strength(x=rest, heads=self.heads, beta_range=model.beta_range, backend=model.backend)
        o = hqlt_attention(
            q=self._split_heads(q, model.key_dim), k=self._split_heads(k, model.key_dim),
            v=self._split_heads(v, model.value_dim), beta=beta,
            mix=self._split_heads(mix, mixing // self.heads) if mixing else None, blend=hqlt.blend,
            mixing=hqlt.mixing, window=hqlt.window, rope_theta=hqlt.rope_theta,
            cu_seqlens=None if documents is None else documents.packed, backend=model.backend)
        return rms_norm(x=o, weight=self._shared_by_heads(self.o_norm), eps=model.norm_eps,
                        backend=model.backend).flatten(-2)
