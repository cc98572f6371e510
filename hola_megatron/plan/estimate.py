"""Everything a plan says about one recipe on N GPUs, as numbers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from hola_megatron.config import Recipe
from hola_megatron.model.flops import executed_flops_per_token, flops_per_token
from hola_megatron.plan.activations import Share
from hola_megatron.plan.layouts import Suggestion, suggest
from hola_megatron.plan.memory import GB, StageMemory, worst_stage
from hola_megatron.plan.parameters import active_parameters, layer_products, parameters_by_part
from hola_megatron.recipe_checks import check_recipe

CHECKPOINT_BYTES = 12  # a parameter: float32 weight and two moments (hola_megatron/checkpoint)


@dataclass(frozen=True)
class Machine:
    """gpus: all of them; memory_gb: of one, 10^9 bytes; peak_flops: of one, FLOP/s, None if nobody said."""

    gpus: int
    memory_gb: float
    peak_flops: float | None
    mfu: float


@dataclass(frozen=True)
class Plan:
    """problems: why the layout does not go with this number of GPUs; memory: None in that case.

    suggestions: what fits where the recipe does not, or else one layout that fits with fewer ranks a model copy.
    """

    recipe: Recipe
    machine: Machine
    parameters: dict[str, int]
    problems: list[str]
    memory: StageMemory | None
    suggestions: list[Suggestion] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.total <= self.machine.memory_gb * GB

    @property
    def tokens(self) -> int:
        return self.recipe.train.steps * self.recipe.tokens_per_step

    @property
    def flops_per_token(self) -> float:
        return flops_per_token(self.recipe.model, self.recipe.train.sequence_length)

    @property
    def recompute_share(self) -> float:
        """Work done twice, as a share of the model's own; 0 without recompute."""
        return executed_flops_per_token(self.recipe) / self.flops_per_token - 1

    @property
    def tokens_per_second(self) -> float | None:
        """Of all GPUs at the stated MFU (which counts the model's work, without recompute)."""
        machine = self.machine
        return machine.mfu * machine.peak_flops * machine.gpus / self.flops_per_token if machine.peak_flops else None

    @property
    def hours(self) -> float | None:
        speed = self.tokens_per_second
        return self.tokens / speed / 3600 if speed else None

    @property
    def checkpoint_bytes(self) -> int:
        model = self.recipe.model
        matrices = sum(layer_products(model, kind) for kind in model.layer_kinds)  # of these Muon keeps one moment
        less = 4 * matrices if self.recipe.train.optimizer == "muon" else 0
        return CHECKPOINT_BYTES * self.parameters["total"] - less

    @property
    def data_ranks(self) -> int:
        return self.recipe.data_ranks(self.machine.gpus)

    @property
    def micro_batches(self) -> int:
        return self.recipe.micro_batches(self.machine.gpus)

    @property
    def bubble(self) -> float:
        """Share of a step in which a pipeline stage waits, by the schedule alone."""
        parallel = self.recipe.parallel
        waiting = (parallel.pipeline - 1) / parallel.virtual_pipeline
        return waiting / (waiting + self.micro_batches)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; bytes, seconds and numbers, nothing rounded."""
        return {"recipe": self.recipe.name, "gpus": self.machine.gpus, "memory_gb": self.machine.memory_gb,
                "peak_flops": self.machine.peak_flops, "mfu": self.machine.mfu, "parameters": self.parameters,
                "active_parameters": active_parameters(self.recipe.model),
                "flops_per_token": self.flops_per_token, "tokens": self.tokens, "steps": self.recipe.train.steps,
                "tokens_per_second": self.tokens_per_second, "hours": self.hours,
                "checkpoint_bytes": self.checkpoint_bytes, "problems": self.problems, "fits": self.fits,
                "kernels_problem": Share(self.recipe).kernels_problem,
                "layout": _layout(self), "memory": None if self.memory is None else _memory(self.memory),
                "suggestions": [{"overrides": s.overrides, "model_ranks": s.recipe.parallel.model_ranks,
                                 "memory": _memory(s.memory)} for s in self.suggestions]}


def make_plan(recipe: Recipe, machine: Machine) -> Plan:
    """The recipe's own layout, and others where that one does not divide or does not fit."""
    problems = check_recipe(recipe, world_size=machine.gpus)
    memory = None if problems else worst_stage(recipe, machine.gpus)
    plan = Plan(recipe, machine, parameters_by_part(recipe.model), problems, memory)
    found = suggest(recipe, machine.gpus, machine.memory_gb * GB)
    if plan.fits:
        ranks, recompute = recipe.parallel.model_ranks, recipe.train.recompute
        found = [other for other in found
                 if other.recipe.parallel.model_ranks < ranks and other.recipe.train.recompute == recompute][:1]
    return dataclasses.replace(plan, suggestions=found)


def _layout(plan: Plan) -> dict[str, Any] | None:
    if plan.problems:
        return None
    parallel, train = plan.recipe.parallel, plan.recipe.train
    return {"tensor": parallel.tensor, "sequence": parallel.sequence, "context": parallel.context,
            "expert": parallel.expert, "pipeline": parallel.pipeline, "virtual_pipeline": parallel.virtual_pipeline,
            "data": plan.data_ranks,
            "micro_batch_size": train.micro_batch_size, "micro_batches": plan.micro_batches,
            "recompute": train.recompute}


def _memory(memory: StageMemory) -> dict[str, Any]:
    return {"stage": memory.stage, "moment": memory.moment, "bytes": memory.parts,
            "allocated_bytes": memory.allocated, "total_bytes": memory.total}
