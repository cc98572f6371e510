"""The DeepSpeed engine: the same modules, micro-batches and loss, with DeepSpeed's ZeRO stage 1 or 2.

ZeRO concatenates the parameters of each optimizer group into a flat buffer, and each data rank owns one equal partition
of it: the float32 weights, both moments, and with stage 2 the summed gradients. DeepSpeed reduces and updates. This
module does the rest on each rank's partition: the sum of norm gradients over tensor ranks under sequence parallelism,
the division by the tokens of all ranks, the gradient norm and clipping, and the decision to update. Tensor and context
parallel groups are Megatron's.

The model stays bf16 with a few float32 parameters, each dtype in groups of its own. DeepSpeed's "bf16" mode would round
the float32 parameters to bf16, so it is off.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from hola_megatron.engine.base import Engine
from hola_megatron.engine.optimizer_state import STATES, OptimizerState
from hola_megatron.engine.zero_bucket import bucket_elements


class DeepSpeedEngine(Engine):
    """Supports data, tensor and context parallelism; recipe/checks.py refuses the other features of Megatron's engine.
    """

    def _wrap(self, chunks: list[GPTModel]) -> None:
        chunk, = chunks
        fused = self.layout.device.type == "cuda"
        adam = torch.optim.AdamW(list(_groups(chunk, self.recipe.train.weight_decay, self.config.params_dtype)),
                                 lr=self.recipe.train.learning_rate, eps=self.recipe.train.adam_eps,
                                 betas=(self.recipe.train.beta1, self.recipe.train.beta2), fused=fused)
        deepspeed = _deepspeed(self.layout.device)
        self._zero = deepspeed.initialize(model=chunk, optimizer=adam, mpu=_Groups(), config=self._settings(chunk))[0]
        self.model = [ZeroChunk(chunk, self._zero)]
        self.optimizer = ZeroGradients(self._zero.optimizer, self.layout.tensor_rank)
        self.state = ZeroState(self.optimizer, _Groups.get_data_parallel_group())
        self.adam = f"torch AdamW{' (fused)' if fused else ''} under DeepSpeed {deepspeed.__version__}, ZeRO " \
                    f"{self.recipe.parallel.zero_stage}"
        self.config.no_sync_func = self._before_the_last
        reduce = self._zero.allreduce_gradients
        self._zero.allreduce_gradients = lambda *args, **kwargs: (self._work.stop(), reduce(*args, **kwargs))

    def _settings(self, chunk: GPTModel) -> dict[str, Any]:
        """DeepSpeed's configuration, without accumulation, clipping and averaging, which this engine does."""
        stage = self.recipe.parallel.zero_stage
        return {
            "train_micro_batch_size_per_gpu": self.recipe.train.micro_batch_size, "gradient_accumulation_steps": 1,
            "gradient_allreduce_op": "sum", "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
            "steps_per_print": None, "timers": {"throughput": {"enabled": False}},
            "zero_optimization": {
                "stage": stage, "overlap_comm": self._overlap, "compute_grad_norm": False,
                "reduce_bucket_size": bucket_elements(sum(p.numel() for p in chunk.parameters())),
                # stage 2 would copy float32 gradients into one bf16 buffer with the others
                "contiguous_gradients": stage == 1}}

    @contextlib.contextmanager
    def _before_the_last(self) -> Iterator[None]:
        """Megatron's no_sync context of all micro-batches but the last: accumulate gradients without reduction."""
        self._zero.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._zero.set_gradient_accumulation_boundary(True)

    def _finalize(self, model: list[nn.Module], tokens: Tensor, **_: Any) -> None:
        dist.all_reduce(tokens, group=_Groups.get_data_parallel_group())
        self.optimizer.collect()
        if self.config.sequence_parallel:
            self.optimizer.sum_over_tensor_ranks()
        self.optimizer.scale(1.0 / tokens.clamp(min=1))

    def _update(self, grad_norm: float, learning_rate: float) -> None:
        limit = self.recipe.train.clip_grad_norm
        if limit > 0 and (factor := limit / (grad_norm + 1e-6)) < 1.0:
            self.optimizer.scale(factor)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self._zero.step()
        self.optimizer.zero_grad()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        owned, whole = self.optimizer.ranges.get(parameter), torch.zeros_like(parameter, dtype=torch.float32)
        if owned and self.optimizer.flat:
            whole.view(-1)[owned.start:owned.end] = owned.of(self.optimizer.flat)
        return whole


class ZeroChunk(nn.Module):
    """The model chunk, called through DeepSpeed's engine."""

    def __init__(self, module: GPTModel, zero: Any):
        super().__init__()
        self.module = module
        self._call = lambda *args, **kwargs: zero(*args, **kwargs)  # not a submodule: it contains this module
        self._optimizer = lambda: zero.optimizer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def zero_grad_buffer(self) -> None:
        """Drop the gradients of the last step, also of a step without an update."""
        optimizer = self._optimizer()
        optimizer.zero_grad()
        for found in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            found.update(dict.fromkeys(found))


@dataclass(frozen=True)
class FlatRange:
    """The range of a parameter that this data rank owns.

    group: the optimizer group. offset: of the range in this rank's flat partition of the group. start, end: elements of
    the flattened parameter.
    """

    group: int
    offset: int
    start: int
    end: int

    def of(self, partitions: list[Tensor]) -> Tensor:
        """The range as a view. partitions: this rank's flat partition of each group."""
        return partitions[self.group].narrow(0, self.offset, self.end - self.start)


