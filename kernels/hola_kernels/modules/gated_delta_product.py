"""A Gated DeltaProduct layer (arXiv 2502.10297) as a plain torch module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hola_kernels.delta_product import gated_delta_product, gated_delta_product_step
from hola_kernels.errors import KernelError
from hola_kernels.modules.cache import LayerCache
from hola_kernels.modules.gated_delta_net import GatedDeltaNet
from hola_kernels.modules.parts import ShortConvolution
from hola_kernels.norms import compute_dtype


class GatedDeltaProduct(GatedDeltaNet):
    """Gated DeltaNet that writes to its state several times a token, with a key, a value and a strength of each write.

    The state's transition is a product of `delta_steps` generalised Householder matrices; with beta_range 2 it can
    rotate.

    Args:
        hidden_size, num_heads, key_dim, value_dim, and further keywords: as in `GatedDeltaNet`, with as many value
            heads as heads and without a delay.
        delta_steps: n, writes a token.

    Raises:
        KernelError: sizes that do not fit together.

    Parameter names are those of `GatedDeltaNet`. Rows of k_proj, v_proj, b_proj and of their convolutions are ordered
    by head, then by write.
    """

    def __init__(self, hidden_size: int, num_heads: int, key_dim: int, value_dim: int | None = None, *,
                 delta_steps: int = 2, conv_width: int = 4, **shared: Any):
        super().__init__(hidden_size, num_heads, key_dim, value_dim, conv_width=conv_width, **shared)
        if self.num_value_heads != num_heads or self.state_delay:
            raise KernelError("GatedDeltaProduct takes num_value_heads = num_heads and state_delay = 0")
        if not isinstance(delta_steps, int) or isinstance(delta_steps, bool) or delta_steps < 1:
            raise KernelError(f"delta_steps = {delta_steps!r} must be a whole number of at least 1")
        self.delta_steps = delta_steps
        rows = {"k": num_heads * self.key_dim, "v": num_heads * self.value_dim, "b": num_heads}
        for name, size in rows.items():
            setattr(self, f"{name}_proj", nn.Linear(hidden_size, delta_steps * size, bias=False))
        for name in "kv":
            setattr(self, f"{name}_conv", ShortConvolution(delta_steps * rows[name], conv_width, backend=self.backend))
        self.reset_parameters()

    def tokens(self, x: Tensor, cu_seqlens: Tensor | None = None, cache: LayerCache | None = None,
               decoding: bool = False) -> dict[str, Tensor]:
        """q [B, T, H, K], k [B, T, n, H, K], v [B, T, n, H, V], log_decay [B, T, H] and beta [B, T, n, H]."""
        q, k, v = (self._convolved(name, x, cu_seqlens, cache, decoding) for name in "qkv")
        beta = self.beta_range * self.b_proj(x).to(compute_dtype(x)).sigmoid()
        return {"q": q.unflatten(-1, (-1, self.key_dim)), "k": self._writes(k), "v": self._writes(v),
                "log_decay": self._log_decay(x), "beta": self._writes(beta)[..., 0]}

    def _writes(self, x: Tensor) -> Tensor:
        """[B, T, H n D] -> [B, T, n, H, D]."""
        return x.unflatten(-1, (self.num_heads, self.delta_steps, -1)).transpose(2, 3)

    def _mix(self, tokens: dict[str, Tensor], cu_seqlens: Tensor | None, cache: LayerCache | None) -> Tensor:
        before = None if cache is None else cache.state
        o, after = gated_delta_product(**tokens, cu_seqlens=cu_seqlens, initial_state=before, backend=self.backend)
        if cache is not None:
            cache.state = after.detach()
        return o

    def _step(self, one: dict[str, Tensor], state: Tensor) -> Tensor:
        return gated_delta_product_step(**one, state=state, backend=self.step_backend)
