"""Speed of training steps: tokens per second, MFU and HFU."""

from __future__ import annotations

import time

from hola_megatron.log import console
from hola_megatron.model.flops import executed_flops_per_token, flops_per_token, peak_flops
from hola_megatron.parallel.groups import Layout
from hola_megatron.recipe.schema import Recipe


class Clock:
    """Measures time in steps only: validation, samples and checkpoints are not included in the reported speed."""

    def __init__(self, recipe: Recipe, layout: Layout):
        self.recipe, self.layout = recipe, layout
        self.flops = flops_per_token(recipe.model, recipe.train.sequence_length)
        self.executed = executed_flops_per_token(recipe)
        self.peak = peak_flops(console.device_name(layout.device), recipe.log.peak_tflops)
        self.times: list[tuple[int, float]] = []  # samples and seconds of the last steps
        self.began = self.data_seconds = self.save_seconds = 0.0

    def start_data(self) -> None:
        self.data_seconds = -time.perf_counter()

    def data_is_here(self) -> None:
        self.data_seconds += time.perf_counter()

    def start_step(self) -> None:
        self.began = time.perf_counter()

    def start_save(self) -> None:
        self.save_seconds = -time.perf_counter()

    def end_save(self) -> None:
        self.save_seconds += time.perf_counter()

    def end_step(self, samples: int) -> None:
        """samples: of the step, over all ranks."""
        self.times = [*self.times[-19:], (samples, self.data_seconds + time.perf_counter() - self.began)]

    def tokens_per_second(self) -> float:
        """Over the last 20 steps, all ranks together."""
        samples, seconds = map(sum, zip(*self.times, strict=True))
        return samples * self.recipe.train.sequence_length / max(seconds, 1e-9)

    def share_of_peak(self, tokens_per_second: float, flops: float) -> float | None:
        """MFU from the model's FLOPs per token, HFU from the executed ones; None where the peak is unknown."""
        return tokens_per_second * flops / (self.peak * self.layout.world) if self.peak else None
