"""One run on a generated task: the engine, model and optimizer of the trainer, samples that are made on the way.

Writes metrics.jsonl (rows of kind train, and of kind task with accuracies) and a checkpoint, and returns the measures
of the last model. One process, one GPU or the CPU.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hola_megatron.checkpoint.save_load import Saver, TrainerState
from hola_megatron.data.stream import Batch
from hola_megatron.data.tokenizer import load_tokenizer
from hola_megatron.engine.base import Engine
from hola_megatron.engine.build import build_engine
from hola_megatron.errors import DivergedError, RecipeError
from hola_megatron.evaluate.recall.mqar import Questions
from hola_megatron.layers.given_score import given_score
from hola_megatron.log.console import code_version
from hola_megatron.recipe.schedule import learning_rate
from hola_megatron.recipe.schema import Recipe
from hola_megatron.startup.start import start, stop
from hola_megatron.study.far_mqar import FarMqar
from hola_megatron.study.kept import kept_shares

BAD_STEPS = 10  # in a row, after which a run has diverged
LOG_EVERY = 10
KEPT_SAMPLES = 16  # of each test of what is kept


def run_task(recipe: Recipe, task: FarMqar, folder: Path, *, by_task_score: bool = False) -> dict[str, float]:
    """Train the recipe's model on the task, then test it.

    Args:
        recipe: model, train and log sections are used; its data section is not.
        task: what is generated.
        folder: gets metrics.jsonl and the last checkpoint, as a run folder of the trainer has them.
        by_task_score: caches rank tokens by the task's score (the recipe's score must be `given_score.SCORE`).

    Returns:
        Accuracies "accuracy/length_T/pairs_N", their mean over the pairs of each length, the last loss, and for layers
        with slots "kept/layer_L/pairs_N", the share of the values that are held where the questions begin.

    Raises:
        RecipeError: the task does not fit the recipe. DivergedError: steps that are not finite.
    """
    if problems := task.problems(recipe, by_task_score):
        raise RecipeError(problems)
    layout = start(recipe)
    try:
        engine = build_engine(recipe, layout)
        with (folder / "metrics.jsonl").open("w", encoding="utf-8") as rows:
            loss = _train(engine, task, by_task_score, rows)
        _save(engine, folder)
        found = measure(engine, task, task.tests(recipe.train.sequence_length), task.test_samples, by_task_score)
        return {"loss": loss, **found, **_kept(engine, task, by_task_score)}
    finally:
        stop()


def _train(engine: Engine, task: FarMqar, by_task_score: bool, rows: Any) -> float:
    """All steps; returns the last loss."""
    recipe, train, bad, loss = engine.recipe, engine.recipe.train, 0, math.nan
    for step in range(train.steps):
        groups = task.training(seed=train.seed, step=step, rows=train.global_batch_size, length=train.sequence_length,
                               vocabulary=recipe.model.vocab_size)
        tokens, mask, score = (np.concatenate([getattr(group, name) for group in groups])
                               for name in ("tokens", "mask", "score"))
        with _ranked(score if by_task_score else None, engine):
            result = engine.train_step(list(_micro_batches(tokens, mask, train.micro_batch_size)),
                                       learning_rate(recipe, step))
        bad = 0 if result.updated else bad + 1
        if bad >= BAD_STEPS:
            raise DivergedError(f"step {step + 1}: {result.problem}, for {bad} steps; make train.learning_rate smaller")
        loss = result.loss
        last = step + 1 == train.steps
        if (step + 1) % LOG_EVERY == 0 or last:
            _write(rows, step + 1, "train", {"loss": loss if math.isfinite(loss) else None})
        if (step + 1) % task.every == 0 or last:
            found = measure(engine, task, [(train.sequence_length, pairs) for pairs in sorted(set(task.pairs))],
                            min(64, task.test_samples), by_task_score)
            _write(rows, step + 1, "task", found)
    return loss


def _save(engine: Engine, folder: Path) -> None:
    """Write the checkpoint of the last step; that of an earlier attempt is removed."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    train, saver = engine.recipe.train, Saver(engine)
    about = {"data_fingerprint": None, "valid_fingerprint": None, "code": code_version(),
             "tokenizer": load_tokenizer(engine.recipe.data.tokenizer).identity()}
    saver.begin(TrainerState(step=train.steps, samples=train.steps * train.global_batch_size), folder / "checkpoints",
                about)
    while saver.writer.busy:
        saver.writer.wait(0.2)
    saver.writer.take_result()


