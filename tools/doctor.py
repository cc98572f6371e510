"""Whether this installation can train: what is installed, who provides what, and small runs of it, on one screen.

    python tools/doctor.py
    python -m hola_megatron.launch --nproc-per-node 8 tools/doctor.py        also collectives between the GPUs

Works without a GPU. Exit codes: 0 all right, 1 a combination known to be bad was found or a check failed.
"""

from __future__ import annotations

import hola_megatron.quiet  # isort: skip  # noqa: F401

import argparse
import os
from pathlib import Path

from hola_megatron.errors import run_cli


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go, for the disk check")
    args = parser.parse_args()
    import torch

    from hola_megatron.doctor.checks import collective_check, disk_check, kernel_checks
    from hola_megatron.doctor.facts import gather_facts
    from hola_megatron.doctor.known_bad import find_known_bad
    from hola_megatron.doctor.pieces import who_provides
    from hola_megatron.doctor.report import print_report

    facts = gather_facts()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if facts.devices else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    collectives = collective_check(device)  # every rank takes part; the rest is said by one
    if int(os.environ.get("RANK", "0")):
        return 0 if collectives.passed else 1
    findings = find_known_bad(facts)
    checks = [*kernel_checks(device), collectives, disk_check(args.runs)]
    print_report(facts, who_provides(facts), findings, checks)
    bad = [finding for finding in findings if finding.level == "bad"]
    return 1 if bad or not all(check.passed for check in checks) else 0


if __name__ == "__main__":
    run_cli(main)
