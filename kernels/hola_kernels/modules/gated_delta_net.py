"""A Gated DeltaNet layer (arXiv 2412.06464) as a plain torch module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hola_kernels.errors import KernelError
from hola_kernels.gated_delta import gated_delta_rule
from hola_kernels.gated_delta.step import gated_delta_step
from hola_kernels.modules.cache import LayerCache
from hola_kernels.modules.initial import decay_rate, draw_children, step_bias
from hola_kernels.modules.parts import GatedRMSNorm, ShortConvolution
from hola_kernels.norms import compute_dtype
from hola_kernels.packed import documents_of
from hola_kernels.state import DelayedState, HolaState
from hola_kernels.state_delay import check_delay, delayed_delta_rule
from hola_kernels.state_delay_memory import delayed_delta_onward, delayed_delta_step


class GatedDeltaNet(nn.Module):
    """Token mixer with a compressed recurrent state: linear in length, constant memory when decoding.

    Per token and value head: q, k, v are projected, convolved over `conv_width` tokens and passed through SiLU; the
    state S decays by exp(log_decay) and is corrected by the delta rule with strength beta; the output K^-1/2 S^T q is
    normalised per head, gated and projected back.

    Args:
        hidden_size: D, width of the input and the output.
        num_heads: H_k, heads of queries and keys.
        key_dim: K, width of a query or key head.
        value_dim: V, width of a value head. Default: K.
        num_value_heads: H_v, a multiple of H_k; each key head serves H_v / H_k value heads. Default: H_k.
        conv_width: W, tokens of the short convolutions.
        rule: "gdn", or "delta": the state never decays (DeltaNet). Subclasses name theirs in `rules`.
        beta_range: what the sigmoid of the write strength is multiplied by, 1 or 2 (negative eigenvalues).
        state_delay: W, in tokens: a token reads the state that is W tokens old; 0: its own.
        state_delay_mode: "stream", or "chunk": the state before the token's chunk of W tokens.
        norm_eps: epsilon of the output norm.
        init_std: standard deviation of the projections' start values.
        backend: "auto", "triton", "torch" or "reference"; the Triton kernels take K and V of 64, 128 or 256.

    Raises:
        KernelError: sizes that do not fit together.

    Parameter names are those of exported HOLA models: q_proj.weight, q_conv.weight, A_log, dt_bias, o_norm.weight, ...
    A_log and dt_bias are float32; keep them so in a 16-bit model.
    """

    rules: tuple[str, ...] = ("gdn", "delta")

    def __init__(self, hidden_size: int, num_heads: int, key_dim: int, value_dim: int | None = None, *,
                 num_value_heads: int | None = None, conv_width: int = 4, rule: str = "gdn", beta_range: int = 1,
                 state_delay: int = 0, state_delay_mode: str = "stream", norm_eps: float = 1e-6,
                 init_std: float = 0.02, backend: str = "auto"):
        super().__init__()
        self.num_heads, self.num_value_heads = num_heads, num_value_heads or num_heads
        self.key_dim, self.value_dim = key_dim, value_dim or key_dim
        self.rule, self.beta_range, self.init_std, self.backend = rule, beta_range, init_std, backend
        self.step_backend = backend  # of a decoded token
        self.state_delay, self.state_delay_mode = state_delay, state_delay_mode
        check_delay(state_delay, state_delay_mode)
        if rule not in self.rules:
            raise KernelError(f"rule: {rule!r} is not one of {', '.join(self.rules)}")
        if beta_range not in (1, 2):
            raise KernelError(f"beta_range: {beta_range!r} is not one of 1, 2")
        if self.num_value_heads % num_heads:
            raise KernelError(f"num_value_heads: {self.num_value_heads} is not a multiple of num_heads = {num_heads}")
        keys, values = num_heads * key_dim, self.num_value_heads * self.value_dim
        rows = {"q": keys, "k": keys, "v": values, "g": values}
        state = {"gdn": ("b", "a"), "delta": ("b",), "none": ()}[rule]
        for name, size in (rows | dict.fromkeys(state, self.num_value_heads)).items():
            setattr(self, f"{name}_proj", nn.Linear(hidden_size, size, bias=False))
        for name in "qkv":
            setattr(self, f"{name}_conv", ShortConvolution(rows[name], conv_width, backend=backend))
        if rule == "gdn":
            self.A_log = nn.Parameter(torch.empty(self.num_value_heads, dtype=torch.float32))
            self.dt_bias = nn.Parameter(torch.empty(self.num_value_heads, dtype=torch.float32))
        self.o_norm = GatedRMSNorm(self.value_dim, norm_eps, backend=backend)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw start values: normal projections, A_log and dt_bias as in Gated DeltaNet."""
        if draw_children(self, self.init_std) and self.rule == "gdn":
            self.A_log.copy_(decay_rate(tuple(self.A_log.shape)))
            self.dt_bias.copy_(step_bias(tuple(self.dt_bias.shape)))

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D].

        Args:
            x: input, of the projections' dtype.
            cu_seqlens: [N + 1] integers from 0 to T, documents packed one after the other in one row (B = 1). On the
                CPU nothing waits for the device.
            cache: what earlier calls left of these sequences (N of them); read, and brought up to date without
                gradient. One token a row without gradient is a decoding step.
        """
        decoding = cache is not None and cu_seqlens is None and x.shape[1] == 1 and not torch.is_grad_enabled()
        tokens = self.tokens(x, cu_seqlens, cache, decoding)
        o = self._decode(tokens, cache) if decoding else self._mix(tokens, cu_seqlens, cache)
        gate = self.g_proj(x).unflatten(-1, (-1, self.value_dim))
        return self.o_proj(self.o_norm(o, gate).flatten(-2))

    def tokens(self, x: Tensor, cu_seqlens: Tensor | None = None, cache: LayerCache | None = None,
               decoding: bool = False) -> dict[str, Tensor]:
        """q, k [B, T, H_v, K], v [B, T, H_v, V], and of a layer with a state log_decay and beta [B, T, H_v] of every
        token."""
        q, k, v = (self._convolved(name, x, cu_seqlens, cache, decoding) for name in "qkv")
        q, k = (self._per_value_head(x.unflatten(-1, (-1, self.key_dim))) for x in (q, k))
        tokens = {"q": q, "k": k, "v": v.unflatten(-1, (-1, self.value_dim))}
        if self.rule == "none":
            return tokens
        beta = self.beta_range * self.b_proj(x).to(compute_dtype(x)).sigmoid()
        return tokens | {"log_decay": self._log_decay(x), "beta": beta}

    def _log_decay(self, x: Tensor) -> Tensor:
        """[B, T, H_v], zero without decay."""
        compute = compute_dtype(x)
        if self.rule == "delta":
            return torch.zeros(*x.shape[:-1], self.num_value_heads, dtype=compute, device=x.device)
        step = F.softplus(self.a_proj(x).to(compute) + self.dt_bias.to(compute))
        return -self.A_log.to(compute).exp() * step

    def _per_value_head(self, x: Tensor) -> Tensor:
        """[B, T, H_k, K] -> [B, T, H_v, K]."""
        groups = self.num_value_heads // self.num_heads
        return x if groups == 1 else x.repeat_interleave(groups, dim=2)

    def _convolved(self, name: str, x: Tensor, cu_seqlens: Tensor | None, cache: LayerCache | None,
                   decoding: bool) -> Tensor:
        """The projection `name` of x after its convolution, whose last inputs are saved."""
        project, convolve = getattr(self, f"{name}_proj"), getattr(self, f"{name}_conv")
        tail = None if cache is None else getattr(cache, f"{name}_tail")
        if decoding and tail is not None:
            return convolve(project(x), tail=tail, step_backend=self.step_backend)[0]
        y, tail = convolve(project(x), cu_seqlens=cu_seqlens, tail=tail)
        if cache is not None:
            setattr(cache, f"{name}_tail", tail.detach())
        return y

    def _mix(self, tokens: dict[str, Tensor], cu_seqlens: Tensor | None, cache: LayerCache | None) -> Tensor:
        """o [B, T, H_v, V] of a whole call."""
        if self.state_delay:
            return self._mix_late(tokens, cu_seqlens, cache)
        before = None if cache is None else cache.state
        o, _, after = gated_delta_rule(**tokens, cu_seqlens=cu_seqlens, initial_state=before, backend=self.backend)
        if cache is not None:
            cache.state = after.detach()
        return o

    def _mix_late(self, tokens: dict[str, Tensor], cu_seqlens: Tensor | None, cache: LayerCache | None) -> Tensor:
        """`_mix` with a delayed state."""
        late = {"delay": self.state_delay, "mode": self.state_delay_mode}
        if cache is None:
            return delayed_delta_rule(**tokens, **late, cu_seqlens=cu_seqlens, backend=self.backend)[0]
        v = tokens["v"]
        if cache.state is None:
            documents = documents_of(v, cu_seqlens)
            cache.state = self._empty_state(v, v.shape[0] if documents is None else documents.count)
        o, after = delayed_delta_onward(**tokens, **late, memory=cache.state, cu_seqlens=cu_seqlens,
                                        backend=self.backend)
        cache.state = after.map(Tensor.detach)
        return o

    def _decode(self, tokens: dict[str, Tensor], cache: LayerCache) -> Tensor:
        """o [N, 1, H_v, V] of one token of every sequence."""
        one = {name: x[:, 0] for name, x in tokens.items()}
        if cache.state is None:
            cache.state = self._empty_state(one["v"])
        return self._step(one, cache.state).to(one["v"].dtype)[:, None]

    def _step(self, one: dict[str, Tensor], state: HolaState | DelayedState | Tensor) -> Tensor:
        if self.state_delay:
            return delayed_delta_step(**one, memory=state, delay=self.state_delay, mode=self.state_delay_mode,
                                      backend=self.step_backend)
        return gated_delta_step(**one, state=state, backend=self.step_backend)[0]

    def _empty_state(self, v: Tensor, sequences: int | None = None) -> HolaState | DelayedState | Tensor:
        """The memory of `sequences` (of v's rows where not given) before the first token."""
        sequences = v.shape[0] if sequences is None else sequences
        if self.state_delay:
            return DelayedState.empty(sequences, self.num_value_heads, self.key_dim, self.value_dim,
                                      delay=self.state_delay, mode=self.state_delay_mode, dtype=v.dtype,
                                      device=v.device)
        return HolaState.empty(v.shape[0], self.num_value_heads, self.key_dim, self.value_dim, dtype=v.dtype,
                               device=v.device, block=1, slots=1).state
