"""What experts add to an engine's state: an optimizer of their own, and the router's bias.

Experts that are shared over ranks are data-parallel over other ranks than everything else, so Megatron gives them a
second optimizer. The bias by which a router balances its experts (model.moe.balancing: bias) is no parameter: it
follows the use of the experts after every step, the same on all ranks, and a resume needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from hola_megatron.engine.optimizer_state import OptimizerState
from hola_megatron.model.parameters import public_module_name, unwrapped


class OptimizerStates:
    """`OptimizerState` of everything and of the experts, by parameter."""

    def __init__(self, common: OptimizerState, experts: OptimizerState):
        self.common, self.experts = common, experts
        self.ranks = common.ranks

    def gather(self, parameter: nn.Parameter, writer: int) -> dict[str, Tensor] | None:
        state = self._of(parameter)
        return state.gather(parameter, writer % state.ranks)

    def kinds(self, parameter: nn.Parameter) -> tuple[str, ...]:
        return self._of(parameter).kinds(parameter)

    def restore(self, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
        self._of(parameter).restore(parameter, values)

    @property
    def step(self) -> int:
        return max(self.common.step, self.experts.step)

    @step.setter
    def step(self, value: int) -> None:
        self.common.step = self.experts.step = value

    def _of(self, parameter: nn.Parameter) -> OptimizerState:
        return self.common if getattr(parameter, "allreduce", True) else self.experts


def optimizer_state(optimizer: Any, data_group: dist.ProcessGroup) -> OptimizerState | OptimizerStates:
    """Of Megatron's optimizer: one, or one for the experts too."""
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    shared = [inner for inner in chain if any(group.get("is_expert_parallel") for group in inner.param_groups)]
    if not shared:
        return OptimizerState(optimizer, data_group)
    common, = (inner for inner in chain if inner not in shared)
    return OptimizerStates(OptimizerState(common, data_group),
                           OptimizerState(shared[0], parallel_state.get_expert_data_parallel_group()))


def router_biases(chunks: list[nn.Module]) -> dict[str, Tensor]:
    """{public name: bias [experts]} of every router that has one."""
    return dict(_routers(chunks))


@torch.no_grad()
def restore_biases(chunks: list[nn.Module], stored: dict[str, Tensor]) -> None:
    """Routers that `stored` does not name start anew."""
    for name, bias in _routers(chunks):
        bias.copy_(stored[name]) if name in stored else bias.zero_()


def _routers(chunks: list[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for chunk in chunks:
        whole = unwrapped(chunk)
        for name, module in whole.named_modules():
            if getattr(module, "expert_bias", None) is not None:
                yield f"{public_module_name(name, whole)}.expert_bias", module.expert_bias
