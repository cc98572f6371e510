"""Shared by all tests: no compiling on CPU, and helpers importable from the test folders."""

import os

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other

import sys
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
# for the processes that tests start (Python 3.12's fork server does not take over sys.path)
os.environ["PYTHONPATH"] = os.pathsep.join([HERE, *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled text as bytes, in samples of 64 tokens: {train,valid} folders."""
    from hola_megatron.data.prepare import PrepareOptions, prepare

    root = tmp_path_factory.mktemp("text")
    for part in ("train", "valid"):
        prepare(PrepareOptions([], str(root / part), "bytes", 64, bundled=part, workers=1))
    return root
