"""Peak GPU memory by phase of a step, read at the phases' edges; nothing waits for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hola_megatron.profile.part_ranges import replaced

PHASES = ("forward", "backward", "gradient reduction", "optimizer")


class MemoryPhases:
    """Bytes allocated between steps, and the peak of each phase.

        phases = MemoryPhases(device)
        with phases.weights_noted():    engine = build_engine(...)
        with phases.watched(engine):    engine.train_step(...)      # a step after the first: Adam's moments exist
        phases.bytes                    # {} on a machine without a GPU
    """

    def __init__(self, device: torch.device):
        self.bytes: dict[str, int] = {}
        self._device = device
        self._phase: str | None = None

    @property
    def measured(self) -> bool:
        return self._device.type == "cuda"

    @contextlib.contextmanager
    def weights_noted(self) -> Iterator[None]:
        """While an engine is built: what its model takes, before gradients and optimizer come."""
        import hola_megatron.engine.base as engines

        def noting(build: Callable) -> Callable:
            def run(*args: Any, **kwargs: Any) -> Any:
                before = self._allocated()
                chunks = build(*args, **kwargs)
                self.bytes["weights"] = self._allocated() - before
                return chunks

            return run

        if not self.measured:
            yield
            return
        with replaced(engines, "build_model", noting):
            yield

    @contextlib.contextmanager
    def watched(self, engine: Any) -> Iterator[None]:
        """While a step runs: its phases."""
        if not self.measured:
            yield
            return
        from megatron.core.pipeline_parallel import schedules

        rest = self._allocated()
        self.bytes["gradients and optimizer"] = rest - self.bytes.get("weights", 0)
        self._enter(None)
        with contextlib.ExitStack() as stack:
            for owner, name, phase in ((schedules, "forward_step", "forward"),
                                       (schedules, "backward_step", "backward"),
                                       (engine.config, "finalize_model_grads_func", "gradient reduction"),
                                       (engine.optimizer, "prepare_grads", "optimizer")):
                stack.enter_context(replaced(owner, name, self._entering(phase)))
            yield
        self._enter(None)

    def _entering(self, phase: str) -> Callable[[Callable], Callable]:
        def change(function: Callable) -> Callable:
            def run(*args: Any, **kwargs: Any) -> Any:
                self._enter(phase)
                return function(*args, **kwargs)

            return run

        return change

    def _enter(self, phase: str | None) -> None:
        """The phase before ends here (a pipeline's forward and backward steps alternate)."""
        if self._phase is not None:
            name = f"peak of {self._phase}"
            self.bytes[name] = max(self.bytes.get(name, 0), torch.cuda.max_memory_allocated(self._device))
        torch.cuda.reset_peak_memory_stats(self._device)
        self._phase = phase

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device)
