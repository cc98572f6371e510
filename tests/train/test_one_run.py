"""Ranks that are not one run: all of them end before anything is computed, and the odd one is named."""

from __future__ import annotations

import datetime
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from helpers import ROOT, run_each, small_recipe

from hola_megatron.config import load_recipe
from hola_megatron.errors import DataError, LostError, RecipeError
from hola_megatron.startup import identity
from hola_megatron.startup.identity import code_facts, describe_differences, name_ranks, run_facts
from hola_megatron.startup.roll_call import RollCall
from hola_megatron.startup.world import World, read_world, refuse_several_launchers, scheduler_tasks

pytestmark = pytest.mark.distributed


def start_two(second: list[str], folder: Path, data: Path, both: tuple[str, ...] = (), **changes: object) -> list:
    recipe = small_recipe(folder / "recipe.yaml", data / "train", run_dir=str(folder / "run"), **changes)
    return run_each([[str(recipe), *both], [str(recipe), *both, *second]], folder)


def one_line(found: list, code: int) -> str:
    """The message, after seeing that both ranks end with `code` and say the same, in one line."""
    assert [rank.code for rank in found] == [code, code], [rank.output[-2000:] for rank in found]
    first, second = (rank.output.strip().splitlines() for rank in found)
    assert len(first) == len(second) == 1, (first, second)
    return first[0]


@pytest.mark.parametrize(("second", "said"), [
    ("train.lr=1e-4", "train.learning_rate: 0.003 on rank 0, 0.0001 on rank 1"),
    ("train.seed=7", "train.seed: 1234 on rank 0, 7 on rank 1"),
    ("train.micro_batch_size=1", "train.micro_batch_size: 4 on rank 0, 1 on rank 1"),
    ("data.documents=joined", "data.documents: separate on rank 0, joined on rank 1"),
    ("train.steps=9", "train.steps: 5 on rank 0, 9 on rank 1"),
    ("log.every=3", "log.every: 1 on rank 0, 3 on rank 1"),
])
def test_another_recipe_is_named(second, said, tmp_path, text_data):
    message = one_line(start_two([second], tmp_path, text_data), 2)
    assert message.startswith("RecipeError: rank 1 ") and said in message and socket.gethostname() in message
    assert "start every rank with the same recipe" in message and not (tmp_path / "run").exists()


@pytest.mark.parametrize("both", ["parallel.tensor=2", "parallel.pipeline=2", "parallel.context=2", "engine=deepspeed"])
def test_ranks_of_one_replica_are_compared_for_both_engines(both, tmp_path, text_data):
    changes = {"model__pattern": "HG"} if both == "parallel.context=2" else {}
    message = one_line(start_two(["train.lr=1e-4"], tmp_path, text_data, (both,), **changes), 2)
    assert "train.learning_rate: 0.003 on rank 0, 0.0001 on rank 1" in message


@pytest.mark.parametrize(("second", "said"), [
    ("train.global_batch_size=7", "is not a multiple of micro_batch_size x data-parallel ranks"),
    ("train.leaning_rate=1", "train.leaning_rate: no such key"), ("--neww", "unrecognized arguments: --neww")])
def test_an_error_of_one_rank_reaches_all(second, said, tmp_path, text_data):
    """A rank whose recipe cannot be used never joins a process group, where the others would wait for it."""
    found = start_two([second], tmp_path, text_data)
    assert [rank.code for rank in found] == [2, 2]
    assert found[0].output.startswith("RecipeError: rank 1 (on ") and said in found[0].output
    assert found[0].output.count("\n") == 1 and "Traceback" not in found[1].output


def test_an_error_in_opening_data_reaches_all(tmp_path, text_data):
    found = start_two([f"data.train={tmp_path / 'nowhere'}"], tmp_path, text_data)
    assert [rank.code for rank in found] == [3, 3]
    assert "DataError: rank 1 (on " in found[0].output and "no such data folder" in found[0].output


@pytest.mark.parametrize(("name", "key"), [("d", "data.train"), ("v", "data.valid")])
def test_other_data_under_the_same_path_are_named(name, key, tmp_path, text_data):
    """As on two nodes whose disks hold different datasets, for tensor ranks of one replica."""
    for rank in (0, 1):
        for link in ("d", "v"):
            (tmp_path / f"node{rank}").mkdir(exist_ok=True)
            part = "valid" if rank and link == name else "train"
            (tmp_path / f"node{rank}/{link}").symlink_to(text_data / part)
    recipe = small_recipe(tmp_path / "recipe.yaml", Path("d"), run_dir=str(tmp_path / "run"), data__train="d",
                          data__valid="v", parallel__tensor=2)
    found = run_each([[str(recipe)]] * 2, tmp_path, folders=[tmp_path / "node0", tmp_path / "node1"])
    message = one_line(found, 3)
    assert message.startswith("DataError: rank 1 ") and f"{key}: " in message and f"({name}) on rank 1" in message


