"""The objects of a training run: engine, data, state, guard, watchdog, clock, reports, checkpoints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from typing import NoReturn

from hola_megatron.checkpoint.remote_copy import Uploader
from hola_megatron.checkpoint.save_load import TrainerState
from hola_megatron.control.guard import NumberGuard
from hola_megatron.control.lost import is_of_communication
from hola_megatron.control.signals import StopSignal
from hola_megatron.control.watchdog import Watchdog
from hola_megatron.data.failure import first_of_all_ranks
from hola_megatron.data.opening import Data
from hola_megatron.data.stream import Batch, BatchLoader
from hola_megatron.engine.base import Engine
from hola_megatron.errors import CheckpointError, DataError
from hola_megatron.files.ownership import note_ending
from hola_megatron.log import console
from hola_megatron.log.metrics import Metrics
from hola_megatron.log.plot import LossPlot
from hola_megatron.log.stragglers import Stragglers
from hola_megatron.parallel.groups import Layout, all_reduce_max, run_on_rank0
from hola_megatron.recipe.schema import Recipe
from hola_megatron.train.checkpoint_schedule import CheckpointSchedule
from hola_megatron.train.clock import Clock

UPLOAD_POLL_SECONDS = 0.2


class RunContext:
    """The objects of one run on one rank. The training loop (loop.py) adds `saves`."""

    saves: CheckpointSchedule

    def __init__(self, recipe: Recipe, layout: Layout, engine: Engine, data: Data, state: TrainerState):
        self.recipe, self.layout, self.engine, self.data, self.state = recipe, layout, engine, data, state
        self.metrics = Metrics(recipe, recipe.folder, state.step) if layout.is_main else None
        self.plot = LossPlot(recipe.folder, recipe.name, self.metrics.reports) if layout.is_main else None
        self.signal = StopSignal(prints=layout.is_main)
        self.guard = NumberGuard(recipe.guard, state.guard)
        self.hurry = False  # after a rank is lost: the launcher ends the others within a few seconds
        self.code_version = console.code_version()
        self.clock = Clock(recipe, layout)
        self.stragglers = Stragglers(layout, recipe.log.straggler_ratio)
        self.watchdog = Watchdog(layout, recipe.folder, recipe.parallel.hang_seconds, state.step or None)
        self.loader = self.open_loader()
        self.uploader = self._open_uploader()
        self.batches: list[Batch] | None = None  # of the next step, if they have been read
        self.data_error: DataError | None = None

    def open_loader(self) -> BatchLoader:
        recipe, layout = self.recipe, self.layout
        return BatchLoader(
            self.data.mixture, data_rank=layout.data_rank, data_size=layout.data,
            micro_batch_size=recipe.train.micro_batch_size,
            micro_batches=recipe.micro_batches(layout.world, self.state.step),
            first_sample=self.state.samples, documents=recipe.data.documents)

    def _open_uploader(self) -> Uploader | None:
        """On the main rank, where checkpoints are copied to a URL. Raises RecipeError, on all ranks."""
        recipe, found = self.recipe, []
        if recipe.checkpoint.upload is None:
            return None

        def begin() -> None:
            found.append(Uploader(recipe.folder / "checkpoints", recipe.checkpoint.upload, partial(print, flush=True)))
            found[0].copy_missing()  # what an earlier start has not copied

        run_on_rank0(self.layout, begin)
        return found[0] if found else None

    def finish_upload(self) -> None:
        """Wait until all is copied, at most `checkpoint.write_seconds`. A collective."""
        if self.recipe.checkpoint.upload is None:
            return
        self.watchdog.mark(self.state.step, "copying checkpoints", patient=True)
        limit, begin = self.recipe.checkpoint.write_seconds, time.monotonic()
        while all_reduce_max(self.layout, self.uploader is not None and self.uploader.busy)[0]:
            late = limit is not None and time.monotonic() - begin > limit
            if all_reduce_max(self.layout, late)[0]:
                if self.layout.is_main:
                    print(f"upload | not done after {limit:g} s (checkpoint.write_seconds), not waited for; start the "
                          "same command again to copy the rest", flush=True)
                return
            time.sleep(UPLOAD_POLL_SECONDS)

    def about_run(self) -> dict[str, object]:
        return {"data_fingerprint": self.data.fingerprint, "valid_fingerprint": self.data.valid_fingerprint,
                "tokenizer": self.data.tokenizer.identity(),
                "code": self.code_version}

    def end_for_data(self) -> NoReturn:
        """Save the state after a rank could not read its data; then all ranks raise the same DataError."""
        error = first_of_all_ranks(self.data_error)
        if self.state.step == 0:
            raise error
        note_ending()
        try:
            self.saves.save_now(self.state)
            saved = f"step {self.state.step:,} is saved, start {self.watchdog.command} again once the data are mended"
        except CheckpointError as refused:
            saved = f"step {self.state.step:,} is not saved: {refused}"
        raise DataError(f"{error}; {saved}")

    @contextlib.contextmanager
    def dead_peers_named(self) -> Iterator[None]:
        """Turn the error of a collective into a LostError that names the lost rank."""
        try:
            yield
        except RuntimeError as error:
            if not is_of_communication(error):
                raise
            self.hurry = True
            raise self.watchdog.lost_peer(error) from None

    def close(self) -> None:
        self.saves.saver.writer.abandon(seconds=3 if self.hurry else 10)
        with contextlib.suppress(RuntimeError):  # of a failed device, whose first error is already raised
            self.engine.leave_graph()
        self.watchdog.stop()
        if self.uploader:
            self.uploader.close()
        if self.layout.is_main:
            self.plot.close()
            self.metrics.close(*[2] * self.hurry)
        self.signal.restore()
