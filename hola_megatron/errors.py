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
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

EXIT_OK = 0
EXIT_RECIPE = 2
EXIT_DATA = 3
EXIT_DIVERGED = 4
EXIT_INTERRUPTED = 75
EXIT_LOST = 76
PRINT_SECONDS = 5.0

SHOWN_CHARACTERS = 80


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
    """The run folder cannot be written (other files than checkpoints)."""

    exit_code = EXIT_RECIPE


class FolderInUseError(UserError):
    """Another process owns the folder that this one was to write."""

    exit_code = EXIT_RECIPE


class DivergedError(UserError):
    """The loss or gradient norm is repeatedly not finite or far above the last ones: training cannot continue."""

    exit_code = EXIT_DIVERGED


class InstallError(UserError):
    """A package is installed and does not load."""

    exit_code = EXIT_RECIPE


class LostError(UserError):
    """A rank died or hangs; the same command resumes from the newest checkpoint."""

    exit_code = EXIT_LOST


class Interrupted(UserError):
    """Stopped by a signal after saving a checkpoint; the job may be queued again."""

    exit_code = EXIT_INTERRUPTED


def shown(value: Any) -> str:
    """A value as an error shows it: one line, of bounded length, printable in any encoding."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python converts
        text = f"a {type(value).__name__} too long to show"
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS - 3] + "..."


def one_line(error: BaseException) -> str:
    """An error's message on one line; of an OSError the system's message without the path."""
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def _claim_message(text: str) -> bool:
    """Whether this rank prints the message: the first local rank with this error does, as all ranks mostly have it.

    torchrun gives each local rank a folder under one parent; the rank that creates the message's file there prints it.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file is None:
        return True
    claim = Path(error_file).parents[1] / f"printed-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the log folder was removed or is full: print it twice rather than not at all
        return True
    return True


def _print_error(text: str) -> bool:
    """Flush stdout and print to stderr; returns whether both were read. Closed or full streams are ignored."""
    printing = threading.Thread(target=_write_out, args=(text,), daemon=True)
    printing.start()
    printing.join(PRINT_SECONDS)
    return not printing.is_alive()


def _write_out(text: str) -> None:
    for number, stream, content in ((1, sys.stdout, ""), (2, sys.stderr, text)):
        try:
            stream.write(content)
            stream.flush()
        except (OSError, ValueError, AttributeError):
            _silence(number)


def _silence(number: int) -> None:
    """Redirect a descriptor to /dev/null: with unwritten output at exit, Python would end with code 120."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


@contextlib.contextmanager
def _broken_packages_named() -> Iterator[None]:
    """Turn the OSError of a Transformer Engine without its libraries, which Megatron imports, into InstallError."""
    try:
        yield
    except OSError as error:
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        # a module whose import failed is not in sys.modules
        if not any(name.startswith("transformer_engine") and name not in sys.modules for name in modules):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InstallError(f"transformer-engine: is installed and does not load ({reason}); repair or uninstall it, "
                           "tools/doctor.py tells more") from None


def _refused_by_the_machine(error: BaseException) -> str | None:
    """A message where the system refuses a named file, or memory is exhausted; None for other errors (our bugs).

    Expected errors of files are handled in hola_megatron/files; this is for others, such as a folder whose parent may
    not be entered.
    """
    if isinstance(error, OSError) and error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes, os.PathLike)) else error.filename
        return f"OSError: {shown(name)[1:-1]}: {one_line(error)}; mend the path, its permissions or the file system"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error):
        return f"MemoryError: not enough memory ({one_line(error)}); take a smaller model, batch or sequence_length"
    return None


def run_cli(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with its code; a `UserError` becomes its message on stderr, no traceback."""
    was_read = True
    try:
        with _broken_packages_named():
            code = main() or EXIT_OK
    except UserError as error:
        text = "".join(f"{type(error).__name__}: {line}\n" for line in str(error).splitlines())
        if _claim_message(text):
            was_read = _print_error(text)
        code = error.exit_code
    except (OSError, MemoryError, RuntimeError) as error:
        message = _refused_by_the_machine(error)
        if message is None:
            raise
        sys.stdout.flush()
        if _claim_message(message):
            print(message, file=sys.stderr, flush=True)
        code = EXIT_RECIPE
    except KeyboardInterrupt:
        was_read = _print_error("interrupted\n")
        code = 130
    if not was_read:
        os._exit(code)  # Python would wait for the stream's lock
    sys.exit(code)
