"""The HAM mixer as a Megatron module: a Gated DeltaNet mixer that also reads exactly kept tokens.

Shapes: S tokens on this rank, B rows (1 for packed documents), H heads of this rank, K key and V value width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hola_kernels import PackedDocuments
from hola_kernels.ham import ham_attention
from hola_kernels.kept_attention.controller import ShareThreshold, learned_logit
from hola_megatron.layers.gdn.mixer import GatedDeltaMixer
from hola_megatron.layers.sections import GradientBuffer
from hola_megatron.parallel.context import ContextParallel


class HamMixer(GatedDeltaMixer):
    """Compressed state, softmax attention to the tokens above a threshold, two gates; the threshold follows a share."""

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        ham = self.model.ham
        self.controller = ShareThreshold(ham.share, start=ham.threshold, rate=ham.rate, freeze=ham.freeze_steps)

    def _tokens(self, projected_BSF: Tensor, packed: PackedDocuments | None,
                cp: ContextParallel | None) -> tuple[dict[str, Tensor], Tensor, Tensor, GradientBuffer, Any]:
        """As in `GatedDeltaMixer`; by name also mix [B, S, H, 2], and of a learned router route [B, S, H]."""
        tokens, further, *others = super()._tokens(projected_BSF, packed, cp)
        rows = [size // self.tp_size for size in self.kind.further_projections(self.model).values()]
        mix, *route = further.split(rows, -1)
        tokens["mix"] = self._split_heads(mix, 2)
        if route:
            tokens["route"] = learned_logit(route[0], self.route_out, self.route_bias)
        return tokens, further, *others

    def _read(self, tokens: dict[str, Tensor], further_BSF: Tensor, packed: PackedDocuments | None,
              cp: ContextParallel | None, maps: Any) -> Tensor:
        o_BSHV, keep_BSH, _ = self.read(tokens, packed)
        if self.training and torch.is_grad_enabled():  # with recomputation in the second forward pass only
            self.controller.count(keep_BSH)
        return o_BSHV

    def read(self, tokens: dict[str, Tensor], packed: PackedDocuments | None) -> tuple[Tensor, Tensor, Tensor]:
        """o, kept tokens and scores, as `ham_attention` returns them."""
        return ham_attention(**tokens, gamma_q=self._shared_by_heads(self.gamma_q),
                             gamma_k=self._shared_by_heads(self.gamma_k), threshold=self.controller.threshold,
                             cu_seqlens=packed, backend=self.model.backend)

    def step_counts(self) -> Tensor:
        return self.controller.counted

    def end_step(self, counts: Tensor) -> None:
        self.controller.update(counts)
