"""Paths that a user gives: those that are written to, and folders that are read, are local.

`Path("s3://bucket/run")` is the relative folder `s3:/bucket/run`, which would be made here, silently. So is `~/run`
where no shell has expanded it (`run_dir=~/run`), and `$SCRATCH/run` in a YAML file. All are refused by name. Data
are the exception: `data.train` and `data.valid` may be URLs (data/remote.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from hola_megatron.errors import RecipeError

# two letters at least: C:/ is a drive. One slash is what Path leaves of two.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


def path_problem(name: str, value: str | os.PathLike[str], *, use: str = "is written to") -> str | None:
    """Why `value`, given as `name`, is no local path, in one line; None if it is one.

    use: what happens with the path, "is written to" or "is read".
    """
    given = os.fspath(value)
    if not given or "\0" in given:
        return f"{name}: {given!r} is no path; give a local one"
    if _URL.match(given):
        if given.startswith("file:/"):
            return f"{name}: {given} is a URL; give the path alone: {given.removeprefix('file:').replace('//', '', 1)}"
        after = "and copy it to the bucket afterwards" if use == "is written to" else "after copying it there"
        return (f"{name}: {given} is a URL, and what {use} here must be a local path; give a local folder (a mounted "
                f"bucket is one) {after}, or ./{given} if a local path is meant")
    if given.startswith("~"):
        return (f"{name}: {given} starts with ~, which no shell has expanded; write the home folder out, or ./{given} "
                "if that is the name")
    if variable := _VARIABLE.search(given):
        return (f"{name}: {given} contains {variable.group()}, which nothing has replaced by its value; write the path "
                "out, or give it on the command line, where the shell replaces it")
    return None


def local(name: str, *, use: str = "is read") -> Callable[[str], Path]:
    """An argparse type: a local path. RecipeError, which argparse lets through, for another."""
    def convert(given: str) -> Path:
        if problem := path_problem(name, given, use=use):
            raise RecipeError(problem)
        return Path(given)
    return convert


def output(name: str) -> Callable[[str], Path]:
    """An argparse type: a local path that is written to."""
    return local(name, use="is written to")


def output_file(name: str) -> Callable[[str], Path]:
    """An argparse type: a local file in a folder that is there, so that hours of work do not end in no such folder."""
    def convert(given: str) -> Path:
        path = output(name)(given)
        if path.is_dir():
            raise RecipeError(f"{name}: {path} is a folder; give the name of a file")
        if not path.parent.is_dir():
            raise RecipeError(f"{name}: {path} cannot be written, there is no folder {path.parent}; make it first")
        return path
    return convert


def write_output(name: str, path: Path, text: str) -> None:
    """Write a tool's output file. Raises RecipeError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{name}: {path} cannot be written ({error.strerror}); name a file elsewhere") from None
