"""The training loop; `train` is the whole run."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from hola_megatron.checkpoint.folder import prune
from hola_megatron.checkpoint.save_load import TrainerState, load
from hola_megatron.control.launcher_watch import LAUNCHER
from hola_megatron.data.opening import Data, open_data
from hola_megatron.engine.base import Engine
from hola_megatron.engine.build import build_engine
from hola_megatron.errors import DataError, Interrupted, LostError
from hola_megatron.files.ownership import note_ending
from hola_megatron.log import console
from hola_megatron.log.banner import print_banner
from hola_megatron.parallel.groups import Layout, all_reduce_max
from hola_megatron.recipe.schedule import learning_rate
from hola_megatron.recipe.schema import Recipe
from hola_megatron.startup.start import compare_data, start
from hola_megatron.train.checkpoint_schedule import CheckpointSchedule
from hola_megatron.train.context import RunContext
from hola_megatron.train.continue_data import continue_mixture
from hola_megatron.train.incidents import Incidents
from hola_megatron.train.init_from import start_from
from hola_megatron.train.reporting import due, report_sample, report_step, validate
from hola_megatron.train.run_folder import forget_rewind, open_run_folder
from hola_megatron.train.run_owner import own_run_folder
from hola_megatron.train.tasks import RunTasks


def train(recipe: Recipe, *, new: bool = False, allow_change: bool = False) -> None:
    """Run a recipe to its end, or to the next signal."""
    layout = start(recipe, {"--new": new, "--allow-change": allow_change})
    data = open_data(recipe)
    compare_data(data)
    with own_run_folder(recipe, layout, new=new):
        _train_in_folder(recipe, layout, data, new, allow_change)


def _train_in_folder(recipe: Recipe, layout: Layout, data: Data, new: bool, allow_change: bool) -> None:
    resume = open_run_folder(recipe, layout, data, allow_change=allow_change)
    tasks = RunTasks(recipe, layout) if recipe.valid.tasks else None
    engine = build_engine(recipe, layout)
    state = TrainerState(step=0, samples=0)
    if resume:
        state = resume.state(load(engine, resume.checkpoint))
        data.mixture = continue_mixture(recipe, data.mixture, resume.checkpoint, state)
    elif recipe.init.source:
        state = start_from(engine, data)
    state = replace(state, phases=data.mixture.phases.to_dicts())
    if layout.is_main:
        print_banner(recipe, layout, engine, data.mixture, state)
    run = Run(recipe, layout, engine, data, state, tasks)
    if new:
        run.watchdog.command = "the same command, without --new,"
    with contextlib.closing(run), run.dead_peers_named():
        run.watchdog.start()
        if resume and not resume.checkpoint.manifest.get("healthy", False):
            run.incidents.check_state()
        run.to_the_end()


class Run(RunContext):
    """The training loop of one rank. tasks: those of valid.tasks."""

    def __init__(self, recipe: Recipe, layout: Layout, engine: Engine, data: Data, state: TrainerState,
                 tasks: RunTasks | None = None):
        super().__init__(recipe, layout, engine, data, state)
        self.incidents = Incidents(self)
        self.saves = CheckpointSchedule(
            engine, self.watchdog, self.clock, self.about_run(), state.step if state.step else -1,
            (self.prune_checkpoints, self.forget_rewind, self.plot_loss, self.upload), self.incidents.bad_state)
        self.tasks = tasks
        LAUNCHER.can_save = True

    def to_the_end(self) -> None:
        steps = self.recipe.train.steps
        while True:
            self.train_on(steps)
            note_ending()
            self.saves.save_now(self.state)
            if self.state.step >= steps:  # else the last state was not finite, and the run was rewound
                break
        self.finish_upload()
        if self.layout.is_main:
            self.plot.end()
            print(f"finished: {steps:,} steps, {console.short(self.data.mixture.tokens(self.state.samples))} tokens; "
                  f"{self.recipe.folder}")

    def train_on(self, steps: int) -> None:
        """Run steps, validation, sample texts and due checkpoints until `steps` steps are finished."""
        recipe = self.recipe
        while self.state.step < steps:
            if self.batches is None:  # at the start, and after a rewind
                self.read_samples()
                if all_reduce_max(self.layout, self.data_error is not None)[0]:
                    self.end_for_data()
            before = self.state.step
            self.step()
            step = self.state.step
            if step <= before:  # after a rewind
                continue
            if recipe.data.valid and due(step, recipe.valid.every, steps):
                validate(self)
            if self.tasks and due(step, self.tasks.every, steps):
                self.tasks.report(self)
            if recipe.log.sample_every and due(step, recipe.log.sample_every, steps):
                report_sample(self)
            if due(step, recipe.checkpoint.every, steps):
                self.saves.due(step)
            if step < steps:
                self.read_samples()
            name = self.check_signals_and_save()
            if name:
                note_ending()  # a restart of the same command waits for this save
                self.saves.save_now(self.state)
                raise Interrupted(f"{recipe.folder}: stopped by {name} at step {self.state.step:,}, checkpoint saved; "
                                  f"start {self.watchdog.command} again to go on")

    def read_samples(self) -> None:
        """Read the next step's samples; an error is stored until all ranks exchange it (check_signals_and_save)."""
        self.watchdog.mark(self.state.step, "reading samples")
        self.clock.start_data()
        if self.loader.samples_per_step != self.recipe.batch_size(self.state.step):  # the next stage of a batch ramp
            self.loader = self.open_loader()
        try:
            self.batches = next(self.loader)
        except DataError as error:
            self.data_error = error
        self.clock.data_is_here()

    def step(self) -> None:
        """One optimizer step; a bad step changes only the data position."""
        self.watchdog.mark(self.state.step, "step")
        batches, self.batches = self.batches, None
        self.clock.start_step()
        result = self.engine.train_step(batches, learning_rate(self.recipe, self.state.step), self.guard.judge)
        self.clock.end_step(self.loader.samples_per_step)
        self.stragglers.add(self.engine.work_seconds, self.clock.data_seconds)
        if result.updated:
            self.guard.accept(result.loss, result.grad_norm)
            self.incidents.streak = []
        self.state = replace(
            self.state, step=self.state.step + 1, samples=self.state.samples + self.loader.samples_per_step,
            bad_steps=0 if result.updated else self.state.bad_steps + 1, guard=self.guard.history)
        report_step(self, result)
        if not result.updated:
            self.incidents.bad_step(result, batches)

    def check_signals_and_save(self) -> str | None:
        """Exchange the ranks' status once per step; returns a signal's name if any rank has received one.

        Starts a due checkpoint. After saving one, raises DataError if a rank cannot read its samples, LostError if a
        launcher has ended.
        """
        signal, orphaned, no_data, *writing = all_reduce_max(
            self.layout, self.signal.seen or 0, LAUNCHER.lost is not None, self.data_error is not None,
            *self.saves.status())
        before = self.state.step
        self.saves.advance(self.state, *writing)
        if no_data and self.state.step == before:  # else the run was rewound, and reads other samples
            self.end_for_data()
        if orphaned:
            note_ending()
            self.saves.save_now(self.state)
            why = LAUNCHER.lost or "the launcher of another rank died"
            raise LostError(f"{self.recipe.folder}: {why}; a checkpoint of step {self.state.step:,} is saved, start "
                            f"{self.watchdog.command} again to go on")
        return self.signal.name(signal)

    def prune_checkpoints(self) -> None:
        checkpoint = self.recipe.checkpoint
        spare = self.uploader.copying if self.uploader else None
        prune(self.recipe.folder / "checkpoints", checkpoint.keep, checkpoint.keep_every, spare=spare)

    def upload(self) -> None:
        if self.uploader:
            self.uploader.copy_missing()

    def forget_rewind(self) -> None:
        forget_rewind(self.recipe.folder)

    def plot_loss(self) -> None:
        if self.state.step < self.recipe.train.steps:  # the last plot is drawn at the end
            self.plot.begin()
