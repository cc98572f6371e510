"""Perplexity of a text under an exported model or a checkpoint; LAMBADA and needle tasks.

    python tools/evaluate.py out/ --text wikitext.test.txt
    python tools/evaluate.py runs/hola_tiny --bundled valid --stream
    python tools/evaluate.py out/ --last-word lambada_test.jsonl
    python tools/evaluate.py out/ --needle 2048 4096 8192

Texts may be .txt, .jsonl (each also .gz, .xz, .zst) or .parquet; a .txt file is one document.
Exit codes: 0 done, 2 model not usable, 3 text or tokenizer not usable.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import argparse
import json
from pathlib import Path
from typing import Any

from hola_megatron.data.documents import BUNDLED_PARTS, DocumentReader, Source, bundled_source, find_sources
from hola_megatron.errors import RecipeError, run_cli

DTYPES = ("fp32", "bf16")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("path", type=Path, help="exported folder, run folder or checkpoint")
    add("--text", nargs="+", default=[], help="perplexity of these files, folders or patterns")
    add("--bundled", choices=BUNDLED_PARTS, help="perplexity of the Shakespeare text that comes with the project")
    add("--last-word", nargs="+", default=[], metavar="TEXT", help="LAMBADA: passages whose last word is asked for")
    add("--needle", nargs="+", type=int, default=[], metavar="TOKENS", help="a number hidden in texts of these lengths")
    add("--needle-texts", type=int, default=20, help="texts asked at each of those lengths; default %(default)s")
    add("--text-field", default="text", help="key (jsonl) or column (parquet) of the text; default %(default)s")
    add("--split-on", metavar="LINE", help="txt: a line equal to LINE parts documents ('' = blank lines)")
    add("--window", type=int, help="tokens of a window; default: the length the model was trained at")
    add("--stream", action="store_true", help="no windows: carry the memory through each document")
    add("--batch", type=int, default=8, help="windows, passages or needle texts at a time; default %(default)s")
    add("--dtype", choices=DTYPES, help="default: as stored")
    add("--device", help="default: a GPU where there is one")
    add("--tokenizer", help="for a checkpoint: where its tokenizer is now")
    add("--prompt", help="also print the greedy continuation of this text")
    add("--json", type=Path, metavar="FILE", help="also write the numbers there")
    return parser


def main() -> int:
    args = _parser().parse_args()
    _refuse(args)
    sources = [bundled_source(args.bundled)] if args.bundled else find_sources(args.text)
    passages = find_sources(args.last_word)
    # only now: torch and Megatron take seconds, --help and a wrong argument should not
    from hola_megatron.evaluate.last_word import last_word
    from hola_megatron.evaluate.load import exported, greedy_sample, load
    from hola_megatron.evaluate.needle import check_lengths, needle
    from hola_megatron.evaluate.perplexity import perplexity
    from hola_megatron.hf.convert import DTYPES as TORCH_DTYPES

    with exported(args.path, args.tokenizer) as folder:
        model, tokenizer = load(folder, dtype=TORCH_DTYPES.get(args.dtype), device=args.device)
    print(f"model                {args.path}, {model.num_parameters():,} parameters, {model.dtype}, {model.device}")
    check_lengths(tokenizer, args.needle)  # before what takes long
    numbers: dict[str, Any] = {}
    if sources:
        window = None if args.stream else args.window or model.config.max_position_embeddings
        found = perplexity(model, tokenizer, _read(args, sources), window=window, batch=args.batch)
        print(found)
        numbers |= found.to_dict()
    if passages:
        words = last_word(model, tokenizer, _read(args, passages), batch=args.batch)
        print(words)
        numbers |= {"last_word": {"accuracy": words.accuracy, "perplexity": words.perplexity}}
    for length in args.needle:
        result = needle(model, tokenizer, length, asked=args.needle_texts, batch=args.batch)
        print(result, flush=True)
        numbers.setdefault("needle", {})[length] = result.right / result.asked
        numbers["needle_texts"] = result.asked
    if args.prompt is not None:
        print(f"greedy sample        {greedy_sample(model, tokenizer, args.prompt, 48)!r}")
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return 0


def _read(args: argparse.Namespace, sources: list[Source]) -> DocumentReader:
    return DocumentReader(sources, args.text_field, args.split_on)


def _refuse(args: argparse.Namespace) -> None:
    problems = []
    if args.text and args.bundled:
        problems.append("--text: give either --text FILE... or --bundled train|valid")
    if not (args.text or args.bundled or args.last_word or args.needle):
        problems.append("--text: nothing to evaluate; give --text, --bundled, --last-word or --needle")
    if args.stream and args.window:
        problems.append("--window: has no meaning with --stream; give one of the two")
    for name in ("window", "batch", "needle_texts"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            problems.append(f"--{name.replace('_', '-')}: {getattr(args, name)} must be at least 1")
    if problems:
        raise RecipeError(problems)


if __name__ == "__main__":
    run_cli(main)
