"""One owner for a folder: a run, a dataset being prepared, an export being made.

Two locks of filelock together, because neither is enough on every file system:

* `owner.lock`, locked by the kernel (flock). The death of its owner ends it at once, and a suspended owner keeps it.
  On NFS it holds across nodes where the server keeps locks; some mounts keep them to each node (nolock, localflock).
* `owner.lease`, a file whose owner renews it every few seconds. It works on any file system. Its owner is named by
  host, process id, the process's start and the machine's boot, so a process id used again is not taken for the owner.

Whether an owner is alive is known at once on its own machine. On another machine, only renewals of its lease are seen:
within RENEW_SECONDS if it is alive; without one for LEASE_SECONDS (measured here, clocks are not compared) it counts as
dead. An owner that was only disconnected that long notices it afterwards and ends (code 2) before it writes.

`owner.lock` also contains the owner as JSON, for users and messages. Readers need no lock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shlex
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, LeaseCompromise, LeaseSettingsMismatch, SoftFileLease, Timeout

from hola_megatron.errors import FolderInUseError

LEASE_SECONDS = 60.0
RENEW_SECONDS = 5.0
ENDING_SECONDS = 600.0  # as long as a launcher waits for ranks that save (HOLA_STOP_SECONDS)
POLL_SECONDS = 0.25
RELEASE_SECONDS = 10.0
LONGEST_COMMAND = 160
PF_EXITING = 4  # a flag in /proc/PID/stat
# what file systems answer that have no kernel locks
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class LockFiles:
    """Paths of a folder's two lock files. advice: the last clause of the error for a second process."""

    folder: Path
    lock: Path
    lease: Path
    advice: str


def inside(folder: Path, advice: str) -> LockFiles:
    """For an existing folder."""
    return LockFiles(folder, folder / "owner.lock", folder / "owner.lease", advice)


def beside(folder: Path, advice: str) -> LockFiles:
    """For a folder that is created under another name first: the lock files are in its parent, with links resolved."""
    whole = folder.absolute()
    parent = Path(os.path.realpath(whole.parent))
    return LockFiles(folder, parent / f".{whole.name}.owner.lock", parent / f".{whole.name}.owner.lease", advice)


@dataclass(frozen=True)
class Who:
    """An owner, as stored in `owner.lock`."""

    token: str
    host: str
    pid: int
    started: str
    command: str
    kernel: str
    job: str | None = None
    attempt: int = 0
    ending: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.started} ({self.command})"


def this_process() -> Who:
    """This process as an owner, with a new token."""
    job = os.environ.get("SLURM_JOB_ID")
    attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
    command = shlex.join(sys.orig_argv)
    if len(command) > LONGEST_COMMAND:
        command = f"{command[:LONGEST_COMMAND]}..."
    return Who(secrets.token_hex(8), socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S %z"),
               " ".join(command.split()), _kernel(), f"slurm {job}" if job else None,
               int(attempt) if attempt.isdigit() else 0)


def read_owner(locks: LockFiles) -> Who | None:
    """The owner in the lock file; None if there is none, or it is just being written."""
    try:
        found = json.loads(locks.lock.read_text(encoding="utf-8"))
        who = Who(**{name: found[name] for name in Who.__dataclass_fields__})
        return who if isinstance(who.pid, int) and isinstance(who.attempt, int) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


