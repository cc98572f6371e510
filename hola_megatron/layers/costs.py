"""Units of the plan's memory estimate: `Term`, one saved tensor, and `Share`, the sizes of a rank's micro-batch.

Importable without torch. Every layer kind gives its own terms (layers/*/costs.py); the plan adds those that all
layers have (plan/activations.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hola_megatron.layers.padding import CountedKind, projection_padding, projection_rows

if TYPE_CHECKING:
    from hola_megatron.layers.recipe_view import Recipe

FLOAT32 = 4


@dataclass(frozen=True)
class Term:
    """One saved tensor, or several of the same kind. part: "activations", "kernels" or "context"; bytes: their size."""

    part: str
    name: str
    bytes: float


@dataclass(frozen=True)
class Share:
    """Sizes of one rank's shard of a layer and of a micro-batch."""

    recipe: Recipe

    @property
    def number(self) -> int:
        """Bytes of one element in the training precision."""
        return 2 if self.recipe.train.precision == "bf16" else FLOAT32

    @property
    def product(self) -> int:
        """Bytes per element of the input that a linear saves (1 with fp8)."""
        return 1 if self.recipe.fp8.recipe else self.number

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on this rank."""
        train = self.recipe.train
        return train.micro_batch_size * train.sequence_length // self.recipe.parallel.context

    @property
    def norm_tokens(self) -> int:
        """Tokens per rank in norms and residuals (sharded further by sequence parallelism)."""
        return self.tokens // (self.recipe.parallel.tensor if self.recipe.parallel.sequence else 1)

    def heads(self, kind: CountedKind) -> int:
        return kind.heads(self.recipe.model) // self.recipe.parallel.tensor

    def projection(self, kind: CountedKind) -> int:
        """Width of a token's fused projection on this rank, padding included."""
        rows = projection_rows(kind, self.recipe.model, self.recipe.parallel.tensor)
        return rows + projection_padding(rows)

    @property
    def packed(self) -> bool:
        return self.recipe.data.documents == "separate"

    @property
    def interleaved(self) -> bool:
        """Several unpacked rows: in Megatron's [S, B] layout a row is not contiguous and is copied where it must be."""
        return not self.packed and self.recipe.train.micro_batch_size > 1

    @property
    def sequences(self) -> int:
        """Sequences of full length on this rank; shorter packed documents need less."""
        return max(1, self.tokens // self.longest)

    @property
    def longest(self) -> int:
        """Tokens on this rank of its longest sequence."""
        train, context = self.recipe.train, self.recipe.parallel.context
        if self.packed:  # the packed row of all samples is sharded as one: a rank may hold whole samples
            return min(train.sequence_length, self.tokens)
        return train.sequence_length // context
