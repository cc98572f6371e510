"""One case of `verify` as a row of its table."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator


def rows_of(chosen: list[tuple[str, str]]) -> Iterator[tuple[str, bool]]:
    """(row of the table, passed) of every (module, case) in `chosen`, one after the other."""
    wanted = dict.fromkeys(module for module, _ in chosen)
    for module in map(importlib.import_module, wanted):
        names = {name for of, name in chosen if of == module.__name__}
        for name, run in module.cases():
            if name in names:
                yield _row(name, run, module.limit)


def _row(name: str, run: Callable[[], dict[str, float]], limit: Callable[[str, str], float]) -> tuple[str, bool]:
    begin = time.perf_counter()
    try:
        errors = run()
    except Exception as error:  # a kernel that does not launch is a row of the table, not the end of the sweep
        message = (str(error).splitlines() or [""])[0][:100]
        return f"| {name} | {type(error).__name__}: {message} | | | FAILED |", False
    share = {output: error / limit(name, output) for output, error in errors.items()}
    passed = all(part <= 1 for part in share.values())  # NaN compares false
    worst = max(share, key=lambda output: float("inf") if share[output] != share[output] else share[output])
    seconds, verdict = time.perf_counter() - begin, "" if passed else "FAILED"
    return f"| {name} | {worst} {errors[worst]:.1e} | {100 * share[worst]:.0f} % | {seconds:.1f} | {verdict} |", passed
