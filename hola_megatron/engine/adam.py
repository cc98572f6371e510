"""AdamW with one step count per parameter group, for Megatron's optimizers.

Megatron's distributed optimizer is written for the fused Adam of Transformer Engine or apex, which count steps per
group. With torch's AdamW it loads all parameters with one shared step tensor, which then advances once per parameter:
bias correction is wrong after a resume. This class counts as Megatron expects and replaces torch's AdamW where
Transformer Engine is not installed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class GroupStepAdam(torch.optim.Optimizer):
    """Decoupled weight decay (AdamW) in float32; `group["step"]` counts updates."""

    def __init__(self, params: Iterable, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, **_: Any):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        beta1, beta2 = group["betas"]
        grads = [p.grad for p in params]
        means = [self.state[p]["exp_avg"] for p in params]
        squares = [self.state[p]["exp_avg_sq"] for p in params]
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
        scale = torch._foreach_sqrt(squares)
        torch._foreach_div_(scale, (1 - beta2 ** group["step"]) ** 0.5)
        torch._foreach_add_(scale, group["eps"])
        torch._foreach_addcdiv_(params, means, scale, value=-group["lr"] / (1 - beta1 ** group["step"]))


def use_group_step_adam() -> str:
    """Replace torch's AdamW in Megatron by GroupStepAdam; returns the name of the Adam in use."""
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer

    if not optimizers.USING_PYTORCH_OPTIMIZER and optimizers.Adam is not GroupStepAdam:
        return "Transformer Engine or apex FusedAdam"
    optimizers.Adam, optimizers.USING_PYTORCH_OPTIMIZER = GroupStepAdam, False
    distrib_optimizer.Adam = GroupStepAdam
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    return "GroupStepAdam (Transformer Engine is not installed)"
