"""The HOLA mixer as a Megatron module: a Gated DeltaNet mixer whose read includes the exact cache, or is that alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hola_kernels import PackedDocuments, exact_attention, hola_attention
from hola_kernels.stages import CacheOptions, learned_logit
from hola_megatron.layers.gdn.mixer import GatedDeltaMixer
from hola_megatron.parallel.context import ContextParallel, hola_attention_over_ranks

if TYPE_CHECKING:
    from hola_megatron.layers.recipe_view import ModelConfig


class HolaMixer(GatedDeltaMixer):
    """Compressed state plus softmax attention to cached tokens and to the token's own block."""

    @property
    def options(self) -> CacheOptions:
        return cache_options(self.model)

    def _read(self, tokens: dict[str, Tensor], further_BSF: Tensor, packed: PackedDocuments | None,
              cp: ContextParallel | None, maps: Any) -> Tensor:
        arguments = {**tokens, **self.read_parameters(), **self._by_token(further_BSF), "backend": self.model.backend}
        if cp is not None:
            return hola_attention_over_ranks(**arguments, cp=cp, maps=maps, options=self.options)
        if self.model.rule == "none":
            return exact_attention(**arguments, **self.options.without_state, cu_seqlens=packed)
        return hola_attention(**arguments, **asdict(self.options), cu_seqlens=packed)

    def _by_token(self, further_BSF: Tensor) -> dict[str, Tensor]:
        """gate where there is a state, and the logits of a learned score, as hola_attention takes them."""
        names = self.kind.further_projections(self.model)
        parts = further_BSF.split([rows // self.tp_size for rows in names.values()], -1) if names else ()
        further = dict(zip(names, parts, strict=True))
        found = {}
        if self.model.rule != "none":
            found["gate"] = further["mix"].unflatten(-1, (self.heads, -1)) if "mix" in further else self.gate
        if "route" in further:
            found["route"] = learned_logit(further["route"], self.route_out, self.route_bias)
        return found

    def read_parameters(self) -> dict[str, Any]:
        """The exact cache's parameters but the gate, as keyword arguments of hola_attention."""
        return {"gamma_q": self._shared_by_heads(self.gamma_q), "gamma_k": self._shared_by_heads(self.gamma_k),
                "sink": self.sink if self.model.cache.sink else None}


def cache_options(model: ModelConfig) -> CacheOptions:
    """The options of the exact cache, as hola_kernels takes them."""
    cache = model.cache
    return CacheOptions(cache.block, cache.slots, cache.score, cache.read_norm, cache.local, cache.window,
                        cache.rope_theta, cache.merge, model.state_delay)
