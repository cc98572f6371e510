"""A path that is written to is local: no URL, ~ or $NAME is taken for a relative folder and made here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import MICRO, ROOT, run_main, run_tool

from hola_megatron.config import build_recipe
from hola_megatron.data.prepare import PrepareOptions
from hola_megatron.errors import CheckpointError, RecipeError
from hola_megatron.hf.fresh_folder import fresh_folder
from hola_megatron.paths import path_problem

BAD = ["s3://bucket/run", "gs://bucket/run", "s3:/bucket/run", "file:///tmp/run", "hdfs://node:9000/run", "~/run",
       "~somebody/run", "$SCRATCH/run", "/data/${USER}/run", ""]
GOOD = ["runs/a", "/abs/run", "./s3:/run", "../x", "run~1", "a:b", "C:/run", "price$", "with blank/run", "µ/run"]


@pytest.mark.parametrize("given", BAD)
def test_refused(given):
    problem = path_problem("run_dir", given)
    assert problem.startswith("run_dir: ") and (given or "''") in problem and "\n" not in problem
    assert "give" in problem or "write the" in problem


def test_a_file_url_is_answered_with_its_path():
    assert path_problem("--out", "file:///tmp/run").endswith("give the path alone: /tmp/run")


@pytest.mark.parametrize("given", GOOD)
def test_local(given):
    assert path_problem("run_dir", given) is None


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working folder, in which nothing may appear."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("field", ["run_dir", "data.cache", "data.tokenizer"])
@pytest.mark.parametrize("given", ["s3://bucket/x", "~/x", "$HOME/x"])
def test_fields_of_a_recipe(field, given, here, capsys):
    (here / "r.yaml").write_text(yaml.safe_dump(MICRO))
    done = run_main([str(here / "r.yaml"), f"{field}={given}"], capsys)
    assert done.code == 2 and f"{field}: {given}" in done.output and "Traceback" not in done.output
    assert os.listdir(here) == ["r.yaml"]


def test_data_may_be_a_url():
    values = MICRO | {"data": {"train": "s3://bucket/train", "valid": "gs://b/v", "tokenizer": "bytes", "cache": "c"}}
    assert build_recipe(values).data.train == "s3://bucket/train"


COMMANDS = {
    "convert": [["to-hf", "runs/x", "{}"], ["to-hf", "{}", "out"], ["from-hf", "out", "{}"], ["from-hf", "{}", "run"],
                ["from-fla", "{}", "out"], ["from-fla", "in", "{}"], ["to-fla", "in", "{}"], ["verify", "{}", "out"],
                ["verify", "run", "{}"]],
    "prepare_data": [["in.txt", "--tokenizer", "bytes", "--sequence-length", "8", "--out", "{}"],
                     ["{}", "--tokenizer", "bytes", "--sequence-length", "8", "--out", "out"],
                     ["--verify", "s3://bucket/data", "--cache", "{}"]],
    "evaluate": [["{}", "--bundled", "valid"], ["out", "--bundled", "valid", "--json", "{}"]],
    "plan": [[str(ROOT / "recipes/hola_1b.yaml"), "--gpus", "8", "--memory", "80", "--json", "{}"]],
    "profile": [["r.yaml", "--json", "{}"], ["r.yaml", "--trace", "{}"], ["r.yaml", "--markdown", "{}"]],
    "compare": [["r.yaml", "--json", "{}"], ["r.yaml", "--markdown", "{}"]],
    "needle_text": [["--documents", "2", "--out", "{}.jsonl"]],
    "demo": [["--folder", "{}"]],
}


@pytest.mark.parametrize(("tool", "number"), [(tool, i) for tool, calls in COMMANDS.items() for i in range(len(calls))])
@pytest.mark.parametrize("given", ["s3://bucket/x", "~/x"])
def test_paths_on_command_lines(tool, number, given, here, capsys):
    done = run_tool(tool, [word.format(given) for word in COMMANDS[tool][number]], capsys)
    assert done.code == 2 and done.output.startswith("RecipeError: ") and len(done.output.splitlines()) == 1, done
    assert given in done.output and not os.listdir(here)


def test_the_demo_removes_nothing_but_its_own(here, capsys):
    (here / "thesis").mkdir()
    (here / "thesis/chapter.txt").write_text("years of work")
    done = run_tool("demo", ["--folder", str(here / "thesis")], capsys)
    assert done.code == 2 and "was not made by this tool" in done.output and len(done.output.splitlines()) == 1, done
    assert (here / "thesis/chapter.txt").read_text() == "years of work"


def test_the_real_program(here):
    """As a user starts it: one line, exit 2, no folder s3:."""
    done = subprocess.run([sys.executable, str(ROOT / "tools/prepare_data.py"), "--bundled", "valid", "--tokenizer",
                           "bytes", "--sequence-length", "64", "--out", "s3://bucket/x"],
                          capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--out" in done.stderr
    assert not os.listdir(here)


def test_a_file_for_results_is_looked_at_before_the_work(here, capsys):
    for given, said in (("no/such/x.json", "there is no folder no/such"), (str(here), "is a folder")):
        done = run_tool("evaluate", ["out", "--bundled", "valid", "--json", given], capsys)
        assert done.code == 2 and said in done.output


def test_from_python_as_well(here):
    with pytest.raises(RecipeError, match="--out"):
        PrepareOptions([], "s3://b/x", "bytes", 8, bundled="valid").check()
    with pytest.raises(CheckpointError, match="s3:/b/x is a URL"), fresh_folder(Path("s3://b/x")):
        pass
    assert not os.listdir(here)
