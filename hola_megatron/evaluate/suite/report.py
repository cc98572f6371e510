"""The tables of an evaluation: Markdown for people, JSON with everything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hola_megatron.evaluate.suite import paper
from hola_megatron.evaluate.suite.intervals import RESAMPLES
from hola_megatron.evaluate.suite.results import Outcome, write
from hola_megatron.log.console import code_version

PACKAGES = ("torch", "transformers", "lm_eval")
NOTE = ("Brackets are 95 % intervals over the items: Wilson's for shares of right answers, a bootstrap of "
        f"{RESAMPLES:,} resamples for perplexities and mean shares.")


def markdown(found: Mapping[str, Sequence[Outcome]], *, suite: str | None = None) -> str:
    """One row a metric, one column a model; of the suite "paper" also its table with the published rows."""
    models = list(found)
    lines = [f"| task | metric | items | {' | '.join(models)} |", f"| --- | --- | ---: |{' ---: |' * len(models)}"]
    for row in zip(*found.values(), strict=True):
        for metric in row[0].metrics:
            numbers = [str(outcome.metrics[metric]) if metric in outcome.metrics else "-" for outcome in row]
            lines.append(f"| {row[0].task} | {metric} | {row[0].items:,} | {' | '.join(numbers)} |")
    text = "\n".join(lines) + f"\n\n{NOTE}\n"
    if suite == "paper":
        rows = {name: paper.row({outcome.task: outcome.metrics for outcome in outcomes})
                for name, outcomes in found.items()}
        text += f"\n{paper.table(rows)}\n"
    return text


def write_report(folder: Path, found: Mapping[str, Sequence[Outcome]], command: str, *,
                 suite: str | None = None) -> None:
    """report.md and report.json. command: how it was made. Raises RecipeError where they cannot be written."""
    about = {"command": command, "versions": _versions()}
    record: dict[str, Any] = {**about, "models": {name: [outcome.to_dict() for outcome in outcomes]
                                                  for name, outcomes in found.items()}}
    write(folder / "report.json", json.dumps(record, indent=1) + "\n")
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    write(folder / "report.md", f"# Evaluation\n\n`{command}`\n\n{versions}\n\n{markdown(found, suite=suite)}")


def _versions() -> dict[str, str]:
    found = {"hola_megatron": code_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
