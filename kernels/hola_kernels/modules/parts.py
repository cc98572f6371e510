"""Parts of a layer: the short convolution and the gated norm, each with its weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hola_kernels.gated_norm import gated_rms_norm
from hola_kernels.modules.initial import convolution
from hola_kernels.short_conv import short_conv, short_conv_step


class ShortConvolution(nn.Module):
    """A depthwise causal convolution over time, then SiLU. weight [D, W]: its last column multiplies the current token.

    Args:
        channels: D.
        width: W, in tokens.
        backend: "auto", "triton", "torch" or "reference".
    """

    def __init__(self, channels: int, width: int = 4, *, backend: str = "auto"):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.backend = backend
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.weight.device.type != "meta":
            self.weight.copy_(convolution(tuple(self.weight.shape)))

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, tail: Tensor | None = None,
                step_backend: str | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, D] -> (y [B, T, D], the last W - 1 inputs of every sequence [N, W - 1, D]).

        cu_seqlens: [N + 1], documents of a packed row (B = 1). tail: what an earlier call returned. step_backend: x is
        one token a row, and `step` computes it.
        """
        if step_backend is not None:  # not called by itself: hooks that bring an offloaded weight are forward's
            return self.step(x[:, 0], tail, step_backend)[:, None], tail
        return short_conv(x=x, weight=self.weight, cu_seqlens=cu_seqlens, tail=tail, return_tail=True,
                          backend=self.backend)

    def step(self, x: Tensor, tail: Tensor, backend: str | None = None) -> Tensor:
        """One token of every sequence, x [N, D] -> y [N, D]; `tail` is updated in place."""
        return short_conv_step(x=x, weight=self.weight, tail=tail, backend=backend or self.backend)


class GatedRMSNorm(nn.Module):
    """RMSNorm over the last axis, times the weight and SiLU of a gate.

    Args:
        width: V, the size of the last axis.
        eps: added to the mean square.
        backend: "auto", "triton", "torch" or "reference".
    """

    def __init__(self, width: int, eps: float = 1e-6, *, backend: str = "auto"):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.backend = eps, backend

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.fill_(1.0)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate [..., V] -> [..., V]."""
        return gated_rms_norm(x=x, gate=gate, weight=self.weight, eps=self.eps, backend=self.backend)
