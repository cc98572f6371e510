"""Reports of the training loop: step metrics, validation, sample texts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

from hola_megatron.data.stream import Batch, eval_batches
from hola_megatron.engine.base import StepResult
from hola_megatron.errors import DataError
from hola_megatron.log import console, memory_health
from hola_megatron.log.sample import NoSample, sample_text
from hola_megatron.parallel.groups import all_reduce_max
from hola_megatron.recipe.schedule import learning_rate
from hola_megatron.train.context import RunContext


def report_step(run: RunContext, result: StepResult) -> None:
    """Write and print the metrics of the last step, every `log.every` steps. Call on every rank."""
    step, recipe = run.state.step, run.recipe
    if not (due(step, recipe.log.every, recipe.train.steps) or step == 1):
        return
    work, slow = run.stragglers.report()
    if not run.layout.is_main:
        return
    memory, total = console.memory_gb(run.layout.device)
    speed = run.clock.tokens_per_second()
    row = {"step": step, "kind": "train", "loss": finite(result.loss), "grad_norm": finite(result.grad_norm),
           "learning_rate": learning_rate(recipe, step - 1), "samples": run.state.samples,
           "tokens": run.data.mixture.tokens(run.state.samples), "loss_tokens": result.tokens,
           "tokens_per_second": speed, **_by_stream(run), **work,
           "mfu": run.clock.share_of_peak(speed, run.clock.flops),
           "hfu": run.clock.share_of_peak(speed, run.clock.executed), "memory_gb": memory,
           "eta_seconds": _samples_left(run) * recipe.train.sequence_length / speed}
    run.metrics.write(row)
    print(console.step_line({**row, "loss": result.loss, "grad_norm": result.grad_norm}, recipe.train.steps, total),
          *slow, sep="\n", flush=True)


def _samples_left(run: RunContext) -> int:
    recipe = run.recipe
    return recipe.samples_before(recipe.train.steps) - recipe.samples_before(run.state.step)


def _by_stream(run: RunContext) -> dict[str, float]:
    """Tokens and epochs read so far of each stream of a mixture; empty for a single stream."""
    mixture, samples = run.data.mixture, run.state.samples
    counts = dict(zip(mixture.names, mixture.tokens_per_stream(samples), strict=True))
    counts |= mixture.earlier_streams(samples)
    if len(counts) < 2:
        return {}
    epochs = zip(mixture.names, mixture.epochs_per_stream(samples), strict=True)
    return {**{f"tokens/{name}": count for name, count in counts.items()},
            **{f"epochs/{name}": round(count, 6) for name, count in epochs}}


def validate(run: RunContext) -> None:
    """Report the loss of every validation set, and the layers' memory statistics. Call on every rank."""
    health: dict[int, dict[str, float]] = {}
    for number, name in enumerate(run.data.valid):
        health |= _validate_on(run, name, watching=run.recipe.log.memory_health and number == 0)
    if run.recipe.log.memory_health:
        health = memory_health.of_all_ranks(health, run.layout)
    if not run.layout.is_main:
        return
    for layer, values in health.items():
        run.metrics.write({"step": run.state.step, "kind": f"memory/layer{layer}",
                           **{name: finite(value) for name, value in values.items()}})
    if health:
        print(memory_health.panel(health), flush=True)


def _validate_on(run: RunContext, name: str, *, watching: bool) -> dict[int, dict[str, float]]:
    """Report the loss of one validation set. watching: return the memory statistics of its first batch."""
    recipe, totals, health = run.recipe, [0.0, 0], {}
    batches = eval_batches(run.data.valid[name], data_rank=run.layout.data_rank, data_size=run.layout.data,
                           micro_batch_size=recipe.train.micro_batch_size, documents=recipe.data.documents,
                           limit=recipe.valid.samples)
    for number, batch in enumerate(_read_by_all(run, batches)):
        run.watchdog.mark(run.state.step, f"validation {name}".strip())
        with memory_health.watch(run.engine.model) if watching and number == 0 else contextlib.nullcontext({}) as seen:
            total, tokens = run.engine.evaluate([batch])
        health |= seen
        totals[0] += total
        totals[1] += tokens
    loss = totals[0] / max(totals[1], 1)
    if run.layout.is_main:
        run.metrics.write({"step": run.state.step, "kind": f"valid/{name}".rstrip("/"), "loss": finite(loss),
                           "perplexity": finite(math.exp(min(loss, 50))), "tokens": totals[1]})
        print(" | ".join(["valid", *filter(None, [name]), f"step {run.state.step:,}", f"loss {loss:.4f}",
                          f"perplexity {math.exp(min(loss, 50)):.2f}", f"{totals[1]:,} tokens"]), flush=True)
    return health


def _read_by_all(run: RunContext, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield each batch after every rank has read its own. Raises DataError on all ranks if one could not."""
    batch: Batch | None = None
    while True:
        try:
            batch = next(batches, None)
        except DataError as error:
            run.data_error = error
        if all_reduce_max(run.layout, run.data_error is not None)[0]:
            run.end_for_data()
        if batch is None:
            return
        yield batch


def report_sample(run: RunContext) -> None:
    """Generate from log.sample_prompt and print the text. Call on every rank."""
    run.watchdog.mark(run.state.step, "sample text")
    log = run.recipe.log
    try:
        text = sample_text(run.engine, run.data.tokenizer, log.sample_prompt, log.sample_tokens,
                           seed=run.state.step)
    except NoSample as reason:
        if run.layout.is_main:
            print(f"sample | none: {reason}", flush=True)
        return
    if run.layout.is_main:
        run.metrics.text(run.state.step, text)
        print(f"sample | {text!r}", flush=True)


def due(step: int, every: int, last: int) -> bool:
    """Whether something is due at `step`: every `every` steps, and at the `last`."""
    return step % every == 0 or step == last


def finite(value: float) -> float | None:
    """The value, or None where it is not finite (JSON has no NaN)."""
    return value if math.isfinite(value) else None
