"""The state of a layer for N sequences between two calls of its `forward`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hola_kernels.ham.memory import HamState
from hola_kernels.hqlt.memory import HqltState
from hola_kernels.state import DelayedState, HolaState


@dataclass
class LayerCache:
    """Empty before the first call; a call reads it and brings it up to date. Constant size at any length, but with a
    `HamState`.

    q_tail, k_tail [N, W - 1, H_k K], v_tail [N, W - 1, H_v V]: the last inputs of the short convolutions.
    state: a `HolaState` (HolaAttention), an `HqltState` (HqltAttention, which has no tails), a `HamState`
        (HamAttention), or float32 [N, H_v, K, V] (GatedDeltaNet and GatedDeltaProduct; with a delayed state a
        `DelayedState`).
    """

    q_tail: Tensor | None = None
    k_tail: Tensor | None = None
    v_tail: Tensor | None = None
    state: HolaState | HqltState | HamState | DelayedState | Tensor | None = None

    def nbytes(self) -> int:
        """Bytes held."""
        tails = sum(x.nbytes for x in (self.q_tail, self.k_tail, self.v_tail) if x is not None)
        if self.state is None:
            return tails
        return tails + (self.state.nbytes if isinstance(self.state, Tensor) else self.state.nbytes())
