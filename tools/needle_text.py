"""Texts with hidden numbers, questions and answers, as evaluate.py --needle asks them: to mix into a training corpus.

    python tools/needle_text.py --documents 20000 --noise corpus/wikipedia.jsonl.xz --out corpus/needles.jsonl

A small model learns the task from these; how far back it finds a number is then the memory's doing.
Half of the texts have the task's own five sentences as noise, half sentences of the --noise texts.
Exit codes: 0 done, 2 bad option, 3 bad text.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import argparse
import json
import re
from itertools import islice
from pathlib import Path

from hola_megatron.data.documents import DocumentReader, find_sources
from hola_megatron.errors import RecipeError, run_cli

SENTENCES = 200_000  # of the noise texts, at most: 25 MB


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--documents", type=int, required=True, help="texts to write")
    add("--noise", nargs="+", default=[], metavar="TEXT", help="files, folders or patterns to take sentences from")
    add("--text-field", default="text", help="key (jsonl) or column (parquet) of the text; default %(default)s")
    add("--seed", type=int, default=0, help="of numbers, places and lengths; default %(default)s")
    add("--out", type=Path, required=True, metavar="FILE", help="jsonl file to write")
    return parser


def main() -> int:
    args = _parser().parse_args()
    problems = [] if args.documents > 0 else [f"--documents: {args.documents} is not above 0"]
    if args.out.exists():
        problems.append(f"--out: {args.out} exists; name another file or remove it")
    if problems:
        raise RecipeError(problems)
    noise = _sentences(args)
    from hola_megatron.evaluate.needle import needle_documents  # only now: torch takes a second

    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", encoding="utf-8") as file:
        for text in needle_documents(args.documents, noise, args.seed):
            file.write(json.dumps({"text": text}) + "\n")
    print(f"{args.documents:,} texts with {'own noise only' if not noise else f'{len(noise):,} sentences of noise'} "
          f"in {args.out}")
    return 0


def _sentences(args: argparse.Namespace) -> list[str]:
    """Sentences of the noise texts, each with a space behind it; no digits, which would be other numbers."""
    reader = DocumentReader(find_sources(args.noise), text_field=args.text_field)
    found = (sentence for text in reader for sentence in re.findall(r"[A-Z][^.\n\d]{20,200}\.(?=\s)", text))
    return [f"{sentence} " for sentence in islice(found, SENTENCES)]


if __name__ == "__main__":
    run_cli(main)
