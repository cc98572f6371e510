"""A task's records from local files, in the fields of the dataset that lm-evaluation-harness would download.

In the folder that --data names, a task's file begins with the task's name: arc_easy.jsonl, piqa_val.jsonl.xz,
winogrande.validation.jsonl.gz; siqa and csqa are short for social_iqa and commonsense_qa. WikiText may also be the raw
file (wiki.test.raw.txt). Prompts, choices and metrics stay the harness's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hola_megatron.data.documents import DocumentReader, json_records
from hola_megatron.data.sources import Source, find_sources
from hola_megatron.errors import DataError
from hola_megatron.evaluate.wikitext import pages
from hola_megatron.files import FileProblem, check_schema
from hola_megatron.files.task_records import ANY_RECORD, RECORDS

Record = dict[str, Any]
SHORT_NAMES = {"social_iqa": ("siqa",), "commonsense_qa": ("csqa",), "lambada_openai": ("lambada",),
               "wikitext": ("wikitext2_raw", "wikitext2", "wikitext103", "wiki.test.raw", "wiki.valid.raw")}
NOT_SCORED = re.compile(r"(?<![a-z])train(?![a-z])")


def local_records(folder: Path, task: str) -> list[Record]:
    """The records of `task` in `folder`. Raises DataError where there is no file, several, or a record of other form.

    A task that is not in RECORDS takes its records as they are: the fields of its dataset.
    """
    source = task_file(folder, task)
    if task == "wikitext" and source.form == "txt":
        return [{"page": page} for document in DocumentReader([source]) for page in pages(document)]
    found = []
    for where, record in json_records(source):
        found.append(_hub_record(task, record, where))
    if not found:
        raise DataError(f"{source.path}: no record; every line must be one")
    return found


def task_file(folder: Path, task: str) -> Source:
    """The file of `task` in `folder`; of several, the only one named test. Raises DataError where there is none."""
    if not folder.is_dir():
        raise DataError(f"--data: {folder} is no folder; give the one that holds the tasks' files")
    names = (task, *SHORT_NAMES.get(task, ()))
    stem = re.compile(rf"({'|'.join(map(re.escape, names))})([._-].*)?", re.IGNORECASE)
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and stem.fullmatch(_stem(path.name))
             and not NOT_SCORED.search(path.name.lower())]
    forms = ("jsonl", "txt") if task == "wikitext" else ("jsonl",)
    sources = [source for path in paths for source in find_sources([str(path)]) if source.form in forms]
    if not sources:
        raise DataError(f"--data: {folder} has no file of the task {task}; put its records there as {task}.jsonl (also "
                        f"{task}_NAME.jsonl, .gz, .xz, .zst), or leave the task out")
    if len(tests := [source for source in sources if "test" in source.path.name.lower()]) == 1:
        sources = tests
    if len(sources) > 1:
        raise DataError(f"--data: {folder} has {len(sources)} files of the task {task} "
                        f"({', '.join(source.path.name for source in sources)}); leave one")
    return sources[0]


def _stem(name: str) -> str:
    """A file's name without the suffixes that say its format; "" where they say none that is read."""
    found = re.fullmatch(r"(.+?)\.(jsonl|txt)(\.(gz|xz|zst))?", name, re.IGNORECASE)
    return found[1] if found else ""


def _hub_record(task: str, record: Record, where: str) -> Record:
    forms = RECORDS.get(task, {"hub": ANY_RECORD})
    problems = []
    for form, schema in forms.items():
        try:
            check_schema(record, schema)
        except FileProblem as problem:
            problems.append(f"{form} fields: {problem}")
            continue
        return record if form == "hub" else FROM_PLAIN[task](record)
    raise DataError(f"{where}: no record of {task}: {'; '.join(problems)}")


def _labelled(record: Record, question: str = "question") -> Record:
    labels = [chr(ord("A") + n) for n in range(len(record["choices"]))]
    return {question: record["question"], "choices": {"text": record["choices"], "label": labels},
            "answerKey": labels[record["gold"]]}


def _hellaswag(record: Record) -> Record:
    label, _, context = record["query"].partition(": ")
    return {"activity_label": label, "ctx_a": context, "ctx_b": "", "endings": record["choices"],
            "label": str(record["gold"])}


def _piqa(record: Record) -> Record:
    one, two = record["choices"]
    return {"goal": record["goal"], "sol1": one, "sol2": two, "label": record["gold"]}


def _winogrande(record: Record) -> Record:
    return record | {"answer": str(record["answer"])}


def _boolq(record: Record) -> Record:
    """The task itself puts the question mark."""
    return {"passage": record["passage"], "question": record["question"].removesuffix("?"),
            "label": int(record["answer"] == "yes")}


def _social_iqa(record: Record) -> Record:
    answers = dict(zip(("answerA", "answerB", "answerC"), record["choices"], strict=True))
    return {"context": record["context"], "question": record["question"], **answers, "label": str(record["gold"] + 1)}


def _lambada(record: Record) -> Record:
    return {"text": f"{record['context']} {record['continuation']}"}


def _drop(record: Record) -> Record:
    """Every answer as spans: the task treats a number as a span of one."""
    no_date = {"day": "", "month": "", "year": ""}
    first, *others = record["answers"]
    return {"query_id": str(record.get("id", "")), "passage": record["passage"], "question": record["question"],
            "answer": {"number": "", "date": no_date, "spans": first},
            "validated_answers": {"number": [""] * len(others), "date": [no_date] * len(others), "spans": others}}


FROM_PLAIN: dict[str, Callable[[Record], Record]] = {
    "arc_easy": _labelled, "arc_challenge": _labelled, "commonsense_qa": _labelled,
    "openbookqa": lambda record: _labelled(record, "question_stem"), "hellaswag": _hellaswag, "piqa": _piqa,
    "winogrande": _winogrande, "boolq": _boolq, "social_iqa": _social_iqa, "lambada_openai": _lambada, "drop": _drop}
