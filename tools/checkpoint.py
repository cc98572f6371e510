"""Checkpoints: what is in them, their mean, which are kept, and their copies elsewhere.

    python tools/checkpoint.py inspect runs/hola_340m                       a table of its checkpoints
    python tools/checkpoint.py inspect runs/hola_340m/checkpoints/step_00028610 --tensors
    python tools/checkpoint.py average runs/hola_340m --last 5 --out runs/mean
    python tools/checkpoint.py average runs/a runs/b --out runs/mean        the newest of each
    python tools/checkpoint.py fetch s3://bucket/runs/hola_340m runs/hola_340m      what checkpoint.upload has copied
    python tools/checkpoint.py prune runs/hola_340m --keep 2 --keep-every 5000 --dry-run

Exit codes: 0 done, 2 not usable, 3 the storage failed.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import argparse
from pathlib import Path

from hola_megatron.arguments import Parser, count, whole
from hola_megatron.errors import run_cli
from hola_megatron.paths import local, output

ADVICE = "wait for its end, or stop it: a run removes its own old checkpoints (checkpoint.keep)"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="print what a run folder or one checkpoint holds")
    inspect.add_argument("path", type=local("PATH"), help="run folder or step_NNNNNNNN folder")
    inspect.add_argument("--no-verify", action="store_true", help="compare the files' sizes only, not their hashes")
    inspect.add_argument("--tensors", action="store_true", help="of one checkpoint: every tensor's shape")
    mean = commands.add_parser("average", help="write the mean of several checkpoints' weights")
    mean.add_argument("paths", nargs="+", type=local("PATH"), metavar="PATH",
                      help="step_NNNNNNNN folders, or run folders (the newest checkpoint of each)")
    mean.add_argument("--last", type=whole(2), metavar="N", help="the N newest checkpoints of the one run folder given")
    mean.add_argument("--out", type=output("--out"), required=True, help="run folder to make")
    fetch = commands.add_parser("fetch", help="copy a checkpoint back from the URL of checkpoint.upload")
    fetch.add_argument("url", help="s3://bucket/..., as in the recipe")
    fetch.add_argument("run", type=output("RUN"), help="run folder, which may be new")
    fetch.add_argument("--step", type=count, help="which; default: the newest")
    prune = commands.add_parser("prune", help="remove old checkpoints of a run that is not going on")
    prune.add_argument("run", type=local("RUN"), help="run folder")
    prune.add_argument("--keep", type=count, required=True, help="newest healthy checkpoints to keep")
    prune.add_argument("--keep-every", type=count, metavar="STEPS", help="also keep multiples of this step")
    prune.add_argument("--dry-run", action="store_true", help="print what would be removed, and remove nothing")
    return parser


def main() -> int:
    args = _parser().parse_args()
    {"inspect": _inspect, "average": _average, "fetch": _fetch, "prune": _prune}[args.command](args)
    return 0


def _inspect(args: argparse.Namespace) -> None:
    from hola_megatron.checkpoint.folder import MANIFEST, open_checkpoint
    from hola_megatron.checkpoint.inspection import describe_checkpoint, describe_run

    if (args.path / MANIFEST).exists() or args.path.name.startswith("step_"):
        checkpoint = open_checkpoint(args.path, verify=not args.no_verify)
        print("\n".join(describe_checkpoint(checkpoint, tensors=args.tensors)))
    else:
        print("\n".join(describe_run(_checkpoints(args.path), verify=not args.no_verify)))


def _average(args: argparse.Namespace) -> None:
    from hola_megatron.checkpoint.averaging import average, choose, refuse_existing

    refuse_existing(args.out)  # before hashing, which may take minutes
    chosen = choose(args.paths, args.last)
    for checkpoint in chosen:
        print(f"averaging | {checkpoint.path}")
    print(f"done: {average(chosen, args.out)}")


def _fetch(args: argparse.Namespace) -> None:
    from hola_megatron.checkpoint.remote_copy import download
    from hola_megatron.files.ownership import inside, owned

    args.run.mkdir(parents=True, exist_ok=True)
    with owned(inside(args.run, ADVICE)):
        found = download(args.url, args.run, args.step)
    print(f"done: {found.path}\nresume with the run's own command")


def _prune(args: argparse.Namespace) -> None:
    from hola_megatron.checkpoint.folder import list_steps, prune
    from hola_megatron.errors import CheckpointError
    from hola_megatron.files.ownership import inside, owned

    root = _checkpoints(args.run)
    if not list_steps(root):
        raise CheckpointError(f"{args.run}: no checkpoint here (looked for step_NNNNNNNN folders); give a run folder")
    with owned(inside(args.run, ADVICE)):
        removed = prune(root, args.keep, args.keep_every, dry_run=args.dry_run)
    for path in removed:
        print(f"{'would be removed' if args.dry_run else 'removed'} | {path}")
    left = len(list_steps(root)) - (len(removed) if args.dry_run else 0)
    print(f"done: {len(removed)} {'would go' if args.dry_run else 'removed'}, {left} kept")


def _checkpoints(run: Path) -> Path:
    return run / "checkpoints" if (run / "checkpoints").is_dir() else run


if __name__ == "__main__":
    run_cli(main)
