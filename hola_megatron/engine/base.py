"""Base class of the engines: forward passes, reductions over ranks, and the training step.

    engine = build_engine(recipe, layout)                  # engine/build.py: the one that recipe.engine names
    result = engine.train_step(batches, learning_rate)     # forward, backward, reduce, clip, update
    total, tokens = engine.evaluate(batches)               # summed loss, no gradients
    logits = next_logits(engine, tokens)                   # engine/sampling.py: of the token after the last
    engine.param_shards(), engine.state                    # for checkpoints: this rank's shards

An engine builds data parallelism and optimizer around the model (`_wrap`) and makes the update (`_update`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from hola_megatron.data.stream import Batch
from hola_megatron.engine.cuda_graph import MicroBatchGraph, default_max_documents
from hola_megatron.engine.expert_state import BalancingWeight, restore_biases, router_biases
from hola_megatron.engine.forward import ForwardStep
from hola_megatron.engine.layer_states import LayerStates
from hola_megatron.engine.step_timer import StepTimer
from hola_megatron.model.build import build_model
from hola_megatron.model.parameters import ParamShard, param_shards
from hola_megatron.parallel.groups import Layout
from hola_megatron.parallel.waiting import waiting_for_ranks
from hola_megatron.recipe.schema import Recipe


@dataclass(frozen=True)
class StepResult:
    """Result of one step, equal on every rank. problem: why the update was skipped; None: it was made."""

    loss: float
    grad_norm: float
    tokens: int
    problem: str | None = None

    @property
    def updated(self) -> bool:
        return self.problem is None


Judge = Callable[[float, float], str | None]


def not_finite(loss: float, grad_norm: float) -> str | None:
    """The default judge: refuses a loss or gradient norm that is not finite."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return None
    return f"loss {loss} or grad_norm {grad_norm} is not finite"


