"""The data mixture of a resumed run: samples of earlier phases are not read again."""

from __future__ import annotations

from typing import Any

from hola_megatron.checkpoint.folder import Checkpoint
from hola_megatron.checkpoint.save_load import TrainerState
from hola_megatron.data.mixture import Mixture, fingerprint_of
from hola_megatron.data.opening import open_mixture
from hola_megatron.data.order import CYCLE
from hola_megatron.data.phases import Phase, Phases, StreamShare
from hola_megatron.errors import CheckpointError, DataError, RecipeError
from hola_megatron.recipe.loading import build_recipe
from hola_megatron.recipe.schema import Recipe


def continue_mixture(recipe: Recipe, mixture: Mixture, checkpoint: Checkpoint,
                     state: TrainerState) -> Mixture:
    """The recipe's mixture, continued after `checkpoint`.

    state: the trainer's; without phases in checkpoints older than them. Raises CheckpointError for invalid phases,
    RecipeError where the run is in the middle of a planned phase that has changed.
    """
    if state.phases:
        try:
            before = Phases.from_dicts(state.phases)
        except CheckpointError as problem:
            raise CheckpointError(f"{checkpoint.path}: {problem}") from None
    elif state.samples:
        before = _first_phase(recipe, mixture, checkpoint.manifest)
    else:
        return mixture
    return mixture.going_on(before, state.samples, state.first_sample)


def _first_phase(recipe: Recipe, mixture: Mixture, manifest: dict[str, Any]) -> Phases:
    """The one phase of a checkpoint older than phases: its recipe's mixture, from the first sample on."""
    was = manifest.get("data_fingerprint")
    train = manifest["recipe"]["train"]
    seed, length = train.get("seed", recipe.train.seed), train["sequence_length"]

    def phase(streams: list[tuple[str, str, int]]) -> Phases:
        shares = [StreamShare(dataset, name, n, 0, share) for n, (dataset, name, share) in enumerate(streams)]
        return Phases([Phase(0, seed, length, shares)])

    known = [(stream.dataset, stream.name, stream.share) for stream in mixture.phases.phases[-1].streams]
    if was in (None, mixture.fingerprint):
        return phase(known)
    for dataset, name, _ in known:  # one dataset, that is one stream of the mixture now
        if fingerprint_of([dataset], [CYCLE]) == was:
            return phase([(dataset, name, CYCLE)])
    try:
        earlier = open_mixture(build_recipe(manifest["recipe"], stored=True), recipe.data.cache)
    except (DataError, RecipeError):
        earlier = None
    if earlier is not None and earlier.fingerprint == was:
        return Phases([Phase(0, seed, length, earlier.phases.phases[0].streams)])
    # its streams are not there any more, so none of them can be one of the mixture now
    return phase([(str(was), "earlier data", CYCLE)])
