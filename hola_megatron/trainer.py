"""The training loop: read it top to bottom, `train` is the whole run."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hola_megatron.checkpoint.folder import newest_usable, retire
from hola_megatron.checkpoint.save_load import Saver, TrainerState, load
from hola_megatron.checkpoint.writer import refusal
from hola_megatron.config import Recipe
from hola_megatron.data.stream import Batch, BatchLoader, Mixture, PackedDataset, check_tokenizer, eval_batches
from hola_megatron.data.tokenizer import Tokenizer, load_tokenizer
from hola_megatron.engine.base import Engine, StepResult, build_engine
from hola_megatron.errors import CheckpointError, DataError, DivergedError, Interrupted
from hola_megatron.model.flops import executed_flops_per_token, flops_per_token, peak_flops
from hola_megatron.monitor import console, memory_health
from hola_megatron.monitor.banner import print_banner
from hola_megatron.monitor.guard import NumberGuard
from hola_megatron.monitor.incident import BadStep, first_nonfinite, incident_folder, write_incident
from hola_megatron.monitor.metrics import Metrics
from hola_megatron.monitor.plot import plot_loss
from hola_megatron.monitor.sample import sample_text
from hola_megatron.monitor.signals import StopSignal
from hola_megatron.monitor.stragglers import Stragglers
from hola_megatron.monitor.watchdog import Watchdog
from hola_megatron.parallel.groups import Layout, agree, on_main, start
from hola_megatron.run_folder import forget_rewind, note_checkpoint, note_rewind, open_run_folder


@dataclass
class Data:
    """What a run reads."""

    mixture: Mixture
    valid: PackedDataset | None
    tokenizer: Tokenizer

    @property
    def fingerprint(self) -> str:
        return self.mixture.fingerprint


def train(recipe: Recipe, *, new: bool = False, allow_change: bool = False) -> None:
    """Run a recipe to its end, or to the next signal."""
    layout = start(recipe)
    data = open_data(recipe)
    resume = open_run_folder(recipe, layout, data.fingerprint, new=new, allow_change=allow_change)
    engine = build_engine(recipe, layout)
    state = TrainerState(step=0, samples=0)
    if resume:
        state = resume.state(load(engine, resume.checkpoint))
    if layout.is_main:
        print_banner(recipe, layout, engine, data.mixture, state)
    run = Run(recipe, layout, engine, data, state)
    with contextlib.closing(run), run.dead_peers_named():
        run.to_the_end()


class Run:
    """The loop and what hangs on it."""

    def __init__(self, recipe: Recipe, layout: Layout, engine: Engine, data: Data, state: TrainerState):
        self.recipe, self.layout, self.engine, self.data, self.state = recipe, layout, engine, data, state
        self.metrics = Metrics(recipe, recipe.folder, state.step) if layout.is_main else None
        self.signal = StopSignal()
        self.guard = NumberGuard(recipe.guard, state.guard)
        self.saver = Saver(engine)
        self.saved_step = state.step if state.step else -1
        self.rewound_to: int | None = None
        self.save_due = self.saving = False
        self.streak: list[BadStep] = []
        self.code_version = console.code_version()
        self.clock = Clock(recipe, layout)
        self.stragglers = Stragglers(layout, recipe.log.straggler_ratio)
        self.watchdog = Watchdog(layout, recipe.folder, recipe.parallel.hang_seconds)
        self.loader = self.open_loader()

    def open_loader(self) -> BatchLoader:
        recipe, layout = self.recipe, self.layout
        return BatchLoader(
            self.data.mixture, data_rank=layout.data_rank, data_size=layout.data,
            micro_batch_size=recipe.train.micro_batch_size, micro_batches=recipe.micro_batches(layout.world),
            first_sample=self.state.samples, documents=recipe.data.documents)

    def to_the_end(self) -> None:
        recipe, steps = self.recipe, self.recipe.train.steps
        while self.state.step < steps:
            before = self.state.step
            self.step()
            step = self.state.step
            if step <= before:  # it was bad, and one too many: the run has gone back
                continue
            if recipe.data.valid and due(step, recipe.valid.every, steps):
                self.validate()
            if recipe.log.sample_every and due(step, recipe.log.sample_every, steps):
                self.sample()
            if due(step, recipe.checkpoint.every, steps):
                self.save_due = True
                if recipe.checkpoint.keep_every and step % recipe.checkpoint.keep_every == 0:
                    self.finish_save()  # this very step is to be kept: it cannot wait for the last one
            name = self.agree_and_save()
            if name:
                self.save_now()
                raise Interrupted(f"{recipe.folder}: stopped by {name} at step {self.state.step:,}, checkpoint saved; "
                                  "start the same command again to go on")
        self.save_now()
        if self.layout.is_main:
            plot_loss(recipe.folder, recipe.name)
            print(f"finished: {steps:,} steps, {console.short(steps * recipe.tokens_per_step)} tokens; {recipe.folder}")

    def step(self) -> None:
        """One optimizer step; one with bad numbers changes nothing but the data position."""
        self.watchdog.mark(self.state.step, "step")
        self.clock.start_step()
        batches = next(self.loader)
        self.clock.data_is_here()
        result = self.engine.train_step(batches, learning_rate(self.recipe, self.state.step), self.guard.judge)
        self.clock.end_step()
        self.stragglers.add(self.engine.work_seconds, self.clock.data_seconds)
        if result.updated:
            self.guard.accept(result.loss, result.grad_norm)
            self.streak = []
        self.state = TrainerState(
            self.state.step + 1, self.loader.state()["samples"], 0 if result.updated else self.state.bad_steps + 1,
            self.state.rewinds, self.guard.history)
        self.log(result)
        if not result.updated:
            self.bad_step(result, batches)

    def log(self, result: StepResult) -> None:
        step, recipe = self.state.step, self.recipe
        if not (due(step, recipe.log.every, recipe.train.steps) or step == 1):
            return
        work, slow = self.stragglers.report()
        if not self.layout.is_main:
            return
        memory, total = console.memory_gb(self.layout.device)
        speed = self.clock.tokens_per_second()
        row = {"step": step, "kind": "train", "loss": finite(result.loss), "grad_norm": finite(result.grad_norm),
               "learning_rate": learning_rate(recipe, step - 1), "samples": self.state.samples,
               "tokens": step * recipe.tokens_per_step, "loss_tokens": result.tokens, "tokens_per_second": speed,
               **self.tokens_by_stream(), **work,
               "mfu": self.clock.share_of_peak(speed, self.clock.flops),
               "hfu": self.clock.share_of_peak(speed, self.clock.executed), "memory_gb": memory,
               "eta_seconds": (recipe.train.steps - step) * recipe.tokens_per_step / speed}
        self.metrics.write(row)
        print(console.step_line({**row, "loss": result.loss, "grad_norm": result.grad_norm}, recipe.train.steps, total),
              *slow, sep="\n", flush=True)

    def tokens_by_stream(self) -> dict[str, int]:
        """Tokens read of each stream of a mixture so far; nothing where there is one."""
        mixture = self.data.mixture
        if len(mixture.names) == 1:
            return {}
        counts = mixture.tokens_per_stream(self.state.samples)
        return {f"tokens/{name}": count for name, count in zip(mixture.names, counts, strict=True)}

    def validate(self) -> None:
        recipe, totals, health = self.recipe, [0.0, 0], {}
        batches = eval_batches(self.data.valid, data_rank=self.layout.data_rank, data_size=self.layout.data,
                               micro_batch_size=recipe.train.micro_batch_size, documents=recipe.data.documents,
                               limit=recipe.valid.samples)
        for number, batch in enumerate(batches):
            self.watchdog.mark(self.state.step, "validation")
            watching = recipe.log.memory_health and number == 0
            with memory_health.watch(self.engine.model) if watching else contextlib.nullcontext({}) as seen:
                total, tokens = self.engine.evaluate([batch])
            health |= seen
            totals[0] += total
            totals[1] += tokens
        loss = totals[0] / max(totals[1], 1)
        if recipe.log.memory_health:
            health = memory_health.of_all_ranks(health, self.layout)
        if self.layout.is_main:
            self.metrics.write({"step": self.state.step, "kind": "valid", "loss": finite(loss),
                                "perplexity": finite(math.exp(min(loss, 50))), "tokens": totals[1]})
            print(f"valid | step {self.state.step:,} | loss {loss:.4f} | perplexity {math.exp(min(loss, 50)):.2f} | "
                  f"{totals[1]:,} tokens", flush=True)
            for layer, values in health.items():
                self.metrics.write({"step": self.state.step, "kind": f"memory/layer{layer}",
                                    **{name: finite(value) for name, value in values.items()}})
            if health:
                print(memory_health.panel(health), flush=True)

    def sample(self) -> None:
        self.watchdog.mark(self.state.step, "sample text")
        log = self.recipe.log
        text = sample_text(self.engine, self.data.tokenizer, log.sample_prompt, log.sample_tokens, seed=self.state.step)
        if self.layout.is_main:
            self.metrics.text(self.state.step, text)
            print(f"sample | {text!r}", flush=True)

    def agree_and_save(self) -> str | None:
        """The loop's one collective of its own: a signal's name if any rank has seen one; begins a due checkpoint.

        A checkpoint that is due while the last one is still being written waits for it, without stopping the run.
        """
        writer = self.saver.writer
        signal, failed, busy = agree(self.layout, self.signal.seen or 0, writer.failed, writer.busy)
        if failed or not busy:
            self.finish_save()
            if self.save_due:
                self.begin_save()
                if not self.recipe.checkpoint.background:
                    self.finish_save()
        return self.signal.name(signal)

    def begin_save(self) -> None:
        """Copy the state of this step and let the writer go on with it; nothing if this step is saved already."""
        self.save_due = False
        if self.saved_step == self.state.step:
            return
        self.watchdog.mark(self.state.step, "copying a checkpoint")
        self.clock.start_save()
        self.saver.begin(self.state, self.recipe.folder / "checkpoints", self.about_run(),
                         (self.retire_checkpoints, self.forget_rewind, self.plot_loss))
        self.saving, self.saved_step = True, self.state.step
        self.clock.end_save()

    # these three on rank 0's writing thread, when a checkpoint is whole
    def retire_checkpoints(self) -> None:
        checkpoint = self.recipe.checkpoint
        retire(self.recipe.folder / "checkpoints", checkpoint.keep, checkpoint.keep_every)

    def forget_rewind(self) -> None:
        forget_rewind(self.recipe.folder)

    def plot_loss(self) -> None:
        plot_loss(self.recipe.folder, self.recipe.name)

    def finish_save(self) -> None:
        """Wait for the writers and say what was written. A collective; CheckpointError on every rank if one failed."""
        writer = self.saver.writer
        if not self.saving:
            return
        busy, failed = 1, 0
        while busy and not failed:
            self.watchdog.mark(self.state.step, "writing a checkpoint")
            writer.wait(0.2)
            busy, failed = agree(self.layout, writer.busy, writer.failed)
        self.saving = False
        path = writer.take_result()
        if failed:
            raise refusal(self.recipe.folder / "checkpoints", "another rank could not write its part")
        if path and self.layout.is_main:
            note_checkpoint(self.recipe.folder)
            print(f"saved | {path} | the step waited {self.clock.save_seconds:.2f} s", flush=True)

    def save_now(self) -> None:
        """This step's checkpoint, whole when this returns."""
        self.finish_save()
        self.begin_save()
        self.finish_save()

    def about_run(self) -> dict[str, object]:
        return {"data_fingerprint": self.data.fingerprint, "tokenizer": self.data.tokenizer.identity(),
                "code": self.code_version}

    def bad_step(self, result: StepResult, batches: list[Batch]) -> None:
        """Write down what happened; too many in a row: rewind, and after too many rewinds stop."""
        recipe, state = self.recipe, self.state
        place = None
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            place = first_nonfinite(self.engine, batches)
        bad = BadStep(state.step, result.problem, repr(result.loss), repr(result.grad_norm),
                      state.samples - recipe.train.global_batch_size, state.samples - 1, place)
        self.streak.append(bad)
        folder = incident_folder(recipe.folder, self.streak[0])
        on_main(self.layout, lambda: write_incident(folder, self.streak))
        if self.layout.is_main:
            self.metrics.write({"kind": "bad_step", **vars(bad)})
            print(f"skipped | step {state.step:,} | {bad.reason} | samples {bad.first_sample} to {bad.last_sample} | "
                  f"first non-finite: {place or 'none'}", flush=True)
        if state.bad_steps <= recipe.guard.max_skips:
            return
        self.finish_save()
        self.keep_state(folder)
        if state.rewinds < recipe.guard.max_rewinds and self.rewind():
            return
        raise DivergedError(
            f"{recipe.folder}: {state.bad_steps} steps in a row had bad numbers ({bad.reason}) after "
            f"{state.rewinds} rewinds (limits guard.max_skips = {recipe.guard.max_skips}, guard.max_rewinds = "
            f"{recipe.guard.max_rewinds}); the samples and the state are in {folder}, --replay {folder} runs them "
            "again; lower train.learning_rate, or widen guard.loss_mads and guard.grad_mads if the numbers are fine")

    def keep_state(self, folder: Path) -> None:
        """The exact state the bad batches met, for --replay; a disk that has no room for it does not end the run."""
        try:
            self.saver.begin(self.state, folder, self.about_run())
            self.saving = True
            self.finish_save()
        except CheckpointError as error:
            if self.layout.is_main:
                print(f"not kept | {error}", flush=True)

    def rewind(self) -> bool:
        """Back to the newest healthy checkpoint, and on with the samples after the bad ones; False if there is none.

        One gone back to already, with nothing healthy saved since, has not helped: then the one before it.
        """
        self.watchdog.mark(self.state.step, "rewinding", patient=True)  # checks whole files, which may take minutes
        went, root = self.state, self.recipe.folder / "checkpoints"
        before = self.rewound_to if self.saved_step == self.rewound_to else None
        found, passed_over = on_main(self.layout, lambda: newest_usable(root, healthy=True, before=before))
        if found is None:
            return False
        loaded = load(self.engine, found)
        self.state = replace(loaded, samples=went.samples, rewinds=went.rewinds + 1)
        self.guard = NumberGuard(self.recipe.guard, loaded.guard)
        self.loader, self.streak = self.open_loader(), []
        self.saved_step = self.rewound_to = loaded.step
        on_main(self.layout, lambda: note_rewind(self.recipe.folder, self.state))
        if self.layout.is_main:
            self.metrics.rewind(loaded.step)
            print(*[f"passed over | {problem}" for problem in passed_over],
                  f"rewound | from step {went.step:,} to {found.path} | going on with sample {went.samples}",
                  sep="\n", flush=True)
        return True

    @contextlib.contextmanager
    def dead_peers_named(self) -> Iterator[None]:
        """A collective that fails because a rank has died: say which."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError) or not (lost := self.watchdog.lost_peer()):
                raise
            raise lost from None

    def close(self) -> None:
        self.saver.writer.abandon(seconds=10)
        with contextlib.suppress(RuntimeError):  # of a device that has failed already; that failure is on its way
            self.engine.leave_graph()
        self.watchdog.stop()
        if self.metrics:
            self.metrics.close()
        self.signal.restore()


class Clock:
    """Time in steps only: validation, samples and checkpoints do not slow the speed shown."""

    def __init__(self, recipe: Recipe, layout: Layout):
        self.recipe, self.layout = recipe, layout
        self.flops = flops_per_token(recipe.model, recipe.train.sequence_length)
        self.executed = executed_flops_per_token(recipe)
        self.peak = peak_flops(console.device_name(layout.device), recipe.log.peak_tflops)
        self.times: list[float] = []
        self.began = self.data_seconds = self.save_seconds = 0.0

    def start_step(self) -> None:
        self.began = time.perf_counter()

    def data_is_here(self) -> None:
        self.data_seconds = time.perf_counter() - self.began

    def start_save(self) -> None:
        self.save_seconds = -time.perf_counter()

    def end_save(self) -> None:
        self.save_seconds += time.perf_counter()

    def end_step(self) -> None:
        self.times = [*self.times[-19:], time.perf_counter() - self.began]

    def tokens_per_second(self) -> float:
        """Over the last 20 steps, all ranks together."""
        return self.recipe.tokens_per_step * len(self.times) / max(sum(self.times), 1e-9)

    def share_of_peak(self, tokens_per_second: float, flops: float) -> float | None:
        """MFU of the model's FLOPs a token, HFU of those executed; None where the peak is not known."""
        return tokens_per_second * flops / (self.peak * self.layout.world) if self.peak else None


