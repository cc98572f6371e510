"""Messages of a context-parallel HOLA layer, measured, compared with all-to-all over heads.

    python tools/comm_report.py
    python tools/comm_report.py --heads 8 --key-dim 128 --value-dim 128 --ranks 2 4 8 --lengths 4096 8192

Starts gloo processes on this machine for every number of ranks, runs the token mixer of one layer forward and
backward at every length, and counts the bytes that reach a rank from others (the busiest one). Nothing is
modelled but the all-to-all column and the lengths marked as such. Fails if a message grows with the length.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from hola_kernels.options import CacheOptions
from hola_megatron.arguments import Parser, count
from hola_megatron.errors import run_cli
from hola_megatron.log.console import code_version
from hola_megatron.parallel.collectives import Sent, counted
from hola_megatron.parallel.context import ContextParallel, hola_attention_over_ranks, short_conv_over_ranks
from hola_megatron.parallel.sequence_shard import SequenceShard

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHOWN_LENGTHS = (65_536, 262_144, 1_048_576)


def measure(rank: int, ranks: int, options: argparse.Namespace, folder: str) -> None:
    """One process: {length: (forward, backward)} messages to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{ranks}", rank=rank, world_size=ranks)
    found = {length: layer(options, SequenceShard.of_rows(length // ranks, rank, ranks)) for length in options.lengths}
    plain = {length: [[asdict(sent) for sent in way] for way in ways] for length, ways in found.items()}
    Path(f"{folder}/{ranks}_{rank}.json").write_text(json.dumps(plain))
    dist.barrier()
    dist.destroy_process_group()


def read(path: Path) -> dict[int, tuple[list[Sent], list[Sent]]]:
    """What `measure` of one rank wrote."""
    plain = json.loads(path.read_text())
    return {int(length): tuple([Sent(**sent) for sent in way] for way in ways) for length, ways in plain.items()}


def layer(options: argparse.Namespace, part: SequenceShard) -> tuple[list[Sent], list[Sent]]:
    """Convolution and HOLA mixer of one layer over one row, forward and backward."""
    cp, dtype = ContextParallel(part, dist.group.WORLD), DTYPES[options.dtype]
    heads, key, value = options.heads, options.key_dim, options.value_dim
    generator = torch.Generator().manual_seed(part.rank)

    def normal(*shape: int, to: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(to).requires_grad_()

    x = normal(1, part.tokens, heads * (2 * key + value), to=dtype)
    weight = normal(x.shape[2], 4)
    log_decay, beta = -0.01 * normal(1, part.tokens, heads).square(), normal(1, part.tokens, heads).sigmoid()
    parameters = {"gamma_q": normal(key), "gamma_k": normal(key), "gate": normal(heads), "sink": normal(heads)}
    with counted() as forward:
        mixed = short_conv_over_ranks(x=x, weight=weight, cp=cp, backend="torch")
        sections = mixed.split([heads * key, heads * key, heads * value], -1)
        tokens = dict(zip("qkv", (s.unflatten(-1, (heads, -1)) for s in sections), strict=True))
        o = hola_attention_over_ranks(**tokens, log_decay=log_decay, beta=beta, **parameters, cp=cp,
                                      options=CacheOptions(options.block, options.slots), backend="torch")
    with counted() as backward:
        o.float().square().mean().backward()
    return forward, backward


def all_to_all_bytes(options: argparse.Namespace, length: int, ranks: int) -> int | None:
    """Received by a rank when heads are cut instead: q, k, v, beta, decay there and o back, and the same backward.

    None where there are fewer heads than ranks.
    """
    if options.heads % ranks:
        return None
    size = DTYPES[options.dtype].itemsize
    a_token_and_head = size * (2 * options.key_dim + 2 * options.value_dim) + 2 * 4
    return 2 * (length // ranks) * options.heads * a_token_and_head * (ranks - 1) // ranks


def table(options: argparse.Namespace, ranks: int, found: list[dict[int, tuple[list[Sent], list[Sent]]]]) -> list[str]:
    """Rows of one number of ranks: every message, then the sum."""
    length = options.lengths[0]
    for rank in found:
        if any(rank[other] != rank[length] for other in options.lengths):
            raise SystemExit(f"comm_report: messages at {ranks} ranks differ between the lengths {options.lengths}")
    rows, totals = [], [0] * len(found)
    for way, name in enumerate(("forward", "backward")):
        for number, message in enumerate(found[0][length][way]):
            received = [rank[length][way][number].received for rank in found]
            totals = [total + more for total, more in zip(totals, received, strict=True)]
            rows.append(f"| {ranks} | {name} | {message.kind} | {message.what} | {max(received):,} |")
    return [*rows, f"| {ranks} | both | {len(rows)} messages | all, at the busiest rank | {max(totals):,} |"]


def main() -> None:
    parser = Parser(description="Bytes a context-parallel HOLA layer sends.")
    add = parser.add_argument
    add("--ranks", type=count, nargs="+", default=[2, 4, 8])
    add("--lengths", type=count, nargs="+", default=[2048, 4096, 8192], help="tokens of a row, over all ranks")
    add("--heads", type=count, default=4)
    add("--key-dim", type=count, default=256)
    add("--value-dim", type=count, default=256)
    add("--block", type=count, default=256)
    add("--slots", type=count, default=64)
    add("--dtype", choices=DTYPES, default="bf16")
    options = parser.parse_args()
    for ranks in options.ranks:
        if bad := [n for n in options.lengths if n % ranks or n // ranks < options.block - 1]:
            parser.error(f"--lengths: {bad} do not give {ranks} equal parts of at least {options.block - 1} tokens")
    shape = (f"H {options.heads}, K {options.key_dim}, V {options.value_dim}, C {options.block}, w {options.slots}, "
             f"{options.dtype}")
    print(f"One layer, one row of T tokens, {shape}; torch {torch.__version__}, gloo on {platform.machine()}, "
          f"code {code_version()}\nMeasured at T = {', '.join(f'{n:,}' for n in options.lengths)}: the same bytes.\n")
    print("| ranks | pass | kind | what | bytes received |\n|---|---|---|---|---|")
    sums = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks:
            mp.spawn(measure, (ranks, options, folder), nprocs=ranks)
            found = [read(Path(folder) / f"{ranks}_{rank}.json") for rank in range(ranks)]
            rows = table(options, ranks, found)
            sums[ranks] = int(rows[-1].split("|")[-2].replace(",", ""))
            print("\n".join(rows), flush=True)
    lengths = sorted({*options.lengths, *SHOWN_LENGTHS})
    print("\nMB received by a rank, forward and backward: measured here; all-to-all over heads by formula.\n")
    print("| ranks | here, any T | " + " | ".join(f"all-to-all, T = {n:,}" for n in lengths)
          + " | equal at T |\n|" + "---|" * (3 + len(lengths)))
    for ranks, total in sums.items():
        others = [all_to_all_bytes(options, n, ranks) for n in lengths]
        shown = [f"{n / 1e6:,.1f}" if n is not None else "too few heads" for n in others]
        slope = all_to_all_bytes(options, 1 << 20, ranks)
        equal = "-" if slope is None else f"{round(total / slope * (1 << 20)):,}"
        print(f"| {ranks} | {total / 1e6:,.1f} | " + " | ".join(shown) + f" | {equal} |")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_cli(main)
