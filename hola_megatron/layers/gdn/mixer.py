"""The Gated DeltaNet mixer as a Megatron module.

Shapes: S tokens on this rank, B rows (1 for packed documents), H heads of this rank, K key and V value width of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hola_kernels import PackedDocuments, gated_delta_rule, gated_rms_norm, short_conv
from hola_kernels.gates import decay_and_strength
from hola_kernels.stages import CacheOptions
from hola_kernels.state_delay import delayed_delta_rule
from hola_megatron.layers.documents import Documents
from hola_megatron.layers.mixer import Mixer
from hola_megatron.layers.sections import GradientBuffer, split_sections
from hola_megatron.parallel.context import (
    ContextParallel,
    conv_tail,
    gated_delta_over_ranks,
    send_conv_tail,
    start_state_exchange,
)


class GatedDeltaMixer(Mixer):
    """Projections, short convolutions, the gated delta rule, a gated norm per head."""

    options: CacheOptions | None = None  # of a layer with an exact cache

    def mix(self, projected_BSF: Tensor, documents: Documents | None, cp: ContextParallel | None) -> Tensor:
        packed = None if documents is None else documents.packed
        tokens, further, out_gate, gate_grad, maps = self._tokens(projected_BSF, packed, cp)
        if self.observer is not None:
            self.observer(self, {**tokens, **self._by_token(further)}, packed, cp)
        o_BSHV = self._read(tokens, further, packed, cp, maps)
        normed = gated_rms_norm(x=o_BSHV, gate=out_gate, weight=self._shared_by_heads(self.o_norm),
                                eps=self.model.norm_eps, dgate_buffer=gate_grad, backend=self.model.backend)
        return normed.flatten(-2)

    def _by_token(self, further_BSF: Tensor) -> dict[str, Tensor]:
        """What the kind's operation takes of its further projections [B, S, F], by name."""
        return {}

    def _read(self, tokens: dict[str, Tensor], further_BSF: Tensor, packed: PackedDocuments | None,
              cp: ContextParallel | None, maps: Any) -> Tensor:
        """o [B, S, H, V]: the output of the memory, before the output norm.

        further [B, S, F]: the kind's further projections.
        """
        if cp is not None:
            return gated_delta_over_ranks(**tokens, cp=cp, maps=maps, backend=self.model.backend)[0]
        if self.model.state_delay:
            return delayed_delta_rule(**tokens, delay=self.model.state_delay, mode=self.model.state_delay_mode,
                                      cu_seqlens=packed, backend=self.model.backend)[0]
        return gated_delta_rule(**tokens, cu_seqlens=packed, backend=self.model.backend)[0]

    def _tokens(self, projected_BSF: Tensor, packed: PackedDocuments | None,
                cp: ContextParallel | None) -> tuple[dict[str, Tensor], Tensor, Tensor, GradientBuffer, Any]:
        """The operation's inputs.

        Returns (q, k, v, and of a state log_decay and beta, by name; further projections [B, S, F]; output gate
        [B, S, H, V]; the gate's gradient buffer; handle of the state maps in flight, None without context parallelism).
        """
        model = self.model
        convolved, in_flight = sum(self.widths[:3]), None
        if cp is not None:  # overlaps with the decays
            projected_BSF, in_flight = send_conv_tail(projected_BSF, model.conv_width, convolved, cp)
        further_width = sum(self.kind.further_projections(model).values()) // self.tp_size
        widths = [convolved, self.widths[3], further_width, sum(self.widths[4:]) - further_width]
        (qkv, gate, further, rest), (qkv_grad, gate_grad, _, rest_grad) = split_sections(projected_BSF, widths)
        numbers = self._state_numbers(rest, rest_grad) if model.rule != "none" else {}
        tail = None
        if in_flight is not None:
            tail = conv_tail(in_flight, model.conv_width, projected_BSF.shape[0], cp)
        qkv = short_conv(x=qkv, weight=self.conv_weight, cu_seqlens=packed, tail=tail, dx_buffer=qkv_grad,
                         widths=tuple(self.widths[:3]), backend=model.backend)
        dims = {"q": model.key_dim, "k": model.key_dim, "v": model.value_dim}
        tokens = {name: self._split_heads(x, dim) for x, (name, dim) in zip(qkv, dims.items(), strict=True)}
        tokens |= numbers
        maps = None
        if cp is not None:
            maps = start_state_exchange(**tokens, cp=cp, backend=model.backend, options=self.options)
        return (tokens, further, self._split_heads(gate, model.value_dim),
                lambda: self._split_heads(gate_grad(), model.value_dim), maps)

    def _state_numbers(self, rest_BSF: Tensor, gradient: GradientBuffer) -> dict[str, Tensor]:
        """log_decay and beta [B, S, H] by name, from the last sections of the projection."""
        model = self.model
        decay = {"A_log": self.A_log, "dt_bias": self.dt_bias} if model.rule == "gdn" else {}
        log_decay, beta = decay_and_strength(x=rest_BSF, heads=self.heads, **decay, beta_range=model.beta_range,
                                             dx_buffer=gradient, backend=model.backend)
        return {"log_decay": log_decay, "beta": beta}
