"""Table 1 of the HOLA paper (arXiv 2607.02303): which tasks, and the published rows that ours is printed beside.

340M parameters, 15B tokens of SlimPajama, a context of 2,048. The values are those of its table 1 and of its text, from
a transcription; accuracies in percent. The paper does not say which accuracy of ARC and HellaSwag it gives; as usual
for this table, acc_norm is taken for ARC-Challenge and HellaSwag, acc elsewhere. Avg: of the six accuracies shown.
"""

from __future__ import annotations

from collections.abc import Mapping

from hola_megatron.evaluate.suite.intervals import Measure

TASKS = ("wikitext", "lambada_openai", "arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "boolq", "sciq",
         "openbookqa", "fda", "swde", "squad_completion")
# column: (task, metric, whether it is a share shown in percent)
COLUMNS = {"Wiki ppl": ("wikitext", "word_perplexity", False), "LMB ppl": ("lambada_openai", "perplexity", False),
           "ARCe": ("arc_easy", "acc", True), "ARCc": ("arc_challenge", "acc_norm", True),
           "Hella": ("hellaswag", "acc_norm", True), "PIQA": ("piqa", "acc", True),
           "Wino": ("winogrande", "acc", True), "LMBa": ("lambada_openai", "acc", True),
           "FDA": ("fda", "contains", True), "SWDE": ("swde", "contains", True),
           "SQuAD": ("squad_completion", "contains", True),
           "BoolQ": ("boolq", "acc", True), "SciQ": ("sciq", "acc", True), "OBQA": ("openbookqa", "acc_norm", True)}
AVERAGED = ("ARCe", "ARCc", "Hella", "PIQA", "Wino", "LMBa")
PUBLISHED: dict[str, dict[str, float]] = {
    "GDN (paper)": {"Wiki ppl": 27.32, "LMB ppl": 30.95, "ARCe": 46.13, "ARCc": 23.72, "Hella": 35.88, "PIQA": 65.07,
                    "Wino": 50.43, "LMBa": 34.02, "FDA": 11.7, "SWDE": 29.0, "SQuAD": 32.5, "BoolQ": 54.8},
    "HOLA + recency (paper)": {"Wiki ppl": 25.04, "LMB ppl": 32.33, "ARCe": 46.13, "ARCc": 24.40, "Hella": 35.62,
                               "PIQA": 65.34, "Wino": 52.80, "LMBa": 34.72, "FDA": 16.9, "SWDE": 29.9},
    "HOLA (paper)": {"Wiki ppl": 22.92, "LMB ppl": 30.26, "ARCe": 46.00, "ARCc": 24.06, "Hella": 35.91, "PIQA": 65.02,
                     "Wino": 51.54, "LMBa": 34.54, "FDA": 20.1, "SWDE": 35.9, "SQuAD": 33.8, "BoolQ": 58.4}}


def row(metrics: Mapping[str, Mapping[str, Measure]]) -> dict[str, float]:
    """The columns of one model, of those tasks that were run. metrics: {task: {metric: number}}."""
    found = {}
    for column, (task, metric, percent) in COLUMNS.items():
        if metric in metrics.get(task, {}):
            found[column] = metrics[task][metric].value * (100 if percent else 1)
    return found


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: our rows, then the paper's, with Avg where all its accuracies are there."""
    columns = [*list(COLUMNS)[:8], "Avg", *list(COLUMNS)[8:]]
    lines = [f"| model | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for name, values in {**rows, **PUBLISHED}.items():
        whole = dict(values)
        if all(column in values for column in AVERAGED):
            whole["Avg"] = sum(values[column] for column in AVERAGED) / len(AVERAGED)
        lines.append(f"| {name} | " + " | ".join(f"{whole[c]:.2f}" if c in whole else "-" for c in columns) + " |")
    return "\n".join(lines)
