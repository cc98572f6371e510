"""Comparison of the ranks before training, through the job's store.

There are no collectives here: a rank with another recipe, other code, or an error could not take part in one. Each rank
writes its facts to the store; rank 0 reads all digests and writes a verdict; all ranks act on it: continue, or end with
the same message and exit code.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from hola_megatron import errors
from hola_megatron.errors import LostError, UserError
from hola_megatron.startup.identity import Facts, describe_differences, digest, name_ranks
from hola_megatron.startup.world import World, read_world

# torch is imported inside functions: a wrong recipe is refused before
RUN, DATA, FOLDER = "run", "data", "folder"
PHASES = (RUN, DATA, FOLDER)
ERROR_SECONDS = 60  # how long a rank with an error waits for its peers
LEAVE_SECONDS = 10  # how long rank 0, which serves the store, waits until all have read the verdict
FAILED = "failed"


class RollCall:
    """The comparisons of one run. Every rank calls `compare` for every phase, in order."""

    def __init__(self, store: Any, world: World, timeout: datetime.timedelta):
        self.store, self.world, self.timeout = store, world, timeout
        self.done: list[str] = []
        self._prefix = f"roll_call/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    @property
    def next_phase(self) -> str | None:
        return PHASES[len(self.done)] if len(self.done) < len(PHASES) else None

    def compare(self, phase: str, facts: Facts, kind: type[UserError], advice: str) -> None:
        """Return if all ranks have the same facts; else raise `kind` on all of them, with `advice`.

        An error that a rank reported instead (`report`) is raised on all ranks. LostError for ranks that do not answer.
        """
        self.done.append(phase)
        about = {"host": socket.gethostname(), "facts": dict(facts), "kind": kind.__name__, "advice": advice}
        self._act(self._exchange(phase, digest(facts), about))

    def report(self, error: BaseException) -> None:
        """End the other ranks because this rank cannot take part in the next phase. Raises nothing."""
        phase = self.next_phase
        if phase is None:
            return
        self.done = list(PHASES)
        user = error if isinstance(error, UserError) else LostError(
            f"ended by {type(error).__name__} before the first step, its log has more")
        about = {"host": socket.gethostname(), "error": type(user).__name__, "text": str(user)}
        with contextlib.suppress(RuntimeError, UserError):
            self._leave(self._exchange(phase, FAILED, about))

    def _exchange(self, phase: str, digest: str, about: dict[str, Any]) -> dict[str, Any] | None:
        """Write this rank's facts, and return the verdict: None if all are equal."""
        key, rank = f"{self._prefix}/{phase}", self.world.rank
        try:
            self.store.set(f"{key}/about/{rank}", json.dumps(about, default=str))
            self.store.set(f"{key}/digest/{rank}", digest)
            if rank == 0:
                verdict = self._judge(key)
                self.store.set(f"{key}/verdict", json.dumps(verdict))
            else:
                # longer than rank 0, so that its message about missing ranks arrives first
                self.store.wait([f"{key}/verdict"], self.timeout + datetime.timedelta(seconds=30))
                verdict = json.loads(self.store.get(f"{key}/verdict"))
        except RuntimeError as error:  # torch's error types for a lost store, or a timeout
            raise LostError(f"rank {rank}: no answer of rank 0 while the ranks were compared ({_first_line(error)}); "
                            "start the same command again") from None
        self._key = key
        return verdict

    def _judge(self, key: str) -> dict[str, Any] | None:
        digests = [f"{key}/digest/{rank}" for rank in range(self.world.size)]
        try:
            self.store.wait(digests, self.timeout)
        except RuntimeError:
            missing = [rank for rank, name in enumerate(digests) if not self.store.check([name])]
            return {"kind": "LostError", "text": f"{name_ranks(missing)} did not answer within "
                    f"{self.timeout.total_seconds() / 60:g} minutes (parallel.timeout_minutes); the log of each says "
                    "why, if it could; start the same command again"}
        groups: dict[str, list[int]] = defaultdict(list)
        for rank, found in enumerate(self.store.multi_get(digests)):
            groups[found.decode()].append(rank)
        if failed := groups.pop(FAILED, None):
            return self._failures(key, failed)
        if len(groups) == 1:
            return None
        first = {ranks[0]: self._about(key, ranks[0]) for ranks in groups.values()}
        text = describe_differences([(ranks, first[ranks[0]]["host"], first[ranks[0]]["facts"])
                                     for ranks in groups.values()])
        if not text:
            return None
        own = self._about(key, 0)
        return {"kind": own["kind"], "text": f"{text}; {own['advice']}"}

    def _failures(self, key: str, failed: list[int]) -> dict[str, Any]:
        """The error of the failed ranks (that of the first one, where they differ)."""
        first = self._about(key, failed[0])
        if len(failed) == self.world.size:
            return {"kind": first["error"], "text": first["text"]}
        where = f"{name_ranks(failed)} (on {first['host']})" if len(failed) == 1 else name_ranks(failed)
        return {"kind": first["error"], "text": f"{where}: {first['text']}"}

    def _about(self, key: str, rank: int) -> dict[str, Any]:
        return json.loads(self.store.get(f"{key}/about/{rank}"))

    def _act(self, verdict: dict[str, Any] | None) -> None:
        if verdict is None:
            return
        self.done = list(PHASES)
        self._leave(verdict)
        kind = getattr(errors, verdict["kind"], LostError)
        lines = verdict["text"].splitlines()
        raise kind(lines if kind is errors.RecipeError else verdict["text"])

    def _leave(self, verdict: dict[str, Any] | None) -> None:
        """End the run: rank 0 last, since its process serves the store."""
        if verdict is None:
            return
        with contextlib.suppress(RuntimeError):
            self.store.add(f"{self._key}/read", 1)
            deadline = time.monotonic() + LEAVE_SECONDS
            while self.world.rank == 0 and time.monotonic() < deadline:
                if self.store.add(f"{self._key}/read", 0) >= self.world.size:
                    return
                time.sleep(0.02)


_current: RollCall | None = None


def join(world: World, timeout: datetime.timedelta) -> RollCall:
    """The roll call on the store of torchrun's environment variables. Raises LostError if it cannot be reached."""
    global _current
    if _current is None or _current.world != world:
        import torch.distributed as dist

        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise LostError(f"rank {world.rank} of {world.size}: the ranks did not meet at {where} (MASTER_ADDR, "
                            f"MASTER_PORT; {_first_line(error)}); see that all ranks were started and that the port "
                            "is free, then start the same command again") from None
        _current = RollCall(store, world, timeout)
    return _current


def current() -> RollCall | None:
    """The current roll call; None for one process."""
    return _current


def leave() -> None:
    """Forget the current roll call."""
    global _current
    _current = None


@contextlib.contextmanager
def errors_reach_all_ranks() -> Iterator[None]:
    """Inside the context, an error of this rank also ends the other ranks, which would wait until a timeout."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit):  # argparse has printed why
            if not error.code:
                raise
            error = errors.RecipeError("its command line cannot be used, its log says why")
        with contextlib.suppress(UserError):
            world = read_world()
            if world.size > 1 and (roll := current() or _join_late(world)):
                roll.report(error)
        raise


def _join_late(world: World) -> RollCall | None:
    """The roll call, for an error before `join`; None where one launcher has all ranks, and ends them itself."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("GROUP_WORLD_SIZE") == "1":
        return None
    return join(world, datetime.timedelta(seconds=ERROR_SECONDS))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
