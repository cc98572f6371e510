"""Decision rules, written in the study before its runs, and what they say afterwards."""

from __future__ import annotations

from dataclasses import dataclass

from hola_megatron.study.table import Rule, Study

ROUNDING = 1e-9  # 0.7 - 0.5 is less than 0.2
Results = dict[str, dict[int, dict[str, float]]]  # arm -> seed -> measure -> value, of finished runs


@dataclass(frozen=True)
class Verdict:
    """What a rule says: "yes", "no", or "undecided" with the reason.

    differences: {other arm: {seed: how much better}}. seeds: those in which all differences reach the rule's `by`.
    """

    rule: Rule
    answer: str
    reason: str
    differences: dict[str, dict[int, float]]
    seeds: list[int]


def judge(study: Study, rule: Rule, results: Results) -> Verdict:
    """Apply a rule to the finished runs. A seed counts when all arms of the rule have finished it."""
    sign = 1.0 if rule.higher_is_better else -1.0

    def value(arm: str, seed: int) -> float | None:
        return results.get(arm, {}).get(seed, {}).get(rule.measure)

    seeds = study.seeds_of(study.arm(rule.arm))
    differences: dict[str, dict[int, float]] = {other: {} for other in rule.than}
    for other, found in differences.items():
        for seed in seeds:
            mine, theirs = value(rule.arm, seed), value(other, seed)
            if mine is not None and theirs is not None:
                found[seed] = sign * (mine - theirs)
    whole = [seed for seed in seeds if all(seed in found for found in differences.values())]
    reached = [seed for seed in whole if all(found[seed] >= rule.by - ROUNDING for found in differences.values())]
    missing = len(seeds) - len(whole)
    if len(reached) >= rule.in_seeds:
        answer, reason = "yes", ""
    elif len(reached) + missing < rule.in_seeds:
        answer, reason = "no", ""
    else:
        answer, reason = "undecided", f"{missing} of {len(seeds)} seeds are not finished or lack the measure"
    return Verdict(rule, answer, reason, differences, reached)


def sentence(rule: Rule) -> str:
    """The rule in words."""
    better = "above" if rule.higher_is_better else "below"
    return (f"`{rule.measure}` of {rule.arm} is at least {rule.by:g} {better} that of {' and '.join(rule.than)}, in at "
            f"least {rule.in_seeds} seeds")