def open_data(recipe: Recipe) -> Data:
    """The mixture, the validation set and the tokenizer, checked against each other and the recipe."""
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    sources = recipe.data.train
    paths = [sources] if isinstance(sources, str) else [source.path for source in sources]
    weights = None if isinstance(sources, str) else [source.weight for source in sources]
    streams = [PackedDataset(path, cache=recipe.data.cache) for path in paths]
    valid = PackedDataset(recipe.data.valid, cache=recipe.data.cache) if recipe.data.valid else None
    for dataset in [*streams, *([valid] if valid else [])]:
        check_tokenizer(dataset, tokenizer)
        if dataset.sequence_length != recipe.train.sequence_length:
            raise DataError(f"{dataset.path}: samples of {dataset.sequence_length} tokens, train.sequence_length is "
                            f"{recipe.train.sequence_length}; prepare the text again with --sequence-length, or change "
                            "the recipe")
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise DataError(f"{recipe.data.tokenizer}: has {tokenizer.vocab_size} tokens, model.vocab_size is "
                        f"{recipe.model.vocab_size}; make model.vocab_size at least as large")
    return Data(Mixture(streams, weights=weights, seed=recipe.train.seed), valid, tokenizer)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Of the update that follows `step` finished ones: linear warm-up, then cosine or constant."""
    train = recipe.train
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    progress = (step - train.warmup_steps) / max(train.steps - 1 - train.warmup_steps, 1)
    half = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return train.min_learning_rate + (train.learning_rate - train.min_learning_rate) * half


def due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
