"""Parts to one dataset, without writing a shard again.

    train/part-00001-of-00016/shard.00000.mds ...     each part is a dataset of its own
    train/index.json, train/dataset.json              the parts' indexes one after the other, their counts added up

Each part's samples are in the dataset once, so its share in training is that of its tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hola_megatron.data.prepare.making import refuse_existing, summary_of
from hola_megatron.data.prepare.options import Summary
from hola_megatron.data.prepare.shard_writer import to_disk
from hola_megatron.data.prepare.splitting import part_name
from hola_megatron.data.shards import DATASET_FILE, INDEX_FILE, INDEX_HASH, JOINED_VERSION, ShardStore
from hola_megatron.errors import DataError
from hola_megatron.files.ownership import beside, owned

_ADDED = ("documents", "empty", "duplicates", "padding", "text_bytes", "tokens", "samples")
_PATTERN = "part-?????-of-?????"


def merge(out: Path, given: Sequence[Path], *, overwrite: bool = False) -> Summary:
    """Join parts to the dataset `out`. Started again after a kill it does the same.

    Args:
        given: folders of parts, or folders that hold some; empty: those in `out`. Shards of a part outside `out` are
            linked there, or copied where the file system has no links.
        overwrite: replace what other parts were joined to.

    Raises:
        DataError: a part is missing, damaged, of another preparation or given twice.
        FolderInUseError: another process writes `out`.
    """
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with owned(beside(out, "wait for its end")):
            if given:
                _bring(out, [part for folder in given for part in _parts_in(folder)], overwrite)
            parts = _parts_in(out)
            _refuse_other(out, parts, overwrite)
            join(out, parts)
    except OSError as error:
        raise DataError(f"{out}: the parts could not be joined ({error}); check permissions and free space") from error
    return summary_of(out)


def join(out: Path, parts: Sequence[Path]) -> None:
    """Write the two index files of `parts`, which lie in `out`; dataset.json last."""
    index, record = joined(out, parts, lambda name: _size(out / name))
    for name, data in ((INDEX_FILE, index), (DATASET_FILE, record)):
        partial = out / f".{name}.new"
        partial.write_bytes(data)
        to_disk(partial)
        os.replace(partial, out / name)
    to_disk(out)


def joined(out: Path, parts: Sequence[Path], size_of: Callable[[str], int | None],
           name_of_out: str | None = None) -> tuple[bytes, bytes]:
    """The bytes of index.json and dataset.json.

    Args:
        parts: folders that hold the two index files of each part.
        size_of: bytes of a shard, named by its path from `out`; None where there is none.
        name_of_out: for messages, where it is not `out`.

    Raises:
        DataError: not all the parts of one preparation, or a shard is missing.
    """
    where = name_of_out or str(out)
    stores = {part.name: ShardStore(str(part)) for part in parts}
    _check(where, {name: store.info for name, store in stores.items()})
    shards = [_within(entry, name) for name, store in sorted(stores.items()) for entry in store.entries]
    for shard in shards:
        name, size = shard["raw_data"]["basename"], shard["raw_data"]["bytes"]
        if size_of(name) != size:
            raise DataError(f"{where}: shard {name} is missing or has not the {size} bytes that its index says; make "
                            "the part again")
    index = json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode()
    infos = [store.info for _, store in sorted(stores.items())]
    record = {name: value for name, value in infos[0].items() if name not in ("part", INDEX_HASH)}
    record |= {name: sum(info[name] for info in infos) for name in _ADDED if name in infos[0]}
    record |= {"format_version": JOINED_VERSION, "plan": infos[0]["part"]["plan"], "parts": len(infos),
               "sources": [source for info in infos for source in info["sources"]],
               INDEX_HASH: hashlib.sha256(index).hexdigest()}
    return index, (json.dumps(record, indent=2) + "\n").encode()


def _within(entry: dict[str, Any], part: str) -> dict[str, Any]:
    raw = entry["raw_data"]
    return entry | {"raw_data": raw | {"basename": f"{part}/{raw['basename']}"}}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _check(where: str, infos: dict[str, dict[str, Any]]) -> None:
    """DataError unless these are all the parts of one preparation."""
    if not infos:
        raise DataError(f"{where}: holds no part; make them with tools/prepare_data.py --part I/N, or name their "
                        "folders")
    for name, info in infos.items():
        part = info.get("part")
        if part is None or name != part_name(part["number"], part["of"]):
            raise DataError(f"{where}/{name}: is not the part that its name says; make it with tools/prepare_data.py "
                            "--part I/N")
    (first, info), *others = infos.items()
    for name, other in others:
        if other["part"]["plan"] != info["part"]["plan"]:
            raise DataError(f"{where}: {first} and {name} are not of one preparation: other input files, options or "
                            "number of parts; make all parts by the same command")
    of = info["part"]["of"]
    missing = [str(number) for number in range(1, of + 1) if part_name(number, of) not in infos]
    if missing:
        raise DataError(f"{where}: part {', '.join(missing)} of {of} is missing; make it with --part I/{of}")


def _refuse_other(out: Path, parts: Sequence[Path], overwrite: bool) -> None:
    """A dataset that is there already may be the one of these parts."""
    if not (out / DATASET_FILE).exists() or overwrite:
        return
    if (out / DATASET_FILE).read_bytes() != joined(out, parts, lambda name: _size(out / name))[1]:
        raise DataError(f"{out}: holds a dataset of other parts already; choose another folder, or pass --overwrite to "
                        "replace it")


def _parts_in(folder: Path) -> list[Path]:
    """The folder itself if it is a part, else the parts in it."""
    whole = folder.absolute()  # "." has no name
    if whole.match(_PATTERN):
        found = [folder]
    else:
        found = sorted(path for path in folder.glob(_PATTERN) if path.is_dir())
    if not found:
        raise DataError(f"{folder}: holds no part-IIIII-of-NNNNN; give folders that tools/prepare_data.py --part made")
    return found


def _bring(out: Path, parts: Sequence[Path], overwrite: bool) -> None:
    """Have `parts` in `out`: their shards linked, the two index files copied."""
    names = [part.absolute().name for part in parts]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{name}: given twice; give each part once")
    if out.exists() and not any(out.glob(_PATTERN)):
        refuse_existing(out, overwrite)
    out.mkdir(exist_ok=True)
    for part in parts:
        target = out / part.absolute().name
        if target.exists() and target.samefile(part):
            continue
        if target.exists():
            _same_part(target, part, overwrite)
        partial = out / f".{target.name}.linked"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        store = ShardStore(str(part))
        for entry in store.entries:
            name = entry["raw_data"]["basename"]
            _link(part / name, partial / name)
        for name in (INDEX_FILE, DATASET_FILE):
            shutil.copyfile(part / name, partial / name)
            to_disk(partial / name)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)


def _same_part(there: Path, given: Path, overwrite: bool) -> None:
    if not overwrite and (there / DATASET_FILE).read_bytes() != (given / DATASET_FILE).read_bytes():
        raise DataError(f"{there}: is another part of that name than {given}; remove one of them, or pass --overwrite")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        _tell_once(f"prepare | {target.parent.parent}: no links from {source.parent.parent}, the shards are copied")
        shutil.copyfile(source, target)
        to_disk(target)


_told: set[str] = set()


def _tell_once(text: str) -> None:
    if text not in _told:
        _told.add(text)
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)