class Owner:
    """This process's hold on a folder, from `take` to `release`."""

    def __init__(self, locks: LockFiles, who: Who, lease_seconds: float, on_lost: Callable[[str], None]):
        self.locks, self.who, self._on_lost = locks, who, on_lost
        self._retry_seconds = min(RENEW_SECONDS, lease_seconds / 4)
        # the locks are let go by whichever thread is at hand
        self._kernel = FileLock(locks.lock, thread_local=False, fallback_to_soft=False)
        self._lease = SoftFileLease(
            locks.lease, lease_duration=lease_seconds, heartbeat_interval=self._retry_seconds, thread_local=False,
            on_compromise=self._compromised)
        self._no_kernel_locks = False

    @property
    def has_kernel_lock(self) -> bool:
        return self._kernel.is_locked or self._no_kernel_locks

    def try_to_take(self) -> bool:
        """One attempt at both locks; OSError where the folder cannot be written."""
        if not self.has_kernel_lock:
            try:
                self._kernel.acquire(blocking=False)
            except Timeout:
                return False
            except NotImplementedError:
                self._no_kernel_locks = True
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                self._no_kernel_locks = True
        try:
            self._lease.acquire(blocking=False)
        except (Timeout, LeaseSettingsMismatch):
            return False
        self._write(self.who)
        _owners.add(self)
        return True

    def note_ending(self) -> None:
        """A second comer now waits for the end instead of being refused."""
        self.who = Who(**{**asdict(self.who), "ending": True})
        with contextlib.suppress(OSError):
            self._write(self.who)

    def _write(self, who: Who) -> None:
        self.locks.lock.write_text(json.dumps(asdict(who), indent=1) + "\n", encoding="utf-8")

    def give_up(self) -> None:
        """Let go of what `try_to_take` has got so far."""
        self._lease.release()
        self._kernel.release()

    def release(self, moved_to: Path | None = None) -> None:
        """Remove the lock files and let go. A disk that no longer answers holds this up for ten seconds at most.

        moved_to: where the folder is now, if it was renamed meanwhile.
        """
        _owners.discard(self)
        names = [(moved_to / path.name if moved_to else path) for path in (self.locks.lock, self.locks.lease)]

        def let_go() -> None:
            with contextlib.suppress(OSError):
                if self._kernel.is_locked or read_owner(self.locks) == self.who:
                    names[0].unlink()  # while it is locked: who waits for it then sees that it has no name
            if moved_to:
                with contextlib.suppress(OSError):
                    names[1].unlink()
            with contextlib.suppress(OSError):
                self._lease.release()
            with contextlib.suppress(OSError):
                self._kernel.release()

        thread = threading.Thread(target=let_go, name="letting go of a folder", daemon=True)
        thread.start()
        thread.join(RELEASE_SECONDS)

    def _compromised(self, loss: LeaseCompromise) -> None:
        """The lease's thread calls this when it could not renew it, and ends then."""
        if loss.reason == "refresh-failed":
            self._renew_again()
        elif loss.reason == "owner-changed":
            self._on_lost(self._taken())
        else:
            self._warn(f"{self.locks.lease} was removed; this process goes on, and nothing keeps others out any more")

    def _renew_again(self) -> None:
        """The file system did not answer for most of a lease: go on if nobody has taken the folder meanwhile."""
        self._warn(f"{self.locks.lease} could not be renewed; another process may take the folder until it can")
        while True:
            time.sleep(self._retry_seconds)
            try:
                os.lstat(self.locks.lease)
            except FileNotFoundError:
                return self._warn(f"{self.locks.lease} was removed; nothing keeps others out any more")
            except OSError:
                continue
            if not self._lease.is_lock_held_by_us:
                return self._on_lost(self._taken())
            with contextlib.suppress(OSError):
                self._lease.release()
                self._lease.acquire(blocking=False)
                return None

    def _taken(self) -> str:
        other = read_owner(self.locks)
        return (f"{self.locks.folder}: was taken over by {other or 'another process'}, as this process gave no sign of "
                f"life for {self._lease.lease_duration:.0f} s (it was suspended, or the disk did not answer); it ends "
                "here and has left what the other writes alone")

    def _warn(self, text: str) -> None:
        print(f"owner | {text}", file=sys.stderr, flush=True)


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()


def note_ending() -> None:
    """Record that this process is about to release all folders that it owns."""
    for owner in list(_owners):
        owner.note_ending()


def take(locks: LockFiles, *, lease_seconds: float = LEASE_SECONDS, ending_seconds: float = ENDING_SECONDS,
         patience_seconds: float = 0.0, on_lost: Callable[[str], None] | None = None) -> Owner:
    """Own a folder. Raises FolderInUseError, which names the owner; OSError where the folder cannot be written.

    Waits for an owner that is ending or was an earlier attempt of the same job, and until one on another machine is
    known to be alive or dead. patience_seconds: maximum wait for a live owner. on_lost: called from a thread if another
    process takes the folder; default: ends this process.
    """
    owner = Owner(locks, this_process(), lease_seconds, on_lost or _end)
    watch = _Watch(owner, lease_seconds, ending_seconds, patience_seconds)
    try:
        while not owner.try_to_take():
            watch.look()
            time.sleep(POLL_SECONDS)
    except BaseException:
        owner.give_up()
        raise
    return owner


