"""The Markdown report of a study: answers by its rules, tables, curves, commands and versions."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from hola_megatron.study.curves import draw
from hola_megatron.study.intervals import LEVEL, interval, text
from hola_megatron.study.rules import Results, judge, sentence
from hola_megatron.study.runs import Run
from hola_megatron.study.table import Arm, Study

SOLVED = 0.9  # accuracy from which a seed counts as one that has solved a test
NOTHING = "-"  # in a cell
COLUMNS = 8  # of one table


def write_report(study: Study, runs: Sequence[Run], out: Path, command: str) -> Path:
    """Write OUT/report.md and its pictures from what is finished now; returns the path.

    command: what makes or continues the study.
    """
    done = {run: record for run in runs if (record := run.done)}
    results: Results = {}
    for run, record in done.items():
        results.setdefault(run.arm.name, {})[run.seed] = record["measures"]
    pictures = draw(list(done), results, out)
    parts = [f"# {study.title}", study.question, *_status(study, runs, done), *_verdicts(study, results),
             *_tables(study, results), *_pictures(pictures), *_arms(study, done), *_making(study, done, command)]
    path = out / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _status(study: Study, runs: Sequence[Run], done: dict[Run, dict]) -> list[str]:
    lines = []
    if study.is_smoke:
        lines.append("**The small form (--smoke): it shows that everything runs. Its figures say nothing about the "
                     "question.**")
    lines.append(f"{len(done)} of {len(runs)} runs are finished.")
    unsupported = [f"* {arm.name} ({arm.note}): {reason}" for arm in study.arms if (reason := study.unsupported(arm))]
    if unsupported:
        lines += ["Not run, since this version's recipes do not support them:", "\n".join(unsupported)]
    failed = [f"* {run}: {run.failed['problem']} (`{run.failed['log']}`)" for run in runs
              if run not in done and run.failed]
    if failed:
        lines += ["Failed; the same command tries them again:", "\n".join(failed)]
    waiting = [str(run) for run in runs if run not in done and not run.failed]
    if waiting:
        lines.append(f"Not finished: {'; '.join(waiting)}.")
    return lines


def _verdicts(study: Study, results: Results) -> list[str]:
    if not study.rules:
        return []
    lines = ["## Decision rules", "Written before the runs."]
    for rule in study.rules:
        verdict = judge(study, rule, results)
        seeds = study.seeds_of(study.arm(rule.arm))
        rows = [[other, *(text(found[seed]) if seed in found else "-" for seed in seeds),
                 str(interval(list(found.values()))) if found else "-"]
                for other, found in verdict.differences.items()]
        reached = f"{len(verdict.seeds)} of {len(seeds)} seeds reach it"
        lines += [f"**{rule.name}: {verdict.answer}** ({verdict.reason or reached}). The rule: {sentence(rule)}.",
                  table([f"{rule.arm} better than", *(f"seed {seed}" for seed in seeds), "mean"], rows)]
    return lines


def _tables(study: Study, results: Results) -> list[str]:
    groups = _groups(study, results)
    if not groups:
        return []
    arms = [arm.name for arm in study.arms if arm.name in results]
    parts = ["## Results", f"Mean over seeds ± half of its {LEVEL:.0%} interval (Student's t over seeds). In "
             f"parentheses: seeds with an accuracy of {SOLVED} or more, of all finished ones."]
    for group, names in groups:
        parts.append(_titled(group, table(["arm", *(_short(name) for name in names)], [
            [arm, *cells] for arm in arms
            if set(cells := [_cell(results[arm], name) for name in names]) != {NOTHING}])))
    if study.baseline in results:
        parts += _differences(study.baseline, results, arms, groups)
    parts += ["## Every seed"]
    for group, names in groups:
        parts.append(_titled(group, table(["arm", "seed", *(_short(name) for name in names)], [
            [arm, str(seed), *(text(found[name]) if name in found else NOTHING for name in names)]
            for arm in arms for seed, found in sorted(results[arm].items()) if not found.keys().isdisjoint(names)])))
    return parts


def _groups(study: Study, results: Results) -> list[tuple[str, list[str]]]:
    """(start of the names, names) of the measures that are shown, at most COLUMNS together."""
    names = dict.fromkeys(name for seeds in results.values() for found in seeds.values() for name in found)
    starts: dict[str, list[str]] = {}
    for name in names:
        if not study.tables or name.startswith(tuple(study.tables)):
            starts.setdefault(name.rpartition("/")[0], []).append(name)
    return [(start, its[first: first + COLUMNS]) for start, its in starts.items()
            for first in range(0, len(its), COLUMNS)]


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _titled(group: str, content: str) -> str:
    return f"{group}:\n\n{content}" if group else content


def _differences(baseline: str, results: Results, arms: list[str], groups: list[tuple[str, list[str]]]) -> list[str]:
    """Tables of (arm - baseline) over the seeds that both have finished."""
    parts = [f"## Differences from {baseline}", "Seed by seed, with the interval of their mean."]
    for group, names in groups:
        rows = []
        for arm in arms:
            cells = [[results[arm][seed][name] - results[baseline][seed][name] for seed in results[arm]
                      if name in results[arm][seed] and name in results[baseline].get(seed, {})] for name in names]
            if arm != baseline and any(cells):
                rows.append([arm, *(str(interval(cell)) if cell else NOTHING for cell in cells)])
        parts.append(_titled(group, table(["arm", *(_short(name) for name in names)], rows)))
    return parts


def _cell(seeds: dict[int, dict[str, float]], name: str) -> str:
    values = [found[name] for found in seeds.values() if name in found]
    if not values:
        return NOTHING
    solved = f" ({sum(x >= SOLVED for x in values)}/{len(values)})" if name.startswith("accuracy/") else ""
    return f"{interval(values)}{solved}"


def _pictures(pictures: list[tuple[str, str]]) -> list[str]:
    if not pictures:
        return []
    return ["## Curves", *(part for file, caption in pictures for part in (f"![{caption}]({file})", caption))]


def _arms(study: Study, done: dict[Run, dict]) -> list[str]:
    graphs = {run.arm.name: record.get("graph") for run, record in done.items()}
    rows = [[arm.name, arm.note or "-", f"`{study.recipe_path(arm)}`", _overrides(arm), graphs.get(arm.name) or "-"]
            for arm in study.arms]
    head = ["arm", "what", "recipe", "overrides", "without a CUDA graph, because"]
    if not any(graphs.values()):
        head, rows = head[:-1], [row[:-1] for row in rows]
    common = ", ".join(f"`{key}={value}`" for key, value in study.overrides.items())
    return ["## Arms", table(head, rows), f"Overrides of all arms: {common or 'none'}."]


def _overrides(arm: Arm) -> str:
    found = [f"`{key}={value}`" for key, value in arm.overrides.items()]
    if arm.given_score:
        found.append("scores from the task")
    return ", ".join(found) or "-"


def _making(study: Study, done: dict[Run, dict], command: str) -> list[str]:
    parts = ["## How it was made", "The command, which also continues the study:",
             f"```bash\n{command}\n```"]
    if study.task is not None:
        task = ", ".join(f"{key} {value}" for key, value in study.task.to_dict().items())
        parts.append(f"The task (`hola_megatron/study/far_mqar.py`): {task}.")
    made = {(record["code"], record["device"], ", ".join(f"{k} {v}" for k, v in record["versions"].items()))
            for record in done.values()}
    parts += [f"* Code {code}; device {device}; {versions}." for code, device, versions in sorted(made)]
    if done:
        seconds = sum(record["seconds"] for record in done.values())
        parts.append(f"{seconds:,.0f} seconds of runs together. The commands of every run are in its `done.json`; the "
                     "first one's:")
        parts.append("```text\n" + "\n".join(next(iter(done.values()))["commands"]) + "\n```")
    return parts


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; | in cells is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
                     for row in lines)


def command_text(program: str, arguments: list[str]) -> str:
    return shlex.join(["python", program, *arguments])
