"""The forward step of a micro-batch: model and summed loss."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hola_kernels.transfer import sent
from hola_megatron.data.stream import Batch
from hola_megatron.layers.documents import Documents
from hola_megatron.model.logits import chunk_rows, logits_copies
from hola_megatron.model.loss import summed_loss
from hola_megatron.parallel.groups import Layout
from hola_megatron.parallel.sequence_shard import SequenceShard
from hola_megatron.recipe.schema import Recipe


class ForwardStep:
    """Megatron's forward_step_func: called with an iterator of batches and a model chunk."""

    def __init__(self, recipe: Recipe, layout: Layout, config: TransformerConfig):
        self.recipe, self.layout, self.config = recipe, layout, config

    def __call__(self, batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
        batch, device = next(batches), self.layout.device
        tokens, labels, mask = (sent(x, device) for x in (batch.tokens, batch.labels, batch.loss_mask))
        documents, rank, ranks = None, self.layout.context_rank, self.layout.context
        if (packed := batch.documents) is not None:
            documents = Documents.of(packed, rank, ranks)
            tokens, labels, mask = (x.reshape(1, -1) for x in (tokens, labels, mask))
        if ranks > 1:  # all context ranks read the same samples
            shard = documents.shard if documents else SequenceShard.of_rows(tokens.shape[1] // ranks, rank, ranks)
            tokens, labels, mask = (shard.slice(x) for x in (tokens, labels, mask))
        rows = self._logit_rows(labels.numel())
        if rows is None:
            output = model(tokens, None, None, labels=labels, packed_seq_params=documents)
            return output, partial(_masked_sum, mask)
        output = model(tokens, None, None, labels=labels, packed_seq_params=documents, loss_mask=mask,
                       output_processor=partial(self._chunked_loss, rows))
        return output, partial(_known_sum, mask)

    def _logit_rows(self, tokens: int) -> int | None:
        """Tokens per chunk of the loss; None: not chunked, by Megatron's (or Transformer Engine's) own loss."""
        model, number = self.recipe.model, self.config.params_dtype.itemsize
        copies = logits_copies(number, self.config.cross_entropy_loss_fusion)
        return chunk_rows(tokens, model.vocab_size // self.layout.tensor, number, copies,
                          self.recipe.train.logits_budget_gb)

    def _chunked_loss(self, rows: int, *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None,
                      labels: Tensor, loss_mask: Tensor, **_: Any) -> Tensor:
        """Output layer and loss in chunks; Megatron's model calls it in place of its own (output_processor)."""
        return summed_loss(
            hidden=hidden_states, weight=output_layer.weight if output_weight is None else output_weight, labels=labels,
            mask=loss_mask, rows=rows, group=parallel_state.get_tensor_model_parallel_group(),
            sequence_parallel=self.config.sequence_parallel, backend=self.recipe.model.backend)


def _known_sum(mask: Tensor, total: Tensor, non_loss_data: bool = False) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    tokens = mask.sum()
    return total, tokens.int(), {"sums": torch.stack([total.detach().float(), tokens])}


def _masked_sum(mask: Tensor, losses: Tensor, non_loss_data: bool = False) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total, tokens = torch.where(mask != 0, losses.float() * mask, 0.0).sum(), mask.sum()
    return total, tokens.int(), {"sums": torch.stack([total.detach(), tokens])}
