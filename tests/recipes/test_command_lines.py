"""Numbers of command lines: one line and code 2 for what is no number, in every program."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import pytest
from helpers import ROOT, run_main, run_tool

from hola_megatron.arguments import environment_number, gigabytes, number, whole
from hola_megatron.errors import RecipeError
from hola_megatron.launch import _configured

NO_NUMBERS = ("nan", "inf", "-inf", "1e400", "", " ", "١٢", "1_000", "0x10", "one", "9" * 5000, "1,5", "--", "１")


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_is_no_number(text):
    for kind in (whole(1), number(), gigabytes):
        with pytest.raises(argparse.ArgumentTypeError) as caught:
            kind(text)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_bounds():
    assert whole(0)("0") == 0 and whole(1)("+7") == 7 and number()("1e-3") == 1e-3 and gigabytes("5") == 5.0
    for kind, text in ((whole(1), "0"), (whole(1), "-3"), (whole(1, 9), "10"), (number(), "0"), (number(), "-1"),
                       (gigabytes, "0"), (gigabytes, "1e-9"), (gigabytes, "1e30")):
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


# (tool, arguments with N in the place of the number)
OPTIONS = [
    ("convert", ["to-hf", "run", "out", "--shard-gb", "N"]), ("convert", ["from-hf", "out", "run", "--shard-gb", "N"]),
    ("convert", ["from-fla", "a", "b", "--shard-gb", "N"]), ("convert", ["to-fla", "a", "b", "--shard-gb", "N"]),
    ("plan", ["recipes/hola_tiny.yaml", "--memory", "80", "--gpus", "N"]),
    ("plan", ["recipes/hola_tiny.yaml", "--gpus", "8", "--memory", "N"]),
    ("plan", ["recipes/hola_tiny.yaml", "--gpus", "8", "--memory", "80", "--mfu", "N"]),
    ("plan", ["recipes/hola_tiny.yaml", "--gpus", "8", "--memory", "80", "--peak-tflops", "N"]),
    ("prepare_data", ["x", "--tokenizer", "bytes", "--out", "o", "--sequence-length", "N"]),
    ("prepare_data", ["x", "--tokenizer", "bytes", "--out", "o", "--sequence-length", "8", "--workers", "N"]),
    ("prepare_data", ["x", "--tokenizer", "bytes", "--out", "o", "--sequence-length", "8", "--shard-size", "N"]),
    ("evaluate", ["x", "--bundled", "valid", "--batch", "N"]), ("evaluate", ["x", "--needle", "N"]),
    ("evaluate", ["x", "--bundled", "valid", "--window", "N"]), ("profile", ["r.yaml", "--steps", "N"]),
    ("profile", ["r.yaml", "--timeout", "N"]), ("compare", ["r.yaml", "--micro-batches", "N"]),
    ("compare", ["r.yaml", "--timeout", "N"]), ("needle_text", ["--out", "x.jsonl", "--documents", "N"])]


@pytest.mark.parametrize(("tool", "arguments"), OPTIONS, ids=[" ".join(a[-2:] + [t]) for t, a in OPTIONS])
def test_every_tool_refuses_it_in_one_line(tool, arguments, capsys):
    for value in ("nan", "inf", "1e400", "", "١٢", "-1", "0", "9" * 40):
        done = run_tool(tool, [value if word == "N" else word for word in arguments], capsys)
        assert done.code in (2, 3), (value, done)  # 3: a workable number, and then no such input
        lines = done.output.strip().splitlines()
        assert len(lines) == 1 and "Error: " in lines[0], (value, done)
        assert done.code == 2 or value in ("-1", "0"), (value, done)


@pytest.mark.parametrize("tool", ["convert", "plan", "prepare_data", "evaluate", "profile", "compare", "needle_text",
                                  "doctor", "demo"])
def test_an_unknown_option_is_one_line(tool, capsys):
    done = run_tool(tool, ["--no-such-option"], capsys)
    assert done.code == 2 and len(done.output.strip().splitlines()) == 1 and "RecipeError: " in done.output


def test_train_and_launch_refuse_in_one_line(capsys):
    """The launcher's own arguments are checked before it takes over signals."""
    done = run_main(["r.yaml", "--no-such-option"], capsys)
    assert done.code == 2 and len(done.output.strip().splitlines()) == 1
    for option, values in (("--nproc-per-node", ("0", "-1", "nan", "١٢", "1e3", "", "99999999")),
                           ("--nnodes", ("0", "a", "2:1", "1:2:3"))):
        for value in values:
            with pytest.raises(RecipeError) as caught:
                _configured([f"{option}={value}", "x.py"])
            assert option in str(caught.value) and len(str(caught.value).splitlines()) == 1, (option, value)


def test_numbers_of_the_environment(monkeypatch):
    assert environment_number("HOLA_TEST_NUMBER", "600", number()) == 600.0
    monkeypatch.setenv("HOLA_TEST_NUMBER", "nan")
    with pytest.raises(RecipeError, match=r"HOLA_TEST_NUMBER \(environment\): 'nan'"):
        environment_number("HOLA_TEST_NUMBER", "600", number())


@pytest.mark.parametrize("tool", ["comm_report"])
def test_as_a_program_it_is_one_line_too(tool):
    """Tools that `run_tool` above does not start: their own last lines must turn the error into a line."""
    done = subprocess.run([sys.executable, str(ROOT / f"tools/{tool}.py"), "--no-such-option"], capture_output=True,
                          text=True, check=False, env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "RecipeError: " in done.stderr, done