@contextlib.contextmanager
def owned(locks: LockFiles, **options: Any) -> Iterator[Owner]:
    """`take`, and `release` at the end of the block."""
    owner = take(locks, **options)
    try:
        yield owner
    finally:
        owner.release()


class _Watch:
    """What a waiting process learns about the owner, poll by poll."""

    def __init__(self, owner: Owner, lease_seconds: float, ending_seconds: float, patience_seconds: float):
        self.owner, self.locks = owner, owner.locks
        self.lease_seconds, self.ending_seconds, self.patience_seconds = lease_seconds, ending_seconds, patience_seconds
        self.began = self._sign = time.monotonic()  # time of the first poll, and of the owner's last sign of life
        self._seen: tuple[Who | None, tuple[int, int] | None] | None = None
        self._reported: set[str] = set()

    def look(self) -> None:
        """FolderInUseError if the owner is alive and there is no reason to wait for it."""
        who, mark, before = read_owner(self.locks), self._mark(), self._seen
        self._seen = (who, mark)
        if before is None:
            return
        # a kernel lock of this machine means a live process; checked twice, as starting owners hold it for a moment
        here = not self.owner.has_kernel_lock and who is not None and who.kernel == self.owner.who.kernel \
            and before[0] is not None and before[0].token == who.token and _runs(who.pid)
        renewed = mark is not None and before[1] is not None and mark != before[1]
        now = time.monotonic()
        if here or renewed:
            self._sign = now
            self._alive(who, now - self.began)
        quiet = now - self._sign
        if quiet > 2 * self.lease_seconds and not self.owner.has_kernel_lock:
            raise FolderInUseError(
                f"{self.locks.folder}: in use by {who or 'another process'}, which has not renewed its lease for "
                f"{quiet:.0f} s, but the file system still keeps its lock; if it has died, remove {self.locks.lock} "
                f"and {self.locks.lease}, else {self.locks.advice}")
        if quiet > 2 * RENEW_SECONDS:
            self._report(f"{who or 'its owner'} may have died: taking over after {self.lease_seconds:.0f} s without a "
                       "sign of life")

    def _alive(self, who: Who | None, waited: float) -> None:
        if who and (who.ending or self._is_predecessor(who)) and waited < self.ending_seconds:
            self._report(f"{who} is ending: waiting for it, {self.ending_seconds:.0f} s at most")
        elif waited >= self.patience_seconds:
            raise FolderInUseError(f"{self.locks.folder}: in use by {who or 'another process'}; {self.locks.advice}")

    def _is_predecessor(self, who: Who) -> bool:
        mine = self.owner.who
        return who.job is not None and who.job == mine.job and who.attempt < mine.attempt

    def _mark(self) -> tuple[int, int] | None:
        try:
            with self.locks.lease.open("rb") as file:  # opening asks an NFS server, where stat may answer from a cache
                found = os.fstat(file.fileno())
            return found.st_mtime_ns, found.st_ino
        except OSError:
            return None

    def _report(self, text: str) -> None:
        if text not in self._reported:
            self._reported.add(text)
            print(f"waiting | {self.locks.folder}: {text}", file=sys.stderr, flush=True)


def _runs(pid: int) -> bool:
    """Whether a process of this machine is there and not on its way out: a killed one holds its locks until its memory
    is free, which takes seconds. False as well for a process of another container, which its lease tells of."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        state, *fields = text.rpartition(")")[2].split()  # the name before it may hold anything
        return state not in "ZX" and not int(fields[5]) & PF_EXITING
    except (OSError, ValueError, IndexError):
        return not Path("/proc/self/stat").exists()  # no Linux: the lock alone tells


def _end(message: str) -> None:
    """End this process, since the folder belongs to another one now."""
    print(f"{FolderInUseError.__name__}: {message}", file=sys.stderr, flush=True)
    os._exit(FolderInUseError.exit_code)


def _kernel() -> str:
    """The running kernel: flock is decisive within it, whatever its containers call themselves."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
