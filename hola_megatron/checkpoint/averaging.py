"""The mean of several checkpoints' weights, as a run folder that a run starts from or an export is made of."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hola_megatron.checkpoint.folder import Checkpoint, find_checkpoint, list_steps, open_checkpoint
from hola_megatron.checkpoint.tensors import LAYER_STATE, TensorReader
from hola_megatron.checkpoint.weights_only import write_weights
from hola_megatron.errors import CheckpointError
from hola_megatron.files.yaml_text import dump_yaml
from hola_megatron.paths import path_problem

SHARD_BYTES = 5 * 10**9
MORE = ("router", LAYER_STATE)  # what is averaged besides weights


def choose(paths: Sequence[Path], last: int | None) -> list[Checkpoint]:
    """The checkpoints to average, verified, oldest first.

    Args:
        paths: step_NNNNNNNN folders, or run folders (the newest checkpoint of each).
        last: so many newest checkpoints of the one run folder in `paths`; None: `paths` themselves.

    Raises:
        CheckpointError: one is not usable, there are too few, or one is named twice.
    """
    if last is None:
        found = [find_checkpoint(path) for path in paths]
    elif len(paths) != 1:
        raise CheckpointError(f"--last: {len(paths)} folders are given; name one run folder, or leave --last out")
    else:
        root = paths[0] / "checkpoints" if (paths[0] / "checkpoints").is_dir() else paths[0]
        steps = list_steps(root)
        if len(steps) < last:
            raise CheckpointError(f"--last: {paths[0]} has {len(steps)} checkpoints, {last} are to be averaged; keep "
                                  "more (checkpoint.keep, checkpoint.keep_every), or give a smaller number")
        found = [open_checkpoint(path) for _, path in reversed(steps[:last])]
    if len(found) < 2:
        raise CheckpointError("average: one checkpoint is its own mean; give two or more, or --last N")
    names = [checkpoint.path.resolve() for checkpoint in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise CheckpointError(f"average: {twice} is there twice; name each once")
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def refuse_existing(out: Path) -> None:
    """CheckpointError unless a new folder can have this name."""
    if problem := path_problem("--out", out):
        raise CheckpointError(problem)
    if out.exists():
        raise CheckpointError(f"{out}: exists; choose another name")


def average(checkpoints: Sequence[Checkpoint], out: Path) -> Path:
    """Write the mean of the weights as the one checkpoint of a new run folder `out`; returns the checkpoint's folder.

    The step, the position in the data and the recipe are those of the last checkpoint; moments are zero.

    Raises:
        CheckpointError: the checkpoints are of different models or tokenizers, hold values that are not finite, or
            `out` exists or cannot be written.
    """
    refuse_existing(out)
    newest, manifests = checkpoints[-1], [checkpoint.run_manifest() for checkpoint in checkpoints]
    readers = {kind: [TensorReader(c.path, m["tensors"].get(kind, {})) for c, m in
                      zip(checkpoints, manifests, strict=True)] for kind in ("weight", *MORE)}
    _check_same(checkpoints, manifests, readers)
    manifest: dict[str, Any] = {name: manifests[-1].get(name) for name in ("data_fingerprint", "valid_fingerprint",
                                                                           "tokenizer", "code")}
    sources = ", ".join(str(checkpoint.path) for checkpoint in checkpoints)
    manifest |= {"trainer": manifests[-1]["trainer"] | {"origin": f"mean of {sources}", "bad_steps": 0},
                 "recipe": manifests[-1]["recipe"] | {"run_dir": str(out)}}
    more = {kind: dict(_means(readers[kind])) for kind in MORE if readers[kind][0].index}
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        (partial / "recipe.yaml").write_text(dump_yaml(manifest["recipe"]), encoding="utf-8")
        written = write_weights(partial / "checkpoints", _means(readers["weight"]), manifest, shard_bytes=SHARD_BYTES,
                                more=more)
        partial.rename(out)
    except OSError as error:
        raise CheckpointError(f"{out}: the mean of {newest.path} and others could not be written ({error}); free the "
                              "disk or choose another name") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out / "checkpoints" / written.name


def _means(readers: Sequence[TensorReader]) -> Iterator[tuple[str, Tensor]]:
    """(name, mean in float32) of every tensor, summed in float64."""
    for name in readers[0].names():
        total = sum(reader.whole(name).double() for reader in readers)
        mean = (total / len(readers)).float()
        if not torch.isfinite(mean).all():
            raise CheckpointError(f"average: the mean of {name} holds values that are not finite; leave out the "
                                  "checkpoint that has them (tools/checkpoint.py inspect)")
        yield name, mean


def _check_same(checkpoints: Sequence[Checkpoint], manifests: Sequence[dict[str, Any]],
                readers: dict[str, list[TensorReader]]) -> None:
    """CheckpointError unless all are of one model and one tokenizer."""
    first = checkpoints[0]
    for checkpoint, manifest in zip(checkpoints, manifests, strict=True):
        if manifest.get("tokenizer") != manifests[0].get("tokenizer"):
            raise CheckpointError(f"{checkpoint.path}: has another tokenizer than {first.path}; only checkpoints of "
                                  "one model can be averaged")
    for kind, of_kind in readers.items():
        for checkpoint, reader in zip(checkpoints, of_kind, strict=True):
            shapes, wanted = ({name: r.shape(name) for name in r.names()} for r in (reader, of_kind[0]))
            if shapes != wanted:
                name = min(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
                raise CheckpointError(f"{checkpoint.path}: its {name} ({kind}) is {shapes.get(name, 'missing')}, that "
                                      f"of {first.path} {wanted.get(name, 'missing')}; only checkpoints of one model "
                                      "can be averaged")
