"""Which rank is at fault when a run hangs, from the reports of all ranks."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from hola_megatron.control.heartbeat import Seen


def blame(seen: Seen) -> str:
    """A sentence that names the ranks at fault.

    At fault are silent ranks; else those with the fewest steps; else those that do not wait for others; else the
    smallest group at one source line. seen: as from `Heartbeat.compare`.
    """
    silent = [rank for rank, (_, alive) in seen.items() if not alive]
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for rank, (report, alive) in seen.items():
        if alive:
            groups[report["step"], report["waits"], report["phase"], report["where"]].append(rank)
    # (steps, whether it waits for others, number of ranks): the group at fault is first, if there is one
    ordered = sorted(groups.items(), key=lambda item: (*item[0][:2], len(item[1])))
    suspicion = [(*key[:2], len(ranks)) for key, ranks in ordered]
    is_clear = not silent and len(ordered) > 1 and suspicion[0] != suspicion[1]
    clauses = []
    if silent:
        hosts = sorted({report["host"] for report, alive in seen.values() if report and not alive})
        clauses.append(f"{named(silent)} no longer answers" + (f" (on {', '.join(hosts)})" if hosts else ""))
    for number, ((step, _, phase, where), ranks) in enumerate(ordered):
        verb = "hangs" if number == 0 and is_clear else "waits"
        host = f" on {seen[ranks[0]][0]['host']}" if verb == "hangs" and len(ranks) == 1 else ""
        clauses.append(f"{named(ranks)}{host} {verb} in {where}, {phase}, after step {step:,}")
    if not silent and not is_clear and len(seen) > 1:
        clauses.append("which of them hangs is not known")
    return "; ".join(clauses)


def named(ranks: list[int]) -> str:
    """rank 3; ranks 0, 1 and 5 more."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:8]))
    return f"ranks {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
