"""Records for tests of lm-evaluation-harness's tasks: a few items of each, in both forms that --data takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SUBJECTS = ("water", "copper", "the moon", "a horse", "the sea", "an old oak", "bread", "a violin", "rain", "glass")


def write(folder: Path, name: str, records: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _choices(n: int) -> list[str]:
    return [SUBJECTS[(n + k * 3) % 10] + " is it" * (k % 2) for k in range(4)]


def plain() -> dict[str, list[dict[str, Any]]]:
    """{task: records} in the plain form."""
    ten, yes_no = range(10), ("yes", "no")
    return {
        "arc_easy": [{"question": f"What is {SUBJECTS[n]} made of?", "choices": _choices(n), "gold": n % 4}
                     for n in ten],
        "boolq": [{"passage": f"{SUBJECTS[n].title()} -- It is known to all.", "question": f"is {SUBJECTS[n]} known?",
                   "answer": yes_no[n % 2]} for n in ten],
        "hellaswag": [{"query": f"Cooking: Somebody takes {SUBJECTS[n]} and", "choices": _choices(n), "gold": n % 4}
                      for n in ten],
        "lambada_openai": [{"context": f"They spoke of {SUBJECTS[n]} and went on to speak of",
                            "continuation": SUBJECTS[n].split()[-1]} for n in ten],
        "openbookqa": [{"question": f"One can see {SUBJECTS[n]} by", "choices": _choices(n), "gold": n % 4}
                       for n in ten],
        "piqa": [{"goal": f"How to move {SUBJECTS[n]}", "choices": _choices(n)[:2], "gold": n % 2} for n in ten],
        "winogrande": [{"sentence": f"Ann liked {SUBJECTS[n]} more than Mary, so _ kept it.", "option1": "Ann",
                        "option2": "Mary", "answer": 1 + n % 2} for n in ten],
        "social_iqa": [{"context": f"Ann lost {SUBJECTS[n]}.", "question": "How does she feel?",
                        "choices": _choices(n)[:3], "gold": n % 3} for n in ten],
    }


def hub() -> dict[str, list[dict[str, Any]]]:
    """The same items with the fields of the hub's datasets, and tasks that have no plain form."""
    given = plain()

    def labelled(task: str, question: str) -> list[dict[str, Any]]:
        return [{question: r["question"], "choices": {"text": r["choices"], "label": list("ABCD")},
                 "answerKey": "ABCD"[r["gold"]]} for r in given[task]]

    return {
        "arc_easy": labelled("arc_easy", "question"), "openbookqa": labelled("openbookqa", "question_stem"),
        "boolq": [{"passage": r["passage"], "question": r["question"].rstrip("?"), "label": int(r["answer"] == "yes")}
                  for r in given["boolq"]],
        "hellaswag": [{"activity_label": "Cooking", "ctx_a": r["query"].removeprefix("Cooking: "), "ctx_b": "",
                       "endings": r["choices"], "label": str(r["gold"])} for r in given["hellaswag"]],
        "lambada_openai": [{"text": f"{r['context']} {r['continuation']}"} for r in given["lambada_openai"]],
        "piqa": [{"goal": r["goal"], "sol1": r["choices"][0], "sol2": r["choices"][1], "label": r["gold"]}
                 for r in given["piqa"]],
        "winogrande": [r | {"answer": str(r["answer"])} for r in given["winogrande"]],
        "social_iqa": [{"context": r["context"], "question": r["question"], "answerA": r["choices"][0],
                        "answerB": r["choices"][1], "answerC": r["choices"][2], "label": str(r["gold"] + 1)}
                       for r in given["social_iqa"]],
        "fda": [{"text": f"Name of {n}: {SUBJECTS[n]}.\nMade of: iron.\nName of {n}:", "value": "e" if n % 2 else "qq"}
                for n in range(6)],
        "wikitext": [{"page": f" = Page {n} = \n \n It was , as one says , 1 @,@ {n} m . \n"} for n in range(4)],
    }
