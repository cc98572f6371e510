"""Schedule of a run's checkpoints, which a background thread writes.

A checkpoint that is due while the last one is being written waits for it; training continues. One that takes more than
a minute is reported. After `checkpoint.write_seconds` the run ends with code 76, since a disk that does not answer
would leave the run without checkpoints. Every method is a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from hola_megatron.checkpoint.folder import folder_name
from hola_megatron.checkpoint.save_load import Saver, TrainerState
from hola_megatron.checkpoint.writer import HostSnapshot, refusal
from hola_megatron.control.watchdog import Watchdog
from hola_megatron.engine.base import Engine
from hola_megatron.errors import LostError, RunFolderError
from hola_megatron.parallel.groups import all_reduce_max, run_on_rank0
from hola_megatron.train.clock import Clock
from hola_megatron.train.run_folder import note_checkpoint
from hola_megatron.train.run_place import RunPlace

REPORT_SECONDS = 60.0  # a slower checkpoint is reported


class CheckpointSchedule:
    """Call `due` and `advance` once per step, `save_now` where the run ends. `saved_step`: of the last checkpoint.

    on_bad_state: called on all ranks instead of saving, with the names of weights or moments that are not finite.
    """

    def __init__(self, engine: Engine, watchdog: Watchdog, clock: Clock, about_run: dict[str, object],
                 saved_step: int, afterwards: Sequence[Callable[[], object]],
                 on_bad_state: Callable[[list[str]], None]):
        self.recipe, self.layout = engine.recipe, engine.layout
        self.watchdog, self.clock, self.about_run, self.afterwards = watchdog, clock, about_run, afterwards
        self.root = engine.recipe.folder / "checkpoints"
        self.on_bad_state = on_bad_state
        self.saver = Saver(engine)
        self.place = RunPlace(engine.recipe.folder) if engine.layout.is_main else None
        self.saved_step = saved_step
        self.is_due = False
        self._step = 0  # of the checkpoint that is being written
        self._writing, self._reported, self._start_time = False, False, 0.0
        self._amid_bad_steps = False

    def due(self, step: int) -> None:
        """Request a checkpoint of this step."""
        self.is_due = True
        keep_every = self.recipe.checkpoint.keep_every
        if keep_every and step % keep_every == 0:
            self.finish()  # exactly this step must be saved: wait for the last one now

    def status(self) -> tuple[bool, bool, bool]:
        """This rank's (failed, busy, overdue), for `all_reduce_max`."""
        writer, limit = self.saver.writer, self.recipe.checkpoint.write_seconds
        return writer.failed, writer.busy, self._writing and limit is not None and self._seconds() > limit

    def advance(self, state: TrainerState, failed: int, busy: int, overdue: int) -> None:
        """Call after a step, with the maximum over ranks of `status`."""
        if busy and not failed:
            self._still_writing(overdue)
            return
        self.finish()
        if self.is_due:
            self.begin(state)
            if not self.recipe.checkpoint.background:
                self.finish()

    def save_now(self, state: TrainerState) -> None:
        """Save this step's checkpoint and wait until it is complete."""
        self.finish()
        self.begin(state)
        self.finish()

    def begin(self, state: TrainerState) -> None:
        """Copy the state of this step to the host and start to write it; nothing if this step is saved already."""
        self.is_due = False
        if self.saved_step == state.step:
            return
        self.watchdog.mark(state.step, "copying a checkpoint", limit=self.recipe.checkpoint.write_seconds)
        moved = run_on_rank0(self.layout, lambda: self.place.moved_to())
        self.clock.start_save()
        snapshot = self.saver.copy()
        if bad := self._nonfinite(snapshot):
            self.on_bad_state(bad)
            return
        if moved:
            self._end_in(moved, snapshot, state)
        self._start(snapshot, state, self.root, self.afterwards)
        self.saved_step = state.step
        self.clock.end_save()

    def nonfinite(self) -> list[str]:
        """Names of the engine's tensors, of all ranks, with a value that is not finite."""
        return self._nonfinite(self.saver.copy())

    def _nonfinite(self, snapshot: HostSnapshot) -> list[str]:
        (found,) = all_reduce_max(self.layout, bool(snapshot.nonfinite))
        if not found:
            return []
        gathered: list[tuple[str, ...]] = [()] * self.layout.world
        dist.all_gather_object(gathered, snapshot.nonfinite)
        return sorted({name for names in gathered for name in names})

    def finish(self) -> None:
        """Wait for all ranks' writers and print the folder. Raises CheckpointError on every rank if one failed."""
        if not self._writing:
            return
        if path := self._wait():
            self.watchdog.newest = self._step
            if self.layout.is_main:
                note_checkpoint(self.recipe.folder)
                unhealthy = " | not healthy: saved during bad steps" if self._amid_bad_steps else ""
                print(f"saved | {path} | the step waited {self.clock.save_seconds:.2f} s{unhealthy}", flush=True)

    def keep(self, state: TrainerState, folder: Path) -> None:
        """Save a state in another folder than the run's checkpoints, and wait until it is complete."""
        self._start(self.saver.copy(), state, folder, ())
        self._wait()

    def _start(self, snapshot: HostSnapshot, state: TrainerState, root: Path,
               afterwards: Sequence[Callable[[], object]]) -> None:
        self._amid_bad_steps = state.bad_steps > 0
        self.saver.begin(state, root, self.about_run, afterwards, snapshot)
        self._step, self._writing, self._reported = state.step, True, False
        self._start_time = self.watchdog.awake()

    def _end_in(self, moved: Path, snapshot: HostSnapshot, state: TrainerState) -> None:
        """Save in the run folder's new location. Raises RunFolderError on every rank, naming it."""
        self._start(snapshot, state, moved / "checkpoints", ())
        self._wait()
        raise RunFolderError(f"{self.recipe.folder}: the run folder was moved to {moved} while the run went on; step "
                             f"{state.step:,} is saved there; move it back, or set run_dir to it, and start again")

    def _wait(self) -> Path | None:
        """The finished folder, on every rank."""
        writer = self.saver.writer
        busy, failed = 1, 0
        while busy and not failed:
            self.watchdog.mark(self._step, "writing a checkpoint")
            writer.wait(0.2)
            failed, busy, overdue = all_reduce_max(self.layout, *self.status())
            if busy and not failed:
                self._still_writing(overdue)
        self._writing, folder = False, writer.folder
        writer.take_result()
        if failed:
            raise refusal(self.root, "another rank could not write its files")
        return folder.with_name(folder.name.removesuffix(".tmp"))

    def _seconds(self) -> float:
        return self.watchdog.awake() - self._start_time

    def _still_writing(self, overdue: int) -> None:
        """Report once that a checkpoint takes long; LostError on every rank when it takes too long."""
        limit = self.recipe.checkpoint.write_seconds
        if overdue:
            doing = run_on_rank0(self.layout, lambda: self.saver.writer.doing)
            raise LostError(f"{self.root}: the checkpoint of step {self._step:,} is not whole after {limit:g} s "
                            f"(checkpoint.write_seconds): {doing}; see whether the disk answers; "
                            f"{self.watchdog.resume_advice()}")
        slow = self._seconds() > min(REPORT_SECONDS, (limit or 1e9) / 2)
        if self.layout.is_main and not self._reported and slow:
            self._reported = True
            ends = f"; after {limit:g} s (checkpoint.write_seconds) the run ends with code 76" if limit else ""
            print(f"slow to save | {self.root / folder_name(self._step)} | not whole after {self._seconds():.0f} s: "
                  f"{self.saver.writer.doing}{ends}", flush=True)
