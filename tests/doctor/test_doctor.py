"""tools/doctor.py as a user meets it, and that its checks can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import run_tool
from train.quick_launch import launch_quickly

from hola_megatron.doctor import checks

ROOT = Path(__file__).parent.parent.parent


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          check=False, env=environment)


def test_one_screen_without_a_gpu(capsys):
    done = run_tool("doctor", [], capsys)
    assert done.code == (0 if "all right" in done.output else 1), done.output
    for line in ("versions", "devices", "linears", "Adam", "HOLA kernels", "kernels, torch float32", "disk"):
        assert line in done.output
    assert "FAILED" not in done.output and len(done.output.splitlines()) < 40


def test_a_known_bad_combination_ends_with_code_1(tmp_path, capsys, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    done = run_tool("doctor", [], capsys)
    assert done.code == 1 and "bad  apex: PyPI's `apex` is another project" in done.output
    assert "pip uninstall apex" in done.output and "1 known-bad combination(s)" in done.output


def test_a_transformer_engine_that_does_not_load_is_a_finding(tmp_path):
    """The real program in a fresh process: Megatron-core fails on what a missing library raises (OSError)."""
    for folder in ("transformer_engine/pytorch", "transformer_engine-2.20.2.dist-info"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise OSError('libcudnn.so.9: undefined symbol')\n")
    (tmp_path / "transformer_engine" / "pytorch" / "__init__.py").write_text("")
    (tmp_path / "transformer_engine-2.20.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.20.2\n")
    done = run("tools/doctor.py", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "bad  transformer-engine: " in done.stdout and "OSError: libcudnn.so.9: undefined symbol" in done.stdout
    assert "linears  none: megatron-core does not load" in done.stdout


@pytest.mark.distributed
def test_collectives_under_the_launcher(tmp_path):
    done = launch_quickly(["tools/doctor.py"], tmp_path / "log.txt", ranks=2)
    assert "all-reduce of 16 MiB over 2 ranks (gloo): right" in done.output, done.output
    assert done.output.count("versions") == 1


def test_a_wrong_kernel_fails_the_check(monkeypatch):
    right = checks.OPERATIONS["convolution"]

    def wrong(**arguments: torch.Tensor) -> torch.Tensor:
        y = right[0](**arguments)
        return y if arguments["backend"] == "reference" else y * 1.001

    monkeypatch.setattr(checks, "OPERATIONS", {"convolution": (wrong, right[1])})
    assert not checks.kernel_checks(torch.device("cpu"))[0].passed
    monkeypatch.setattr(checks, "OPERATIONS", {"convolution": right})
    assert checks.kernel_checks(torch.device("cpu"))[0].passed


def test_a_kernel_that_does_not_run_is_a_failed_check(monkeypatch):
    def broken(**arguments: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no launch")

    monkeypatch.setattr(checks, "OPERATIONS", {"convolution": (broken, checks.OPERATIONS["convolution"][1])})
    found = checks.kernel_checks(torch.device("cpu"))[0]
    assert not found.passed and "RuntimeError: no launch" in found.found


def test_a_disk_that_refuses_is_a_failed_check(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    assert checks.disk_check(tmp_path / "not" / "there").passed
    monkeypatch.setattr(checks.tempfile, "NamedTemporaryFile", refuse)
    found = checks.disk_check(tmp_path)
    assert not found.passed and "No space left" in found.found