class Engine:
    """One rank's shard of model and optimizer.

    `_wrap` sets: `model`, the model chunks wrapped for data parallelism (`chunk.module` is Megatron's GPTModel,
    `chunk.zero_grad_buffer()` zeroes its gradients); `optimizer`, with zero_grad, prepare_grads and get_grad_norm;
    `state`, its tensors for checkpoints; `adam`, the implementation's name for the banner.
    """

    model: list[nn.Module]
    optimizer: Any
    state: Any
    adam: str

    def __init__(self, recipe: Recipe, layout: Layout):
        self.recipe, self.layout = recipe, layout
        self._work = StepTimer(layout.device)
        chunks = build_model(recipe, device=layout.device)
        self.config = chunks[0].config
        self.config.finalize_model_grads_func = self._finalize
        self._graph = self._new_graph() if recipe.train.cuda_graph else None
        self._forward_step = ForwardStep(recipe, layout, self.config)
        self._balancing = BalancingWeight(recipe, self.config, layout.device)
        self._wrap(chunks)
        self.layer_states = LayerStates(chunks)

    def _wrap(self, chunks: list[GPTModel]) -> None:
        """Build data parallelism and optimizer around the model."""
        raise NotImplementedError

    def _finalize(self, model: list[nn.Module], tokens: Tensor, **_: Any) -> None:
        """After the last backward pass: all-reduce the gradients and divide them by all ranks' number of tokens."""
        raise NotImplementedError

    def _update(self, grad_norm: float, learning_rate: float) -> None:
        """Clip the gradients and run the optimizer's step."""
        raise NotImplementedError

    @property
    def _overlap(self) -> bool:
        """Whether gradient reduction overlaps with the backward pass; never with a CUDA graph."""
        parallel, ranks = self.recipe.parallel, self.layout.data * self.layout.context
        return parallel.overlap and ranks > 1 and not self.recipe.train.cuda_graph

    def train_step(self, batches: list[Batch], learning_rate: float, judge: Judge = not_finite) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        batches: of the step. learning_rate: of this step. judge: judge(loss, grad_norm) returns a problem, or None. If
        any rank's judge returns a problem, no rank changes weights or optimizer, and the result has the `problem`.
        """
        self._work.start()
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        scales, biases = ({name: value.clone() for name, value in found.items()}
                          for found in (self.fp8_tensors(), self.router_biases()))
        self._balancing.begin_step(batches)
        sums = self._run(batches, forward_only=False)
        self.optimizer.prepare_grads()
        with waiting_for_ranks():  # on a GPU the host waits for the other ranks here
            grad_norm = float(self.optimizer.get_grad_norm())
        total, tokens = sums.tolist()  # read late: reading synchronises with the device, whose queue would run empty
        loss = total / max(tokens, 1.0)
        problem = judge(loss, grad_norm)
        if self._all_ranks(problem is None):
            self._update(grad_norm, learning_rate)
            self.layer_states.end_step()
        else:
            self.layer_states.forget_step()
            self.restore_fp8(scales)  # the forward pass has updated these two already
            self.restore_biases(biases)
            problem = problem or "another rank found bad numbers"
        return StepResult(loss, grad_norm, int(tokens), problem)

    @property
    def work_seconds(self) -> float:
        """Seconds of the last step from its start until this rank was ready to reduce gradients."""
        return self._work.seconds()

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> tuple[float, int]:
        """(summed loss, tokens) over this step's batches of all ranks, without fp8."""
        for chunk in self.model:
            chunk.eval()
        with self.without_fp8():
            sums = self._run(self._fill_up(batches), forward_only=True)
        with waiting_for_ranks():
            total, tokens = sums.tolist()
        return total, int(tokens)

    @contextmanager
    def without_fp8(self) -> Iterator[None]:
        """Run the model as it is exported: in bf16, at any length, without updates of delayed fp8 scales."""
        wanted, self.config.fp8 = self.config.fp8, None
        try:
            yield
        finally:
            self.config.fp8 = wanted

    def _fill_up(self, batches: list[Batch]) -> list[Batch]:
        """Pad to a multiple of the pipeline's stages, as the interleaved schedule needs, with fully masked batches."""
        missing = -len(batches) % self.layout.pipeline if len(self.model) > 1 else 0
        idle = replace(batches[-1], loss_mask=torch.zeros_like(batches[-1].loss_mask))
        return [*batches, *[idle] * missing]

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The gradient of the last backward pass, in the parameter's shape; zero where another data rank has it."""
        return getattr(parameter, "main_grad", None)

    def fp8_tensors(self) -> dict[str, Tensor]:
        """Scales and amax histories of delayed fp8, by public name; equal on all ranks of a pipeline stage."""
        return {}

    def restore_fp8(self, stored: dict[str, Tensor]) -> None:
        pass

    def router_biases(self) -> dict[str, Tensor]:
        """The routers' biases by public name; equal on all ranks of a pipeline stage."""
        return router_biases(self.model)

    def restore_biases(self, stored: dict[str, Tensor]) -> None:
        restore_biases(self.model, stored)

    def param_shards(self) -> list[ParamShard]:
        return param_shards(self.model, self.layout.tensor_rank, self.layout.tensor)

    def leave_graph(self) -> None:
        """Run training steps eagerly from now on, and release the graph's memory."""
        if self._graph is not None:
            self._graph.leave()

    def describe_graph(self) -> str:
        """One line for the banner; empty without a graph."""
        if self._graph is None:
            return ""
        most = self._graph.max_documents
        return f"a micro-batch{'' if most is None else f' of up to {most} documents'} is one CUDA graph"

    def _new_graph(self) -> MicroBatchGraph:
        train, most = self.recipe.train, None
        if self.recipe.data.documents == "separate":
            most = train.cuda_graph_documents or default_max_documents(train.micro_batch_size, train.sequence_length)
        return MicroBatchGraph(self._one_micro_batch, self.layout.device, most, log=partial(print, flush=True))

    def _run(self, batches: list[Batch], forward_only: bool) -> Tensor:
        """[summed loss, tokens] float64 over micro-batches and data ranks; also reduces the gradients, if any."""
        if forward_only or self._graph is None:
            return self._sum_over_ranks([result["sums"] for result in self._passes(batches, forward_only)])
        sums = [self._graph(batch) for batch in batches]
        self._finalize(self.model, torch.stack(sums)[:, 1].double().sum().int())
        return self._sum_over_ranks(sums)

    def _one_micro_batch(self, batch: Batch) -> Tensor:
        """[summed loss, tokens] of a forward and backward pass, which accumulates gradients without reduction."""
        finalize, self.config.finalize_model_grads_func = self.config.finalize_model_grads_func, None
        try:
            return self._passes([batch], forward_only=False)[0]["sums"]
        finally:
            self.config.finalize_model_grads_func = finalize

    def _passes(self, batches: list[Batch], forward_only: bool) -> list[dict[str, Tensor]]:
        """Megatron's schedule over the micro-batches; returns the results of `ForwardStep`."""
        rows, length = batches[0].tokens.shape
        packed = batches[0].cu_seqlens is not None
        return get_forward_backward_func()(
            forward_step_func=self._forward_step,
            # every chunk of a pipeline rank iterates over the same micro-batches
            data_iterator=[iter(batches) for _ in self.model] if len(self.model) > 1 else iter(batches),
            model=self.model if len(self.model) > 1 else self.model[0],
            num_microbatches=len(batches),
            seq_length=rows * length if packed else length,
            micro_batch_size=1 if packed else rows,
            forward_only=forward_only)

    @waiting_for_ranks()
    def _sum_over_ranks(self, results: list[Tensor]) -> Tensor:
        """[summed loss, tokens] over micro-batches and data ranks, on every pipeline stage."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.layout.device)
        for result in results:
            sums += result.double()
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        if self.layout.pipeline > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(sums, last, group=parallel_state.get_pipeline_model_parallel_group())
        return sums

    @waiting_for_ranks()
    def _all_ranks(self, ok: bool) -> bool:
        """Whether `ok` is true on all ranks. A collective."""
        if self.layout.world == 1:
            return ok
        flag = torch.tensor([0.0 if ok else 1.0], device=self.layout.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return not flag.item()
