"""Bad steps in the training loop: record them, rewind to a healthy checkpoint, or end the run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from hola_megatron.checkpoint.folder import newest_usable
from hola_megatron.checkpoint.save_load import load
from hola_megatron.control.guard import NumberGuard
from hola_megatron.control.incident import BadStep, first_nonfinite, incident_folder, write_incident
from hola_megatron.data.stream import Batch
from hola_megatron.engine.base import StepResult
from hola_megatron.errors import CheckpointError, DivergedError, RunFolderError
from hola_megatron.parallel.groups import run_on_rank0
from hola_megatron.train.context import RunContext
from hola_megatron.train.run_folder import note_rewind


class Incidents:
    """Bad steps and bad states of one run.

    streak: consecutive bad steps since the last good one. rewound_to: step of the last rewind's checkpoint.
    """

    def __init__(self, run: RunContext):
        self.run = run
        self.rewound_to: int | None = None
        self.streak: list[BadStep] = []

    def bad_step(self, result: StepResult, batches: list[Batch]) -> None:
        """Record a bad step; after too many in a row rewind, and after too many rewinds stop."""
        recipe, state = self.run.recipe, self.run.state
        first = None
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            first = first_nonfinite(self.run.engine, batches)
        bad = BadStep(state.step, result.problem, repr(result.loss), repr(result.grad_norm),
                      state.samples - recipe.batch_size(state.step - 1), state.samples - 1, first)
        self.streak.append(bad)
        folder = incident_folder(recipe.folder, self.streak[0])
        self.write(folder, self.streak)
        if self.run.layout.is_main:
            self.run.metrics.write({"kind": "bad_step", **vars(bad)})
            print(f"skipped | step {state.step:,} | {bad.reason} | samples {bad.first_sample} to {bad.last_sample} | "
                  f"first non-finite: {first or 'none'}", flush=True)
        if state.bad_steps > recipe.guard.max_skips:
            self.rewind_or_stop(folder, f"{state.bad_steps} steps in a row had bad numbers ({bad.reason})")

    def write(self, folder: Path, steps: list[BadStep]) -> None:
        """Write the record for --replay. A folder that cannot be written does not end the run."""
        if not self.run.layout.is_main:
            return
        try:
            write_incident(folder, steps)
        except RunFolderError as error:
            print(f"not saved | {error}", flush=True)

    def check_state(self) -> None:
        """After loading a checkpoint that is not marked healthy: rewind or stop if its state is not finite."""
        if bad := self.run.saves.nonfinite():
            self.bad_state(bad)

    def bad_state(self, names: list[str]) -> None:
        """Rewind or stop because weights or moments are not finite, although the loss was. names: of these tensors."""
        state, last = self.run.state, self.run.state.samples - 1
        more = f" (and {len(names) - 1} more tensors)" if len(names) > 1 else ""
        reason = f"{names[0]}{more} holds values that are not finite"
        bad = BadStep(state.step, reason, "not known", "not known",
                      max(last + 1 - self.run.recipe.batch_size(state.step - 1), 0), last, names[0])
        folder = incident_folder(self.run.recipe.folder, bad)
        self.write(folder, [bad])
        if self.run.layout.is_main:
            self.run.metrics.write({"kind": "bad_step", **vars(bad)})
            print(f"bad state | step {state.step:,} | {reason}", flush=True)
        self.rewind_or_stop(folder, f"at step {state.step:,} {reason}")

    def rewind_or_stop(self, folder: Path, what: str) -> None:
        """Save the state in the incident's folder and rewind; DivergedError after too many rewinds."""
        recipe, rewinds = self.run.recipe, self.run.state.rewinds
        self.run.saves.finish()
        saved = self.save_state(folder)
        if rewinds < recipe.guard.max_rewinds and self.rewind():
            return
        raise DivergedError(
            f"{recipe.folder}: {what} after {rewinds} rewinds (limits guard.max_skips = {recipe.guard.max_skips}, "
            f"guard.max_rewinds = {recipe.guard.max_rewinds}); "
            + (f"the samples and the state are in {folder}, --replay {folder} runs them again" if saved else
               f"the state could not be saved in {folder}")
            + "; lower train.learning_rate, or widen guard.loss_mads and guard.grad_mads if the numbers are fine")

    def save_state(self, folder: Path) -> bool:
        """Save the exact state before the bad steps, for --replay; a full disk does not end the run.

        Returns whether it was saved.
        """
        try:
            self.run.saves.keep(self.run.state, folder)
        except CheckpointError as error:
            if self.run.layout.is_main:
                print(f"not saved | {error}", flush=True)
            return False
        return True

    def rewind(self) -> bool:
        """Load the newest healthy checkpoint and continue with the samples after the bad ones; False if there is none.

        Where the last rewind loaded that one and nothing healthy was saved since, the one before it.
        """
        # hashes of whole files are verified, which may take minutes
        self.run.watchdog.mark(self.run.state.step, "rewinding", patient=True)
        before_rewind, root = self.run.state, self.run.recipe.folder / "checkpoints"
        before = self.rewound_to if self.run.saves.saved_step == self.rewound_to else None
        found, passed_over = run_on_rank0(self.run.layout, lambda: newest_usable(root, healthy=True, before=before))
        if found is None:
            return False
        loaded = load(self.run.engine, found)
        self.run.state = replace(loaded, samples=before_rewind.samples, rewinds=before_rewind.rewinds + 1,
                                 phases=before_rewind.phases)
        self.run.guard = NumberGuard(self.run.recipe.guard, loaded.guard)
        self.run.loader, self.run.batches, self.streak = self.run.open_loader(), None, []
        self.run.data_error = None
        self.run.saves.saved_step = self.rewound_to = self.run.watchdog.newest = loaded.step
        run_on_rank0(self.run.layout, lambda: note_rewind(self.run.recipe.folder, self.run.state))
        if self.run.layout.is_main:
            self.run.metrics.rewind(loaded.step)
            print(*[f"passed over | {problem}" for problem in passed_over],
                  f"rewound | from step {before_rewind.step:,} to {found.path} | "
                  f"continuing with sample {before_rewind.samples}",
                  sep="\n", flush=True)
        return True
