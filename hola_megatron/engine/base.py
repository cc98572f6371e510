"""What every engine does the same way: forward passes, sums over ranks, and the one way through a training step.

    engine = build_engine(recipe, layout)                  # the one that recipe.engine names
    result = engine.train_step(batches, learning_rate)     # forward, backward, reduce, clip, update
    total, tokens = engine.evaluate(batches)               # summed loss, no gradients
    logits = engine.next_logits(tokens)                    # of the token after the last
    engine.parameter_pieces(), engine.state                # for checkpoints: every slice this rank holds

An engine builds data parallelism and optimizer around the model (`_wrap`) and makes the update (`_update`).
"""

from __future__ import annotations

import math
import time
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

from hola_kernels.transfer import sent
from hola_megatron.config import Recipe
from hola_megatron.data.stream import Batch
from hola_megatron.engine.cuda_graph import FixedBatch, MicroBatchGraph, room_for
from hola_megatron.engine.expert_state import restore_biases, router_biases
from hola_megatron.model.build import build_model
from hola_megatron.model.documents import Documents
from hola_megatron.model.logits import logits_copies, piece_rows
from hola_megatron.model.loss import summed_loss
from hola_megatron.model.parameters import Piece, pieces
from hola_megatron.parallel.groups import Layout


@dataclass(frozen=True)
class StepResult:
    """What one step did, the same on every rank."""

    loss: float
    grad_norm: float
    tokens: int
    problem: str | None = None

    @property
    def updated(self) -> bool:
        return self.problem is None


Judge = Callable[[float, float], str | None]


