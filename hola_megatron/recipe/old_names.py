"""Fields of earlier recipes under the names they have now: recipes, run folders and exports of then still load."""

from __future__ import annotations

from typing import Any

from hola_megatron.errors import shown

RULE_OF_DECAY = {True: "gdn", False: "delta"}


def with_present_names(values: dict[str, Any], problems: list[str] | None = None) -> dict[str, Any]:
    """A recipe's plain values with `model.decay` (true, false) as `model.rule` (gdn, delta); a copy where it changes.

    problems: takes a line where both are given, or decay is neither true nor false.
    """
    problems = [] if problems is None else problems
    model = values.get("model")
    if not isinstance(model, dict) or "decay" not in model:
        return values
    model = dict(model)
    decay = model.pop("decay")
    if "rule" in model:
        problems.append(f"model.decay: {shown(decay)} is given beside model.rule, which takes its place; leave "
                        "model.decay out")
    elif not isinstance(decay, bool):
        problems.append(f"model.decay: {shown(decay)} is not allowed; give model.rule: gdn or delta")
    else:
        model["rule"] = RULE_OF_DECAY[decay]
    return {**values, "model": model}
