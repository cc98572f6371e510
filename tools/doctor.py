"""Whether this installation can train: what is installed, who provides what, and small runs of it, on one screen.

    python tools/doctor.py
    python -m hola_megatron.launch --nproc-per-node 8 tools/doctor.py        also collectives between the GPUs
    sbatch --nodes=4 slurm/doctor.sh                                         tools/doctor.py --nodes on every node

Works without a GPU. Exit codes: 0 all right, 1 a combination known to be bad was found, a check failed, or nodes do
not fit together.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import os
from pathlib import Path

from hola_megatron.arguments import Parser, positive
from hola_megatron.errors import run_cli
from hola_megatron.paths import output


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=output("--runs"), default=Path("runs"),
                        help="where run folders go, for the disk check")
    parser.add_argument("--nodes", action="store_true", help="instead of all else: are the nodes of this launch fit "
                        "for one run (versions, clocks, all-reduce between them); docs/cluster.md")
    parser.add_argument("--min-bandwidth", type=positive, metavar="GB/S",
                        help="with --nodes: name every two nodes with less between them")
    args = parser.parse_args()
    if args.min_bandwidth is not None and not args.nodes:
        parser.error("--min-bandwidth: is for --nodes, which is not given; give both")
    import torch

    from hola_megatron.doctor.checks import collective_check, disk_check, kernel_checks
    from hola_megatron.doctor.components import who_provides
    from hola_megatron.doctor.facts import gather_facts
    from hola_megatron.doctor.known_bad import find_known_bad
    from hola_megatron.doctor.nodes import check_nodes
    from hola_megatron.doctor.report import print_report

    facts = gather_facts()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if facts.devices else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if args.nodes:
        return 0 if check_nodes(facts, device, args.min_bandwidth) else 1
    collectives = collective_check(device)  # every rank takes part; one prints the rest
    if int(os.environ.get("RANK", "0")):
        return 0 if collectives.passed else 1
    findings = find_known_bad(facts)
    checks = [*kernel_checks(device), collectives, disk_check(args.runs)]
    print_report(facts, who_provides(facts), findings, checks)
    bad = [finding for finding in findings if finding.level == "bad"]
    return 1 if bad or not all(check.passed for check in checks) else 0


if __name__ == "__main__":
    run_cli(main)
