"""The errors a user can cause, each with the exit code the scheduler sees.

Every message is one line: where, what was found, what is allowed, what to do.
`run_cli` is the only place that turns one into output; nothing else prints a
user error or calls `sys.exit`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

RANK_0_FIRST_SECONDS = 3

EXIT_OK = 0
EXIT_RECIPE = 2
EXIT_DATA = 3
EXIT_DIVERGED = 4
EXIT_INTERRUPTED = 75


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


class DivergedError(UserError):
    """The loss or a gradient is not a finite number and training cannot go on."""

    exit_code = EXIT_DIVERGED


class Interrupted(UserError):
    """A signal asked for the end; a checkpoint has been saved and the job may be queued again."""

    exit_code = EXIT_INTERRUPTED


def run_cli(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with its code; a `UserError` becomes its message on stderr, no traceback."""
    try:
        code = main() or EXIT_OK
    except UserError as error:
        sys.stdout.flush()
        if os.environ.get("RANK", "0") != "0":
            # mostly every rank meets the same error: rank 0 says it, and the launcher ends us meanwhile
            time.sleep(RANK_0_FIRST_SECONDS)
        for line in str(error).splitlines():
            print(f"{type(error).__name__}: {line}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
