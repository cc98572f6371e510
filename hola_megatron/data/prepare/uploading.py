"""A dataset at a URL: its parts are made in a local folder, uploaded, and joined there by the two index files.

A part's index.json and dataset.json are uploaded last, so a part that has them is whole. Started again after a kill,
the same command uploads what is missing. The local copy of a part is removed when it is uploaded.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hola_megatron.data.prepare.joining import joined
from hola_megatron.data.prepare.making import summary_of
from hola_megatron.data.prepare.options import Summary
from hola_megatron.data.prepare.parts import Task
from hola_megatron.data.shards import DATASET_FILE, INDEX_FILE, ShardStore
from hola_megatron.data.urls import filesystem, storage_errors
from hola_megatron.errors import DataError

_UPLOADS = 8
_INDEXES = (INDEX_FILE, DATASET_FILE)


def missing_at(url: str, tasks: Sequence[Task]) -> list[Task]:
    """The parts that are not whole at the URL yet.

    Raises:
        DataError: a part of another preparation lies there, or the storage failed.
    """
    with tempfile.TemporaryDirectory(prefix="hola-parts-") as folder:
        fetched = {part.name: part for part in _fetch(url, Path(folder))}
        sizes = _sizes(url)
        missing = []
        for task in tasks:
            name = task.part.name
            if name not in fetched:
                missing.append(task)
                continue
            store = ShardStore(str(fetched[name]))
            if (store.info.get("part") or {}).get("plan") != task.part.plan:
                raise DataError(f"{url}/{name}: is of another preparation (input files or options); choose another "
                                "--out")
            if any(sizes.get(f"{name}/{entry['raw_data']['basename']}") != entry["raw_data"]["bytes"]
                   for entry in store.entries):
                missing.append(task)
        return missing


def upload(part: Path, url: str) -> None:
    """Upload a part that is made to `url`/its name, and remove it here."""
    system, path = filesystem(url)
    target = f"{path}/{part.name}"
    there = _sizes(f"{url}/{part.name}")
    with storage_errors(url):
        shards = [file for file in part.iterdir() if file.name not in _INDEXES]
        waiting = [file for file in shards if there.get(file.name) != file.stat().st_size]
        system.makedirs(target, exist_ok=True)
        with ThreadPoolExecutor(_UPLOADS) as pool:
            list(pool.map(lambda file: system.put_file(str(file), f"{target}/{file.name}"), waiting))
        for name in _INDEXES:
            system.put_file(str(part / name), f"{target}/{name}")
    shutil.rmtree(part)


def merge_at(url: str) -> Summary:
    """Join the parts at a URL: write the two index files above them.

    Raises:
        DataError: as `joining.merge`, or the storage failed.
    """
    with tempfile.TemporaryDirectory(prefix="hola-parts-") as folder:
        sizes = _sizes(url)
        index, record = joined(Path(folder), _fetch(url, Path(folder)), sizes.get, url)
        system, path = filesystem(url)
        with storage_errors(url):
            for name, data in ((INDEX_FILE, index), (DATASET_FILE, record)):
                system.pipe_file(f"{path}/{name}", data)
        (Path(folder) / INDEX_FILE).write_bytes(index)
        (Path(folder) / DATASET_FILE).write_bytes(record)
        found = summary_of(Path(folder))
    return Summary(**{**vars(found), "out": url})


def part_at(url: str, name: str) -> Summary:
    """What a part at a URL holds."""
    with tempfile.TemporaryDirectory(prefix="hola-parts-") as folder:
        part = next(part for part in _fetch(url, Path(folder)) if part.name == name)
        return Summary(**{**vars(summary_of(part)), "out": f"{url}/{name}"})


def _fetch(url: str, folder: Path) -> list[Path]:
    """The index files of the parts at a URL, as folders in `folder`."""
    system, path = filesystem(url)
    found = []
    with storage_errors(url):
        for name in sorted(_glob(system, f"{path}/part-?????-of-?????/{DATASET_FILE}")):
            part = folder / name.split("/")[-2]
            part.mkdir()
            for file in _INDEXES:
                (part / file).write_bytes(system.cat_file(f"{name.rpartition('/')[0]}/{file}"))
            found.append(part)
    return found


def _glob(system: Any, pattern: str) -> list[str]:
    try:
        return list(system.glob(pattern))
    except FileNotFoundError:
        return []


def _sizes(url: str) -> dict[str, int]:
    """Bytes of every file below a URL, by the path from there."""
    system, path = filesystem(url)
    system.invalidate_cache()
    with storage_errors(url):
        try:
            found = system.find(path, detail=True)
        except FileNotFoundError:
            return {}
    root = path.strip("/") + "/"
    return {name.lstrip("/").removeprefix(root): int(about["size"]) for name, about in found.items()}
