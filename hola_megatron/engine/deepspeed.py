"""The DeepSpeed engine: the same modules, micro-batches and loss, with DeepSpeed's ZeRO 1 or 2 in place of Megatron's
data parallelism and optimizers.

ZeRO lays the parameters of each optimizer group one after the other into a flat buffer, and each data rank owns one
equal part of it: the float32 weights, both moments, and with stage 2 the summed gradients. DeepSpeed reduces and
updates; what it does not know is done here, on the part of each rank: the sum of norm gradients over tensor ranks under
sequence parallelism, the division by the tokens of all ranks, the norm and clipping, and the judgement of an update.
Tensor and context parallel groups are Megatron's.

The model stays as it is built: bf16 with a few float32 parameters, each kind in groups of its own. DeepSpeed's own
"bf16" mode would round those to bf16, so it is left off and only the ZeRO optimizer sees the types.
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

# DeepSpeed's buffer of gradients on their way, in numbers; more than a small model has would only take room
BUCKET = 50_000_000


class DeepSpeedEngine(Engine):
    """Data, tensor and context parallel; recipe_checks.py refuses what else Megatron's engine has."""

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
        """DeepSpeed's configuration. Steps, accumulation, clipping and averaging are ours, so it has none of them."""
        stage = self.recipe.parallel.zero_stage
        return {
            "train_micro_batch_size_per_gpu": self.recipe.train.micro_batch_size, "gradient_accumulation_steps": 1,
            "gradient_allreduce_op": "sum", "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
            "steps_per_print": None, "timers": {"throughput": {"enabled": False}},
            "zero_optimization": {
                "stage": stage, "overlap_comm": self._overlap, "compute_grad_norm": False,
                "reduce_bucket_size": min(BUCKET, sum(p.numel() for p in chunk.parameters())),
                # stage 2 would put float32 gradients into one bf16 buffer with the others
                "contiguous_gradients": stage == 1}}

    @contextlib.contextmanager
    def _before_the_last(self) -> Iterator[None]:
        """Megatron's schedule runs all micro-batches but the last in here: gradients only add up."""
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
        part, whole = self.optimizer.parts.get(parameter), torch.zeros_like(parameter, dtype=torch.float32)
        if part and self.optimizer.flat:
            whole.view(-1)[part.start:part.end] = part.of(self.optimizer.flat)
        return whole


class ZeroChunk(nn.Module):
    """The model, called through DeepSpeed."""

    def __init__(self, module: GPTModel, zero: Any):
        super().__init__()
        self.module = module
        self._call = lambda *args, **kwargs: zero(*args, **kwargs)  # no submodule: it has this module in it
        self._optimizer = lambda: zero.optimizer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def zero_grad_buffer(self) -> None:
        """Drop the gradients of a step, also of one whose update was refused."""
        optimizer = self._optimizer()
        optimizer.zero_grad()
        for found in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            found.update(dict.fromkeys(found))


@dataclass(frozen=True)
class Part:
    """What this data rank owns of a parameter: flat numbers [start, end), at `at` of its part of group `group`."""

    group: int
    at: int
    start: int
    end: int

    def of(self, parts: list[Tensor]) -> Tensor:
        """parts: of each group this rank's part."""
        return parts[self.group].narrow(0, self.at, self.end - self.start)


