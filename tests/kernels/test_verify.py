"""The table of python -m hola_kernels.verify: what passes, what fails, and that no process takes its cases along."""

from __future__ import annotations

import textwrap

import pytest
import torch

from hola_kernels.verify import main
from hola_kernels.verify_jobs import in_processes
from hola_kernels.verify_rows import rows_of

CASES = """
    import os

    def cases():
        return [("fine", lambda: {"o": 0.5, "dq": 1.0}), ("far K=256", lambda: {"o": 0.1, "dq": 3.0}),
                ("empty", lambda: {"o": float("nan")}), ("raises float32", lambda: 1 / 0),
                ("dies", lambda: os._exit(3)),
                ("gpu", lambda: {"o": float(os.environ["CUDA_VISIBLE_DEVICES"] not in ("one", "two"))})]

    def limit(name, output):
        return {"o": 1.0, "dq": 2.0}[output]
"""


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    (tmp_path / "some_cases.py").write_text(textwrap.dedent(CASES))
    monkeypatch.syspath_prepend(str(tmp_path))  # spawned processes get it too
    return "some_cases"


def table(rows) -> dict[str, tuple[list[str], bool]]:
    return {cells[1]: (cells[2:], passed) for text, passed in rows for cells in [[c.strip() for c in text.split("|")]]}


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_row_of_every_case(module, jobs):
    chosen = [(module, name) for name in ("fine", "far K=256", "empty", "raises float32")]
    chosen += [(module, "gpu")] * (jobs > 1)
    rows = list(in_processes(chosen, jobs, ["one", "two"]) if jobs > 1 else rows_of(chosen))
    found = table(rows)
    assert len(rows) == len(found) == len(chosen)
    assert {name for name, (_, passed) in found.items() if passed} == {"fine", *["gpu"] * (jobs > 1)}
    assert found["fine"][0][0] in ("o 5.0e-01", "dq 1.0e+00") and found["fine"][0][1] == "50 %"
    assert found["far K=256"][0][:2] == ["dq 3.0e+00", "150 %"] and found["far K=256"][0][3] == "FAILED"
    assert found["empty"][0][0] == "o nan" and found["raises float32"][0][0] == "ZeroDivisionError: division by zero"


def test_a_process_that_dies_fails_what_it_had(module):
    rows = table(in_processes([(module, "dies"), (module, "fine")], 2, []))
    assert set(rows) == {"dies", "fine"}
    assert all(not passed and "BrokenProcessPool" in cells[0] for cells, passed in rows.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="verifies for minutes on a GPU")
def test_the_program_without_a_gpu(capsys):
    assert main([]) == 2 and "nothing to verify here: no CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--jobs", "0"])
    assert "--jobs: 0 must be at least 1" in capsys.readouterr().err
