"""A HAM layer (arXiv 2603.22325) as a plain torch module: Gated DeltaNet that also keeps the tokens it fails on."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hola_kernels.errors import KernelError
from hola_kernels.ham import ham_attention
from hola_kernels.ham.memory import HamState, ham_attention_onward, ham_attention_step
from hola_kernels.kept_attention.controller import ShareThreshold, learned_logit
from hola_kernels.modules.cache import LayerCache
from hola_kernels.modules.gated_delta_net import GatedDeltaNet
from hola_kernels.packed import documents_of

ROUTERS = ("cosine", "learned")


class HamAttention(GatedDeltaNet):
    """Gated DeltaNet beside softmax attention to exactly kept tokens, whose number grows with the sequence.

    The state sees every token. A head keeps a token for all later ones when its routing score reaches the layer's
    threshold, and every token reads the kept tokens before it and itself. Two gates a head, sigmoids of the input,
    weigh the two reads; the sum is normalised, gated and projected back. `hola_kernels.ham` has the formulas.

    Training: the layer counts what it keeps. Call `end_step()` after every step: it moves the threshold towards the
    wanted share. In evaluation, and without gradients, nothing is counted and the threshold stays.

    Args:
        hidden_size, num_heads, key_dim, value_dim, and further keywords: as in `GatedDeltaNet`.
        router: "cosine" (how far the state's answer points away from the value) or "learned" (a small network of the
            input per head).
        share: of (tokens x heads) that are kept, the target of the threshold, 0 to 1.
        threshold: its start value; cosine scores lie between 0 and 2, learned ones between 0 and 1.
        rate: how far a step moves the threshold for a share that is off by 1.
        freeze_steps: first steps that leave it as it is.
        router_width: inner width of a head's learned router.

    Raises:
        KernelError: a choice or size that is not possible.

    Parameter names beside those of `GatedDeltaNet`: mix_proj, gamma_q, gamma_k, and of a learned router route_proj,
    route_out, route_bias. gamma_q, gamma_k, route_out, route_bias and the buffers controller.threshold and
    controller.updates are float32; keep them so in a 16-bit model.
    """

    def __init__(self, hidden_size: int, num_heads: int, key_dim: int, value_dim: int | None = None, *,
                 router: str = "learned", share: float = 0.5, threshold: float = 0.5, rate: float = 0.01,
                 freeze_steps: int = 0, router_width: int = 64, **shared: Any):
        super().__init__(hidden_size, num_heads, key_dim, value_dim, **shared)
        if self.state_delay:
            raise KernelError(f"state_delay: {self.state_delay} is for GatedDeltaNet; HamAttention takes 0")
        if router not in ROUTERS:
            raise KernelError(f"router: {router!r} is not one of {', '.join(ROUTERS)}")
        if not isinstance(router_width, int) or isinstance(router_width, bool) or router_width < 1:
            raise KernelError(f"router_width = {router_width!r} must be a whole number of at least 1")
        self.router, heads = router, self.num_value_heads
        self.mix_proj = nn.Linear(hidden_size, 2 * heads, bias=False)
        self.gamma_q = nn.Parameter(torch.ones(key_dim, dtype=torch.float32))
        self.gamma_k = nn.Parameter(torch.ones(key_dim, dtype=torch.float32))
        if router == "learned":
            self.route_proj = nn.Linear(hidden_size, heads * router_width, bias=False)
            self.route_out = nn.Parameter(torch.empty(heads, router_width, dtype=torch.float32))
            self.route_bias = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        self.controller = ShareThreshold(share, start=threshold, rate=rate, freeze=freeze_steps)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As in `GatedDeltaNet`; gamma_q and gamma_k one, the router's outer weights normal, its bias zero, the
        threshold at its start."""
        super().reset_parameters()
        if not hasattr(self, "controller") or self.gamma_q.device.type == "meta":
            return
        self.gamma_q.fill_(1.0)
        self.gamma_k.fill_(1.0)
        if self.router == "learned":
            self.route_out.normal_(0.0, self.init_std)
            self.route_bias.zero_()

    def tokens(self, x: Tensor, *arguments: Any) -> dict[str, Tensor]:
        """As in `GatedDeltaNet`, and mix [B, T, H_v, 2]; with a learned router route [B, T, H_v]."""
        found = super().tokens(x, *arguments)
        found["mix"] = self.mix_proj(x).unflatten(-1, (-1, 2))
        if self.router == "learned":
            found["route"] = learned_logit(self.route_proj(x), self.route_out, self.route_bias)
        return found

    def end_step(self, group: dist.ProcessGroup | None = None) -> None:
        """A training step is done: move the threshold by the share that its forward passes have kept.

        group: of processes that train the same layer on other tokens; a collective, all of them must call.
        """
        if group is not None:
            dist.all_reduce(self.controller.counted, group=group)
        self.controller.update()

    def _read_arguments(self) -> dict[str, Tensor]:
        return {"gamma_q": self.gamma_q, "gamma_k": self.gamma_k, "threshold": self.controller.threshold}

    def _mix(self, tokens: dict[str, Tensor], cu_seqlens: Tensor | None, cache: LayerCache | None) -> Tensor:
        arguments = {**tokens, **self._read_arguments(), "cu_seqlens": cu_seqlens, "backend": self.backend}
        if cache is None:
            o, keep, _ = ham_attention(**arguments)
            if self.training and torch.is_grad_enabled():
                self.controller.count(keep)
            return o
        v = tokens["v"]
        if cache.state is None:
            documents = documents_of(v, cu_seqlens)
            cache.state = self._empty_state(v, v.shape[0] if documents is None else documents.count)
        return ham_attention_onward(**arguments, memory=cache.state)

    def _step(self, one: dict[str, Tensor], state: HamState) -> Tensor:
        return ham_attention_step(**one, **self._read_arguments(), memory=state, backend=self.step_backend)

    def _empty_state(self, v: Tensor, sequences: int | None = None) -> HamState:
        return HamState.empty(v.shape[0] if sequences is None else sequences, self.num_value_heads, self.key_dim,
                              self.value_dim, dtype=v.dtype, device=v.device)