def _write(rows: Any, step: int, kind: str, values: dict[str, float | None]) -> None:
    rows.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
    rows.flush()


def _micro_batches(tokens: np.ndarray, mask: np.ndarray, rows: int) -> Iterator[Batch]:
    """Batches of `rows` samples [rows, T]; the last token of a sample has no label."""
    labels = np.roll(tokens, -1, 1)
    for first in range(0, len(tokens), rows):
        part = slice(first, first + rows)
        yield Batch(*(torch.from_numpy(np.ascontiguousarray(x[part])) for x in (tokens, labels, mask)), documents=None)


def _ranked(score: np.ndarray | None, engine: Engine) -> contextlib.AbstractContextManager[None]:
    if score is None:
        return contextlib.nullcontext()
    return given_score(torch.from_numpy(score).to(engine.layout.device))


@torch.no_grad()
def measure(engine: Engine, task: FarMqar, tests: list[tuple[int, int]], samples: int,
            by_task_score: bool = False) -> dict[str, float]:
    """Share of answers that are the model's first choice in the whole vocabulary, for each (length, pairs)."""
    for chunk in engine.model:
        chunk.eval()
    found: dict[str, float] = {}
    for length, pairs in tests:
        right, rows = 0, max(1, min(samples, task.test_tokens // length))
        for first in range(0, samples, rows):
            drawn = task.test(length=length, vocabulary=engine.recipe.model.vocab_size, pairs=pairs, first=first,
                              rows=min(rows, samples - first))
            with _ranked(drawn.score if by_task_score else None, engine):
                right += int((answers(engine, drawn) == torch.from_numpy(drawn.answers)).sum())
        found[f"accuracy/length_{length}/pairs_{pairs}"] = right / (samples * pairs)
    for length in dict.fromkeys(length for length, _ in tests):
        of_length = [found[f"accuracy/length_{length}/pairs_{pairs}"] for at, pairs in tests if at == length]
        found[f"accuracy/length_{length}/mean"] = sum(of_length) / len(of_length)
    return found


def _kept(engine: Engine, task: FarMqar, by_task_score: bool) -> dict[str, float]:
    length, found = engine.recipe.train.sequence_length, {}
    for pairs in task.test_pairs:
        drawn = task.test(length=length, vocabulary=engine.recipe.model.vocab_size, pairs=pairs, first=0,
                          rows=min(KEPT_SAMPLES, task.test_samples))
        with _ranked(drawn.score[:, : length * 3 // 4] if by_task_score else None, engine):
            shares = kept_shares(engine, drawn)
        found |= {f"kept/layer_{number}/pairs_{pairs}": share for number, share in enumerate(shares, 1)}
    return dict(sorted(found.items(), key=lambda item: item[0].split("/")[1]))


def answers(engine: Engine, drawn: Questions) -> Tensor:
    """int64 [B, N] on the CPU: the model's first choice after every key that is asked."""
    asked = torch.from_numpy(drawn.asked).to(engine.layout.device)

    def choose(*, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any) -> Tensor:
        weight = output_layer.weight if output_weight is None else output_weight
        hidden = hidden_states.transpose(0, 1)  # Megatron has [S, B, D]
        at = hidden.gather(1, asked[..., None].expand(-1, -1, hidden.shape[2]))
        return (at @ weight.t()).float().argmax(-1)

    tokens = torch.from_numpy(drawn.tokens).to(engine.layout.device)
    return engine.model[0](tokens, None, None, output_processor=choose).cpu()
