"""The errors a user can cause, each with the exit code the scheduler sees.

Every message is one line: where, what was found, what is allowed, what to do.
`run_cli` is the only place that turns one into output; nothing else prints a
user error or calls `sys.exit`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

EXIT_OK = 0
EXIT_RECIPE = 2
EXIT_DATA = 3
EXIT_DIVERGED = 4
EXIT_INTERRUPTED = 75
EXIT_LOST = 76


class UserError(Exception):
    """Base of everything a user can fix; `exit_code` is what the process returns."""

    exit_code = 1


class RecipeError(UserError):
    """The recipe, an override or a command-line argument cannot be used as given."""

    exit_code = EXIT_RECIPE

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """The data folder, a shard or a tokenizer is missing, damaged or of the wrong kind."""

    exit_code = EXIT_DATA


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or belongs to another model."""

    exit_code = EXIT_RECIPE


class RunFolderError(UserError):
    """The run folder refuses what training writes to it besides checkpoints."""

    exit_code = EXIT_RECIPE


class DivergedError(UserError):
    """The loss or a gradient is not finite, or leaps, again and again: training cannot go on."""

    exit_code = EXIT_DIVERGED


class InstallError(UserError):
    """A package is installed and does not load."""

    exit_code = EXIT_RECIPE


class LostError(UserError):
    """A rank died or hangs: not the recipe's fault, the same command goes on from the newest checkpoint."""

    exit_code = EXIT_LOST


class Interrupted(UserError):
    """A signal asked for the end; a checkpoint has been saved and the job may be queued again."""

    exit_code = EXIT_INTERRUPTED


def _first_to_say(text: str) -> bool:
    """Whether no other rank of this machine has said this: mostly every rank meets the same error.

    torchrun gives each rank a folder beside those of the other local ranks; whoever creates the
    message's file there first speaks. No waiting: which rank comes first depends on the load.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file is None:
        return True
    said = Path(error_file).parents[1] / f"said-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    try:
        said.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the log folder is gone or full: twice is better than not at all
        return True
    return True


@contextlib.contextmanager
def _broken_packages_named() -> Iterator[None]:
    """Megatron imports Transformer Engine where it is installed; one whose libraries are missing ends with OSError."""
    try:
        yield
    except OSError as error:
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        # a module whose import failed is in no table of modules
        if not any(name.startswith("transformer_engine") and name not in sys.modules for name in modules):
            raise
        said = " ".join(str(error).split())[:200]
        raise InstallError(f"transformer-engine: is installed and does not load ({said}); repair or uninstall it, "
                           "tools/doctor.py tells more") from None


def run_cli(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with its code; a `UserError` becomes its message on stderr, no traceback."""
    try:
        with _broken_packages_named():
            code = main() or EXIT_OK
    except UserError as error:
        sys.stdout.flush()
        text = "".join(f"{type(error).__name__}: {line}\n" for line in str(error).splitlines())
        if _first_to_say(text):
            print(text, end="", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
