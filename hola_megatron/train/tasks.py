"""Tasks inside the run (valid.tasks): lm-evaluation-harness's, on the model in training and its ranks.

Multiple choice, last words and perplexities; what has to write its answers is for tools/evaluate.py, on checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hola_megatron.data.failure import first_of_all_ranks
from hola_megatron.data.tokenizer import Tokenizer
from hola_megatron.engine.base import Engine
from hola_megatron.engine.scoring import shared_scores
from hola_megatron.errors import DataError, RecipeError, UserError
from hola_megatron.evaluate.reader import Row, Score
from hola_megatron.parallel.groups import Layout, all_reduce_max
from hola_megatron.recipe.schema import Recipe
from hola_megatron.train.reporting import finite

if TYPE_CHECKING:
    from hola_megatron.train.context import RunContext


class RunTokenizer:
    """The run's tokenizer as the harness's adapter asks one of transformers."""

    name_or_path = ""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.eos_id

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer.encode(text)}

    def decode(self, ids: Any, **_: Any) -> str:
        return self._tokenizer.decode([ids] if isinstance(ids, int) else list(ids))


class EngineReader:
    """A Reader (evaluate/reader.py) of the model in training. told: called before each forward pass."""

    def __init__(self, engine: Engine, told: Callable[[], None]):
        self._engine, self._told = engine, told

    def scores(self, rows: Sequence[Row], name: str = "") -> list[Score]:
        return [Score(*score) for score in shared_scores(self._engine, rows, told=self._told)]

    def choices(self, rows: Sequence[list[int]], places: Sequence[list[int]], name: str = "") -> list[list[int]]:
        raise NotImplementedError

    def answers(self, prompts: Sequence[list[int]], most: int, ended: Callable[[int, list[int]], bool],
                name: str = "") -> list[list[int]]:
        raise NotImplementedError  # refused by RunTasks


class RunTasks:
    """The tasks of a run.

    Raises RecipeError or DataError, on all ranks, where a task cannot be had or asks for written answers.
    """

    def __init__(self, recipe: Recipe, layout: Layout):
        self.recipe, self._ended = recipe, time.monotonic()
        self.every = recipe.valid.tasks_every or recipe.valid.every
        mine: UserError | None = None
        self._tasks: dict[str, Any] = {}
        try:
            self._tasks = _load(recipe)
        except UserError as error:
            mine = error
        if all_reduce_max(layout, mine is not None)[0]:
            raise mine if isinstance(mine, RecipeError) else first_of_all_ranks(mine and DataError(str(mine)))

    def report(self, run: RunContext) -> None:
        """Run every task, print and write their numbers and what they cost. Call on every rank."""
        from hola_megatron.evaluate.harness.adapter import HarnessModel
        from hola_megatron.evaluate.harness.tasks import run_task

        start, step, limit = time.monotonic(), run.state.step, self.recipe.valid.tasks_limit
        reader = EngineReader(run.engine, lambda: run.watchdog.mark(step, "tasks"))
        model = HarnessModel(reader, RunTokenizer(run.data.tokenizer), self.recipe.train.sequence_length)
        found = {name: run_task(model, name, task, limit=limit).metrics for name, task in self._tasks.items()}
        end = time.monotonic()
        seconds, share = end - start, (end - start) / max(end - self._ended, 1e-9)
        self._ended = end
        if not run.layout.is_main:
            return
        row = {f"{name}/{metric}": finite(value) for name, metrics in found.items()
               for metric, value in metrics.items()}
        run.metrics.write({"step": step, "kind": "tasks", **row, "seconds": seconds, "share_of_time": share})
        texts = [f"{name} " + " ".join(f"{metric} {value:,.4g}" for metric, value in metrics.items())
                 for name, metrics in found.items()]
        print(" | ".join([f"tasks | step {step:,}", *texts,
                          f"{seconds:.1f} s, {share:.1%} of the time since the last"]), flush=True)


def _load(recipe: Recipe) -> dict[str, Any]:
    from hola_megatron.evaluate.harness.tasks import check_names, load_task, missing_data

    data = None if recipe.valid.tasks_data is None else Path(recipe.valid.tasks_data)
    try:
        names = check_names(recipe.valid.tasks or ())
        if data:
            missing_data(names, data)
    except UserError as error:
        known = str(error).replace("--tasks", "valid.tasks").replace("--data", "valid.tasks_data")
        raise type(error)(known) from None
    tasks = {name: load_task(name, data) for name in names}
    written = [name for name, task in tasks.items() if task.OUTPUT_TYPE == "generate_until"
               or task.get_config("output_type") == "generate_until"]
    if written:
        raise RecipeError(f"valid.tasks: {', '.join(written)} ask for written answers, which a run does not generate; "
                          "leave them out, and run them by tools/evaluate.py on its checkpoints")
    return tasks
