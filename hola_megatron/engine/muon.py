"""Muon for the matrices of the layers, AdamW for everything else, as one optimizer.

Muon replaces a matrix's momentum by the nearest matrix whose singular values are all about one (Newton-Schulz steps of
the package emerging-optimizers):

    m <- momentum m + (1 - momentum) g      d = momentum m + (1 - momentum) g        (Nesterov)
    w <- (1 - lr wd) w - lr 0.2 sqrt(max(rows, columns)) orthogonal(d)

The factor gives the update the root mean square of AdamW's (about 0.2), so learning rate and weight decay are those of
AdamW, and one schedule serves both. Source: Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982.

Matrices: of the fused input projection, each head's q, k, v and gate separately, since heads are independent before the
output projection (choice). b and a have one row per head, for which the formula gives a unit vector. The output
projection, and the MLP's gate, up and down, are one matrix each. A head is on one tensor rank and needs no messages;
the other four are gathered over tensor ranks, and every rank computes the whole result and takes its shard: the update
does not depend on the tensor-parallel size. Padding belongs to no matrix. AdamW updates embedding and output
projection, convolutions, norms, decay, gates, sinks, and experts.

Megatron-core's own Muon is not used: it treats a fused projection as one matrix, and its state is not in the form of
our checkpoints.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from torch import Tensor, nn

from hola_megatron.engine.adam import GroupStepAdam
from hola_megatron.errors import RecipeError
from hola_megatron.layers.spec import Parameter
from hola_megatron.model.parameters import unwrapped
from hola_megatron.recipe.schema import TrainConfig

UPDATE_RMS = 0.2
COEFFICIENTS = "quintic"


@dataclass(frozen=True)
class Matrix:
    """One or more matrices to orthogonalise: rows [start, start + rows) of a parameter's shard on this rank.

    heads: number of stacked matrices, each whole on this rank; 0: one matrix, sharded over tensor ranks along
    `partition_dim` (None: whole).
    """

    start: int
    rows: int
    heads: int = 0
    partition_dim: int | None = None


class Muon(GroupStepAdam):
    """Muon for parameters with an entry in `matrices`, AdamW for the others. Source: arXiv 2502.16982."""

    def __init__(self, params: Any, *, momentum: float, steps: int, low_precision: bool, group: dist.ProcessGroup,
                 **kwargs: Any):
        super().__init__(params, **kwargs)
        self.momentum, self.steps, self.group = momentum, steps, group
        self.precision = "medium" if low_precision else "highest"  # Newton-Schulz in bf16, or in float32
        self.matrices: dict[Tensor, list[Matrix]] = {}

    def make_state(self) -> None:
        """Initialise zero moments of every parameter; Muon's parameters have no second moment."""
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    moments = ("exp_avg",) if p in self.matrices else ("exp_avg", "exp_avg_sq")
                    self.state[p].update({name: torch.zeros_like(p) for name in moments})

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        self.make_state()
        others = [p for p in params if p not in self.matrices]
        if others:
            super()._update(others, group)
        for p in params:
            if p in self.matrices:
                self._update_matrices(p, group)

    def _update_matrices(self, p: Tensor, group: dict[str, Any]) -> None:
        from emerging_optimizers.utils import fp32_matmul_precision

        mean = self.state[p]["exp_avg"].lerp_(p.grad, 1 - self.momentum)
        direction = p.grad.lerp(mean, self.momentum)
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        with fp32_matmul_precision(self.precision):
            for matrix in self.matrices[p]:
                rows = slice(matrix.start, matrix.start + matrix.rows)
                p[rows].add_(self._orthogonal(direction[rows], matrix), alpha=-group["lr"])

    def _orthogonal(self, x: Tensor, matrix: Matrix) -> Tensor:
        """x [rows, columns] -> the scaled, orthogonalised update of the same shape."""
        from emerging_optimizers.orthogonalized_optimizers import get_muon_scale_factor
        from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz, newton_schulz_tp

        if matrix.heads:
            heads = x.unflatten(0, (matrix.heads, -1))
            shape = heads.shape[1:]
            found = F.normalize(x, dim=-1) if shape[0] == 1 else newton_schulz(heads, self.steps, COEFFICIENTS)
        else:
            shape = [n * (self.group.size() if axis == matrix.partition_dim else 1) for axis, n in enumerate(x.shape)]
            found = newton_schulz_tp(x.contiguous(), self.steps, COEFFICIENTS, self.group, matrix.partition_dim,
                                     "duplicated")
        return found.reshape(x.shape) * (UPDATE_RMS * get_muon_scale_factor(*shape, mode="spectral"))


def muon_optimizer(config: OptimizerConfig, chunks: list[nn.Module], train: TrainConfig,
                   group: dist.ProcessGroup) -> MegatronOptimizer:
    """Megatron's optimizer with Muon inside. group: tensor ranks. Raises RecipeError without emerging-optimizers."""
    if importlib.util.find_spec("emerging_optimizers") is None:
        raise RecipeError("train.optimizer: muon needs the package emerging-optimizers; install the extra "
                          "hola-megatron[muon], or set train.optimizer=adamw")
    import megatron.core.optimizer as optimizers

    # Megatron builds every optimizer with the class `Adam` of this module
    before = optimizers.Adam, optimizers.USING_PYTORCH_OPTIMIZER
    optimizers.Adam = partial(Muon, momentum=train.muon_momentum, steps=train.muon_steps,
                              low_precision=train.precision == "bf16", group=group)
    optimizers.USING_PYTORCH_OPTIMIZER = False
    try:
        made = get_megatron_optimizer(config, chunks)
    finally:
        optimizers.Adam, optimizers.USING_PYTORCH_OPTIMIZER = before
    found = {getattr(p, "main_param", p): entries for p, entries in matrices(chunks, group.size())}
    for inner in made.chained_optimizers:
        if inner.optimizer is not None:
            inner.optimizer.matrices = found
            inner.init_state_fn = lambda muon, config: muon.make_state()
    return made


def matrices(chunks: list[nn.Module], ranks: int) -> Iterator[tuple[nn.Parameter, list[Matrix]]]:
    """(parameter, its matrices) of all parameters that Muon updates."""
    for chunk in chunks:
        for layer in unwrapped(chunk).decoder.layers:
            mixer = layer.self_attention
            stored: dict[str, list[Parameter]] = defaultdict(list)
            for row in mixer.kind.parameters(mixer.model):
                if row.muon:
                    stored[row.stored_in].append(row)
            for name, rows in stored.items():
                weight = mixer.get_parameter(name)
                if rows[0].muon == "heads":
                    heads = [(row.heads or mixer.kind.heads(mixer.model)) // ranks for row in rows]
                    yield weight, [replace(matrix, heads=n)
                                   for matrix, n in zip(_sections(weight), heads, strict=True)]
                else:
                    yield weight, list(_sections(weight, partition_dim=rows[0].partition_dim if ranks > 1 else None))
            if hasattr(layer.mlp, "linear_fc1"):  # not experts
                first, second = layer.mlp.linear_fc1.weight, layer.mlp.linear_fc2.weight
                yield first, list(_sections(first, partition_dim=0 if ranks > 1 else None))
                yield second, [Matrix(0, len(second), partition_dim=1 if ranks > 1 else None)]


def _sections(weight: nn.Parameter, **how: Any) -> Iterator[Matrix]:
    start = 0
    for section in weight.sections:
        yield Matrix(start, section.rows, **how)
        start += section.rows
