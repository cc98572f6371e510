"""tools/doctor.py --nodes: two launchers as two nodes, and what is said about nodes that do not fit together."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from helpers import ROOT, run_tool
from train.quick_launch import QuickLauncher

from hola_megatron.doctor.between import Pair, rounds
from hola_megatron.doctor.node_table import Node, clock_problems, difference_problems, speed_problems

# of the second node's ranks: another Triton is installed there, and its clock runs ahead
OTHER_NODE = """
import os, runpy, sys
if os.environ["SLURMD_NODENAME"] == "second":
    sys.path.insert(0, {packages!r})
    import hola_megatron.doctor.between as between
    right = between.wall_clock
    between.wall_clock = lambda: right() + 100
sys.argv = ["doctor.py", "--nodes", *sys.argv[1:]]
runpy.run_path({doctor!r}, run_name="__main__")
"""


def run_nodes(folder: Path, *words: str, names: tuple[str, ...] = ("first", "second"), **environment: str) -> list:
    """(exit code, output) of one launcher a node, each with one rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ["--nnodes", str(len(names)), "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint",
               f"localhost:{port}", *words]
    nodes = [(QuickLauncher(options, folder / f"{name}.log", SLURMD_NODENAME=name, patient=False, **environment),
              folder / f"{name}.log") for name in names]
    return [(node.wait(200), log.read_text()) for node, log in nodes]


@pytest.mark.distributed
def test_equal_nodes_are_all_right(tmp_path):
    ended = run_nodes(tmp_path, "tools/doctor.py", "--nodes")
    said = "".join(text for _, text in ended)
    assert [code for code, _ in ended] == [0, 0], said
    assert said.count("result   all right") == 1 and "all-reduce over 2 ranks: 8 bytes " in said
    assert "WRONG" not in said and said.count("slowest peer") == 2  # the head of one table


@pytest.mark.distributed
def test_what_differs_is_one_line_each_and_code_1_on_every_node(tmp_path):
    packages = tmp_path / "packages/triton-0.1.dist-info"
    packages.mkdir(parents=True)
    (packages / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 0.1\n")
    script = tmp_path / "rank.py"
    script.write_text(OTHER_NODE.format(packages=str(packages.parent), doctor=str(ROOT / "tools/doctor.py")))
    ended = run_nodes(tmp_path, str(script), "--min-bandwidth", "1e6")
    said = "".join(text for _, text in ended)
    assert [code for code, _ in ended] == [1, 1], said
    problems = [line.split("  ", 1)[1] for line in said.splitlines() if line.startswith("problem")]
    assert len(problems) == 3 and "result   3 problem(s)" in said, said
    assert "triton: " in problems[0] and "0.1 on second" in problems[0]
    assert "its clock is 100.0 s " in problems[1]  # which of the two is rank 0 is not known
    assert "GB/s between them, 1e+06 GB/s asked for" in problems[2]


@pytest.mark.distributed
def test_nodes_that_cannot_connect_are_named(tmp_path):
    ended = run_nodes(tmp_path, "tools/doctor.py", "--nodes", GLOO_SOCKET_IFNAME="nothing0")
    said = "".join(text for _, text in ended)
    assert [code for code, _ in ended] == [1, 1], said
    for name in ("first", "second"):
        assert f"problem  {name}: no all-reduce with the other nodes (" in said and "nothing0" in said, said
    assert "all-reduce over 2 ranks: failed" in said and "result   2 problem(s)" in said
    assert "set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the network" in said and "Traceback" not in said


def test_one_node_is_refused(capsys):
    done = run_tool("doctor", ["--nodes"], capsys)
    assert done.code == 2 and "--nodes: one process was started, several nodes are needed" in done.output
    done = run_tool("doctor", ["--min-bandwidth", "3"], capsys)
    assert done.code == 2 and "--min-bandwidth: is for --nodes" in done.output


@pytest.mark.distributed
def test_ranks_of_one_node_are_refused(tmp_path):
    log = tmp_path / "log.txt"
    node = QuickLauncher(["--nproc-per-node", "2", "tools/doctor.py", "--nodes"], log, SLURMD_NODENAME="only",
                         patient=False)
    assert node.wait(200) == 2
    said = log.read_text()
    assert "RecipeError: --nodes: all 2 ranks are on only; sbatch --nodes=N slurm/doctor.sh" in said
    assert len(said.splitlines()) == 1, said


@pytest.mark.parametrize("nodes", [2, 3, 5, 8, 33])
def test_every_pair_once_and_every_node_once_a_round(nodes):
    found = rounds(nodes)
    for pairs in found:
        members = [node for pair in pairs for node in pair]
        assert len(members) == len(set(members)) and set(members) <= set(range(nodes))
    pairs = [pair for one in found for pair in one]
    assert len(pairs) == len(set(pairs)) and all(first < second for first, second in pairs)
    if nodes <= 16:
        assert len(pairs) == nodes * (nodes - 1) // 2
    else:
        assert len(found) == 15 and all(sum(node in pair for pair in pairs) >= 14 for node in range(nodes))


def made(bandwidth: dict[tuple[int, int], float], latency: dict[tuple[int, int], float], count: int) -> list[Node]:
    """Nodes n0, n1, ... with 10 GB/s and 10 us between them, but for what is given."""
    nodes = [Node(f"n{number}", [number], {"torch": "2.13.0"}, 0.0) for number in range(count)]
    for first in range(count):
        for second in range(first + 1, count):
            pair = (first, second)
            speed = (latency.get(pair, 10e-6), 1e9 * bandwidth.get(pair, 10.0), True)
            nodes[first].pairs[second].append(Pair(second, *speed))
            nodes[second].pairs[first].append(Pair(first, *speed))
    return nodes


@pytest.mark.parametrize(("bandwidth", "latency", "named"), [
    ({}, {}, []),
    ({(0, 2): 1.0, (1, 2): 1.0}, {}, ["n2: slow to all other nodes: 10 us and 1 GB/s, the"]),
    ({}, {(0, 2): 1e-3, (1, 2): 1e-3}, ["n2: slow to all other nodes: 1000 us and 10 GB/s"]),
    ({(0, 1): 4.9}, {}, ["n0 and n1: 4.9 GB/s between them, usual for them is 10 GB/s"]),
    ({(0, 1): 5.1}, {(0, 1): 30e-6}, [])], ids=["equal", "slow_node", "late_node", "slow_link", "within"])
def test_a_slow_node_is_told_from_a_slow_link(bandwidth, latency, named):
    found = speed_problems(made(bandwidth, latency, 3), None)
    assert len(found) == len(named) and all(line.startswith(start) for line, start in zip(found, named, strict=True))


def test_two_nodes_are_compared_with_what_was_asked_for():
    assert speed_problems(made({(0, 1): 2.0}, {}, 2), None) == []
    assert "n0 and n1: 2 GB/s between them, 3 GB/s asked for" in speed_problems(made({(0, 1): 2.0}, {}, 2), 3.0)[0]


def test_the_rarest_value_and_the_wrong_clock_are_named():
    nodes = made({}, {}, 3)
    nodes[1].facts, nodes[1].clock, nodes[2].clock = {"torch": "2.11.0", "NCCL_DEBUG": "INFO"}, -3.0, 0.9
    assert difference_problems(nodes) == [
        "NCCL_DEBUG: INFO on n1; nothing on n0, n2; make it equal on all nodes",
        "torch: 2.11.0 on n1; 2.13.0 on n0, n2; make it equal on all nodes"]
    assert [line.split(";")[0] for line in clock_problems(nodes)] == ["n1: its clock is 3.0 s behind n0's"]