def test_the_same_data_may_have_another_path_on_another_node(tmp_path, text_data):
    shutil.copytree(text_data / "train", tmp_path / "copy")
    found = start_two([f"data.train={tmp_path / 'copy'}"], tmp_path, text_data, train__steps=2)
    assert [rank.code for rank in found] == [0, 0], found[0].output


def copied_code(folder: Path) -> Path:
    """Both packages without git; returns a source file of them."""
    for package in ("hola_megatron", "kernels/hola_kernels"):
        shutil.copytree(ROOT / package, folder / Path(package).name,
                        ignore=shutil.ignore_patterns("__pycache__", "bundled"))
    return folder / "hola_megatron/model/flops.py"


def test_a_line_of_code_that_differs_is_named(tmp_path, monkeypatch):
    source = copied_code(tmp_path)
    ours = code_facts()["code (hash of the sources)"]
    monkeypatch.setattr(identity.importlib.util, "find_spec",
                        lambda name: SimpleNamespace(origin=str(tmp_path / name / "__init__.py")))
    same = code_facts()["code (hash of the sources)"]
    source.write_text(source.read_text() + "\nCHANGED = 1\n")
    other = code_facts()["code (hash of the sources)"]
    assert same == ours != other
    told = compare_in_threads([{"code (hash of the sources)": (found, found)} for found in (ours, same, other)])
    assert f"code (hash of the sources): {ours} on ranks 0-1, {other} on rank 2" in str(told[0])


