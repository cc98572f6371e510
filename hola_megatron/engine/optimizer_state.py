"""The float32 weights and Adam moments of a parameter, whichever Megatron optimizer holds them.

The plain optimizers keep whole tensors; the distributed one keeps, on each data-parallel
rank, a flat range of each parameter. Checkpoints want whole local tensors, so ranges are
put together on the one rank that writes, and cut again on loading.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor, nn

STATES = ("exp_avg", "exp_avg_sq")


class OptimizerState:
    """Reads and writes optimizer tensors in the shape of the model's parameters."""

    def __init__(self, optimizer: Any, data_group: dist.ProcessGroup):
        chain = getattr(optimizer, "chained_optimizers", [optimizer])
        if len(chain) != 1:
            raise NotImplementedError("checkpoints know one optimizer a rank")
        self.inner = chain[0]
        self.group = data_group
        self.ranks = dist.get_world_size(data_group)
        self.distributed = isinstance(self.inner, DistributedOptimizer)
        if self.inner.init_state_fn is not None and self.inner.optimizer is not None:
            self.inner.init_state_fn(self.inner.optimizer, self.inner.config)
        self.shards = self._find_shards() if self.distributed else {}

    def gather(self, parameter: nn.Parameter, writer: int) -> dict[str, Tensor] | None:
        """{"weight", "exp_avg", "exp_avg_sq"} float32 in the parameter's shape, on data rank `writer` (None elsewhere).

        Without "exp_avg_sq" where the optimizer has none of this parameter (Muon). A collective over the data-parallel
        group with the distributed optimizer.
        """
        held = self._held(parameter)
        here = dist.get_rank(self.group) == writer
        if not self.distributed:
            return {name: value.detach() for name, value in held.items()} if here else None
        start, end = self._range(parameter)
        gathered = {}
        for name in ("weight", *STATES):
            # as integers: adding zeros then keeps every bit, also of -0.0
            whole = torch.zeros(parameter.numel(), dtype=torch.int32, device=parameter.device)
            if end > start:
                whole[start:end] = held[name].detach().float().view(torch.int32)
            dist.reduce(whole, dist.get_global_rank(self.group, writer), group=self.group)
            gathered[name] = whole.view(torch.float32).view(parameter.shape)
        return gathered if here else None

    def kinds(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """What is held of a parameter, on whichever data rank: "weight" and moments."""
        return ("weight", *STATES) if self.distributed else tuple(self._held(parameter))

    @torch.no_grad()
    def restore(self, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
        """Set the parameter and what the optimizer holds of it from whole local tensors."""
        parameter.data.copy_(values["weight"])
        held = self._held(parameter)
        start, end = self._range(parameter) if self.distributed else (0, parameter.numel())
        for name in ("weight", *STATES):
            if name in held and end > start:
                source = values[name].to(held[name].device).reshape(-1)[start:end]
                held[name].copy_(source.view_as(held[name]))

    @property
    def step(self) -> int:
        """Updates made so far (all groups agree)."""
        groups = self.inner.optimizer.param_groups if self.inner.optimizer else []
        return max((int(group.get("step", 0)) for group in groups), default=0)

    @step.setter
    def step(self, value: int) -> None:
        for group in self.inner.optimizer.param_groups if self.inner.optimizer else []:
            group["step"] = value

    def _held(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if self.distributed:
            start, end = self._range(parameter)
            if end == start:
                return {}
            shard = self.shards[parameter]
            state = self.inner.optimizer.state[shard]
            return {"weight": shard.view(-1), **{name: state[name].view(-1) for name in STATES}}
        mixed = isinstance(self.inner, Float16OptimizerWithFloat16Params) and parameter.dtype != torch.float32
        main = parameter.main_param if mixed else parameter
        state = self.inner.optimizer.state[main]
        return {"weight": main, **{name: state[name] for name in STATES if name in state}}

    def _find_shards(self) -> dict[nn.Parameter, Tensor]:
        """The float32 shard of every parameter the distributed optimizer holds here.

        Not by `model_param_group_index_map`: its order within a group is that of the gradient buffers, while the
        group lists float32 parameters first. In a bf16 model with float32 gates the two differ.
        """
        inner, shards = self.inner, {}
        for models, mains in ((inner.model_float16_groups, inner.shard_fp32_from_float16_groups),
                              (inner.model_fp32_groups, inner.shard_fp32_groups)):
            for group, main_group in zip(models, mains, strict=True):
                shards |= dict(zip(group, main_group, strict=True))
        return shards

    def _range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """The flat range of the parameter this data rank owns; empty where it owns none."""
        if parameter not in self.inner.model_param_group_index_map:
            return 0, 0
        owned = self.inner._get_model_param_range_map(parameter)["param"]
        return owned.start, owned.end
