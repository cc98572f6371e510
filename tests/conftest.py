"""Shared by all tests: no compiling on CPU, helpers for the test folders, which tests run, in what order.

    pytest                      everything but what is marked `long`
    pytest --long               everything
    TRITON_INTERPRET=1 pytest   the tests of Triton kernels, interpreted on the CPU (tests/interpreted.py)

`make test` and `make test-all` run both, on two workers (pytest-xdist), a file always on one of them.
"""

import os

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other

import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.config.argparsing import Parser

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
# for the processes that tests start (Python 3.12's fork server does not take over sys.path)
os.environ["PYTHONPATH"] = os.pathsep.join([HERE, *filter(None, [os.environ.get("PYTHONPATH")])])

# a shell starts what runs in the background with SIGINT ignored, and so would be every process that a test starts
signal.signal(signal.SIGINT, signal.default_int_handler)

# started first, so that no worker ends minutes after the others
LONGEST = ("slurm/test_slurm.py", "slurm/test_several_nodes.py", "distributed/test_layouts.py",
           "train/test_liveness.py", "distributed/test_resume.py", "train/test_lost_ranks.py",
           "train/test_numbers.py", "train/test_run_folder.py", "train/test_reports.py",
           "kernels/test_compiles_for_hopper.py", "hf/test_convert.py", "hf/test_transformers_versions.py",
           "train/test_good_state.py", "train/test_one_owner.py", "hf/test_generate.py", "plan/test_activations.py",
           "distributed/test_deepspeed.py", "kernels/test_arguments.py",
           "kernels/test_packed.py", "kernels/test_triton_exact_cache.py", "kernels/test_triton_gated_delta.py")


# what a process of several has; libraries that a test calls may set them (accelerate does), and all later tests of the
# process, and the programs that they start, would take themselves for one rank of several
WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GIVEN_WORLD = {name: os.environ.get(name) for name in WORLD}


def pytest_addoption(parser: Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked `long` too")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("long"):
        os.environ["HOLA_TEST_LONG"] = "1"  # helpers.LONG, read when test files are imported


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Under Triton's interpreter only the test files that import tests/interpreted.py."""
    if os.environ.get("TRITON_INTERPRET") != "1" or collection_path.suffix != ".py":
        return None
    return "from interpreted import" not in collection_path.read_text(encoding="utf-8") or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.relative_to(HERE).as_posix(), len(order)))
    if not config.getoption("long"):
        skip = pytest.mark.skip(reason="long: run by `make test-all`, or pytest --long")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled text as bytes, in samples of 64 tokens: {train,valid} folders."""
    from hola_megatron.data.prepare import PrepareOptions, prepare

    root = tmp_path_factory.mktemp("text")
    for part in ("train", "valid"):
        prepare(PrepareOptions([], str(root / part), "bytes", 64, bundled=part, workers=1))
    return root


@pytest.fixture(autouse=True)
def _no_watchdog_is_left() -> Iterator[None]:
    """One that a failed run has left would end the test process minutes later, in another test."""
    before = set(threading.enumerate())
    yield
    left = [thread.name for thread in {*threading.enumerate()} - before if thread.name in ("watchdog", "heartbeat")]
    assert not left, f"the test has left threads of a run: {left}"


@pytest.fixture(autouse=True)
def _no_world_is_left() -> Iterator[None]:
    yield
    for name, value in GIVEN_WORLD.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
