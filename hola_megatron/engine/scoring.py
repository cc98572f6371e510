"""Likelihoods of token rows under the model in training, in any layout: for tasks inside the run.

Data ranks share the rows; the ranks of one copy of the model work on the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from hola_megatron.engine.base import Engine
from hola_megatron.parallel.waiting import waiting_for_ranks

LOGIT_ROWS = 1024  # positions whose logits are whole at a time


class Targets(NamedTuple):
    """The P predicted tokens of a batch: row, column of the token before, and the token itself, each [P] int64."""

    row: Tensor
    column: Tensor
    token: Tensor


@torch.no_grad()
def shared_scores(engine: Engine, rows: Sequence[tuple[list[int], int]], *, told: Callable[[], None] = lambda: None
                  ) -> list[tuple[float, bool]]:
    """(log likelihood of the last tokens, whether each is the first choice) of every row. A collective of all ranks.

    Args:
        rows: (token ids, how many of the last ones are predicted; fewer than there are ids), equal on all ranks.
        told: called before each forward pass.

    Returns:
        The same on every rank, in the order of `rows`.
    """
    for chunk in engine.model:
        chunk.eval()
    layout = engine.layout
    batches = _batches(engine, [len(ids) for ids, _ in rows])
    found = torch.zeros(len(rows), 2, dtype=torch.float64, device=layout.device)
    for first in range(0, len(batches), layout.data):  # as many passes on every data rank: some gather parameters
        told()
        mine = batches[min(first + layout.data_rank, len(batches) - 1)]
        scores = batch_scores(engine, [rows[n] for n in mine])
        if first + layout.data_rank < len(batches):
            found[mine] = scores
    with waiting_for_ranks():
        dist.all_reduce(found, group=parallel_state.get_data_parallel_group())
        return [(nats, greedy == 1.0) for nats, greedy in found.tolist()]


def _batches(engine: Engine, lengths: list[int]) -> list[list[int]]:
    """Numbers of the rows of each forward pass, longest first.

    Padded they have the tokens of a micro-batch at most, and logits of at most train.logits_budget_gb.
    """
    train, model = engine.recipe.train, engine.recipe.model
    tokens = train.micro_batch_size * train.sequence_length
    if train.logits_budget_gb is not None:
        bytes_each = model.vocab_size // engine.layout.tensor * engine.config.params_dtype.itemsize
        tokens = min(tokens, int(train.logits_budget_gb * 1e9 / bytes_each))
    batches: list[list[int]] = []
    for n in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens:
            batches[-1].append(n)
        else:
            batches.append([n])
    return batches


@torch.no_grad()
def batch_scores(engine: Engine, rows: list[tuple[list[int], int]]) -> Tensor:
    """[B, 2] float64 of one forward pass: log likelihood, and 1 where every predicted token is the first choice."""
    layout, longest = engine.layout, max(len(ids) for ids, _ in rows) - 1
    # padding behind a row changes nothing in it; a context-parallel shard has a minimum length
    wanted = max(longest, layout.context * engine.recipe.min_shard_tokens if layout.context > 1 else 0)
    length = -(-wanted // (layout.tensor * layout.context)) * layout.tensor
    tokens = torch.zeros(len(rows), length * layout.context, dtype=torch.int64)
    for n, (ids, _) in enumerate(rows):
        tokens[n, : len(ids) - 1] = torch.tensor(ids[:-1])
    targets = _targets(rows, layout.device)
    shard = tokens.to(layout.device).chunk(layout.context, 1)[layout.context_rank]
    begin = layout.context_rank * length
    here = ((targets.column >= begin) & (targets.column < begin + length)).nonzero().squeeze(1)
    held = Targets(*(x[here] for x in targets))

    def scored(output: Tensor, non_loss_data: bool = False) -> Tensor:
        return _of_logits(engine, output, held._replace(column=held.column - begin))

    def forward(_: Any, model: torch.nn.Module) -> tuple[Tensor, Any]:
        return model(shard, None, None), scored

    count = layout.pipeline if len(engine.model) > 1 else 1
    with engine.without_fp8():
        parts = get_forward_backward_func()(
            forward_step_func=forward, data_iterator=[None] * len(engine.model), model=engine.model,
            num_microbatches=count, seq_length=tokens.shape[1], micro_batch_size=len(rows), forward_only=True,
            collect_non_loss_data=True)
    whole = torch.zeros(len(targets.row), 2, dtype=torch.float64, device=layout.device)
    if parts:
        whole[here] = parts[0]
    _over_the_model(engine, whole)
    result = whole.new_zeros(len(rows), 2)
    result[:, 0].index_add_(0, targets.row, whole[:, 0])
    result[:, 1].index_add_(0, targets.row, 1.0 - whole[:, 1])  # how many are not the first choice
    result[:, 1] = (result[:, 1] == 0).double()
    return result


def _targets(rows: list[tuple[list[int], int]], device: torch.device) -> Targets:
    found = [(n, column, ids[column + 1]) for n, (ids, predicted) in enumerate(rows)
             for column in range(len(ids) - 1 - predicted, len(ids) - 1)]
    return Targets(*torch.tensor(found, dtype=torch.int64, device=device).reshape(-1, 3).unbind(1))


def _of_logits(engine: Engine, output_BTV: Tensor, targets: Targets) -> Tensor:
    """[P, 2] float64 of logits of this rank's part of the vocabulary."""
    found = [torch.zeros(0, 2, dtype=torch.float64, device=output_BTV.device)]
    for at in range(0, len(targets.row), LOGIT_ROWS):
        row, column, token = (x[at: at + LOGIT_ROWS] for x in targets)
        logs = _whole_vocabulary(engine, output_BTV[row, column].float()).log_softmax(-1)
        nats = logs.gather(1, token[:, None]).squeeze(1)
        found.append(torch.stack([nats.double(), (logs.argmax(-1) == token).double()], 1))
    return torch.cat(found)


@waiting_for_ranks()
def _whole_vocabulary(engine: Engine, logits: Tensor) -> Tensor:
    """[P, V] of [P, V / tensor ranks]."""
    if engine.layout.tensor == 1:
        return logits
    shards = [torch.empty_like(logits) for _ in range(engine.layout.tensor)]
    dist.all_gather(shards, logits.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(shards, 1)


@waiting_for_ranks()
def _over_the_model(engine: Engine, whole: Tensor) -> None:
    """Give every rank of a model's copy what the context ranks of its last pipeline stage hold."""
    if engine.layout.context > 1:
        dist.all_reduce(whole, group=parallel_state.get_context_parallel_group())
    if engine.layout.pipeline > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(whole, last, group=parallel_state.get_pipeline_model_parallel_group())
