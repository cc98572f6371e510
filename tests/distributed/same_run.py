"""Whether two runs are the same: losses, gradient norms and tokens of every step, and what their checkpoints hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import checkpoint_tensors, metric_rows

# of the losses and the gradient norms of steps, relative
LOSS, NORM = 1e-5, 1e-5


def assert_same_steps(run: Path, other: Path, steps: int, *, loss: float = LOSS, norm: float = NORM) -> None:
    expected, found = metric_rows(other), metric_rows(run)
    assert len(expected) == len(found) == steps
    for want, have in zip(expected, found, strict=True):
        assert have["loss"] == pytest.approx(want["loss"], rel=loss), (want["step"], have, want)
        assert have["grad_norm"] == pytest.approx(want["grad_norm"], rel=norm), (want["step"], have, want)
        assert (have["loss_tokens"], have["samples"]) == (want["loss_tokens"], want["samples"])


def assert_same_tensors(run: Path, other: Path, kinds: tuple[str, ...] = ("weight",), limit: float = 1e-4) -> None:
    """run, other: checkpoints. Errors are relative to each tensor's norm, or to 1e-3 if that is more."""
    for kind in kinds:
        want, have = checkpoint_tensors(other, kind), checkpoint_tensors(run, kind)
        assert want.keys() == have.keys() and want
        errors = {name: float((have[name] - tensor).norm() / tensor.norm().clamp_min(1e-3))
                  for name, tensor in want.items()}
        wrong = {name: error for name, error in errors.items() if not error < limit}
        assert not wrong, (kind, wrong)
