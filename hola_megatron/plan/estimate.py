"""The plan of one recipe on N GPUs: memory, speed and layouts as numbers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from hola_megatron.layers.costs import Share
from hola_megatron.model.flops import executed_flops_per_token, flops_per_token
from hola_megatron.plan.activations import kernels_problem
from hola_megatron.plan.layouts import Suggestion, fastest, suggest
from hola_megatron.plan.memory import GB, StageMemory, worst_stage
from hola_megatron.plan.parameters import active_parameters, layer_products, parameters_by_part
from hola_megatron.plan.speed import Speed, estimate_speed, unmeasured
from hola_megatron.recipe.checks import check_recipe
from hola_megatron.recipe.schema import Recipe

CLEARLY = 1.05  # what a predicted speed must be better by to be worth a line
CHECKPOINT_BYTES = 12  # a parameter: float32 weight and two moments (hola_megatron/checkpoint)


@dataclass(frozen=True)
class Machine:
    """gpus: all of them; memory_gb: of one, 10^9 bytes; peak_flops: of one, FLOP/s, None if unknown.

    mfu: share of the peak that is reached, given by whoever asks; None: predicted (plan/speed.py).
    bandwidth: bytes a second of one device's memory; None: in proportion to its peak. device: its name, for notes.
    """

    gpus: int
    memory_gb: float
    peak_flops: float | None
    mfu: float | None = None
    bandwidth: float | None = None
    device: str | None = None

    def speed(self, recipe: Recipe) -> Speed | None:
        """Of a layout that divides the GPUs; None where the peak is unknown."""
        if self.peak_flops is None:
            return None
        return estimate_speed(recipe, self.gpus, self.peak_flops, self.bandwidth)


@dataclass(frozen=True)
class Plan:
    """problems: why the layout does not go with this number of GPUs; memory: None in that case.

    suggestions: what fits where the recipe does not, or else one layout that fits and is faster, or needs fewer ranks
    a model copy. speed: None where the layout does not divide the GPUs or the peak is unknown.
    """

    recipe: Recipe
    machine: Machine
    parameters: dict[str, int]
    problems: list[str]
    memory: StageMemory | None
    speed: Speed | None = None
    suggestions: list[Suggestion] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.total <= self.machine.memory_gb * GB

    @property
    def tokens(self) -> int:
        return self.recipe.samples_before(self.recipe.train.steps) * self.recipe.train.sequence_length

    @property
    def flops_per_token(self) -> float:
        return flops_per_token(self.recipe.model, self.recipe.train.sequence_length)

    @property
    def recompute_share(self) -> float:
        """Work done twice, as a share of the model's own; 0 without recompute."""
        return executed_flops_per_token(self.recipe) / self.flops_per_token - 1

    @property
    def tokens_per_second(self) -> float | None:
        """Of all GPUs: predicted, or at the MFU that was given (which counts the model's work, without recompute)."""
        machine = self.machine
        if machine.peak_flops and machine.mfu is not None:
            return machine.mfu * machine.peak_flops * machine.gpus / self.flops_per_token
        return self.speed.tokens_per_second if self.speed else None

    @property
    def mfu(self) -> float | None:
        """Given, or predicted."""
        speed, machine = self.tokens_per_second, self.machine
        return None if speed is None else speed * self.flops_per_token / (machine.peak_flops * machine.gpus)

    @property
    def unmeasured(self) -> list[str]:
        """What of the predicted speed no run has shown."""
        return unmeasured(self.recipe, self.machine.gpus, self.machine.device) if self.speed else []

    @property
    def with_graph(self) -> Speed | None:
        """The same layout with train.cuda_graph, where that is allowed and not on already."""
        train = dataclasses.replace(self.recipe.train, cuda_graph=True)
        recipe = dataclasses.replace(self.recipe, train=train)
        if self.speed is None or self.recipe.train.cuda_graph or check_recipe(recipe, world_size=self.machine.gpus):
            return None
        return self.machine.speed(recipe)

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
                "peak_flops": self.machine.peak_flops, "mfu": self.mfu,
                "predicted": _speed(self), "parameters": self.parameters,
                "active_parameters": active_parameters(self.recipe.model),
                "flops_per_token": self.flops_per_token, "tokens": self.tokens, "steps": self.recipe.train.steps,
                "tokens_per_second": self.tokens_per_second, "hours": self.hours,
                "checkpoint_bytes": self.checkpoint_bytes, "problems": self.problems, "fits": self.fits,
                "kernels_problem": kernels_problem(Share(self.recipe)),
                "layout": _layout(self), "memory": None if self.memory is None else _memory(self.memory),
                "suggestions": [{"overrides": s.overrides, "model_ranks": s.recipe.parallel.model_ranks,
                                 "tokens_per_second": s.tokens_per_second,
                                 "memory": _memory(s.memory)} for s in self.suggestions]}


def make_plan(recipe: Recipe, machine: Machine) -> Plan:
    """The recipe's own layout, and others where that one does not divide or does not fit."""
    problems = check_recipe(recipe, world_size=machine.gpus)
    memory = None if problems else worst_stage(recipe, machine.gpus)
    speed = None if problems else machine.speed(recipe)
    plan = Plan(recipe, machine, parameters_by_part(recipe.model), problems, memory, speed)
    capacity = machine.memory_gb * GB
    found = [dataclasses.replace(other, tokens_per_second=_tokens_per_second(other.recipe, machine))
             for other in suggest(recipe, machine.gpus, capacity)]
    if plan.fits:
        found = _alternative(plan, found, capacity)
    return dataclasses.replace(plan, suggestions=found)


def _alternative(plan: Plan, found: list[Suggestion], capacity: float) -> list[Suggestion]:
    """For a recipe that fits: the fastest layout if it is faster, or else one of fewer ranks a model copy."""
    recipe, machine = plan.recipe, plan.machine
    if plan.speed:
        best = fastest(recipe, machine.gpus, capacity, lambda other: _tokens_per_second(other, machine))
        if best and best.tokens_per_second > CLEARLY * plan.speed.tokens_per_second:
            return [best]
    ranks, recompute = recipe.parallel.model_ranks, recipe.train.recompute
    return [other for other in found
            if other.recipe.parallel.model_ranks < ranks and other.recipe.train.recompute == recompute][:1]


def _tokens_per_second(recipe: Recipe, machine: Machine) -> float | None:
    speed = machine.speed(recipe)
    return speed.tokens_per_second if speed else None


def _speed(plan: Plan) -> dict[str, Any] | None:
    """The predicted step, whatever MFU was given."""
    if plan.speed is None:
        return None
    graph = plan.with_graph
    return {**dataclasses.asdict(plan.speed), "unmeasured": plan.unmeasured,
            "tokens_per_second_with_cuda_graph": graph.tokens_per_second if graph else None}


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
