"""Every recipe on the usual machines, as Markdown tables (layouts for docs/plan.md, hours for README.md)."""

from __future__ import annotations

import dataclasses

from hola_megatron.plan.estimate import Machine, Plan, make_plan
from hola_megatron.plan.memory import GB
from hola_megatron.plan.report import layout_text
from hola_megatron.recipe.schema import Recipe

GPUS = (8, 64, 512)
MEMORY_GB = (80.0, 141.0)
HOURS_GPUS = (1, 4, 8, 64)


def layout_table(recipes: list[Recipe]) -> str:
    """A row a recipe and GPU size; a cell is the recipe as it is, or what to change; the layout, the micro-batches of a
    step and data rank, and GB of a rank."""
    head = ["recipe", "GB", *(f"{gpus} GPUs" for gpus in GPUS)]
    rows = [head, ["---"] * len(head)]
    for recipe in recipes:
        for memory in MEMORY_GB:
            rows.append([recipe.name, f"{memory:g}", *(_cell(make_plan(recipe, Machine(gpus, memory, None, 1.0)))
                                                        for gpus in GPUS)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def hours_table(recipes: list[Recipe], machine: Machine) -> str:
    """Predicted hours of every recipe's whole training on 1 to 64 GPUs of one kind, as a Markdown table.

    A cell is in hours. `*`: in the fastest layout that the plan suggests, because the recipe's own does not fit or does
    not divide. `-`: no layout fits.
    """
    head = ["recipe", "tokens", *(f"{gpus} GPU{'s' if gpus > 1 else ''}" for gpus in HOURS_GPUS)]
    rows = [head, ["---"] * 2 + ["---:"] * len(HOURS_GPUS)]
    for recipe in recipes:
        plans = [make_plan(recipe, dataclasses.replace(machine, gpus=gpus)) for gpus in HOURS_GPUS]
        rows.append([recipe.name, f"{plans[0].tokens / 1e9:.3g}B", *map(_hours, plans)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _hours(plan: Plan) -> str:
    if plan.fits and plan.hours is not None:
        return _number(plan.hours)
    speeds = [found.tokens_per_second for found in plan.suggestions if found.tokens_per_second]
    return f"{_number(plan.tokens / max(speeds) / 3600)}*" if speeds else "-"


def _number(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}"


def _cell(plan: Plan) -> str:
    if plan.fits:
        return f"as it is: {_described(plan.recipe, plan.machine.gpus)}: {plan.memory.total / GB:.0f}"
    if not plan.suggestions:
        return f"none: {plan.recipe.train.global_batch_size} samples a step are too few"
    best = plan.suggestions[0]
    return f"`{' '.join(best.overrides)}`: {_described(best.recipe, plan.machine.gpus)}: {best.memory.total / GB:.0f}"


def _described(recipe: Recipe, gpus: int) -> str:
    again = ", recompute" if recipe.train.recompute == "full" else ""
    return f"{layout_text(recipe, gpus)}, {recipe.micro_batches(gpus)} of {recipe.train.micro_batch_size}{again}"
