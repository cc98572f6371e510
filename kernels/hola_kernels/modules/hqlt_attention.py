"""An HQLT layer (arXiv 2506.00744) as a plain torch module: a delta-rule state and a softmax window, read together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hola_kernels.errors import KernelError
from hola_kernels.hqlt import BLENDS, MIXINGS, hqlt_attention
from hola_kernels.hqlt.memory import HqltState, hqlt_attention_onward, hqlt_attention_step
from hola_kernels.modules.cache import LayerCache
from hola_kernels.modules.initial import draw_children
from hola_kernels.norms import compute_dtype
from hola_kernels.packed import PackedDocuments, documents_of


class HqltAttention(nn.Module):
    """Hybrid quadratic-linear token mixer: linear in length, constant memory when decoding.

    Queries, keys and values are projected once for both memories. No convolution and no output gate; after the two
    reads are mixed, each head is normalised and projected back. `hola_kernels.hqlt` has the formulas.

    Args:
        hidden_size: D, width of the input and the output.
        num_heads: H.
        key_dim: K, even, width of a query or key head.
        value_dim: V, width of a value head. Default: K.
        blend: "sync", "delayed_stream" or "delayed_chunk": which state a token reads, and what its softmax sees.
        mixing: "vector" (a sigmoid a channel, convex), "scalar" (two sigmoids a head) or "sum".
        window: W, tokens of the softmax window or chunk.
        rope_theta: base of the rotary positions in the softmax part.
        beta_range: what the sigmoid of the write strength is multiplied by, 1 or 2.
        norm_eps: epsilon of the output norm.
        init_std: standard deviation of the projections' start values.
        backend: of the state, "auto", "triton", "torch" or "reference"; the Triton kernels take K and V of 64, 128 or
            256.

    Raises:
        KernelError: a choice or size that is not possible.

    Parameter names are those of exported models: q_proj, k_proj, v_proj, mix_proj (not for "sum"), b_proj, o_norm,
    o_proj.
    """

    def __init__(self, hidden_size: int, num_heads: int, key_dim: int, value_dim: int | None = None, *,
                 blend: str = "sync", mixing: str = "vector", window: int = 64, rope_theta: float = 10000.0,
                 beta_range: int = 1, norm_eps: float = 1e-6, init_std: float = 0.02, backend: str = "auto"):
        super().__init__()
        for name, value, allowed in (("blend", blend, BLENDS), ("mixing", mixing, MIXINGS),
                                     ("beta_range", beta_range, (1, 2))):
            if value not in allowed:
                raise KernelError(f"{name}: {value!r} is not one of {', '.join(map(str, allowed))}")
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim or key_dim
        self.blend, self.mixing, self.window, self.rope_theta = blend, mixing, window, rope_theta
        self.beta_range, self.init_std = beta_range, init_std
        self.backend = self.step_backend = backend
        values = num_heads * self.value_dim
        rows = {"q": num_heads * key_dim, "k": num_heads * key_dim, "v": values, "b": num_heads}
        rows |= {"vector": {"mix": values}, "scalar": {"mix": 2 * num_heads}, "sum": {}}[mixing]
        for name, size in rows.items():
            setattr(self, f"{name}_proj", nn.Linear(hidden_size, size, bias=False))
        self.o_norm = nn.RMSNorm(self.value_dim, eps=norm_eps)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw start values: normal projections, norm one."""
        draw_children(self, self.init_std)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | PackedDocuments | None = None,
                cache: LayerCache | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D].

        Args:
            x: input, of the projections' dtype.
            cu_seqlens: [N + 1] integers from 0 to T, documents packed one after the other in one row (B = 1).
            cache: what earlier calls left of these sequences (N of them), in `cache.state`; read, and brought up to
                date. One token a row is a decoding step. With a cache nothing is differentiable.
        """
        tokens = self.tokens(x)
        choices = {"blend": self.blend, "mixing": self.mixing, "rope_theta": self.rope_theta}
        if cache is None:
            o = hqlt_attention(**tokens, **choices, window=self.window, cu_seqlens=cu_seqlens, backend=self.backend)
        else:
            o = self._remembering(tokens, choices, cu_seqlens, cache)
        return self.o_proj(self.o_norm(o).flatten(-2))

    def tokens(self, x: Tensor) -> dict[str, Tensor | None]:
        """q, k [B, T, H, K] and v [B, T, H, V] as projected, beta [B, T, H], and what the mixing takes."""
        q, k = (project(x).unflatten(-1, (-1, self.key_dim)) for project in (self.q_proj, self.k_proj))
        b = self.b_proj(x)
        mix = None if self.mixing == "sum" else self.mix_proj(x).unflatten(-1, (self.num_heads, -1))
        return {"q": q, "k": k, "v": self.v_proj(x).unflatten(-1, (-1, self.value_dim)),
                "beta": self.beta_range * b.to(compute_dtype(b)).sigmoid(), "mix": mix}

    def _remembering(self, tokens: dict[str, Tensor | None], choices: dict, cu_seqlens: Tensor | PackedDocuments | None,
                     cache: LayerCache) -> Tensor:
        v = tokens["v"]
        if cache.state is None:
            sequences = v.shape[0] if cu_seqlens is None else documents_of(v, cu_seqlens).count
            cache.state = HqltState.empty(sequences, self.num_heads, self.key_dim, self.value_dim, window=self.window,
                                          blend=self.blend, dtype=v.dtype, device=v.device)
        if cu_seqlens is not None or v.shape[1] != 1:
            o, cache.state = hqlt_attention_onward(**tokens, **choices, memory=cache.state, cu_seqlens=cu_seqlens,
                                                   backend=self.backend)
            return o
        one = {name: None if x is None else x[:, 0] for name, x in tokens.items()}
        return hqlt_attention_step(**one, **choices, memory=cache.state, backend=self.step_backend)[:, None]
