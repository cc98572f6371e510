"""The training program.

    python -m hola_megatron.train RECIPE [section.key=value ...] [--new] [--allow-change]
    torchrun --nproc-per-node 8 -m hola_megatron.train RECIPE ...

Read it top to bottom: `train` is the whole run. Resuming is the default: the newest complete
checkpoint of the run folder wins. Exit codes: 0 finished, 2 recipe, 3 data, 4 diverged,
75 stopped by a signal with a checkpoint saved.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401  (first: it sets what later imports say)

import argparse
import contextlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

from hola_megatron.checkpoint.save_load import TrainerState, load, save
from hola_megatron.config import Recipe, load_recipe, micro_batches
from hola_megatron.data.stream import BatchLoader, Mixture, PackedDataset, check_tokenizer, eval_batches
from hola_megatron.data.tokenizer import Tokenizer, load_tokenizer
from hola_megatron.engine.megatron import MegatronEngine, StepResult
from hola_megatron.errors import DataError, DivergedError, Interrupted, run_cli
from hola_megatron.model.flops import flops_per_token, peak_flops
from hola_megatron.monitor import console, memory_health
from hola_megatron.monitor.banner import print_banner
from hola_megatron.monitor.metrics import Metrics
from hola_megatron.monitor.plot import plot_loss
from hola_megatron.monitor.sample import sample_text
from hola_megatron.monitor.signals import StopSignal
from hola_megatron.parallel.groups import Layout, start, stop
from hola_megatron.run_folder import open_run_folder


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
    engine = MegatronEngine(recipe, layout)
    state = load(engine, resume) if resume else TrainerState(step=0, samples=0)
    if layout.is_main:
        print_banner(recipe, layout, engine, data.mixture, state)
    run = Run(recipe, layout, engine, data, state)
    try:
        run.to_the_end()
    finally:
        run.close()


class Run:
    """The loop and what hangs on it."""

    def __init__(self, recipe: Recipe, layout: Layout, engine: MegatronEngine, data: Data, state: TrainerState):
        self.recipe, self.layout, self.engine, self.data, self.state = recipe, layout, engine, data, state
        self.metrics = Metrics(recipe, recipe.folder, state.step) if layout.is_main else None
        self.signal = StopSignal(layout.device)
        self.loader = BatchLoader(
            data.mixture, data_rank=layout.data_rank, data_size=layout.data,
            micro_batch_size=recipe.train.micro_batch_size, micro_batches=micro_batches(recipe, layout.world),
            first_sample=state.samples, documents=recipe.data.documents)
        self.saved_step = state.step if state.step else -1
        self.clock = Clock(recipe, layout)

    def to_the_end(self) -> None:
        recipe, steps = self.recipe, self.recipe.train.steps
        while self.state.step < steps:
            result = self.step()
            step = self.state.step
            self.log(result)
            if recipe.data.valid and due(step, recipe.valid.every, steps):
                self.validate()
            if recipe.log.sample_every and due(step, recipe.log.sample_every, steps):
                self.sample()
            if due(step, recipe.checkpoint.every, steps):
                self.save()
            if name := self.signal.agreed():
                self.save()
                raise Interrupted(f"{recipe.folder}: stopped by {name} at step {step:,}, checkpoint saved; "
                                  "start the same command again to go on")
        if self.layout.is_main:
            plot_loss(recipe.folder, recipe.name)
            print(f"finished: {steps:,} steps, {console.short(steps * recipe.tokens_per_step)} tokens; {recipe.folder}")

    def step(self) -> StepResult:
        """One optimizer step; a non-finite one changes nothing but the data position."""
        self.clock.start_step()
        batches = next(self.loader)
        result = self.engine.train_step(batches, learning_rate(self.recipe, self.state.step))
        bad = 0 if result.updated else self.state.bad_steps + 1
        self.state = TrainerState(self.state.step + 1, self.loader.state()["samples"], bad)
        self.clock.end_step()
        if bad:
            self.report_bad_step(result)
        return result

    def log(self, result: StepResult) -> None:
        step, recipe = self.state.step, self.recipe
        if not self.layout.is_main or not (due(step, recipe.log.every, recipe.train.steps) or step == 1):
            return
        memory, total = console.memory_gb(self.layout.device)
        speed = self.clock.tokens_per_second()
        row = {"step": step, "kind": "train", "loss": finite(result.loss), "grad_norm": finite(result.grad_norm),
               "learning_rate": learning_rate(recipe, step - 1), "samples": self.state.samples,
               "tokens": step * recipe.tokens_per_step, "loss_tokens": result.tokens, "tokens_per_second": speed,
               **self.tokens_by_stream(),
               "mfu": self.clock.mfu(speed), "memory_gb": memory,
               "eta_seconds": (recipe.train.steps - step) * recipe.tokens_per_step / speed}
        self.metrics.write(row)
        print(console.step_line({**row, "loss": result.loss, "grad_norm": result.grad_norm}, recipe.train.steps, total),
              flush=True)

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
            watching = recipe.log.memory_health and number == 0
            with memory_health.watch(self.engine.model) if watching else contextlib.nullcontext({}) as seen:
                total, tokens = self.engine.evaluate([batch])
            health |= seen
            totals[0] += total
            totals[1] += tokens
        loss = totals[0] / max(totals[1], 1)
        if self.layout.is_main:
            self.metrics.write({"step": self.state.step, "kind": "valid", "loss": finite(loss),
                                "perplexity": math.exp(min(loss, 50)), "tokens": totals[1]})
            print(f"valid | step {self.state.step:,} | loss {loss:.4f} | perplexity {math.exp(min(loss, 50)):.2f} | "
                  f"{totals[1]:,} tokens", flush=True)
            for layer, values in health.items():
                self.metrics.write({"step": self.state.step, "kind": f"memory/layer{layer}",
                                    **{name: finite(value) for name, value in values.items()}})
            if health:
                print(memory_health.panel(health), flush=True)

    def sample(self) -> None:
        log = self.recipe.log
        text = sample_text(self.engine, self.data.tokenizer, log.sample_prompt, log.sample_tokens, seed=self.state.step)
        if self.layout.is_main:
            self.metrics.text(self.state.step, text)
            print(f"sample | {text!r}", flush=True)

    def save(self) -> None:
        """One checkpoint of this step; a second call for the same step does nothing."""
        if self.saved_step == self.state.step:
            return
        path = save(self.engine, self.state, self.recipe.folder / "checkpoints", {
            "data_fingerprint": self.data.fingerprint, "tokenizer": self.data.tokenizer.identity(),
            "code": console.code_version()})
        self.saved_step = self.state.step
        if self.layout.is_main:
            plot_loss(self.recipe.folder, self.recipe.name)
            print(f"saved | {path}", flush=True)

    def report_bad_step(self, result: StepResult) -> None:
        """Say which samples made a non-finite step; too many in a row end the run."""
        recipe, state = self.recipe, self.state
        first = state.samples - recipe.train.global_batch_size
        if self.layout.is_main:
            row = {"step": state.step, "kind": "bad_step", "loss": repr(result.loss),
                   "grad_norm": repr(result.grad_norm), "first_sample": first, "last_sample": state.samples - 1}
            self.metrics.write(row)
            print(f"skipped | step {state.step:,} | loss {result.loss} | gnorm {result.grad_norm} | samples {first} to "
                  f"{state.samples - 1}", flush=True)
        if state.bad_steps > recipe.train.max_bad_steps:
            if self.layout.is_main:
                about = {"step": state.step, "samples": [first, state.samples - 1], "bad_steps": state.bad_steps}
                (recipe.folder / "diverged.json").write_text(json.dumps(about, indent=1))
            raise DivergedError(
                f"{recipe.folder}: {state.bad_steps} steps in a row had a non-finite loss or gradient (limit "
                f"train.max_bad_steps = {recipe.train.max_bad_steps}); the samples are in diverged.json; lower "
                "train.learning_rate, or go on from an earlier checkpoint")

    def close(self) -> None:
        self.signal.restore()
        if self.metrics:
            self.metrics.close()


class Clock:
    """Time in steps only: validation, samples and checkpoints do not slow the speed shown."""

    def __init__(self, recipe: Recipe, layout: Layout):
        self.recipe, self.layout = recipe, layout
        self.flops = flops_per_token(recipe.model, recipe.train.sequence_length)
        self.peak = peak_flops(console.device_name(layout.device), recipe.log.peak_tflops)
        self.times: list[float] = []
        self.began = 0.0

    def start_step(self) -> None:
        self.began = time.perf_counter()

    def end_step(self) -> None:
        self.times = [*self.times[-19:], time.perf_counter() - self.began]

    def tokens_per_second(self) -> float:
        """Over the last 20 steps, all ranks together."""
        return self.recipe.tokens_per_step * len(self.times) / max(sum(self.times), 1e-9)

    def mfu(self, tokens_per_second: float) -> float | None:
        return tokens_per_second * self.flops / (self.peak * self.layout.world) if self.peak else None


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hola_megatron.train", description="Train a recipe.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--new", action="store_true", help="start over; an earlier run's folder is moved aside")
    parser.add_argument("--allow-change", action="store_true",
                        help="resume although the recipe or the data differ from the checkpoint's")
    args = parser.parse_intermixed_args(argv)
    train(load_recipe(args.recipe, args.overrides), new=args.new, allow_change=args.allow_change)


def finish() -> None:
    """main, then leave the process groups: an early exit would make peers wait for a rank that is gone."""
    main()
    stop()


if __name__ == "__main__":
    run_cli(finish)
