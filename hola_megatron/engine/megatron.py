"""The Megatron engine: Megatron-core's data parallelism, optimizers and pipeline schedules around the model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from hola_megatron.engine.adam import use_group_step_adam
from hola_megatron.engine.base import Engine
from hola_megatron.engine.expert_state import optimizer_state
from hola_megatron.engine.fp8_state import fp8_tensors, restore_fp8
from hola_megatron.engine.muon import muon_optimizer
from hola_megatron.parallel.groups import release_at_stop


class MegatronEngine(Engine):
    """Supports data, tensor, sequence, context, expert and pipeline parallelism."""

    def _wrap(self, chunks: list[GPTModel]) -> None:
        self.adam = use_group_step_adam()
        self.model = [self._data_parallel(chunk) for chunk in chunks]
        self.optimizer = self._build_optimizer()
        for group in self.optimizer.param_groups:  # otherwise done by Megatron's learning-rate scheduler
            group["weight_decay"] *= group["wd_mult"]
        self.state = optimizer_state(self.optimizer, parallel_state.get_data_parallel_group(with_context_parallel=True))
        self.config.grad_scale_func = self.optimizer.scale_loss
        if self._overlap:
            hooks = [chunk.no_sync for chunk in self.model]
            self.config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
        release_at_stop(self)

    def release(self) -> None:
        """Remove Megatron's gradient hooks. No training step is possible afterwards.

        Autograd's nodes refer to them, and they to the model and its process groups, in a cycle that the garbage
        collector does not see: the groups' threads would outlive the run in this process.
        """
        for chunk in self.model:
            for node in chunk.grad_accs:
                node.register_hook(lambda *_: None).hooks_dict_ref().clear()
            chunk.grad_accs.clear()

    def _data_parallel(self, chunk: torch.nn.Module) -> DistributedDataParallel:
        sharded = self.recipe.parallel.distributed_optimizer
        config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=sharded, overlap_grad_reduce=self._overlap,
            overlap_param_gather=self._overlap and sharded)
        with self._graph.on_its_stream() if self._graph else nullcontext():
            return DistributedDataParallel(self.config, config, chunk)

    def _build_optimizer(self) -> MegatronOptimizer:
        if self.recipe.train.optimizer == "adamw":
            return get_megatron_optimizer(self._optimizer_config(), self.model)
        group = parallel_state.get_tensor_model_parallel_group()
        made = muon_optimizer(self._optimizer_config(), self.model, self.recipe.train, group)
        self.adam = "Muon for matrices, GroupStepAdam for other parameters"
        return made

    def _optimizer_config(self) -> OptimizerConfig:
        train = self.recipe.train
        return OptimizerConfig(
            optimizer="adam", lr=train.learning_rate, weight_decay=train.weight_decay, adam_beta1=train.beta1,
            adam_beta2=train.beta2, adam_eps=train.adam_eps, clip_grad=train.clip_grad_norm,
            bf16=train.precision == "bf16", params_dtype=self.config.params_dtype,
            use_distributed_optimizer=self.recipe.parallel.distributed_optimizer,
            overlap_param_gather=self._overlap and self.recipe.parallel.distributed_optimizer)

    def _finalize(self, *args: Any, **kwargs: Any) -> None:
        self._work.stop()
        finalize_model_grads(*args, **kwargs)

    def _update(self, grad_norm: float, learning_rate: float) -> None:
        limit = self.recipe.train.clip_grad_norm
        parameters = self.optimizer.get_parameters()
        if limit > 0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=limit, total_norm=grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step_with_ready_grads()

    def fp8_tensors(self) -> dict[str, Tensor]:
        return fp8_tensors(self.model) if self.recipe.fp8.recipe == "delayed" else {}

    def restore_fp8(self, stored: dict[str, Tensor]) -> None:
        if self.recipe.fp8.recipe == "delayed":
            from megatron.core.fp8_utils import get_fp8_recipe

            restore_fp8(self.model, get_fp8_recipe(self.config), stored)
