"""The one screen of tools/doctor.py."""

from __future__ import annotations

from collections import Counter

from hola_megatron.doctor.checks import Check
from hola_megatron.doctor.facts import Facts
from hola_megatron.doctor.known_bad import Finding

SHOWN = ("torch", "triton", "megatron-core", "transformer-engine", "apex", "mosaicml-streaming", "transformers",
         "deepspeed")


def print_report(facts: Facts, provided: dict[str, str], findings: list[Finding], checks: list[Check]) -> None:
    """Versions, who provides what, checks, and last what is wrong."""
    rows = [("versions", _versions(facts)), ("devices", _devices(facts)), *provided.items()]
    rows += [(check.name, f"{'ok' if check.passed else 'FAILED'}: {check.found}") for check in checks]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:>{width}}  {text}" for name, text in rows))
    for finding in findings:
        print(f"{finding.level:>{width}}  {finding.name}: {finding.what}\n{'':>{width}}  fix: {finding.fix}")
    failed = [check for check in checks if not check.passed]
    bad = [finding for finding in findings if finding.level == "bad"]
    problems = f"{len(bad)} known-bad combination(s), {len(failed)} failed check(s)"
    print(f"{'result':>{width}}  {problems if bad or failed else 'all right'}", flush=True)


def _versions(facts: Facts) -> str:
    shown = [f"python {facts.python[0]}.{facts.python[1]}"]
    shown += [f"{name} {facts.packages.get(name, '-')}" for name in SHOWN]
    cublas = ".".join(map(str, facts.cublas)) if facts.cublas else None
    libraries = (("CUDA", facts.cuda), ("cuBLAS", cublas), ("cuDNN", facts.cudnn), ("NCCL", facts.nccl))
    return ", ".join([*shown, *(f"{name} {version or '-'}" for name, version in libraries)])


def _devices(facts: Facts) -> str:
    if not facts.devices:
        return "no GPU"
    return ", ".join(f"{count} x {name}" for name, count in Counter(facts.devices).items()) + \
        f", compute capability {facts.capability[0]}.{facts.capability[1]}"
