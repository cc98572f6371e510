"""What a model's memories do with a text: one HTML page, and the numbers as JSON.

    python tools/memory_report.py runs/hola_tiny --bundled valid --out memory.html
    python tools/memory_report.py out/hola --text valid.jsonl --second out/gdn --out memory.html --json memory.json

Gains over a second model (else over the model without its slots) by place in the block and by distance to the last
occurrence of the coming bigram; other caches at inference, paired by token; what is kept, shown in the text; shares of
reads, gates, state norms, scores. Works for every layer kind; the page says what does not apply. docs/memory_report.md
Exit codes: 0 done, 2 model not usable, 3 text or tokenizer not usable.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import argparse
import json
import shlex
import sys
from typing import Any

from hola_megatron.arguments import Parser, count
from hola_megatron.data.documents import DocumentReader
from hola_megatron.data.sources import BUNDLED_PARTS, bundled_source, find_sources
from hola_megatron.errors import DataError, RecipeError, run_cli
from hola_megatron.paths import local, output_file, write_output


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("path", type=local("PATH"), help="exported folder, run folder or checkpoint")
    add("--text", nargs="+", default=[], help="files, folders or patterns (.txt, .jsonl, .parquet)")
    add("--bundled", choices=BUNDLED_PARTS, help="the Shakespeare text that comes with the project")
    add("--text-field", default="text", help="key (jsonl) or column (parquet) of the text; default %(default)s")
    add("--second", type=local("--second"), help="another model with the same tokenizer, which the gain is over")
    add("--out", type=output_file("--out"), required=True, help="the HTML page")
    add("--json", type=output_file("--json"), help="also write the numbers there")
    add("--window", type=count, help="tokens of a window; default: the length the model was trained at")
    add("--tokens", type=count, default=32_768, help="of the text, at most; default %(default)s")
    add("--batch", type=count, default=4, help="windows at a time; default %(default)s")
    add("--device", help="default: a GPU where there is one")
    add("--tokenizer", help="for a checkpoint: where its tokenizer is now")
    add("--trust-remote-code", action="store_true",
        help="load a model that is not ours by transformers, and run the code in its folder")
    return parser


def main() -> int:
    args = _parser().parse_args()
    if bool(args.text) == bool(args.bundled):
        raise RecipeError("--text: give one of --text FILE... and --bundled train|valid")
    sources = [bundled_source(args.bundled)] if args.bundled else find_sources(args.text)
    # only now: torch and Megatron take seconds
    from hola_megatron.log.console import code_version, device_name
    from hola_megatron.study.memory.losses import same_tokens, windows
    from hola_megatron.study.memory.make import numbers
    from hola_megatron.study.memory.page import page
    from hola_megatron.study.runs import versions

    model, tokenizer = _load(args, args.path)
    length = args.window or getattr(model.config, "max_position_embeddings", None)
    if length is None:
        raise RecipeError("--window: this model does not state its training length; give one")
    tokens = windows(tokenizer, DocumentReader(sources, args.text_field, None), length, args.tokens)
    second = None
    if args.second:
        other, its_tokenizer = _load(args, args.second)
        samples = [tokenizer.decode(row[1:]) for row in tokens[:2]]
        if not same_tokens(tokenizer, its_tokenizer, samples):
            raise DataError(f"--second: {args.second} has another tokenizer than {args.path}, so their tokens cannot "
                            "be paired; give a model with the same one")
        second = (str(args.second), other)
    found = numbers(model, tokens, batch=args.batch, second=second, tell=lambda line: print(line, flush=True))
    about = {"model": str(args.path), "text": args.bundled or " ".join(args.text),
             "parameters": f"{model.num_parameters():,}",
             "command": f"python tools/memory_report.py {shlex.join(sys.argv[1:])}", "code": code_version(),
             "device": device_name(model.device), "versions": ", ".join(f"{k} {v}" for k, v in versions().items())}
    write_output("--out", args.out, page(found, tokenizer, tokens[0, :-1].tolist(), about))
    if args.json:
        write_output("--json", args.json, json.dumps({**found.to_dict(), "about": about}, indent=1) + "\n")
    print(f"loss {found.loss.mean:.4f} nats a token, {found.loss.count:,} tokens; report: {args.out}")
    return 0


def _load(args: argparse.Namespace, path: Any) -> tuple[Any, Any]:
    from hola_megatron.evaluate.load import exported, load

    with exported(path, args.tokenizer) as folder:
        return load(folder, device=args.device, trust_remote_code=args.trust_remote_code)


if __name__ == "__main__":
    run_cli(main)
