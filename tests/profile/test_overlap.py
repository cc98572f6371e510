"""The table of what messages are hidden behind, from a trace made by hand."""

from __future__ import annotations

import pytest

from hola_megatron.parallel.collectives import Sent
from hola_megatron.profile.overlap import Overlap, overlaps, table, transfer


def event(name: str, begin: float, end: float, **arguments: object) -> dict:
    return {"ph": "X", "cat": "kernel", "name": name, "ts": begin, "dur": end - begin, "args": arguments}


TRACE = [
    event("walk", 0, 100), event("read", 90, 200), {**event("copy", 300, 310), "cat": "gpu_memcpy"},
    event("ncclDevKernel_AllGather_RING_LL", 150, 250, dtype="Float", **{"In msg nelems": 1000}),
    event("ncclDevKernel_AllGather_RING_LL", 20, 60, dtype="Byte", **{"In msg nelems": 500}),
    event("ncclDevKernel_SendRecv", 295, 315),
    event("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", 400, 410, dtype="Float", **{"In msg nelems": 5_000_000}),
    {"ph": "X", "cat": "cpu_op", "name": "nccl:all_gather", "ts": 0, "dur": 999},
]
SENT = [Sent("all-gather", "state maps", 4000, 12000), Sent("all-gather", "cache shards", 500, 1500),
        Sent("shift", "open block", 7, 7), Sent("shift", "convolution", 5, 5)]


def test_every_message_has_its_name_and_its_hidden_share():
    rows = {row.what: (row.count, row.total, row.hidden) for row in overlaps(TRACE, SENT)}
    assert rows == {"all-gather: state maps": (1, 100, 50), "all-gather: cache shards": (1, 40, 40),
                    "shift: open block or convolution": (1, 20, 10), "reduce-scatter, 20.0 MB": (1, 10, 0)}


def test_the_table_shows_all_ranks_and_the_worst():
    other = [{**e, "ts": e["ts"] + 1000} for e in TRACE if e["name"] != "read"]
    shown = table([overlaps(TRACE, SENT), overlaps(other, SENT)])
    assert "| all-gather: cache shards | 1 | 40 | 100 % | 100 % | 0.00 | 40 | 100 % |" in shown
    assert "| all-gather: state maps | 1 | 100 | 25 % | 0 % |" in shown


def test_a_transfer_is_what_the_last_rank_sees_and_hidden_is_what_it_hides():
    """Two messages; the first reaches its last rank 30 late, the second its other rank 10 late."""
    def rank(*messages: tuple[float, float], work: tuple[float, float]) -> list[Overlap]:
        return overlaps([event("walk", *work), *(event("ncclDevKernel_AllGather", *m) for m in messages)], [])

    early, late = rank((0, 50), (200, 220), work=(0, 40)), rank((530, 550), (690, 720), work=(480, 545))
    # the last rank sees [530, 550] of the first, 15 of 20 hidden, and [200, 220] of the second, none hidden
    assert transfer([early[0], late[0]]) == (20, 15 / 40)
    assert "| all-gather | 2 | 30 | 46 % | 30 % | 0.03 | 20 | 38 % |" in table([early, late])
    one_more = rank((0, 50), (200, 220), (300, 310), work=(0, 40))
    assert transfer([early[0], one_more[0]]) is None
    assert "| - | - |" in table([early, one_more])


@pytest.mark.parametrize("inside", [(0, 0, 0), (5, 95, 90), (-10, 10, 10), (200, 300, 0), (195, 305, 10)])
def test_overlap_with_any_interval(inside):
    begin, end, expected = inside
    message = event("ncclDevKernel_AllReduce", begin, end)
    assert overlaps([*TRACE[:3], message], [])[0].hidden == expected
