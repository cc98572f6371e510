"""Preparation from the options to the dataset."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from hola_megatron.data.prepare.joining import join
from hola_megatron.data.prepare.making import Job, make, put_in_place, refuse_existing, remove_old, summary_of
from hola_megatron.data.prepare.options import PrepareOptions, Summary
from hola_megatron.data.prepare.parts import make_all, make_part, tasks_of
from hola_megatron.data.prepare.progress import ProgressReport
from hola_megatron.data.prepare.shard_writer import write_json
from hola_megatron.data.prepare.uploading import merge_at, missing_at, part_at, upload
from hola_megatron.data.shards import DATASET_FILE
from hola_megatron.data.sources import Source, bundled_source, find_sources
from hola_megatron.data.tokenizer import Tokenizer, load_tokenizer
from hola_megatron.data.urls import is_url
from hola_megatron.errors import DataError
from hola_megatron.files import FileProblem, read_json, schemas
from hola_megatron.files.ownership import beside, owned

ADVICE = "wait for its end, or choose another --out"
_HEADER = "header.json"


def prepare(options: PrepareOptions) -> Summary:
    """Make the dataset that `options` describe, going on from what a killed run of the same command has finished.

    Raises:
        RecipeError: an option cannot be used.
        DataError: input missing, unreadable or empty; tokenizer unusable; output folder in the way.
        FolderInUseError: another process prepares it.
    """
    options.check()
    out = Path(options.out)
    tokenizer = load_tokenizer(options.tokenizer)
    tokenizer.check_hf_form()  # what cannot be exported is not worth training
    sources = [bundled_source(options.bundled)] if options.bundled else find_sources(options.inputs)
    if is_url(options.out):
        return _at_url(options, tokenizer, sources)
    try:
        if options.part is not None:
            return _one_part(options, tokenizer, sources, out)
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with owned(beside(out, ADVICE)):
            if options.parts > 1:
                return _all_parts(options, tokenizer, sources, out)
            progress = ProgressReport(sum(source.size() for source in sources))
            try:
                return make(Job(options, tokenizer, sources, out), progress.update)
            finally:
                progress.close()
    except OSError as error:
        raise DataError(f"{out}: could not be prepared ({error}); check permissions and free space") from error


def _at_url(options: PrepareOptions, tokenizer: Tokenizer, sources: Sequence[Source]) -> Summary:
    """Parts made in the folder `work` and uploaded one after the other; joined unless one part alone is asked for."""
    url, parts = options.out.rstrip("/"), options.parts if options.part is None else options.part[1]
    work = Path(options.work) / f"{url.rpartition('/')[2]}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    tasks = tasks_of(options, tokenizer, sources, parts, work)
    if options.part is not None:
        tasks = [tasks[options.part[0] - 1]]
    missing = missing_at(url, tasks)
    progress = ProgressReport(sum(task.bytes for task in missing))
    try:
        work.mkdir(parents=True, exist_ok=True)
        if len(missing) == 1:
            make_part(missing[0], tokenizer, progress.update)
        elif missing:
            with owned(beside(work, ADVICE)):
                make_all(missing, options.workers, progress)
    except OSError as error:
        raise DataError(f"{work}: could not be prepared ({error}); check permissions and free space") from error
    finally:
        progress.close()
    for task in missing:
        upload(task.out, url)
    with contextlib.suppress(OSError):
        work.rmdir()  # unless another part is being made there
    return merge_at(url) if options.part is None else part_at(url, tasks[0].part.name)


def _one_part(options: PrepareOptions, tokenizer: Tokenizer, sources: Sequence[Source], out: Path) -> Summary:
    number, of = options.part
    task = tasks_of(options, tokenizer, sources, of, out)[number - 1]
    progress = ProgressReport(task.bytes)
    try:
        return make_part(task, tokenizer, progress.update)
    finally:
        progress.close()


def _all_parts(options: PrepareOptions, tokenizer: Tokenizer, sources: Sequence[Source], out: Path) -> Summary:
    """All parts by processes of this machine, joined; in a work folder until the dataset is complete."""
    work = out.absolute().parent / f".{out.absolute().name}.partial"
    data = work / "data"
    tasks = tasks_of(options, tokenizer, sources, options.parts, data)
    header = {"shape": options.shape(tokenizer), "sources": [source.stamp() for source in sources],
              "plan": tasks[0].part.plan}
    same = _header(work) == header
    if same and not data.exists() and _plan(out) == header["plan"]:  # killed after the rename
        _clean(work, out)
        return summary_of(out)
    refuse_existing(out, options.overwrite)
    if not same:
        shutil.rmtree(work, ignore_errors=True)
    data.mkdir(parents=True, exist_ok=True)
    write_json(work / _HEADER, header)
    progress = ProgressReport(sum(task.bytes for task in tasks))
    try:
        make_all(tasks, options.workers, progress)
    finally:
        progress.close()
    for path in data.glob(".*"):  # of a killed run: locks, and work folders of parts that it had just made
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    join(data, [task.out for task in tasks])
    refuse_existing(out, options.overwrite)
    put_in_place(data, out)
    _clean(work, out)
    return summary_of(out)


def _clean(work: Path, out: Path) -> None:
    """Remove the work folder, the header last: it tells of a run that was killed in between."""
    remove_old(out)
    shutil.rmtree(work / "data", ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)


def _header(work: Path) -> dict | None:
    try:
        return read_json(work / _HEADER, schemas.MAPPING)
    except FileProblem:
        return None


def _plan(out: Path) -> str | None:
    try:
        return read_json(out / DATASET_FILE, schemas.DATASET).get("plan")
    except FileProblem:
        return None
