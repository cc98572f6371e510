"""Perplexity of a text under an exported model or a checkpoint; zero-shot, recall and needle tasks.

    python tools/evaluate.py out/ --text corpus.jsonl
    python tools/evaluate.py out/ --wikitext wiki.test.raw.txt
    python tools/evaluate.py runs/hola_tiny --bundled valid --stream
    python tools/evaluate.py out/ --last-word lambada_test.jsonl
    python tools/evaluate.py out/ --ruler 2048 4096 8192 --samples 500
    python tools/evaluate.py out/ --passkey 1024 4096 16384 --out results/
    python tools/evaluate.py out/ --tasks arc_easy,piqa,lambada_openai
    python tools/evaluate.py out/ other/ --tasks arc_easy,piqa --data eval/ --limit 100 --out results/
    python -m hola_megatron.launch --nproc-per-node 8 tools/evaluate.py out/ --suite paper --out results/

--tasks are lm-evaluation-harness's, with its prompts and metrics (docs/evaluate.md); --data has their records.
Texts may be .txt, .jsonl (each also .gz, .xz, .zst) or .parquet; a .txt file is one document.
Every number comes with its convention. --wikitext gives the numbers of lm-evaluation-harness's task wikitext, and
--lm-eval those of its loglikelihood_rolling for any text:
    lm_eval --model hf --model_args pretrained=out/,trust_remote_code=True,add_bos_token=False --tasks wikitext
Exit codes: 0 done, 2 model not usable, 3 text or tokenizer not usable.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import argparse
import json
import shlex
import sys
from typing import Any

from hola_megatron.arguments import Parser, count, names, whole
from hola_megatron.data.documents import DocumentReader
from hola_megatron.data.sources import BUNDLED_PARTS, Source, bundled_source, find_sources
from hola_megatron.errors import RecipeError, run_cli
from hola_megatron.evaluate.harness.needed import need_harness
from hola_megatron.evaluate.recall.ruler import TASKS as RULER
from hola_megatron.evaluate.recall.words import Haystack, word_lists
from hola_megatron.evaluate.suite import paper
from hola_megatron.paths import local, output, output_file, write_output
from hola_megatron.startup.world import read_world

DTYPES = ("fp32", "bf16")
SUITES = {"paper": paper.TASKS}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("path", type=local("PATH"), nargs="+", help="exported folders, run folders or checkpoints")
    add("--text", nargs="+", default=[], help="perplexity of these files, folders or patterns")
    add("--bundled", choices=BUNDLED_PARTS, help="perplexity of the Shakespeare text that comes with the project")
    add("--wikitext", nargs="+", default=[], metavar="FILE",
        help="perplexity of WikiText as lm-eval has it: raw files (named .txt), or records that hold whole pages")
    add("--lm-eval", action="store_true", help="--text, --bundled: windows and words as lm-eval's rolling perplexity")
    add("--last-word", nargs="+", default=[], metavar="TEXT", help="LAMBADA: passages whose last word is predicted")
    add("--needle", nargs="+", type=whole(1, 2**24), default=[], metavar="TOKENS",
        help="a number hidden in texts of these lengths; not RULER's task (--ruler-tasks niah_single_1)")
    add("--needle-texts", type=count, default=20, help="texts at each of those lengths; default %(default)s")
    add("--suite", choices=SUITES, help="paper: the tasks of HOLA's table 1, beside its numbers")
    add("--tasks", type=names, default=[], metavar="A,B", help="tasks, groups or tags of lm-evaluation-harness")
    add("--data", type=local("--data"), metavar="FOLDER",
        help="the tasks' records, TASK.jsonl (.gz, .xz, .zst); without it from the Hugging Face hub")
    add("--limit", type=count, help="items of each task, the first ones")
    add("--out", type=output("--out"), metavar="FOLDER",
        help="keep the tasks' results there, and report.md and report.json; the same command goes on where it stopped")
    add("--ruler", nargs="+", type=whole(1, 2**24), default=[], metavar="TOKENS", help="RULER's tasks at these lengths")
    add("--ruler-tasks", type=names, metavar="A,B", help=f"default: {','.join(RULER)}")
    add("--haystack", metavar="FILE", help="RULER: running text to hide needles in; default: the bundled one")
    add("--passkey", nargs="+", type=whole(1, 2**24), default=[], metavar="TOKENS",
        help="passkeys by depth at these lengths; a heat map with --out")
    add("--depths", type=whole(1, 100), default=11, help="places of passkeys; default %(default)s")
    add("--mqar", nargs="+", type=whole(8, 2**24), default=[], metavar="TOKENS", help="associative recall on token ids")
    add("--far-mqar", nargs="+", type=whole(8, 2**24), default=[], metavar="TOKENS",
        help="the same with answers far before the questions")
    add("--pairs", nargs="+", type=count, default=[16, 32], help="MQAR: keys of a sample; default 16 32")
    add("--samples", type=count, default=100,
        help="prompts of each RULER task, passkey depth and MQAR number of pairs; default %(default)s")
    add("--seed", type=whole(0), default=0, help="of those prompts; default %(default)s")
    add("--text-field", default="text", help="key (jsonl) or column (parquet) of the text; default %(default)s")
    add("--split-on", metavar="LINE", help="txt: a line equal to LINE parts documents ('' = blank lines)")
    add("--window", type=count, help="tokens of a window; default: the length the model was trained at")
    add("--stream", action="store_true", help="no windows: carry the memory through each document")
    add("--batch", type=count, default=8, help="windows, passages, items, needle texts at a time; default %(default)s")
    add("--dtype", choices=DTYPES, help="default: as stored")
    add("--device", help="default: a GPU where there is one")
    add("--tokenizer", help="for a checkpoint: where its tokenizer is now")
    add("--trust-remote-code", action="store_true",
        help="load a model that is not ours by transformers, and run the code in its folder")
    add("--prompt", help="also print the greedy continuation of this text")
    add("--json", type=output_file("--json"), metavar="FILE", help="also write the numbers there")
    return parser


def main() -> int:
    args = _parser().parse_args()
    _refuse(args)
    sources = [bundled_source(args.bundled)] if args.bundled else find_sources(args.text or args.wikitext)
    passages = find_sources(args.last_word)
    if args.tasks:
        _check_tasks(args)
    if args.ruler:
        word_lists()  # they may not be installed
    # only now: torch and Megatron take seconds, --help and a wrong argument should not
    from hola_megatron.evaluate.recall.heat_map import heat_maps
    from hola_megatron.evaluate.suite.jobs import Reading, opened
    from hola_megatron.evaluate.suite.report import markdown, write_report
    from hola_megatron.evaluate.suite.results import Store
    from hola_megatron.evaluate.suite.run import processes, rank, run_jobs
    from hola_megatron.hf.convert import DTYPES as TORCH_DTYPES

    numbers, found = {}, {}
    with processes(args.device) as device:
        reading = Reading(args.batch, args.window, TORCH_DTYPES.get(args.dtype), device, args.trust_remote_code)
        jobs, store = _jobs(args, reading), Store(args.out)
        for path in args.path:
            with opened(path, reading, args.tokenizer) as subject:
                for job in jobs:
                    job.check(subject)
                numbers[str(path)] = _texts(args, subject, sources, passages)
                if jobs and rank() == 0:
                    print(f"{path}:", flush=True)
                found[str(path)] = run_jobs(subject, jobs, store, print if rank() == 0 else lambda text: None)
        if rank() > 0:
            return 0
    if jobs:
        print(f"\n{markdown(found, suite=args.suite)}", flush=True)
        if args.out:
            for picture in heat_maps(args.out, found):
                print(f"heat map: {picture}")
            write_report(args.out, found, shlex.join(["python", *sys.argv]), suite=args.suite)
        for name, outcomes in found.items():
            numbers[name]["tasks"] = {outcome.task: outcome.to_dict()["metrics"] for outcome in outcomes}
    if args.json:
        whole = numbers if len(args.path) > 1 else numbers[str(args.path[0])]
        write_output("--json", args.json, json.dumps(whole, indent=1) + "\n")
    return 0


def _check_tasks(args: argparse.Namespace) -> None:
    """Names and data of the tasks, before a model is read."""
    need_harness("--suite" if args.suite else "--tasks")
    from hola_megatron.evaluate.harness.tasks import check_names, missing_data

    args.tasks = check_names(args.tasks)
    if args.data:
        missing_data(args.tasks, args.data)


def _jobs(args: argparse.Namespace, reading: Any) -> list[Any]:
    from hola_megatron.evaluate.recall.jobs import Asked, MqarJob, PasskeyJob, RulerJob
    from hola_megatron.evaluate.suite.jobs import HarnessJob

    asked, haystack = Asked(args.samples, args.seed), Haystack(args.haystack) if args.ruler else None
    return [*(HarnessJob(name, args.data, args.limit, reading) for name in args.tasks),
            *(RulerJob(name, length, asked, reading, haystack) for name in args.ruler_tasks for length in args.ruler),
            *(PasskeyJob(length, args.depths, asked, reading) for length in args.passkey),
            *(MqarJob(kind, length, pairs, args.samples, reading) for kind in ("mqar", "far_mqar")
              for length in getattr(args, kind) for pairs in args.pairs)]


def _texts(args: argparse.Namespace, subject: Any, sources: list[Source], passages: list[Source]) -> dict[str, Any]:
    """Print and return what is measured on texts, needles and a prompt."""
    from hola_megatron.evaluate.last_word import last_word
    from hola_megatron.evaluate.load import greedy_sample
    from hola_megatron.evaluate.needle import check_lengths, needle
    from hola_megatron.evaluate.perplexity import perplexity
    from hola_megatron.evaluate.wikitext import wikitext

    if not (sources or passages or args.needle or args.prompt is not None):
        return {}
    model, tokenizer = subject.loaded
    print(f"model                {subject.name}, {model.num_parameters():,} parameters, {model.dtype}, {model.device}")
    check_lengths(tokenizer, args.needle)  # before what takes long
    numbers: dict[str, Any] = {}
    if sources:
        window = None if args.stream else args.window or getattr(model.config, "max_position_embeddings", None)
        if window is None and not args.stream:
            raise RecipeError("--window: this model does not state its training length; give one, or --stream")
        documents = wikitext(_read(args, sources)) if args.wikitext else _read(args, sources)
        rolling = bool(args.lm_eval or args.wikitext)
        found = perplexity(model, tokenizer, documents, window=window, batch=args.batch, rolling=rolling)
        print(found)
        numbers |= found.to_dict()
    if passages:
        words = last_word(model, tokenizer, _read(args, passages), batch=args.batch)
        print(words)
        numbers |= {"last_word": {"accuracy": words.accuracy, "perplexity": words.perplexity}}
    for length in args.needle:
        result = needle(model, tokenizer, length, samples=args.needle_texts, batch=args.batch)
        print(result, flush=True)
        numbers.setdefault("needle", {})[length] = result.right / result.samples
        numbers["needle_texts"] = result.samples
    if args.prompt is not None:
        print(f"greedy sample        {greedy_sample(model, tokenizer, args.prompt, 48)!r}")
    return numbers


def _read(args: argparse.Namespace, sources: list[Source]) -> DocumentReader:
    return DocumentReader(sources, args.text_field, args.split_on)


def _refuse(args: argparse.Namespace) -> None:
    problems = []
    texts = [name for name in ("text", "wikitext", "bundled") if getattr(args, name)]
    if len(texts) > 1:
        problems.append(f"--{texts[1]}: give one of --text FILE..., --wikitext FILE... and --bundled train|valid")
    measured = texts or args.last_word or args.needle or args.prompt is not None
    recall = [*args.ruler, *args.passkey, *args.mqar, *args.far_mqar]
    if not (measured or recall or args.tasks or args.suite):
        problems.append("--text: nothing to evaluate; give --text, --wikitext, --bundled, --last-word, --needle, "
                        "--tasks, --suite, --ruler, --passkey, --mqar or --far-mqar")
    if args.suite and args.tasks:
        problems.append("--tasks: give --tasks or --suite, not both")
    args.tasks = args.tasks or list(SUITES.get(args.suite, ()))
    for name in ("data", "limit"):
        if getattr(args, name) is not None and not args.tasks:
            problems.append(f"--{name}: applies to --tasks and --suite; give one, or leave it out")
    if args.out and not (args.tasks or recall):
        problems.append("--out: applies to --tasks, --suite, --ruler, --passkey, --mqar and --far-mqar; give one, or "
                        "leave it out")
    for name in ("ruler_tasks", "haystack"):
        if getattr(args, name) is not None and not args.ruler:
            problems.append(f"--{name.replace('_', '-')}: applies to --ruler; give lengths there, or leave it out")
    args.ruler_tasks = args.ruler_tasks or list(RULER)
    problems += [f"--ruler-tasks: {name!r} is none of {', '.join(RULER)}" for name in args.ruler_tasks
                 if name not in RULER]
    if args.out and args.out.is_file():
        problems.append(f"--out: {args.out} is a file; give the name of a folder")
    if len(set(args.path)) < len(args.path):
        problems.append("PATH: a model is named twice; name it once")
    if (processes := read_world().size) > 1:
        if measured:
            problems.append(f"--tasks: {processes} processes share tasks only; measure texts, needles and prompts with "
                            "one process")
        problems += [f"PATH: {path} is no exported folder, which several processes need; write one with "
                     "tools/convert.py to-hf" for path in args.path if not (path / "config.json").is_file()]
    if args.lm_eval and not (args.text or args.bundled):
        problems.append("--lm-eval: applies to --text or --bundled; give one of them, or leave it out")
    if args.stream and (args.lm_eval or args.wikitext):
        problems.append("--stream: lm-eval reads windows; leave away --stream, or --lm-eval and --wikitext")
    if args.stream and args.window:
        problems.append("--window: has no meaning with --stream; give one of the two")
    for name in ("window", "batch", "needle_texts"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            problems.append(f"--{name.replace('_', '-')}: {getattr(args, name)} must be at least 1")
    if problems:
        raise RecipeError(problems)


if __name__ == "__main__":
    run_cli(main)
