"""The model's prediction of the next token, for sample texts."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from hola_megatron.engine.base import Engine
from hola_megatron.parallel.waiting import waiting_for_ranks


@torch.no_grad()
def next_logits(engine: Engine, tokens: Tensor) -> Tensor:
    """tokens [T] int64 -> float32 logits [vocab] after the last one, on every rank."""
    for chunk in engine.model:
        chunk.eval()
    layout = engine.layout
    # padding after the last token changes nothing before it; a context-parallel shard has a minimum length
    wanted = max(len(tokens), layout.context * engine.recipe.min_shard_tokens if layout.context > 1 else 0)
    length = -(-wanted // (layout.tensor * layout.context)) * layout.tensor
    row = torch.nn.functional.pad(tokens, (0, length * layout.context - len(tokens)))[None].to(layout.device)
    shard, (holder, last) = row.chunk(layout.context, 1)[layout.context_rank], divmod(len(tokens) - 1, length)

    def forward(_: Any, model: torch.nn.Module) -> tuple[Tensor, Any]:
        return model(shard, None, None), lambda output, non_loss_data=False: output[0, last].float()

    count = engine.layout.pipeline if len(engine.model) > 1 else 1
    with engine.without_fp8():
        found = get_forward_backward_func()(
            forward_step_func=forward, data_iterator=[None] * len(engine.model), model=engine.model,
            num_microbatches=count, seq_length=row.shape[1], micro_batch_size=1, forward_only=True,
            collect_non_loss_data=True)
    return _whole_vocabulary(engine, found[0] if found else None, holder)


@waiting_for_ranks()
def _whole_vocabulary(engine: Engine, local: Tensor | None, holder: int) -> Tensor:
    """Gather the vocabulary's shards of the logits on context rank `holder`, and broadcast them to all ranks."""
    size = engine.recipe.model.vocab_size
    if local is None:
        local = torch.zeros(size // engine.layout.tensor, device=engine.layout.device)
    if engine.layout.context > 1:
        local, group = local.contiguous(), parallel_state.get_context_parallel_group()
        dist.broadcast(local, dist.get_global_rank(group, holder), group=group)
    if engine.layout.tensor > 1:
        shards = [torch.empty_like(local) for _ in range(engine.layout.tensor)]
        dist.all_gather(shards, local.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        local = torch.cat(shards)
    if engine.layout.pipeline > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(local, last, group=parallel_state.get_pipeline_model_parallel_group())
    return local
