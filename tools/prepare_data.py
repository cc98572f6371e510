"""Text, jsonl or parquet to packed MDS shards, and the verification of such a dataset.

    python tools/prepare_data.py corpus/*.jsonl.zst --tokenizer tokenizers/gpt2 --sequence-length 2048 --out data/train
    python tools/prepare_data.py --bundled valid --tokenizer bytes --sequence-length 256 --keep-tail --out data/valid
    python tools/prepare_data.py --verify data/train

The output does not depend on --workers. Exit codes: 0 done, 2 bad option, 3 bad data.
"""

from __future__ import annotations

import argparse
import os

from hola_megatron.data.documents import ALLOWED, BUNDLED_PARTS
from hola_megatron.data.prepare import DEFAULT_SHARD_SIZE, PrepareOptions, prepare
from hola_megatron.data.shards import verify_dataset
from hola_megatron.errors import RecipeError, run_cli


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", help=f"files, folders or patterns: {ALLOWED}")
    add("--bundled", choices=BUNDLED_PARTS, help="use the Shakespeare text that comes with the project")
    add("--tokenizer", help="'bytes', a tokenizer.json, a sentencepiece *.model, or a folder holding one")
    add("--sequence-length", type=int, help="tokens predicted by a sample; one more is stored")
    add("--out", help="folder to make")
    add("--text-field", default="text", help="key (jsonl) or column (parquet) of the text; default %(default)s")
    add("--split-on", metavar="LINE", help="txt: a line equal to LINE parts documents ('' = blank lines);"
        " without it a file is one document")  # fmt: skip
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="tokenizing processes; default %(default)s")
    add("--shard-size", type=int, default=DEFAULT_SHARD_SIZE, help="most bytes of a shard; default %(default)s")
    add("--keep-tail", action="store_true", help="pad the last partial sample instead of dropping it (validation)")
    add("--overwrite", action="store_true", help="replace the dataset at --out")
    add("--verify", metavar="FOLDER", help="check every shard of a dataset (folder or URL) and do nothing else")
    add("--cache", help="with --verify of a URL: folder for the downloads")
    return parser


def main() -> int:
    given = vars(_parser().parse_args())
    verify, cache = given.pop("verify"), given.pop("cache")
    if verify:
        print(verify_dataset(verify, cache=cache))
        return 0
    missing = [name for name in ("tokenizer", "sequence_length", "out") if given[name] is None]
    if missing:
        raise RecipeError([f"--{name.replace('_', '-')}: required, see --help" for name in missing])
    print(prepare(PrepareOptions(**given)))
    return 0


if __name__ == "__main__":
    run_cli(main)
