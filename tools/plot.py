"""Curves of several runs in one picture, and a table of them as Markdown.

    python tools/plot.py runs/hola_46m runs/gdn_46m                      curves.png, by tokens
    python tools/plot.py runs/hola_46m-* runs/gdn_46m-* --by hours --smooth 20 --out loss.svg

Runs whose recipes differ in the seed alone are one curve: their mean, the range shaded. `--each` draws every run alone.
Exit codes: 0 done, 2 not usable.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import argparse
from pathlib import Path

from hola_megatron.arguments import Parser, count
from hola_megatron.errors import RecipeError, run_cli
from hola_megatron.paths import local, output_file

FORMATS = (".png", ".svg", ".pdf")


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=local("RUN"), metavar="RUN", help="run folders")
    parser.add_argument("--by", choices=("tokens", "hours", "steps"), default="tokens",
                        help="what the curves are drawn over; default %(default)s")
    parser.add_argument("--smooth", type=count, default=1, metavar="N",
                        help="training loss as the mean of the last N logged steps; default %(default)s")
    parser.add_argument("--each", action="store_true", help="every run is a curve of its own")
    parser.add_argument("--out", type=output_file("--out"), default=Path("curves.png"),
                        help="picture to write, .png, .svg or .pdf; default %(default)s")
    args = parser.parse_args()
    if args.out.suffix not in FORMATS:
        raise RecipeError(f"--out: {args.out} must end with {', '.join(FORMATS)}")
    from hola_megatron.log.curves import draw, group, read_run, table

    groups = group([read_run(run) for run in dict.fromkeys(args.runs)], each=args.each)
    try:
        draw(groups, args.out, by=args.by, smooth=args.smooth)
    except OSError as error:
        raise RecipeError(f"--out: {args.out} cannot be written ({error.strerror}); name a file elsewhere") from None
    print(table(groups))
    print(f"\ndrawn: {args.out}")
    return 0


if __name__ == "__main__":
    run_cli(main)
