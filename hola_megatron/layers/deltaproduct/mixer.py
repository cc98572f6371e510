"""The Gated DeltaProduct mixer as a Megatron module.

Shapes: S tokens, B rows (1 for packed documents), H heads of this rank, n writes a token.
"""

from __future__ import annotations

from torch import Tensor

from hola_kernels import gated_rms_norm, short_conv
from hola_kernels.delta_product import gated_delta_product
from hola_kernels.gates import decay_and_strength
from hola_megatron.layers.documents import Documents
from hola_megatron.layers.mixer import Mixer
from hola_megatron.layers.sections import split_sections
from hola_megatron.parallel.context import ContextParallel


class DeltaProductMixer(Mixer):
    """Projections, short convolutions, the delta rule with n writes a token, a gated norm per head."""

    def mix(self, projected_BSF: Tensor, documents: Documents | None, cp: ContextParallel | None) -> Tensor:
        model, packed = self.model, None if documents is None else documents.packed
        widths = [sum(self.widths[:3]), self.widths[3], sum(self.widths[4:])]
        (qkv, gate, rest), (qkv_grad, gate_grad, _) = split_sections(projected_BSF, widths)
        log_decay, beta = self._gates(rest)
        q, k, v = short_conv(x=qkv, weight=self.conv_weight, cu_seqlens=packed, dx_buffer=qkv_grad,
                             widths=tuple(self.widths[:3]), backend=model.backend)
        o_BSHV, _ = gated_delta_product(
            q=self._split_heads(q, model.key_dim), k=self._writes(k), v=self._writes(v), log_decay=log_decay,
            beta=self._writes(beta)[..., 0], cu_seqlens=packed, backend=model.backend)
        normed = gated_rms_norm(
            x=o_BSHV, gate=self._split_heads(gate, model.value_dim), weight=self._shared_by_heads(self.o_norm),
            eps=model.norm_eps, dgate_buffer=lambda: self._split_heads(gate_grad(), model.value_dim),
            backend=model.backend)
        return normed.flatten(-2)

    def _gates(self, rest_BSF: Tensor) -> tuple[Tensor, Tensor]:
        """log_decay [B, S, H], and beta [B, S, H n], of numbers b [H n], then a [H] where there is decay."""
        model, strengths = self.model, self.heads * self.model.delta_steps
        zero_decay, beta = decay_and_strength(x=rest_BSF, heads=strengths, beta_range=model.beta_range,
                                              backend=model.backend)
        if model.rule != "gdn":
            return zero_decay[..., : self.heads], beta
        log_decay, _ = decay_and_strength(x=rest_BSF[..., strengths - self.heads:], heads=self.heads, A_log=self.A_log,
                                          dt_bias=self.dt_bias, backend=model.backend)
        return log_decay, beta

    def _writes(self, x_BSF: Tensor) -> Tensor:
        """[B, S, H n D] -> [B, S, n, H, D]."""
        return x_BSF.unflatten(-1, (self.heads, self.model.delta_steps, -1)).transpose(2, 3)
