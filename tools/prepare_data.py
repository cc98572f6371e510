"""Text, jsonl or parquet to packed MDS shards, and the verification of such a dataset.

    python tools/prepare_data.py corpus/*.jsonl.zst --tokenizer tokenizers/gpt2 --sequence-length 2048 --out data/train
    python tools/prepare_data.py --bundled valid --tokenizer bytes --sequence-length 256 --keep-tail --out data/valid
    python tools/prepare_data.py corpus --tokenizer tokenizers/gpt2 --sequence-length 2048 --out data/train --parts 64
    python tools/prepare_data.py corpus --tokenizer tokenizers/gpt2 --sequence-length 2048 --out data/train --part 3/64
    python tools/prepare_data.py --merge data/train
    python tools/prepare_data.py --verify data/train

The output does not depend on --workers. After a kill the same command goes on. docs/data.md tells the rest.
Exit codes: 0 done, 2 bad option, 3 bad data.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from hola_megatron.arguments import Parser, any_whole, text, whole
from hola_megatron.data.prepare import DEFAULT_SHARD_SIZE, PACKINGS, PrepareOptions, merge, prepare
from hola_megatron.data.prepare.uploading import merge_at
from hola_megatron.data.shards import verify_dataset
from hola_megatron.data.sources import ALLOWED, BUNDLED_PARTS
from hola_megatron.data.urls import is_url
from hola_megatron.errors import RecipeError, run_cli, shown
from hola_megatron.paths import path_problem


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", help=f"files, folders or patterns, also as URLs: {ALLOWED}")
    add("--bundled", choices=BUNDLED_PARTS, help="use the Shakespeare text that comes with the project")
    add("--tokenizer", type=text, help="'bytes', a tokenizer.json, a sentencepiece *.model, or a folder holding one")
    add("--sequence-length", type=any_whole, help="tokens predicted by a sample; one more is stored")
    add("--out", type=text, help="folder to make, or a URL (s3://, gs://, hf://, ...)")
    add("--text-field", default="text", help="key (jsonl) or column (parquet) of the text; default %(default)s")
    add("--split-on", metavar="LINE", help="txt: a line equal to LINE parts documents ('' = blank lines);"
        " without it a file is one document")  # fmt: skip
    add("--workers", type=whole(-1, 1024), default=min(8, os.cpu_count() or 1),
        help="tokenizing processes; default %(default)s")
    add("--shard-size", type=whole(-1, 2**40), default=DEFAULT_SHARD_SIZE,
        help="most bytes of a shard; default %(default)s")
    add("--keep-tail", action="store_true", help="pad the last partial sample instead of dropping it (validation)")
    add("--work", type=text, metavar="FOLDER", help="with --out URL: local folder for parts that are not uploaded yet")
    add("--packing", choices=PACKINGS, default="stream",
        help="stream: documents are cut where a sample ends; whole: never one that fits a sample; default %(default)s")
    add("--drop-duplicates", action="store_true", help="leave out documents whose text was there before")
    add("--parts", type=whole(1, 99_999), default=1, metavar="N",
        help="cut the input into N parts that --workers processes make; faster than tokenizing for one packer")
    add("--part", type=_part, metavar="I/N", help="make part I of N alone, in a folder of --out; --merge joins them")
    add("--overwrite", action="store_true", help="replace the dataset at --out")
    add("--merge", type=text, metavar="OUT",
        help="join parts to the dataset OUT and do nothing else; inputs are then folders of parts, by default OUT")
    add("--verify", type=text, metavar="FOLDER",
        help="check every shard of a dataset (folder or URL) and do nothing else")
    add("--cache", help="with --verify of a URL: folder for the downloads")
    return parser


def _part(given: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", given, re.ASCII)
    if not found:
        raise argparse.ArgumentTypeError(f"{shown(given)} is not I/N, such as 3/64")
    return int(found[1]), int(found[2])


def _merge(out: str, given: dict[str, Any]) -> None:
    if is_url(out):
        if given["inputs"]:
            raise RecipeError(f"--merge {out}: joins the parts that lie there; give no other folders")
        print(merge_at(out.rstrip("/")))
        return
    names = [("--merge", out, "is written to"), *(("inputs", name, "is read") for name in given["inputs"])]
    problems = [said for name, value, use in names if (said := path_problem(name, value, use=use))]
    if problems:
        raise RecipeError(problems)
    print(merge(Path(out), [Path(name) for name in given["inputs"]], overwrite=given["overwrite"]))


def main() -> int:
    given = vars(_parser().parse_args())
    verify, cache, joined = given.pop("verify"), given.pop("cache"), given.pop("merge")
    if cache and (problem := path_problem("--cache", cache)):
        raise RecipeError(problem)
    if verify:
        print(verify_dataset(verify, cache=cache))
        return 0
    if joined:
        _merge(joined, given)
        return 0
    missing = [name for name in ("tokenizer", "sequence_length", "out") if given[name] is None]
    if missing:
        raise RecipeError([f"--{name.replace('_', '-')}: required, see --help" for name in missing])
    print(prepare(PrepareOptions(**given)))
    return 0


if __name__ == "__main__":
    run_cli(main)