class ZeroGradients:
    """This rank's part of every group's gradients, with the methods of Megatron's optimizers.

    `flat`: float32, one a group, from the end of the backward passes until the next step begins.
    """

    def __init__(self, zero: Any, tensor_rank: int):
        self.zero = zero
        self.parts = dict(_parts(zero))
        self.flat: list[Tensor] = []
        cut = [getattr(p, "tensor_model_parallel", False) for p in self.parts]
        # what every tensor rank holds whole counts once
        self._counted = [part for part, own in zip(self.parts.values(), cut, strict=True) if own or tensor_rank == 0]
        self._norms = [part for p, part in self.parts.items() if getattr(p, "sequence_parallel", False)]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.zero.optimizer.param_groups

    @property
    def weights(self) -> list[Tensor]:
        return self.zero.single_partition_of_fp32_groups

    def zero_grad(self) -> None:
        self.flat = []

    def collect(self) -> None:
        """Make one tensor of each group's gradients, and let DeepSpeed's update take that one."""
        gradients = self.zero.averaged_gradients
        for group in range(len(self.weights)):
            flat = getattr(gradients[group], "flat_partition", None)
            if flat is None:
                flat = torch.cat([x.reshape(-1).float() for x in gradients[group]])
                gradients[group] = [flat]
            self.flat.append(flat)

    def sum_over_tensor_ranks(self) -> None:
        """Norms see a part of the tokens on each tensor rank. All of these own the same numbers of a parameter."""
        if self._norms:
            together = torch.cat([part.of(self.flat) for part in self._norms])
            dist.all_reduce(together, group=parallel_state.get_tensor_model_parallel_group())
            start = 0
            for part in self._norms:
                end = start + part.end - part.start
                part.of(self.flat).copy_(together[start:end])
                start = end

    def scale(self, factor: Tensor | float) -> None:
        for flat in self.flat:
            flat.mul_(factor)

    def prepare_grads(self) -> bool:
        """DeepSpeed has no loss scale to take out, and infinite numbers are the judge's business."""
        return False

    def get_grad_norm(self) -> float:
        """Of the whole model, on every rank."""
        norms = torch._foreach_norm([part.of(self.flat) for part in self._counted])
        squares = torch.stack(norms).square().sum() if norms else torch.zeros((), device=self.flat[0].device)
        dist.all_reduce(squares)
        return float(squares.sqrt())


class ZeroState(OptimizerState):
    """The float32 weights and moments that ZeRO keeps, for checkpoints."""

    distributed = True

    def __init__(self, optimizer: ZeroGradients, data_group: dist.ProcessGroup):
        self.optimizer, self.group, self.ranks = optimizer, data_group, dist.get_world_size(data_group)
        self._adam = optimizer.zero.optimizer
        fused = self._adam.defaults["fused"]
        for weight in optimizer.weights:  # as torch's AdamW makes it at its first step
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

    def _held(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        part, weights = self.optimizer.parts.get(parameter), self.optimizer.weights
        if part is None:
            return {}
        return {"weight": part.of(weights),
                **{name: part.of([self._adam.state[weight][name] for weight in weights]) for name in STATES}}

    def _range(self, parameter: nn.Parameter) -> tuple[int, int]:
        part = self.optimizer.parts.get(parameter)
        return (part.start, part.end) if part else (0, 0)


def _parts(zero: Any) -> Iterator[tuple[nn.Parameter, Part]]:
    """Of every parameter, what this data rank owns; nothing of one that lies on other ranks."""
    for group, parameters in enumerate(zero.round_robin_bit16_groups):
        size = zero.partition_size[group]
        first = size * dist.get_rank(zero.real_dp_process_group[group])
        for parameter, offset in zip(parameters, zero.round_robin_bit16_offsets[group], strict=True):
            start, end = max(first, offset), min(first + size, offset + parameter.numel())
            if end > start:
                yield parameter, Part(group, start - first, start - offset, end - offset)


def _groups(chunk: GPTModel, weight_decay: float, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Vectors do not decay, as in Megatron's groups; a group has one type, the model's own first (ZeRO goes by it)."""
    parameters = list(chunk.parameters())
    for wanted in (dtype, *{p.dtype for p in parameters} - {dtype}):
        for decays in (True, False):
            members = [p for p in parameters if p.dtype == wanted and (p.dim() > 1) == decays]
            if members:
                yield {"params": members, "weight_decay": weight_decay if decays else 0.0}


class _Groups:
    """Megatron's process groups under the names that DeepSpeed asks an `mpu` for.

    Context-parallel ranks hold the same weights and different tokens: to ZeRO they are data ranks.
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
    """The package, quiet, on this device, and on the process group that is there already."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # it refuses to start without, also on one process
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # on a CPU it would compile, for minutes, sums through shared memory that only its inference uses
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    return deepspeed
