"""Whether several nodes are fit for one run: the same software, clocks that agree, links of equal speed.

The ranks talk through the launcher's store. Process groups are made afterwards only, so that nodes which cannot reach
each other are named. Rank 0 judges and prints; every rank returns its verdict.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import time
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hola_megatron.doctor.between import Pair, answer_clocks, clock_offset, measure_pairs, time_all_reduce
from hola_megatron.doctor.facts import Facts
from hola_megatron.doctor.node_table import (
    Node,
    clock_problems,
    difference_problems,
    print_nodes,
    speed_problems,
)
from hola_megatron.errors import LostError, RecipeError
from hola_megatron.startup import roll_call
from hola_megatron.startup.identity import code_facts, versions
from hola_megatron.startup.world import World, read_world

SECONDS = 120  # for each thing that ranks wait for
LEAVE_SECONDS = 10  # how long rank 0, whose node keeps the store, waits until all have read the verdict
SETTINGS = ("NCCL_", "GLOO_", "UCX_", "FI_", "TORCH_NCCL_", "OMP_NUM_THREADS", "CUDA_DEVICE_")
COMMAND = "sbatch --nodes=N slurm/doctor.sh, or one launcher a node: python -m hola_megatron.launch --nnodes=N " \
    "--nproc-per-node=GPUS --rdzv-backend=c10d --rdzv-endpoint=FIRST_NODE:PORT tools/doctor.py --nodes"


def check_nodes(facts: Facts, device: torch.device, min_bandwidth: float | None = None) -> bool:
    """Compare and measure the nodes of this launch; whether all is right, the same on every rank.

    Args:
        facts: of this rank.
        device: of its all-reduces.
        min_bandwidth: GB/s between two nodes below which they are named; None: nodes are compared with each other only.

    Raises:
        RecipeError: there is one process only. LostError: the launcher's store does not answer.
    """
    world = read_world()
    if world.size == 1:
        raise RecipeError(f"--nodes: one process was started, several nodes are needed; {COMMAND}")
    store = dist.PrefixStore("doctor", roll_call.join(world, datetime.timedelta(seconds=SECONDS)).store)
    store.set(f"about/{world.rank}", json.dumps({"node": node_name(), "group": os.environ.get("GROUP_RANK", "0"),
                                                 "facts": node_facts(facts)}))
    nodes, problems = _meet(store, world)
    if nodes:
        problems += difference_problems(nodes)
        result = _measure(store, world, nodes, device)
        store.set(f"result/{world.rank}", json.dumps(result))
    if world.rank == 0 and nodes:
        problems += _collect(store, nodes)
        problems += clock_problems(nodes) + speed_problems(nodes, min_bandwidth)
        print_nodes(nodes, result.get("all", []))
    return _conclude(store, world, problems)


def node_name() -> str:
    """Slurm's name of this node; without Slurm the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def node_facts(facts: Facts) -> dict[str, str]:
    """{name: value} of what has to be equal on all nodes; only what is there."""
    driver = Path("/sys/module/nvidia/version")
    found = {**versions(), **facts.packages, "CUDA": facts.cuda, "cuDNN": facts.cudnn, "NCCL": facts.nccl,
             "GPUs": ", ".join(facts.devices), "driver": driver.read_text().strip() if driver.is_file() else None,
             **code_facts()}
    settings = {name: value for name, value in os.environ.items() if name.startswith(SETTINGS)}
    return {name: str(value) for name, value in {**found, **settings}.items() if value}


