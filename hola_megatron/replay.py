"""--replay: run the batches of an incident again, on the weights they met, without updating.

Prints for each bad step what was recorded and what comes out now, and where the first value
that is not finite arises.
"""

from __future__ import annotations

from pathlib import Path

from hola_megatron.checkpoint.folder import list_steps, newest_usable, open_checkpoint
from hola_megatron.checkpoint.save_load import load
from hola_megatron.config import Recipe
from hola_megatron.data.stream import BatchLoader
from hola_megatron.engine.base import Engine, build_engine
from hola_megatron.errors import CheckpointError
from hola_megatron.monitor.incident import first_nonfinite, read_incident
from hola_megatron.parallel.groups import Layout, start
from hola_megatron.trainer import open_data


def replay(recipe: Recipe, folder: Path) -> None:
    """Every rank of the recipe's layout calls it. RecipeError, DataError or CheckpointError for what is missing."""
    steps = read_incident(folder)
    layout = start(recipe)
    data = open_data(recipe)
    engine = build_engine(recipe, layout)
    engine.leave_graph()  # the same sums in the same order; recording would take longer than the few steps
    _load_state(recipe, layout, engine, folder, steps[0].step)
    for bad in steps:
        loader = BatchLoader(
            data.mixture, data_rank=layout.data_rank, data_size=layout.data,
            micro_batch_size=recipe.train.micro_batch_size, micro_batches=recipe.micro_batches(layout.world),
            first_sample=bad.first_sample, documents=recipe.data.documents)
        batches = next(loader)
        result = engine.train_step(batches, 0.0, lambda loss, grad_norm: "replayed, not updated")
        place = first_nonfinite(engine, batches)
        if layout.is_main:
            print(f"replay | step {bad.step:,} | samples {bad.first_sample} to {bad.last_sample} | recorded loss "
                  f"{bad.loss} gnorm {bad.grad_norm} | now loss {result.loss!r} gnorm {result.grad_norm!r} | "
                  f"first non-finite: {place or 'none'}", flush=True)


def _load_state(recipe: Recipe, layout: Layout, engine: Engine, folder: Path, step: int) -> None:
    """The state kept with the incident; without one, the newest checkpoint before it, and that is said."""
    kept = list_steps(folder)
    if kept:
        load(engine, open_checkpoint(kept[0][1]))
        return
    root = recipe.folder / "checkpoints"
    usable = [path for number, path in list_steps(root) if number < step]
    found = open_checkpoint(usable[0]) if usable else newest_usable(root)[0]
    if found is None:
        raise CheckpointError(f"{root}: no checkpoint to replay on; the incident keeps its own state only when it "
                              "ended in a rewind or a stop")
    load(engine, found)
    if layout.is_main:
        print(f"replay | the weights are those of step {found.step:,}, the nearest kept before step {step:,}",
              flush=True)
