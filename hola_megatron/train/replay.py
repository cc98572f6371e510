"""--replay: run the batches of an incident again, on the weights of that time, without updates.

Prints for each bad step the recorded and the new loss and gradient norm, and the first tensor that is not finite.
"""

from __future__ import annotations

from pathlib import Path

from hola_megatron.checkpoint.folder import Checkpoint, list_steps, newest_usable, open_checkpoint
from hola_megatron.checkpoint.save_load import load
from hola_megatron.control.incident import first_nonfinite, read_incident
from hola_megatron.data.opening import open_data
from hola_megatron.data.stream import BatchLoader, Mixture
from hola_megatron.engine.base import Engine
from hola_megatron.engine.build import build_engine
from hola_megatron.errors import CheckpointError
from hola_megatron.parallel.groups import Layout
from hola_megatron.recipe.schema import Recipe
from hola_megatron.startup.start import compare_data, start
from hola_megatron.train.continue_data import continue_mixture


def replay(recipe: Recipe, folder: Path) -> None:
    """Replay the incident in `folder`, on every rank. Raises RecipeError, DataError or CheckpointError."""
    steps = read_incident(folder)
    layout = start(recipe, {"--replay": str(folder)})
    data = open_data(recipe)
    compare_data(data)
    engine = build_engine(recipe, layout)
    engine.leave_graph()  # the same sums in the same order; a capture would take longer than the few steps
    mixture = _load_state(recipe, layout, engine, data.mixture, folder, steps[0].step)
    for bad in steps:
        loader = BatchLoader(
            mixture, data_rank=layout.data_rank, data_size=layout.data,
            micro_batch_size=recipe.train.micro_batch_size,
            micro_batches=recipe.micro_batches(layout.world, bad.step - 1),
            first_sample=bad.first_sample, documents=recipe.data.documents)
        batches = next(loader)
        result = engine.train_step(batches, 0.0, lambda loss, grad_norm: "replayed, not updated")
        first = first_nonfinite(engine, batches)
        if layout.is_main:
            print(f"replay | step {bad.step:,} | samples {bad.first_sample} to {bad.last_sample} | recorded loss "
                  f"{bad.loss} gnorm {bad.grad_norm} | now loss {result.loss!r} gnorm {result.grad_norm!r} | "
                  f"first non-finite: {first or 'none'}", flush=True)


def _load_state(recipe: Recipe, layout: Layout, engine: Engine, mixture: Mixture, folder: Path, step: int) -> Mixture:
    """Load the state saved with the incident; without one, the newest checkpoint before it, and print its step.

    Returns the mixture as of that step.
    """
    def loaded(checkpoint: Checkpoint) -> Mixture:
        state = load(engine, checkpoint)
        return continue_mixture(recipe, mixture, checkpoint, state)

    saved = list_steps(folder)
    if saved:
        return loaded(open_checkpoint(saved[0][1]))
    root = recipe.folder / "checkpoints"
    found, passed_over = newest_usable(root, before=step)
    if found is None:
        found, passed_over = newest_usable(root)
    if passed_over and layout.is_main:
        print(*[f"passed over | {problem}" for problem in passed_over], sep="\n", flush=True)
    if found is None:
        raise CheckpointError(f"{root}: no checkpoint to replay on; an incident has its own state only when it "
                              "ended in a rewind or a stop")
    continued = loaded(found)
    if layout.is_main:
        print(f"replay | the weights are those of step {found.step:,}, the nearest saved before step {step:,}",
              flush=True)
    return continued
