"""Engine state of mixture-of-experts layers: the experts' optimizer, and the routers' biases.

Experts that are sharded over expert-parallel ranks have another data-parallel group than the other parameters, so
Megatron gives them a second optimizer. A router's balancing bias (model.moe.balancing: bias) is no parameter: it is
updated after every step from the experts' load, equally on all ranks, and checkpoints contain it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from hola_megatron.data.stream import Batch
from hola_megatron.engine.optimizer_state import OptimizerState
from hola_megatron.model.parameters import public_module_name, unwrapped
from hola_megatron.recipe.schema import Recipe


class BalancingWeight:
    """Scale of the load-balancing loss, so that its weight is the recipe's.

    Megatron multiplies that loss by the number of all tokens of a micro-batch, and divides gradients by the step's
    tokens with a loss (without padding and last tokens of documents), which are fewer. The ratio of the two, over all
    data ranks, gives: loss + weight x (balancing loss, averaged over micro-batches and ranks).
    """

    def __init__(self, recipe: Recipe, config: TransformerConfig, device: torch.device):
        moe = recipe.model.moe
        self._used = moe.experts is not None and moe.balancing == "aux_loss"
        self._share = torch.ones(1, device=device)  # the shape of Megatron's own scale
        # Megatron holds the scale in a class: one that an earlier model of this process left may have another device
        # or shape, and would be copied into
        MoEAuxLossAutoScaler.main_loss_backward_scale = None
        if self._used:
            config.moe_grad_scale_func = lambda: self._share

    def begin_step(self, batches: list[Batch]) -> None:
        """Call on every rank before the step's first forward pass. One collective, none without this loss."""
        if not self._used:
            return
        masks = [batch.loss_mask for batch in batches]
        counts = torch.tensor([sum(float(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)],
                              dtype=torch.float64, device=self._share.device)
        dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        self._share = (counts[:1] / counts[1:]).float()


class OptimizerStates:
    """The `OptimizerState` of a parameter: that of the experts, or that of all other parameters."""

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
    """The state of Megatron's optimizer; two states where experts have their own."""
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
    """Set the routers' biases; zero where `stored` has none."""
    for name, bias in _routers(chunks):
        bias.copy_(stored[name]) if name in stored else bias.zero_()


def _routers(chunks: list[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for chunk in chunks:
        whole = unwrapped(chunk)
        for name, module in whole.named_modules():
            if getattr(module, "expert_bias", None) is not None:
                yield f"{public_module_name(name, whole)}.expert_bias", module.expert_bias
