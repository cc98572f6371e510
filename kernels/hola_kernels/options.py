"""Options of the exact cache, as one object.

The public operations take them as keywords, with the defaults from here, and make a `CacheOptions` in their first line;
everything below them receives that object. A further option is a field with its default and its check in this file, a
keyword of the operations that offer it, and the lines of the backends that implement it. No torch here: planning and
recipe checks read the file as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

from hola_kernels.errors import KernelError

STATE_SCORES = ("betae", "e", "betav")  # from what the kernels of the state write
POSITION_SCORES = ("recency", "random")
STATELESS_SCORES = (*POSITION_SCORES, "betav", "learned")  # of `exact_attention`, which has no recurrent state
SCORES = (*STATE_SCORES, *POSITION_SCORES, "cosine", "learned")
READ_NORMS = ("rms", "l2", "none")
LOCALS = ("block", "window", "none")
MERGES = ("add", "convex", "two")


@dataclass(frozen=True)
class CacheOptions:
    """What a head keeps exactly, and how it is read.

    block: C, tokens between two updates of the cache, counted from a document's first token.
    slots: w, tokens of earlier blocks that a head keeps; 0: no cache.
    score: what the cache ranks by: "betae" (beta * norm(e), the paper's), "e", "betav", "recency", "random", "cosine"
        (1 - cos(v, v - e): how far the state's answer points away from the value) or "learned" (a logit of the token).
    read_norm: norm of q and k in the read: "rms" (sharp), "l2" (flat), "none".
    local: what a token reads besides the cache: its "block" up to itself, a sliding "window", or itself ("none").
    window: tokens of the sliding window, the token itself included; with local "window" only.
    rope_theta: base of rotary positions, which queries and keys of the read take after their norm; None: no positions.
    merge: how the read joins the output of the state (`merge`): "add" (a gate per head), "convex" (a gate per channel
        of every token) or "two" (two gates per head of every token).
    state_delay: D, a token's output of the state is that of D tokens earlier (`state_delay`, mode "stream"); keys,
        values and scores stay where they are.

    Raises KernelError naming the option that is not allowed.
    """

    block: int = 256
    slots: int = 64
    score: str = "betae"
    read_norm: str = "rms"
    local: str = "block"
    window: int | None = None
    rope_theta: float | None = None
    merge: str = "add"
    state_delay: int = 0

    def __post_init__(self) -> None:
        _check_count("block", self.block, 1)
        _check_count("slots", self.slots, 0)
        _check_count("state_delay", self.state_delay, 0)
        for name, allowed in (("score", SCORES), ("read_norm", READ_NORMS), ("local", LOCALS),
                              ("merge", MERGES)):
            if getattr(self, name) not in allowed:
                raise KernelError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.local == "window":
            _check_count("window", self.window, 1)
        elif self.window is not None:
            raise KernelError(f"window = {self.window!r} goes with local = 'window', not {self.local!r}; leave it out")
        theta = self.rope_theta
        if theta is not None and (isinstance(theta, bool) or not isinstance(theta, float | int) or not 0 < theta < inf):
            raise KernelError(f"rope_theta = {theta!r} must be a finite number above 0, or None for no positions")

    @property
    def reach(self) -> int | None:
        """Tokens of the sliding window that is the local part, the token itself included; None: the block."""
        return {"block": None, "window": self.window, "none": 1}[self.local]

    @property
    def of_the_read(self) -> dict[str, Any]:
        """The keywords of `exact_read`, to which rotary positions have been applied (`positions.read_tokens`)."""
        return {name: getattr(self, name) for name in ("block", "slots", "read_norm", "local", "window")}

    @property
    def without_state(self) -> dict[str, Any]:
        """The keywords of `exact_attention`."""
        return {**self.of_the_read, "score": self.score, "rope_theta": self.rope_theta}

    @property
    def window_blocks(self) -> int:
        """P: full blocks before a token's own that its sliding window can reach into."""
        return 0 if self.reach is None else -(-(self.reach - 1) // self.block)


def _check_count(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise KernelError(f"{name} = {value!r} must be a whole number of at least {least}")
