"""lm-evaluation-harness's tasks: found by name, with the hub's data or records from a local folder, and run.

Prompts, choices, filters and metrics are the harness's. Local records take the place of a task's download only.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import lm_eval.api.task
import lm_eval.tasks
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from hola_megatron.errors import DataError, InstallError, RecipeError, UserError, one_line, shown
from hola_megatron.evaluate.harness.adapter import HarnessModel
from hola_megatron.evaluate.harness.local_data import local_records, task_file

# where a task lies in the harness: its whole index of 14,000 tasks takes seconds to read
FOLDERS = {"arc_easy": "arc", "arc_challenge": "arc", "boolq": "super_glue/boolq", "commonsense_qa": "commonsense_qa",
           "drop": "drop", "fda": "fda", "hellaswag": "hellaswag", "lambada_openai": "lambada",
           "openbookqa": "openbookqa", "piqa": "piqa", "sciq": "sciq", "social_iqa": "siqa",
           "squad_completion": "squad_completion", "swde": "swde", "wikitext": "wikitext", "winogrande": "winogrande"}
CLASSES = {"fda": "FDA", "swde": "SWDE", "squad_completion": "SQUADCompletion"}  # tasks that are Python, not YAML
SEED = 1234  # of few-shot examples, the harness's own default


class TaskResult(NamedTuple):
    """A task's result.

    metrics: by the harness's names ("acc", "word_perplexity"). values: of every item, in the order of the data, for
    each metric that has one value an item. statistics: what makes the metric of them, the harness's own. items: how
    many.
    """

    metrics: dict[str, float]
    values: dict[str, list[Any]]
    statistics: dict[str, Callable[[list[Any]], float]]
    items: int


def check_names(names: Sequence[str]) -> list[str]:
    """The tasks that `names` stand for, groups and tags as their members. RecipeError for a name that is unknown."""
    if all(name in FOLDERS for name in names):
        return list(dict.fromkeys(names))
    manager = TaskManager()
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise RecipeError([f"--tasks: {shown(name)} is no task of lm-evaluation-harness"
                           f"{_meant(name, manager.all_tasks)}; lm_eval ls tasks prints them" for name in unknown])
    leaves = [leaf for name in names for leaf in _leaves(manager, name)]
    return list(dict.fromkeys(leaves))


def _meant(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def _leaves(manager: TaskManager, name: str) -> list[str]:
    entry = manager.task_index[name]
    if name in manager.all_tags:
        return sorted(entry.tags)
    if name in manager.all_groups:
        members = (entry.cfg or lm_eval.utils.load_yaml_config(str(entry.yaml_path), mode="simple")).get("task", [])
        names = [member if isinstance(member, str) else member.get("task") for member in members]
        if not all(isinstance(member, str) and member in manager.all_tasks for member in names):
            raise RecipeError(f"--tasks: the group {name} defines tasks of its own; give the tasks' names")
        return [leaf for member in names for leaf in _leaves(manager, member)]
    return [name]


def missing_data(names: Sequence[str], folder: Path) -> None:
    """Raise DataError with every task whose file is not in `folder`, and the --tasks that are there."""
    problems = {}
    for name in names:
        try:
            task_file(folder, name)
        except DataError as error:
            problems[name] = str(error)
    if problems:
        there = [name for name in names if name not in problems]
        known = f" (--tasks {','.join(there)}: these are there)" if there else ""
        raise DataError("\n".join(problems.values()) + known)


def load_task(name: str, data: Path | None = None) -> Any:
    """The harness's task, ready to run. Raises DataError where its data cannot be had, RecipeError for its name."""
    for package in ("lm_eval", "huggingface_hub", "datasets"):
        logging.getLogger(package).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        task = _local_task(name, local_records(data, name)) if data else _manager(name).load(name)["tasks"][name]
    except (UserError, KeyboardInterrupt):
        raise
    except ImportError as error:
        raise InstallError(f"{name}: needs a package that is not installed ({one_line(error)}); install it, or leave "
                           "the task out") from error
    except Exception as error:  # of the hub, or of the records' fields
        what = "its records do not fit" if data else (
            "its data cannot be had from the Hugging Face hub or its cache; give local files by --data FOLDER, or run "
            "once where the hub can be reached")
        raise DataError(f"{name}: {what} ({type(error).__name__}: {one_line(error)})") from error
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEED)
    return task


def _manager(name: str) -> TaskManager:
    if name not in FOLDERS:
        return TaskManager()
    folder = Path(lm_eval.tasks.__file__).parent / FOLDERS[name]
    return TaskManager(include_defaults=False, include_path=[str(folder)])


def _local_task(name: str, records: list[dict[str, Any]]) -> Any:
    split = datasets.Dataset.from_list(records)
    splits = {"validation": split, "test": split}
    if name in CLASSES:
        whole = getattr(importlib.import_module(f"lm_eval.tasks.{FOLDERS[name]}.task"), CLASSES[name])

        class Local(whole):  # type: ignore[misc, valid-type]
            def download(self, *_: Any, **__: Any) -> None:
                self.dataset = splits

        task = Local()
        task.set_config(key="task", value=name)
        return task
    manager = _manager(name)
    if manager.task_index[name].yaml_path is None or name not in manager.all_subtasks:
        raise RecipeError(f"--data: {name} is a group or is written in Python; give tasks of one data set each")
    changes = {"task": name, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": None,
               "training_split": None, "fewshot_split": None, "custom_dataset": lambda **_: splits}
    # a member of a group is the registered task with changes; by itself a mapping is a task of its own
    return manager.load([{"group": "local", "task": [changes]}])["tasks"][name]


def run_task(model: HarnessModel, name: str, task: Any, *, limit: int | None = None) -> TaskResult:
    """Run a task of `load_task` on the first `limit` items (None: all)."""
    with _without_bars():
        found = evaluate(model, {"tasks": {name: task}, "groups": {}, "group_map": {}}, limit=limit, bootstrap_iters=0,
                         log_samples=True)
    metrics = {key.removesuffix(",none"): float(value) for key, value in found["results"][name].items()
               if isinstance(value, (int, float)) and "," in key and "_stderr" not in key}
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    values = {metric: [sample[metric] for sample in samples] for metric in metrics
              if all(metric in sample for sample in samples)}
    return TaskResult(metrics, values, task.aggregation(), len({sample["doc_id"] for sample in samples}))


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Without the harness's own progress bars of making prompts; a Reader shows how far it is."""
    shown, lm_eval.api.task.tqdm = lm_eval.api.task.tqdm, functools.partial(tqdm, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = shown