def _meet(store: Any, world: World) -> tuple[list[Node], list[str]]:
    """(all nodes, problems); no nodes where ranks are missing."""
    keys = [f"about/{rank}" for rank in range(world.size)]
    try:
        store.wait(keys, datetime.timedelta(seconds=SECONDS))
    except RuntimeError:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        return [], [f"ranks {missing} did not start within {SECONDS} s; their nodes' part of the log says why"]
    about = [json.loads(text) for text in store.multi_get(keys)]
    ranks_of: dict[str, list[int]] = defaultdict(list)
    for rank, one in enumerate(about):
        ranks_of[one["group"]].append(rank)
    if len(ranks_of) == 1:
        raise RecipeError(f"--nodes: all {world.size} ranks are on {about[0]['node']}; {COMMAND}")
    first = [about[ranks[0]] for ranks in ranks_of.values()]
    uses = Counter(one["node"] for one in first)
    names = [one["node"] if uses[one["node"]] == 1 else f"{one['node']}#{one['group']}" for one in first]
    return [Node(name, ranks, one["facts"])
            for name, ranks, one in zip(names, ranks_of.values(), first, strict=True)], []


def _measure(store: Any, world: World, nodes: list[Node], device: torch.device) -> dict[str, Any]:
    """What this rank measured, or {"error": why it could not}."""
    mine = next(number for number, node in enumerate(nodes) if world.rank in node.ranks)
    result: dict[str, Any] = {}
    try:
        if world.rank == 0:
            answer_clocks(store, len(nodes))
        elif world.rank == nodes[mine].ranks[0]:
            result["clock"] = clock_offset(store, mine)
        gpu = device.type == "cuda"
        dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=world.rank, world_size=world.size,
                                timeout=datetime.timedelta(seconds=SECONDS))
        megabytes = 256 if gpu else 8
        result["all"] = [(elements * 4, *time_all_reduce(elements, 5, device))
                         for elements in (2, 2**18, megabytes * 2**18)]
        result["pairs"] = [asdict(pair) for pair in measure_pairs(
            mine, [node.ranks for node in nodes], device, megabytes)]
        dist.destroy_process_group()
    except RuntimeError as error:  # torch's errors of collectives, of connecting and of the store
        result["error"] = " ".join(str(error).split())[:200]
    return result


def _collect(store: Any, nodes: list[Node]) -> list[str]:
    """Fill in what all ranks measured; returns what went wrong. Called by rank 0."""
    problems = []
    for node in nodes:
        failed, right = set(), True
        for rank in node.ranks:
            try:
                store.wait([f"result/{rank}"], datetime.timedelta(seconds=2 * SECONDS))
                result = json.loads(store.get(f"result/{rank}"))
            except RuntimeError:
                result = {"error": "no answer"}
            node.clock = result.get("clock", node.clock)
            for pair in result.get("pairs", []):
                node.pairs[pair["peer"]].append(Pair(**pair))
            right &= all(one[-1] for one in result.get("all", [])) and all(p["right"] for p in result.get("pairs", []))
            failed |= {result["error"]} if "error" in result else set()
        address = _address_of(node.name)
        problems += [f"{node.name}: no all-reduce with the other nodes ({error}); its name means {address} here; set "
                     "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the network that joins the nodes"
                     for error in sorted(failed)]
        problems += [] if right else [f"{node.name}: its sums with other nodes are WRONG; leave it out"]
    return problems


def _address_of(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return "no address"


def _conclude(store: Any, world: World, problems: list[str]) -> bool:
    """Print the problems on rank 0; the verdict on every rank."""
    if world.rank == 0:
        print("\n".join([*(f"problem  {problem}" for problem in problems),
                         f"result   {len(problems)} problem(s)" if problems else "result   all right"]), flush=True)
        store.set("verdict", "bad" if problems else "right")
    try:
        store.wait(["verdict"], datetime.timedelta(seconds=4 * SECONDS))
        right = store.get("verdict") == b"right"
        store.add("read", 1)
    except RuntimeError as error:
        raise LostError(f"rank {world.rank}: no verdict of rank 0 ({' '.join(str(error).split())[:200]})") from None
    deadline = time.monotonic() + LEAVE_SECONDS
    while world.rank == 0 and store.add("read", 0) < world.size and time.monotonic() < deadline:
        time.sleep(0.02)
    return right
