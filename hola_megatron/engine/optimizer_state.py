"""The float32 weights and Adam moments of a parameter, for all of Megatron's optimizers.

The plain optimizers have whole tensors; the distributed one has, on each data-parallel rank, a flat range of each
parameter. Checkpoints store whole local tensors, so ranges are gathered on the rank that writes, and sliced on loading.
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
            raise NotImplementedError("checkpoints support one optimizer per rank")
        self.inner = chain[0]
        self.group = data_group
        self.ranks = dist.get_world_size(data_group)
        self.distributed = isinstance(self.inner, DistributedOptimizer)
        if self.inner.init_state_fn is not None and self.inner.optimizer is not None:
            self.inner.init_state_fn(self.inner.optimizer, self.inner.config)
        self.shards = self._find_shards() if self.distributed else {}

    def gather(self, parameter: nn.Parameter, writer: int) -> dict[str, Tensor] | None:
        """{"weight", "exp_avg", "exp_avg_sq"} float32 in the parameter's shape, on data rank `writer` (None elsewhere).

        Without "exp_avg_sq" for parameters updated by Muon. With the distributed optimizer, a collective over the
        data-parallel group.
        """
        owned = self._tensors(parameter)
        here = dist.get_rank(self.group) == writer
        if not self.distributed:
            return {name: value.detach() for name, value in owned.items()} if here else None
        start, end = self._range(parameter)
        gathered = {}
        for name in ("weight", *STATES):
            # as integers: a sum with zeros keeps every bit, also of -0.0
            whole = torch.zeros(parameter.numel(), dtype=torch.int32, device=parameter.device)
            if end > start:
                whole[start:end] = owned[name].detach().float().view(torch.int32)
            dist.reduce(whole, dist.get_global_rank(self.group, writer), group=self.group)
            gathered[name] = whole.view(torch.float32).view(parameter.shape)
        return gathered if here else None

    def kinds(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """Names of the tensors that exist for a parameter on any data rank: "weight" and moments."""
        return ("weight", *STATES) if self.distributed else tuple(self._tensors(parameter))

    @torch.no_grad()
    def restore(self, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
        """Set the parameter and this rank's optimizer tensors from whole local tensors."""
        parameter.data.copy_(values["weight"])
        owned = self._tensors(parameter)
        start, end = self._range(parameter) if self.distributed else (0, parameter.numel())
        for name in ("weight", *STATES):
            if name in owned and end > start:
                source = values[name].to(owned[name].device).reshape(-1)[start:end]
                owned[name].copy_(source.view_as(owned[name]))

    @property
    def step(self) -> int:
        """Number of updates so far, equal in all groups."""
        groups = self.inner.optimizer.param_groups if self.inner.optimizer else []
        return max((int(group.get("step", 0)) for group in groups), default=0)

    @step.setter
    def step(self, value: int) -> None:
        for group in self.inner.optimizer.param_groups if self.inner.optimizer else []:
            group["step"] = value

    def _tensors(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """This rank's optimizer tensors of a parameter; empty where it owns none."""
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
        """The float32 shard of every parameter that the distributed optimizer owns on this rank.

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
