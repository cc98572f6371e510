"""Texts with hidden numbers, questions and answers, as evaluate.py --needle asks them: to mix into a training corpus.

    python tools/needle_text.py --documents 20000 --noise corpus/wikipedia.jsonl.xz --out corpus/needles.jsonl

For models too small to find the task out by themselves (docs/quality.md).
Half of the texts have the task's own five sentences as noise, half sentences of the --noise texts.
Exit codes: 0 done, 2 bad option, 3 bad text.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import argparse
import json
import os
import re
from itertools import islice

from hola_megatron.arguments import Parser, any_whole
from hola_megatron.data.documents import DocumentReader
from hola_megatron.data.sources import find_sources
from hola_megatron.errors import DataError, RecipeError, run_cli
from hola_megatron.paths import output

SENTENCES = 200_000  # of the noise texts, at most: 25 MB
# a whole sentence of a line, without digits, which would be other numbers
SENTENCE = re.compile(r"(?:^|(?<=[.!?]\s))[A-Z][^.\n\d]{20,200}\.(?=\s|$)", re.M)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--documents", type=any_whole, required=True, help="texts to write")
    add("--noise", nargs="+", default=[], metavar="TEXT", help="files, folders or patterns to take sentences from")
    add("--text-field", default="text", help="key (jsonl) or column (parquet) of the text; default %(default)s")
    add("--seed", type=any_whole, default=0, help="of numbers, positions and lengths; default %(default)s")
    add("--out", type=output("--out"), required=True, metavar="FILE.jsonl", help="file to write")
    return parser


def main() -> int:
    args = _parser().parse_args()
    problems = [] if args.documents > 0 else [f"--documents: {args.documents} is not above 0"]
    if args.out.suffix != ".jsonl":
        problems.append(f"--out: {args.out} does not end in .jsonl")
    if args.out.exists():
        problems.append(f"--out: {args.out} exists; name another file or remove it")
    if problems:
        raise RecipeError(problems)
    noise = _sentences(args)
    _write(args, noise)
    print(f"{args.documents:,} texts in {args.out}, noise: the task's own"
          f"{f', and {len(noise):,} sentences in every other text' if noise else ''}")
    return 0


def _sentences(args: argparse.Namespace) -> list[str]:
    """Sentences of the noise texts, each with a space after it. Raises DataError where --noise has none."""
    reader = DocumentReader(find_sources(args.noise), text_field=args.text_field)
    found = [f"{sentence} " for sentence in islice((s for text in reader for s in SENTENCE.findall(text)), SENTENCES)]
    if args.noise and not found:
        raise DataError(f"--noise: no sentence in {' '.join(args.noise)}; give texts that have some in one line, from "
                        "a letter A to Z to a full stop, of 22 to 202 characters without digits")
    return found


def _write(args: argparse.Namespace, noise: list[str]) -> None:
    """Under another name until it is whole."""
    from hola_megatron.evaluate.needle import needle_documents  # only now: torch takes a second

    partial = args.out.with_name(f"{args.out.name}.tmp")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            for text in needle_documents(args.documents, noise, args.seed):
                file.write(json.dumps({"text": text}) + "\n")
        os.replace(partial, args.out)
    except OSError as error:
        raise RecipeError(f"--out: {args.out} cannot be written ({error.strerror}); name a file elsewhere") from None


if __name__ == "__main__":
    run_cli(main)