@pytest.mark.long
def test_other_code_is_named_where_there_is_no_git(tmp_path, text_data):
    """Real processes: a copy of the package in which one line differs."""
    source = copied_code(tmp_path / "node1")
    source.write_text(source.read_text() + "\nCHANGED = 1\n")
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    paths = [os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), str(tmp_path / "node1")]
    started = [subprocess.Popen(
        [sys.executable, "-m", "hola_megatron.train", str(recipe)], cwd=tmp_path, text=True, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths[rank], "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2",
             "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}) for rank in (0, 1)]
    said = [process.communicate(timeout=200)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], said
    assert said[0] == said[1] and said[0].count("\n") == 1 and "code (hash of the sources): " in said[0]
    assert "code (commit)" not in said[0], "the copy has no commit, which says nothing against it"


def compare_in_threads(facts: list[dict], kind: type = RecipeError) -> list[Exception | None]:
    """What each of many ranks is told; a store of one process serves them all."""
    store = dist.HashStore()

    def rank(number: int) -> Exception | None:
        roll = RollCall(store, World(number, len(facts), 0, alone=False), datetime.timedelta(seconds=60))
        try:
            roll.compare("run", facts[number], kind, "start them alike")
        except (RecipeError, DataError, LostError) as error:
            return error
        return None

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(rank, range(len(facts))))


def test_of_many_ranks_the_majority_and_the_odd_ones_are_named_in_one_line():
    same = {"train.seed": (1, "1"), "torch": ("2.9", "2.9")}
    facts = [dict(same) for _ in range(40)]
    facts[7] = same | {"train.seed": (2, "2")}
    for rank in (20, 21, 22):
        facts[rank] = same | {"torch": ("2.8", "2.8")}
    told = compare_in_threads(facts)
    assert {str(error) for error in told} == {str(told[0])} and "\n" not in str(told[0])
    assert str(told[0]).startswith("ranks 7, 20-22 are not the same run as ranks 0-6, 8-19, 23-39: ")
    assert "train.seed: 1 on ranks 0-6, 8-39, 2 on rank 7" in str(told[0])
    assert "torch: 2.9 on ranks 0-19, 23-39, 2.8 on ranks 20-22" in str(told[0])
    assert compare_in_threads([dict(same) for _ in range(40)]) == [None] * 40


def test_ranks_that_are_all_different_still_give_one_short_line():
    told = compare_in_threads([{f"key{name}": (rank, str(rank)) for name in range(30)} for rank in range(30)])
    assert len(str(told[0])) < 2000 and "\n" not in str(told[0]) and "more differences" in str(told[0])


def test_every_field_of_a_recipe_but_places_is_compared(tmp_path, text_data):
    path = small_recipe(tmp_path / "r.yaml", text_data / "train")
    base = run_facts(load_recipe(path), world=2, device="cpu", command={})
    for change, key in [("data.valid=x", "data.valid given"), ("checkpoint.every=7", "checkpoint.every"),
                        ("guard.window=77", "guard.window"), ("run_dir=elsewhere", "run_dir"),
                        ("model.cache.slots=5", "model.cache.slots"),
                        ("data.train=[{path: a, weight: 2.0}]", "weights of data.train")]:
        other = run_facts(load_recipe(path, [change]), world=2, device="cpu", command={})
        assert [name for name in base if base[name] != other[name]] == [key]
    for place in ("data.train=elsewhere", "data.tokenizer=elsewhere", "data.cache=elsewhere"):
        assert run_facts(load_recipe(path, [place]), world=2, device="cpu", command={}) == base
    assert run_facts(load_recipe(path), world=2, device="cuda", command={}) != base
    assert run_facts(load_recipe(path), world=2, device="cpu", command={"--new": True}) != base


def test_a_commit_that_is_not_known_is_no_difference_and_another_one_is():
    known, other = {"code (commit)": ("a", "a"), "x": (1, "1")}, {"code (commit)": ("b", "b"), "x": (1, "1")}
    unknown = {"code (commit)": (None, "null"), "x": (1, "1")}
    assert compare_in_threads([known, unknown, known]) == [None] * 3
    assert "code (commit): a on rank 0, b on rank 1" in str(compare_in_threads([known, other, unknown])[0])


def test_ranks_are_named_in_ranges():
    assert name_ranks([3]) == "rank 3" and name_ranks([5, 0, 1, 2]) == "ranks 0-2, 5"
    assert name_ranks(range(0, 100, 2)).endswith("14 and 42 more")
    said = describe_differences([([0], "a", {"x": (1, "1")}), ([1], "b", {})])
    assert said == "rank 1 (on b) is not the same run as rank 0: x: 1 on rank 0, absent on rank 1"


JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_NPROCS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(("environment", "variable"), [
    ({**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS"),
    ({**JOB, "SLURM_STEP_ID": "0"}, "SLURM_NTASKS"), ({**JOB, "SLURM_PROCID": "1"}, "SLURM_NTASKS"),
    ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "SLURM_NTASKS"),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE"), ({"PMI_SIZE": "4"}, "PMI_SIZE"),
    ({"FLUX_JOB_SIZE": "2", "FLUX_TASK_RANK": "1"}, "FLUX_JOB_SIZE"),
])
def test_tasks_of_a_scheduler_without_a_world_are_refused(environment, variable):
    with pytest.raises(RecipeError, match=rf"^{variable}: . tasks .*WORLD_SIZE.*hola_megatron.launch"):
        read_world(environment)
    with pytest.raises(RecipeError, match=rf"^{variable}: . launchers"):
        refuse_several_launchers("1", False, environment)
    refuse_several_launchers("2", False, environment)
    refuse_several_launchers("1", True, environment)
    assert read_world({**environment, "WORLD_SIZE": "1"}) == World(0, 1, 0, alone=True)
    torchrun = {"WORLD_SIZE": "8", "RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert read_world({**environment, **torchrun}) == World(3, 8, 3, alone=False)


@pytest.mark.parametrize("environment", [
    {}, JOB,  # a batch script
    {name: JOB[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS")},  # the shell of salloc
    {**JOB, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},  # salloc with an interactive step
    {**JOB, "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "1"},  # srun --ntasks=1 in a job of two
])
def test_one_task_is_one_process(environment):
    assert scheduler_tasks(environment) is None
    assert read_world(environment) == World(0, 1, 0, alone=True)


@pytest.mark.parametrize(("environment", "said"), [
    ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT: not set"), ({"RANK": "0"}, "WORLD_SIZE"),
    ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE: 'two' is not a whole number"),
    ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK: 2 is not below"),
    ({"WORLD_SIZE": "2", "RANK": "-1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK: '-1'"),
    ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "99999"}, "MASTER_PORT: 99999"),
])
def test_a_world_that_does_not_fit_together_is_named(environment, said):
    with pytest.raises(RecipeError, match=said):
        read_world(environment)


@pytest.mark.parametrize("module", ["hola_megatron.train", "hola_megatron.launch"])
def test_two_tasks_of_srun_are_refused_by_the_programs(module, tmp_path, text_data):
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"))
    arguments = [str(recipe)] if module.endswith("train") else ["-m", "hola_megatron.train", str(recipe)]
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True,
                          check=False, timeout=200, env={**environment, **JOB, "SLURM_STEP_NUM_TASKS": "2"})
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    by = "RecipeError" if module.endswith("train") else "launch"
    assert done.stderr.startswith(f"{by}: SLURM_STEP_NUM_TASKS: 2 ") and not (tmp_path / "run").exists()
