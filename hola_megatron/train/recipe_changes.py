"""Differences between a checkpoint's recipe and that of the resumed run, and which of them need --allow-change."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from hola_megatron.checkpoint.folder import Checkpoint
from hola_megatron.errors import RecipeError
from hola_megatron.recipe.checks import without_effect
from hola_megatron.recipe.fields import default_values
from hola_megatron.recipe.old_names import with_present_names
from hola_megatron.recipe.schedule import describe_schedule, rate_of
from hola_megatron.recipe.schema import Recipe

# fields that may change in a resumed run, since they do not change what is computed
FREE = ("run_dir", "engine", "parallel.", "checkpoint.", "log.", "valid.", "data.valid", "data.cache",
        "train.micro_batch_size", "train.recompute", "train.logits_budget_gb", "train.cuda_graph", "guard.",
        "model.backend", "model.layer_spec")


RATE_FIELDS = ("steps", "learning_rate", "min_learning_rate", "warmup_steps", "schedule", "cooldown_steps",
               "cooldown_shape")


@dataclass(frozen=True)
class Change:
    """One field that differs. `free`: allowed without --allow-change."""

    key: str
    before: Any
    now: Any
    free: bool

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.now}"


def changes(recipe: Recipe, checkpoint: Checkpoint, data_fingerprint: str, tokenizer: dict[str, Any],
            valid_fingerprint: str | None = None) -> list[Change]:
    """Every difference, sorted by name. tokenizer: identity of the recipe's tokenizer."""
    # for a field newer than the checkpoint, the default is the behaviour of the older code
    before = default_values() | _flat(with_present_names(checkpoint.run_manifest()["recipe"]))
    now = _flat(recipe.to_dict())
    same_data = checkpoint.manifest.get("data_fingerprint") in (None, data_fingerprint)
    same_tokenizer = checkpoint.manifest.get("tokenizer") in (None, tokenizer)
    found, unused = [], without_effect(recipe)
    for key in sorted(before | now):
        was, wanted = before.get(key), now.get(key)
        if was == wanted:
            continue
        free = (_is_free(key, recipe) or key in unused or (key == "train.steps" and _is_longer(was, wanted))
                or (key in ("data.train", "data.phases") and same_data) or (key == "data.tokenizer" and same_tokenizer))
        found.append(Change(key, was, wanted, free))
    if not same_data:  # None: imported weights that have read no data yet
        found.append(Change("data.train (fingerprint)", str(checkpoint.manifest["data_fingerprint"])[:12],
                            data_fingerprint[:12], free=False))
    if not same_tokenizer:  # under one name, or another
        was = checkpoint.manifest["tokenizer"]
        found += [Change(f"data.tokenizer ({name})", _short(was.get(name)), _short(tokenizer.get(name)), free=False)
                  for name in tokenizer if was.get(name) != tokenizer[name]]
    valid_before = checkpoint.manifest.get("valid_fingerprint")
    if valid_before and valid_fingerprint and valid_before != valid_fingerprint:
        found.append(Change("data.valid (fingerprint)", valid_before[:12], valid_fingerprint[:12], free=True))
    return found


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) else value


def accept_changes(found: list[Change], checkpoint: Checkpoint, recipe: Recipe, *, allow: bool) -> None:
    """Print every difference, and what it does to the learning rate. allow: --allow-change was given; else RecipeError
    for those that need it."""
    refused = [change for change in found if not change.free]
    if refused and not allow:
        raise RecipeError([*(f"{change.key}: was {change.before!r} when {checkpoint.path} was saved, now {change.now!r}"
                             for change in refused),
                           "a resumed run must be the same run; undo the change, start a run of its own under another "
                           f"name (name={recipe.name}-2), resume with --allow-change, or start over with --new"])
    for change in found:
        print(f"changed | {change}{'' if change.free else ' (--allow-change)'}", flush=True)
    if line := _rate_change(found, checkpoint.step, recipe):
        print(line, flush=True)


def _rate_change(found: list[Change], step: int, recipe: Recipe) -> str | None:
    """What the changes do to the learning rate of the next step; None where they do nothing to it."""
    earlier = {change.key.removeprefix("train."): change.before for change in found
               if change.key.startswith("train.") and change.key.removeprefix("train.") in RATE_FIELDS}
    if not earlier:
        return None
    before, now = (rate_of(train, step) for train in (dataclasses.replace(recipe.train, **earlier), recipe.train))
    return None if before == now else (f"changed | learning rate of step {step + 1:,}: {before:.4g} -> {now:.4g}; "
                                       f"schedule: {describe_schedule(recipe.train)}")


def _is_longer(before: Any, now: Any) -> bool:
    return isinstance(before, int) and isinstance(now, int) and now > before


def _is_free(key: str, recipe: Recipe) -> bool:
    moe = recipe.model.moe
    if key == "train.micro_batch_size" and moe.experts is not None and moe.balancing == "aux_loss":
        return False  # the load-balancing loss is computed per micro-batch
    return key.startswith(FREE)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
