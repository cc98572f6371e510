"""The learning rate of every step, and the batch sizes of a ramp in words."""

from __future__ import annotations

import math

from hola_megatron.recipe.schema import Recipe, TrainConfig


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of the update after `step` finished steps: linear warm-up, then the schedule's shape."""
    return rate_of(recipe.train, step)


def rate_of(train: TrainConfig, step: int) -> float:
    """The same, of a train section."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    return train.min_learning_rate + (train.learning_rate - train.min_learning_rate) * _share(train, step)


def _share(train: TrainConfig, step: int) -> float:
    """Where the rate is between the lowest (0) and the peak (1) after warm-up."""
    if train.schedule == "constant":
        return 1.0
    if train.schedule == "wsd":
        done = (step + 1 - (train.steps - train.cooldown_steps)) / train.cooldown_steps
        done = min(max(done, 0.0), 1.0)
        return 1 - (math.sqrt(done) if train.cooldown_shape == "sqrt" else done)
    progress = min((step - train.warmup_steps) / max(train.steps - 1 - train.warmup_steps, 1), 1.0)
    return 1 - progress if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def describe_schedule(train: TrainConfig) -> str:
    """One line for the banner: what the rate does from the first step to the last."""
    peak, lowest = (f"{rate:g}" for rate in (train.learning_rate, train.min_learning_rate))
    warmup = f"up to {peak} over {train.warmup_steps:,} steps, " if train.warmup_steps else f"{peak}, "
    if train.schedule == "constant":
        return f"{warmup}then constant"
    if train.schedule == "wsd":
        return (f"{warmup}constant up to step {train.steps - train.cooldown_steps:,}, {train.cooldown_shape} cooldown "
                f"to {lowest} at step {train.steps:,}")
    return f"{warmup}{train.schedule} to {lowest} at step {train.steps:,}"


def describe_batches(train: TrainConfig) -> str:
    """The ramp's batch sizes in words; empty without a ramp."""
    stages = [f"{stage.batch:,} samples a step for {stage.steps:,} steps" for stage in train.batch_ramp or ()]
    return ", ".join([*stages, f"then {train.global_batch_size:,}"]) if stages else ""
