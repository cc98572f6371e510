"""Every recipe on the usual machines, as a Markdown table (docs/plan.md holds one)."""

from __future__ import annotations

from hola_megatron.config import Recipe
from hola_megatron.plan.estimate import Machine, Plan, make_plan
from hola_megatron.plan.memory import GB
from hola_megatron.plan.report import layout_text

GPUS = (8, 64, 512)
MEMORY_GB = (80.0, 141.0)


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