class ZeroGradients:
    """This rank's partition of every group's gradients, with the interface of Megatron's optimizers.

    `flat`: float32, one per group, from the end of the backward passes until the next step.
    """

    def __init__(self, zero: Any, tensor_rank: int):
        self.zero = zero
        self.ranges = dict(_ranges(zero))
        self.flat: list[Tensor] = []
        # replicated parameters count once in the gradient norm, on tensor rank 0
        self._counted = [owned for p, owned in self.ranges.items()
                         if getattr(p, "tensor_model_parallel", False) or tensor_rank == 0]
        self._norms = [owned for p, owned in self.ranges.items() if getattr(p, "sequence_parallel", False)]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.zero.optimizer.param_groups

    @property
    def weights(self) -> list[Tensor]:
        return self.zero.single_partition_of_fp32_groups

    def zero_grad(self) -> None:
        self.flat = []

    def collect(self) -> None:
        """Concatenate each group's gradients into one tensor, which DeepSpeed's update then uses."""
        gradients = self.zero.averaged_gradients
        for group in range(len(self.weights)):
            flat = getattr(gradients[group], "flat_partition", None)
            if flat is None:
                flat = torch.cat([x.reshape(-1).float() for x in gradients[group]])
                gradients[group] = [flat]
            self.flat.append(flat)

    def sum_over_tensor_ranks(self) -> None:
        """All-reduce gradients of norms, which see different tokens on each tensor rank; the ranges are the same."""
        if self._norms:
            together = torch.cat([owned.of(self.flat) for owned in self._norms])
            dist.all_reduce(together, group=parallel_state.get_tensor_model_parallel_group())
            start = 0
            for owned in self._norms:
                end = start + owned.end - owned.start
                owned.of(self.flat).copy_(together[start:end])
                start = end

    def scale(self, factor: Tensor | float) -> None:
        for flat in self.flat:
            flat.mul_(factor)

    def prepare_grads(self) -> bool:
        """Nothing to do: there is no loss scale, and the judge handles values that are not finite."""
        return False

    def get_grad_norm(self) -> float:
        """Of the whole model, on every rank."""
        norms = torch._foreach_norm([owned.of(self.flat) for owned in self._counted])
        squares = torch.stack(norms).square().sum() if norms else torch.zeros((), device=self.flat[0].device)
        dist.all_reduce(squares)
        return float(squares.sqrt())


class ZeroState(OptimizerState):
    """ZeRO's float32 weights and moments, for checkpoints."""

    distributed = True

    def __init__(self, optimizer: ZeroGradients, data_group: dist.ProcessGroup):
        self.optimizer, self.group, self.ranks = optimizer, data_group, dist.get_world_size(data_group)
        self._adam = optimizer.zero.optimizer
        fused = self._adam.defaults["fused"]
        for weight in optimizer.weights:  # as torch's AdamW initialises it at its first step
            self._adam.state[weight].update(
                step=torch.zeros((), device=weight.device if fused else "cpu"),
                **{name: torch.zeros_like(weight) for name in STATES})

    @property
    def step(self) -> int:
        return int(self._adam.state[self.optimizer.weights[0]]["step"])

    @step.setter
    def step(self, value: int) -> None:
        for weight in self.optimizer.weights:
            self._adam.state[weight]["step"].fill_(value)

    def _tensors(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        owned, weights = self.optimizer.ranges.get(parameter), self.optimizer.weights
        if owned is None:
            return {}
        return {"weight": owned.of(weights),
                **{name: owned.of([self._adam.state[weight][name] for weight in weights]) for name in STATES}}

    def _range(self, parameter: nn.Parameter) -> tuple[int, int]:
        owned = self.optimizer.ranges.get(parameter)
        return (owned.start, owned.end) if owned else (0, 0)


def _ranges(zero: Any) -> Iterator[tuple[nn.Parameter, FlatRange]]:
    """(parameter, range) of every parameter of which this data rank owns elements."""
    for group, parameters in enumerate(zero.round_robin_bit16_groups):
        size = zero.partition_size[group]
        first = size * dist.get_rank(zero.real_dp_process_group[group])
        for parameter, offset in zip(parameters, zero.round_robin_bit16_offsets[group], strict=True):
            start, end = max(first, offset), min(first + size, offset + parameter.numel())
            if end > start:
                yield parameter, FlatRange(group, start - first, start - offset, end - offset)


def _groups(chunk: GPTModel, weight_decay: float, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Optimizer groups: no weight decay for vectors, as in Megatron; one dtype per group, the model's first (for ZeRO).
    """
    parameters = list(chunk.parameters())
    for wanted in (dtype, *{p.dtype for p in parameters} - {dtype}):
        for decays in (True, False):
            members = [p for p in parameters if p.dtype == wanted and (p.dim() > 1) == decays]
            if members:
                yield {"params": members, "weight_decay": weight_decay if decays else 0.0}


class _Groups:
    """Megatron's process groups with the interface of DeepSpeed's `mpu`.

    Context-parallel ranks have the same weights and different tokens: for ZeRO they are data ranks.
    """

    @staticmethod
    def get_data_parallel_group() -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    @staticmethod
    def get_data_parallel_rank() -> int:
        return parallel_state.get_data_parallel_rank(with_context_parallel=True)

    @staticmethod
    def get_data_parallel_world_size() -> int:
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    get_model_parallel_group = get_tensor_model_parallel_group = staticmethod(
        parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_rank = get_tensor_model_parallel_rank = staticmethod(
        parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = get_tensor_model_parallel_world_size = staticmethod(
        parallel_state.get_tensor_model_parallel_world_size)


def _deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed with less logging, for this device and the existing process group."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # required also for one process
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # on a CPU it would compile shared-memory collectives (minutes), which only its inference uses
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    return deepspeed