def not_finite(loss: float, grad_norm: float) -> str | None:
    """The judge that only refuses numbers that are none."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return None
    return f"loss {loss} or grad_norm {grad_norm} is not finite"


class Engine:
    """One rank's share of model and optimizer.

    What `_wrap` sets: `model`, the model's chunks inside what reduces their gradients (`chunk.module` is Megatron's
    GPTModel, `chunk.zero_grad_buffer()` drops the last step's gradients); `optimizer`, with zero_grad, prepare_grads
    and get_grad_norm; `state`, its tensors for checkpoints; `adam`, which one it is, for the banner.
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
        self._wrap(chunks)

    def _wrap(self, chunks: list[GPTModel]) -> None:
        """Build data parallelism and optimizer around the model."""
        raise NotImplementedError

    def _finalize(self, model: list[nn.Module], tokens: Tensor, **_: Any) -> None:
        """After the last backward pass: gradients summed over all ranks and divided by the tokens of all of them."""
        raise NotImplementedError

    def _update(self, grad_norm: float, learning_rate: float) -> None:
        """Clip and make the optimizer's step."""
        raise NotImplementedError

    @property
    def _overlap(self) -> bool:
        """Whether gradients are reduced while they are computed; a graph computes them, and reduces none."""
        parallel, ranks = self.recipe.parallel, self.layout.data * self.layout.context
        return parallel.overlap and ranks > 1 and not self.recipe.train.cuda_graph

    def train_step(self, batches: list[Batch], learning_rate: float, judge: Judge = not_finite) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        `judge(loss, grad_norm)` says what is wrong, or None. If any rank's judge finds something, weights and
        optimizer stay untouched on all of them and the result carries the `problem`.
        """
        self._work.start()
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        scales, biases = ({name: value.clone() for name, value in found.items()}
                          for found in (self.fp8_tensors(), self.router_biases()))
        sums = self._run(batches, forward_only=False)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        total, tokens = sums.tolist()  # read only now: reading waits for the device, whose queue would run empty
        loss = total / max(tokens, 1.0)
        problem = judge(loss, grad_norm)
        if self._all_agree(problem is None):
            self._update(grad_norm, learning_rate)
        else:
            self.restore_fp8(scales)  # these two have followed the batch already
            self.restore_biases(biases)
            problem = problem or "another rank found bad numbers"
        return StepResult(loss, grad_norm, int(tokens), problem)

    @property
    def work_seconds(self) -> float:
        """Of the last step: from its start until this rank was ready to reduce gradients over ranks."""
        return self._work.seconds()

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> tuple[float, int]:
        """(summed loss, tokens) over this step's batches of all ranks, without fp8."""
        for chunk in self.model:
            chunk.eval()
        with self._without_fp8():
            total, tokens = self._run(self._whole_rounds(batches), forward_only=True).tolist()
        return total, int(tokens)

    @contextmanager
    def _without_fp8(self) -> Iterator[None]:
        """See the model as it is exported: in bf16, at any length, and with no trace in the scales of delayed fp8."""
        wanted, self.config.fp8 = self.config.fp8, None
        try:
            yield
        finally:
            self.config.fp8 = wanted

    def _whole_rounds(self, batches: list[Batch]) -> list[Batch]:
        """The interleaved schedule takes multiples of the pipeline's length: fill up with batches that do not count."""
        missing = -len(batches) % self.layout.pipeline if len(self.model) > 1 else 0
        idle = replace(batches[-1], loss_mask=torch.zeros_like(batches[-1].loss_mask))
        return [*batches, *[idle] * missing]

    @torch.no_grad()
    def next_logits(self, tokens: Tensor) -> Tensor:
        """tokens [T] int64 -> float32 logits [vocab] after the last one, on every rank."""
        for chunk in self.model:
            chunk.eval()
        layout = self.layout
        # what stands behind the last token changes nothing before it; a context-parallel part has a least length
        wanted = max(len(tokens), layout.context * self.recipe.least_part if layout.context > 1 else 0)
        length = -(-wanted // (layout.tensor * layout.context)) * layout.tensor
        row = torch.nn.functional.pad(tokens, (0, length * layout.context - len(tokens)))[None].to(layout.device)
        part, (holder, last) = row.chunk(layout.context, 1)[layout.context_rank], divmod(len(tokens) - 1, length)

        def forward(_: Any, model: torch.nn.Module) -> tuple[Tensor, Any]:
            return model(part, None, None), lambda output, non_loss_data=False: output[0, last].float()

        count = self.layout.pipeline if len(self.model) > 1 else 1
        with self._without_fp8():
            found = get_forward_backward_func()(
                forward_step_func=forward, data_iterator=[None] * len(self.model), model=self.model,
                num_microbatches=count, seq_length=row.shape[1], micro_batch_size=1, forward_only=True,
                collect_non_loss_data=True)
        return self._whole_vocabulary(found[0] if found else None, holder)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """As the last backward pass left it, in the parameter's shape; zero where another data rank holds it."""
        return getattr(parameter, "main_grad", None)

    def fp8_tensors(self) -> dict[str, Tensor]:
        """What the delayed fp8 recipe remembers, by public name; equal on all ranks of a pipeline stage."""
        return {}

    def restore_fp8(self, stored: dict[str, Tensor]) -> None:
        pass

    def router_biases(self) -> dict[str, Tensor]:
        """By public name; equal on all ranks of a pipeline stage."""
        return router_biases(self.model)

    def restore_biases(self, stored: dict[str, Tensor]) -> None:
        restore_biases(self.model, stored)

    def parameter_pieces(self) -> list[Piece]:
        return pieces(self.model, self.layout.tensor_rank, self.layout.tensor)

    def leave_graph(self) -> None:
        """The same training steps without recording them, from here on; the graph's memory is given back."""
        if self._graph is not None:
            self._graph.leave()

    def describe_graph(self) -> str:
        """What the banner says of it; nothing without one."""
        if self._graph is None:
            return ""
        room = "" if self._graph.room is None else f" of up to {self._graph.room} documents"
        return f"a micro-batch{room} is one CUDA graph"

    def _new_graph(self) -> MicroBatchGraph:
        train, room = self.recipe.train, None
        if self.recipe.data.documents == "separate":
            room = train.cuda_graph_documents or room_for(train.micro_batch_size, train.sequence_length)
        return MicroBatchGraph(self._one_micro_batch, self.layout.device, room, say=partial(print, flush=True))

    def _run(self, batches: list[Batch], forward_only: bool) -> Tensor:
        """[summed loss, tokens] float64 over micro-batches and data ranks; gradients, if any, are reduced then."""
        if forward_only or self._graph is None:
            return self._sum_over_ranks([result["sums"] for result in self._passes(batches, forward_only)])
        sums = [self._graph(batch) for batch in batches]
        self._finalize(self.model, torch.stack(sums)[:, 1].double().sum().int())
        return self._sum_over_ranks(sums)

    def _one_micro_batch(self, batch: Batch) -> Tensor:
        """[summed loss, tokens] of a forward and backward pass, which adds to the gradients and reduces nothing."""
        finalize, self.config.finalize_model_grads_func = self.config.finalize_model_grads_func, None
        try:
            return self._passes([batch], forward_only=False)[0]["sums"]
        finally:
            self.config.finalize_model_grads_func = finalize

    def _passes(self, batches: list[Batch], forward_only: bool) -> list[dict[str, Tensor]]:
        """Megatron's schedule over micro-batches: what `_forward` says of each, gradients as its config says."""
        rows, length = batches[0].tokens.shape
        packed = batches[0].cu_seqlens is not None
        return get_forward_backward_func()(
            forward_step_func=self._forward,
            # every chunk of a pipeline rank walks the same micro-batches
            data_iterator=[iter(batches) for _ in self.model] if len(self.model) > 1 else iter(batches),
            model=self.model if len(self.model) > 1 else self.model[0],
            num_microbatches=len(batches),
            seq_length=rows * length if packed else length,
            micro_batch_size=1 if packed else rows,
            forward_only=forward_only)

    def _forward(self, batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
        batch, device = next(batches), self.layout.device
        tokens, labels, mask = (sent(x, device) for x in (batch.tokens, batch.labels, batch.loss_mask))
        documents, rank, ranks = None, self.layout.context_rank, self.layout.context
        if batch.cu_seqlens is not None:
            documents = (Documents.bounded(batch.cu_seqlens, tokens.shape[1]) if isinstance(batch, FixedBatch)
                         else Documents.from_cuts(batch.cu_seqlens, device, rank, ranks))
            tokens, labels, mask = (x.reshape(1, -1) for x in (tokens, labels, mask))
        # the peers of a context-parallel group read the same samples, and each keeps one part of every row
        tokens, labels, mask = (x.chunk(ranks, 1)[rank] for x in (tokens, labels, mask))
        rows = self._logit_rows(labels.numel())
        if rows is None:
            output = model(tokens, None, None, labels=labels, packed_seq_params=documents)
            return output, partial(_masked_sum, mask)
        output = model(tokens, None, None, labels=labels, packed_seq_params=documents, loss_mask=mask,
                       output_processor=partial(self._loss_in_pieces, rows))
        return output, partial(_known_sum, mask)

    def _logit_rows(self, tokens: int) -> int | None:
        """Tokens whose logits are made at once; None: of all, by Megatron's (or Transformer Engine's) own loss."""
        model, number = self.recipe.model, self.config.params_dtype.itemsize
        copies = logits_copies(number, self.config.cross_entropy_loss_fusion)
        return piece_rows(tokens, model.vocab_size // self.layout.tensor, number, copies,
                          self.recipe.train.logits_budget_gb)

    def _loss_in_pieces(self, rows: int, *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None,
                        labels: Tensor, loss_mask: Tensor, **_: Any) -> Tensor:
        """Megatron's model calls this in place of its output layer and loss."""
        return summed_loss(
            hidden=hidden_states, weight=output_layer.weight if output_weight is None else output_weight, labels=labels,
            mask=loss_mask, rows=rows, group=parallel_state.get_tensor_model_parallel_group(),
            sequence_parallel=self.config.sequence_parallel, backend=self.recipe.model.backend)

    def _sum_over_ranks(self, parts: list[Tensor]) -> Tensor:
        """[summed loss, tokens] over micro-batches and data ranks, known to every pipeline stage."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.layout.device)
        for part in parts:
            sums += part.double()
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        if self.layout.pipeline > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(sums, last, group=parallel_state.get_pipeline_model_parallel_group())
        return sums

    def _all_agree(self, fine: bool) -> bool:
        if self.layout.world == 1:
            return fine
        flag = torch.tensor([0.0 if fine else 1.0], device=self.layout.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return not flag.item()

    def _whole_vocabulary(self, local: Tensor | None, holder: int) -> Tensor:
        """The logits that the context-parallel rank `holder` has, put together and known to all ranks."""
        size = self.recipe.model.vocab_size
        if local is None:
            local = torch.zeros(size // self.layout.tensor, device=self.layout.device)
        if self.layout.context > 1:
            local, group = local.contiguous(), parallel_state.get_context_parallel_group()
            dist.broadcast(local, dist.get_global_rank(group, holder), group=group)
        if self.layout.tensor > 1:
            parts = [torch.empty_like(local) for _ in range(self.layout.tensor)]
            dist.all_gather(parts, local.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
            local = torch.cat(parts)
        if self.layout.pipeline > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(local, last, group=parallel_state.get_pipeline_model_parallel_group())
        return local


def build_engine(recipe: Recipe, layout: Layout) -> Engine:
    """The engine that the recipe names."""
    if recipe.engine == "deepspeed":
        from hola_megatron.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(recipe, layout)
    from hola_megatron.engine.megatron import MegatronEngine

    return MegatronEngine(recipe, layout)


class StepTimer:
    """Seconds between two points of the work: of the GPU's stream, or of the clock without one."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._cuda else [0.0, 0.0]

    def start(self) -> None:
        self._mark(0)

    def stop(self) -> None:
        self._mark(1)

    def seconds(self) -> float:
        """Call after the step's results have been read (the stream has passed both points then)."""
        begin, end = self._marks
        return begin.elapsed_time(end) / 1e3 if self._cuda else end - begin

    def _mark(self, which: int) -> None:
        if self._cuda:
            self._marks[which].record()
        else:
            self._marks[which] = time.perf_counter()


def _known_sum(mask: Tensor, total: Tensor, non_loss_data: bool = False) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    tokens = mask.sum()
    return total, tokens.int(), {"sums": torch.stack([total.detach().float(), tokens])}


def _masked_sum(mask: Tensor, losses: Tensor, non_loss_data: bool = False) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total, tokens = (losses.float() * mask).sum(), mask.sum()
    return total, tokens.int(), {"sums": torch.stack([total.detach(), tokens])}
