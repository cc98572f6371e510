"""Checkpoints to Hugging Face folders and back, proven by logits.

    python tools/convert.py to-hf runs/hola_340m out/                    newest checkpoint, float32, verified
    python tools/convert.py to-hf runs/hola_340m/checkpoints/step_00028610 out/ --dtype bf16
    python tools/convert.py from-hf out/ runs/on                         continue the exported run
    python tools/convert.py from-hf out/ runs/new --recipe recipes/hola_340m.yaml train.lr=1e-4
    python tools/convert.py from-fla gated_deltanet-1.3B/ out/ --exact-cache
    python tools/convert.py to-fla out_gdn/ out_fla/
    python tools/convert.py verify runs/hola_340m out/

Exit codes: 0 done, 2 not usable or not in agreement, 3 tokenizer.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import argparse
from collections.abc import Callable

from hola_megatron.arguments import Parser, gigabytes
from hola_megatron.config import CacheConfig, load_recipe
from hola_megatron.errors import run_cli
from hola_megatron.paths import local, output

# the functions below import what they call: torch and Megatron take seconds, --help should not
DTYPES = ("fp32", "bf16")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("to-hf", help="export a checkpoint")
    out.add_argument("source", type=local("SOURCE"),
                     help="run folder (its newest checkpoint) or one step_NNNNNNNN folder")
    out.add_argument("out", type=output("OUT"), help="folder to make")
    out.add_argument("--dtype", choices=DTYPES, default="fp32", help="fp32 loses nothing; default %(default)s")
    out.add_argument("--tokenizer", help="where the tokenizer is now; default: as in the recipe")
    out.add_argument("--license", metavar="ID", help="for the model card, such as apache-2.0; default: not stated")
    out.add_argument("--overwrite", action="store_true", help="replace an earlier export at OUT")
    back = commands.add_parser("from-hf", help="make a run folder from exported weights")
    back.add_argument("folder", type=local("FOLDER"), help="exported folder")
    back.add_argument("run", type=output("RUN"), help="run folder to make")
    back.add_argument("--recipe", nargs="+", metavar=("RECIPE", "section.key=value"),
                      help="start a new run of this recipe; default: continue the exported run")
    for command in (out, back):
        command.add_argument("--shard-gb", type=gigabytes, default=5.0, help="largest weight file; default %(default)s")
        command.add_argument("--no-verify", action="store_true", help="do not compare logits with the Megatron model")
    fla = commands.add_parser("from-fla", help="import a Gated DeltaNet of flash-linear-attention")
    fla.add_argument("--exact-cache", action="store_true", help="as HOLA: a fresh exact cache on every GDN layer")
    fla.add_argument("--tensor", action="append", default=[], metavar="NAME=MEANING",
                     help="of a published HOLA (use_gdn_swa): a layer's tensor is the gate, sink, gamma_q or gamma_k")
    fla.add_argument("--dtype", choices=DTYPES, default="fp32", help="default %(default)s")
    to = commands.add_parser("to-fla", help="export a Gated DeltaNet in flash-linear-attention's layout")
    for command in (fla, to):
        command.add_argument("folder", type=local("FOLDER"), help="folder of safetensors and config.json")
        command.add_argument("out", type=output("OUT"), help="folder to make")
        command.add_argument("--shard-gb", type=gigabytes, default=5.0, help="largest weight file; default %(default)s")
        command.add_argument("--overwrite", action="store_true", help="replace an earlier one at OUT")
    check = commands.add_parser("verify", help="compare the logits of a checkpoint and an export")
    check.add_argument("source", type=local("SOURCE"), help="run folder or one step_NNNNNNNN folder")
    check.add_argument("folder", type=local("FOLDER"), help="exported folder")
    return parser


def main() -> int:
    args = _parser().parse_args()
    run = {"to-hf": _to_hf, "from-hf": _from_hf, "from-fla": _from_fla, "to-fla": _to_fla, "verify": _verify}
    run[args.command](args)
    return 0


def _to_hf(args: argparse.Namespace) -> None:
    from hola_megatron.hf.convert import ExportOptions, to_hf

    options = ExportOptions(args.dtype, args.tokenizer, int(args.shard_gb * 1e9), args.overwrite, args.license)
    to_hf(args.source, args.out, options, verify=_proof(args))
    print(f"done: {args.out}")


def _from_hf(args: argparse.Namespace) -> None:
    from hola_megatron.hf.convert import from_hf

    recipe = load_recipe(args.recipe[0], args.recipe[1:]) if args.recipe else None
    path = from_hf(args.folder, args.run, recipe, shard_bytes=int(args.shard_gb * 1e9), verify=_proof(args))
    print(f"done: {path}\ntrain on: python -m hola_megatron.train {args.run / 'recipe.yaml'}")


def _from_fla(args: argparse.Namespace) -> None:
    from hola_megatron.hf.fla import from_fla
    from hola_megatron.hf.fla_cache import parse_meanings

    cache = CacheConfig() if args.exact_cache else None
    from_fla(args.folder, args.out, cache, dtype=args.dtype, shard_bytes=int(args.shard_gb * 1e9),
             overwrite=args.overwrite, tensor_meanings=parse_meanings(args.tensor))
    print(f"done: {args.out}\ntrain on: python tools/convert.py from-hf {args.out} RUN --recipe RECIPE")


def _to_fla(args: argparse.Namespace) -> None:
    from hola_megatron.hf.fla import to_fla

    to_fla(args.folder, args.out, shard_bytes=int(args.shard_gb * 1e9), overwrite=args.overwrite)
    print(f"done: {args.out}")


def _verify(args: argparse.Namespace) -> None:
    from hola_megatron.checkpoint.folder import find_checkpoint
    from hola_megatron.hf.verify import verify

    verify(find_checkpoint(args.source), args.folder)
    print("verified")


def _proof(args: argparse.Namespace) -> Callable[..., object] | None:
    """The function that compares the two models' logits; None without verification."""
    if not args.no_verify:
        from hola_megatron.hf.verify import verify

        return verify
    print("warning: --no-verify: the logits of this conversion have not been compared with the Megatron model's",
          flush=True)
    return None


if __name__ == "__main__":
    run_cli(main)
