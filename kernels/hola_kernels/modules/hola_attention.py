"""A HOLA layer (arXiv 2607.02303) as a plain torch module: Gated DeltaNet with a bounded exact cache."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from hola_kernels.attention import exact_attention, hola_attention, stateless_score
from hola_kernels.attention_step import exact_attention_step, hola_attention_step
from hola_kernels.errors import KernelError
from hola_kernels.kept_attention.controller import learned_logit
from hola_kernels.modules.cache import LayerCache
from hola_kernels.modules.gated_delta_net import GatedDeltaNet
from hola_kernels.options import CacheOptions
from hola_kernels.state import HolaState


class HolaAttention(GatedDeltaNet):
    """Gated DeltaNet whose output adds softmax attention to exactly kept tokens.

    The read covers a learned sink, the local part (the token's block of `block` tokens up to itself, or a sliding
    window), and the `slots` tokens of earlier blocks per head with the largest score, by default beta |e|, the residual
    that they wrote to the state. Its weight per head is sigmoid(gate), or as `merge` says.

    Args:
        hidden_size, num_heads, key_dim, value_dim, and further keywords: as in `GatedDeltaNet`. rule is also "none":
            no state, the read is all there is (`exact_attention`); then without b_proj and gate, with merge "add".
        block: tokens of a cache block.
        slots: tokens kept exactly per head; 0: no cache.
        score: "betae", "e", "betav", "recency", "random", "cosine" or "learned" (a small network of the input per
            head: route_proj, route_out, route_bias).
        router_width: inner width of a head's learned score.
        read_norm: norm of q and k in the read, "rms", "l2" or "none", with learned gains gamma_q, gamma_k.
        local: the local part, "block", "window" or "none" (the token itself).
        window: tokens of the sliding window, the token itself included.
        sink: whether there is a sink logit per head, with value zero.
        rope_theta: base of rotary positions of the read, None for no positions.
        merge: "add" (the read's weight is sigmoid(gate), a parameter per head), "convex" (a gate per channel of every
            token, mix_proj) or "two" (two gates per head of every token, mix_proj).
        gate_init: start value of the read gate, before its sigmoid; for merge "add".
    """

    rules = (*GatedDeltaNet.rules, "none")

    def __init__(self, hidden_size: int, num_heads: int, key_dim: int, value_dim: int | None = None, *,
                 block: int = CacheOptions.block, slots: int = CacheOptions.slots, score: str = CacheOptions.score,
                 read_norm: str = CacheOptions.read_norm, local: str = CacheOptions.local, window: int | None = None,
                 rope_theta: float | None = None, merge: str = CacheOptions.merge, sink: bool = True,
                 gate_init: float = -4.0, router_width: int = 64, **shared: Any):
        super().__init__(hidden_size, num_heads, key_dim, value_dim, **shared)
        if self.state_delay and self.state_delay_mode != "stream":
            raise KernelError(f"state_delay_mode: {self.state_delay_mode!r} is for GatedDeltaNet; HolaAttention takes "
                              "'stream'")
        self.options, self.gate_init = CacheOptions(
            block, slots, score, read_norm, local, window, rope_theta, merge, self.state_delay), gate_init
        if self.rule == "none":
            self._check_without_state()
        self.gamma_q = nn.Parameter(torch.ones(key_dim, dtype=torch.float32))
        self.gamma_k = nn.Parameter(torch.ones(key_dim, dtype=torch.float32))
        if merge == "add" and self.rule != "none":
            self.gate = nn.Parameter(torch.full((self.num_value_heads,), gate_init, dtype=torch.float32))
        elif merge != "add":
            numbers = self.num_value_heads * (2 if merge == "two" else self.value_dim)
            self.mix_proj = nn.Linear(hidden_size, numbers, bias=False)
            self.mix_proj.weight.data.normal_(0.0, self.init_std)
        if not isinstance(router_width, int) or isinstance(router_width, bool) or router_width < 1:
            raise KernelError(f"router_width = {router_width!r} must be a whole number of at least 1")
        if score == "learned":
            self.route_proj = nn.Linear(hidden_size, self.num_value_heads * router_width, bias=False)
            self.route_proj.weight.data.normal_(0.0, self.init_std)
            self.route_out = nn.Parameter(torch.empty(self.num_value_heads, router_width, dtype=torch.float32))
            self.route_out.data.normal_(0.0, self.init_std)
            self.route_bias = nn.Parameter(torch.zeros(self.num_value_heads, dtype=torch.float32))
        self.sink = nn.Parameter(torch.zeros(self.num_value_heads, dtype=torch.float32)) if sink else None

    def _check_without_state(self) -> None:
        stateless_score(self.options)
        for name, allowed in (("merge", "add"), ("state_delay", 0)):
            if (value := getattr(self.options, name)) != allowed:
                raise KernelError(f"{name}: {value!r} is of a state, and rule is 'none'; give {allowed!r}")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As in `GatedDeltaNet`; gamma_q and gamma_k one, gate `gate_init`, sink zero."""
        super().reset_parameters()
        if hasattr(self, "gamma_q"):
            self.gamma_q.fill_(1.0)
            self.gamma_k.fill_(1.0)
            if hasattr(self, "gate"):
                self.gate.fill_(self.gate_init)
            if self.sink is not None:
                self.sink.zero_()
            if self.options.score == "learned":
                self.route_out.normal_(0.0, self.init_std)
                self.route_bias.zero_()

    def tokens(self, x: Tensor, *arguments: Any, **named: Any) -> dict[str, Tensor]:
        """As in `GatedDeltaNet`, and gate [B, T, H_v, ...] where the merge takes it from the token, and the logits of a
        learned score, route [B, T, H_v]."""
        tokens = super().tokens(x, *arguments, **named)
        if self.options.merge != "add":
            tokens["gate"] = self.mix_proj(x).unflatten(-1, (self.num_value_heads, -1))
        if self.options.score == "learned":
            tokens["route"] = learned_logit(self.route_proj(x), self.route_out, self.route_bias)
        return tokens

    def _read_arguments(self) -> dict[str, Any]:
        parameters = {"gamma_q": self.gamma_q, "gamma_k": self.gamma_k, "sink": self.sink}
        return parameters | ({"gate": self.gate} if hasattr(self, "gate") else {})

    def _mix(self, tokens: dict[str, Tensor], cu_seqlens: Tensor | None, cache: LayerCache | None) -> Tensor:
        run, options = hola_attention, asdict(self.options)
        if self.rule == "none":
            run, options = exact_attention, self.options.without_state
        arguments = {**tokens, **self._read_arguments(), **options, "cu_seqlens": cu_seqlens, "backend": self.backend}
        if cache is None:
            return run(**arguments)
        o, after = run(**arguments, state=cache.state, return_state=True)
        cache.state = after.map(Tensor.detach)
        return o

    def _step(self, one: dict[str, Tensor], state: HolaState) -> Tensor:
        names = ("score", "read_norm", "local", "window", "rope_theta")
        arguments = {**one, **self._read_arguments(), **{name: getattr(self.options, name) for name in names},
                     "state": state, "backend": self.step_backend}
        if self.rule == "none":
            return exact_attention_step(**arguments)
        return hola_attention_step(**arguments, merge=self.options.merge)

    def _empty_state(self, v: Tensor) -> HolaState:
        return HolaState.empty(v.shape[0], self.num_value_heads, self.key_dim, self.value_dim, dtype=v.dtype,
                               block=self.options.block, slots=self.options.slots,
                               window_blocks=self.options.window_blocks, rope_theta=self.options.rope_theta,
                               state_delay=self.state_delay, recurrent=self.rule != "none", device=v.device)
