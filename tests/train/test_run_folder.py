"""What can be damaged, full or forbidden in a run folder, and what a run then does."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import ROOT, metric_rows, run_main, run_tool, small_recipe
from safetensors.torch import load_file, save_file

from hola_megatron.checkpoint.folder import MANIFEST, _seal, file_digest, newest_usable, open_checkpoint
from hola_megatron.config import load_recipe
from hola_megatron.model.flops import executed_flops_per_token, flops_per_token
from hola_megatron.train.loop import train


@pytest.fixture(scope="module")
def half(tmp_path_factory, text_data) -> Path:
    """A run stopped at step 4 of 6, with checkpoints at 2 and 4, and every other file a run makes."""
    folder = tmp_path_factory.mktemp("half")
    recipe = recipe_in(folder, text_data, 4)
    train(load_recipe(recipe))
    return folder


def recipe_in(folder: Path, data: Path, steps: int) -> Path:
    return small_recipe(folder / "recipe.yaml", data / "train", run_dir=str(folder / "run"), train__steps=steps,
                        train__schedule="constant", train__global_batch_size=2, checkpoint={"every": 2, "keep": 9},
                        log__tensorboard=True)


@pytest.fixture
def copy(half, tmp_path, text_data) -> Path:
    shutil.copytree(half / "run", tmp_path / "run")
    recipe_in(tmp_path, text_data, 6)
    return tmp_path


KINDS = ("weights-*.safetensors", "optimizer-*.safetensors", "manifest.json")


@pytest.mark.parametrize("where", [0.0, 0.02, 0.5, 1.0], ids=["first", "header", "middle", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_bit_flipped_in_a_checkpoint_is_named_and_the_one_before_is_used(kind, where, copy, capsys):
    (file,) = (copy / "run/checkpoints/step_00000004").glob(kind)
    data = bytearray(file.read_bytes())
    data[int(where * (len(data) - 1))] ^= 16
    file.write_bytes(data)
    done = run_main([str(copy / "recipe.yaml"), "--allow-change"], capsys)
    assert done.code == 0
    assert f"passed over | {file}" in done.output and "resuming at step 2" in done.output
    assert [row["step"] for row in metric_rows(copy / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_that_cannot_be_read_stops_the_run_and_no_older_one_is_used(copy, capsys):
    file = copy / "run/checkpoints/step_00000004/manifest.json"
    content = file.read_bytes()
    file.unlink()
    file.symlink_to("/proc/self/mem")  # the kernel answers EIO for the first page of a process
    done = run_main([str(copy / "recipe.yaml"), "--allow-change"], capsys)
    errors = [line for line in done.output.splitlines() if "Error" in line or "Unreadable:" in line]
    assert done.code == 2 and len(errors) == 1 and f"{file}: cannot be read (" in errors[0]
    assert "Traceback" not in done.output and "passed over" not in done.output
    file.unlink()
    file.write_bytes(content)
    done = run_main([str(copy / "recipe.yaml"), "--allow-change"], capsys)
    assert done.code == 0 and "resuming at step 4" in done.output


@pytest.mark.parametrize("tool", ["to-hf", "verify", "evaluate"])
def test_tools_do_not_use_an_older_checkpoint_by_themselves(tool, copy, capsys):
    """The newest is damaged: which one is meant then is the user's choice."""
    (file,) = (copy / "run/checkpoints/step_00000004").glob("weights-*")
    file.write_bytes(file.read_bytes()[:-1])
    arguments = {"to-hf": ["to-hf", str(copy / "run"), str(copy / "out"), "--no-verify"],
                 "verify": ["verify", str(copy / "run"), str(copy / "out")],
                 "evaluate": [str(copy / "run"), "--bundled", "valid"]}[tool]
    done = run_tool("evaluate" if tool == "evaluate" else "convert", arguments, capsys)
    errors = [line for line in done.output.splitlines() if "Error" in line]
    assert done.code == 2 and len(errors) == 1 and "done" not in done.output, done.output
    assert f"{file}: damaged" in errors[0] and "step_00000002: give that folder" in errors[0]


def test_weights_that_are_not_finite_are_not_exported(copy, capsys):
    path = copy / "run/checkpoints/step_00000004"
    (file,) = path.glob("weights-*")
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, file)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": file_digest(file)}
    manifest["sha256"] = _seal(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))
    done = run_tool("convert", ["to-hf", str(copy / "run"), str(copy / "out"), "--no-verify"], capsys)
    assert done.code == 2 and f"{path}: model.norm.weight holds values that are not finite" in done.output
    assert not (copy / "out").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "recipe.yaml", "loss.png", "rewind.json"])
def test_files_that_only_report_cannot_stop_a_run(name, copy, capsys):
    """Torn or with a flipped bit: the run goes on from its newest checkpoint."""
    file = copy / "run" / name
    data = file.read_bytes() if file.exists() else b'{"step": 4, "samples": 32, "rewinds": 1}'
    for damaged in (data[: len(data) // 2], bytes([data[0] ^ 1]) + data[1:], b""):
        shutil.rmtree(copy / "run/checkpoints/step_00000006", ignore_errors=True)
        file.write_bytes(damaged)
        done = run_main([str(copy / "recipe.yaml"), "--allow-change"], capsys)
        assert done.code == 0 and "resuming at step 4" in done.output and "Traceback" not in done.output


def test_a_full_disk_stops_with_a_named_error_and_keeps_the_checkpoints(copy, capsys):
    # the kernel refuses this process files beyond this size, as a full disk would
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        done = run_main([str(copy / "recipe.yaml"), "--allow-change"], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert done.code == 2 and "CheckpointError" in done.output and "free the disk" in done.output
    assert newest_usable(copy / "run/checkpoints")[0].step == 4
    assert run_main([str(copy / "recipe.yaml"), "--allow-change"], capsys).code == 0


def test_a_log_that_cannot_be_written_is_named(copy, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((copy / "run/recipe.yaml").stat().st_size + 100, before[1]))
    try:
        done = run_main([str(copy / "recipe.yaml"), "--allow-change", "log.tensorboard=false", "train.steps=40",
                         "checkpoint.every=40"], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert done.code == 2 and "RunFolderError" in done.output and "metrics.jsonl: cannot be written" in done.output


@pytest.mark.parametrize("place", ["/proc/runs/x", "under a file"])
def test_a_place_that_cannot_be_written_is_named(place, copy, capsys):
    (copy / "file").touch()
    folder = place if place.startswith("/") else copy / "file/run"
    done = run_main([str(copy / "recipe.yaml"), f"run_dir={folder}"], capsys)
    assert done.code == 2 and "the run folder cannot be written" in done.output and "set run_dir" in done.output


def test_a_folder_made_read_only_is_named_and_nothing_is_lost(copy, capsys):
    if os.geteuid() == 0:  # root may write anywhere but on a read-only mount
        mounted = subprocess.run(["mount", "--bind", copy / "run", copy / "run"], capture_output=True, check=False)
        if mounted.returncode:
            pytest.skip(f"needs the right to mount: {mounted.stderr.decode().strip()}")
        subprocess.run(["mount", "-o", "remount,ro,bind", copy / "run"], check=True)
    else:
        (copy / "run").chmod(0o555)
    try:
        done = run_main([str(copy / "recipe.yaml"), "--allow-change"], capsys)
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", copy / "run"], check=True)
        else:
            (copy / "run").chmod(0o755)
    assert done.code == 2 and "the run folder cannot be written" in done.output
    assert newest_usable(copy / "run/checkpoints")[0].step == 4


@pytest.mark.parametrize("kind", ["link", "file"])
def test_checkpoints_that_cannot_be_made_are_found_at_the_start(kind, copy, capsys):
    run = copy / "fresh"
    run.mkdir()
    if kind == "link":
        (run / "checkpoints").symlink_to("nowhere")
    else:
        (run / "checkpoints").write_text("")
    done = run_main([str(copy / "recipe.yaml"), f"run_dir={run}"], capsys)
    assert done.code == 2 and "checkpoints: is no folder" in done.output and "step " not in done.output


def test_nothing_is_unpickled_and_no_foreign_code_is_run():
    """In our own sources: no loader that can execute what it reads."""
    foreign = "trust_remote_code=True"
    forbidden = ("torch.load", "pickle", "yaml.load(", "yaml.unsafe_load", foreign, "eval(", "exec(")
    # the loader is a SafeLoader; load.py needs --trust-remote-code; demo.py loads our own code, exported a moment
    # before; card.py and evaluate.py only show commands to the user
    allowed = {("config.py", "yaml.load("), *((name, foreign) for name in (
        "load.py", "demo.py", "card.py", "evaluate.py"))}
    found = []
    for folder in ("hola_megatron", "kernels/hola_kernels", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text().replace(".eval(", "").replace("_eval(", "")
            found += [(path.name, word) for word in forbidden if word in text]
    assert set(found) <= allowed, set(found) - allowed


def test_a_run_that_lost_its_checkpoints_is_not_begun_again(copy, capsys):
    before = (copy / "run/metrics.jsonl").read_bytes()
    (copy / "run/checkpoints").rename(copy / "elsewhere")
    done = run_main([str(copy / "recipe.yaml")], capsys)
    assert done.code == 2 and "this run has made checkpoints (checkpointed), and there are none" in done.output
    assert (copy / "run/metrics.jsonl").read_bytes() == before
    (copy / "run/checkpointed").unlink()  # as if stopped before the first was made
    done = run_main([str(copy / "recipe.yaml")], capsys)
    assert done.code == 0 and "(new run)" in done.output


def test_what_a_resumed_run_knows_and_says_is_the_whole_one_s(copy, text_data, tmp_path, capsys):
    """The guard's history, the place in the data, the banner, the step line."""
    (tmp_path / "whole").mkdir()
    whole = run_main([str(recipe_in(tmp_path / "whole", text_data, 6))], capsys)
    again = run_main([str(copy / "recipe.yaml"), "--allow-change"], capsys)
    assert whole.code == again.code == 0, again.output
    want, have = (open_checkpoint(run / "run/checkpoints/step_00000006").manifest["trainer"]
                  for run in (tmp_path / "whole", copy))
    assert have == want and have["guard"] and have["step"] == 6
    assert re.search(r"^ +run  .*\(resuming at step 4 \(\S+ tokens\)\)$", again.output, re.MULTILINE)
    for said in (whole.output, again.output):
        for name in ("run", "recipe", "code", "model", "weights", "flops", "layout", "steps", "data", "kernels",
                     "layers", "device"):
            assert re.search(rf"^ *{name}  \S", said, re.MULTILINE), name
        assert re.search(r"^step 6/6 100\.0% \| loss \d\.\d+ \| gnorm \d+\.\d+ \| lr \S+ \| \S+ tok/s \| MFU \S+ \| "
                         r"mem \d+\.\d/\d+ GB \| eta \S+$", said, re.MULTILINE)
    assert (copy / "run/loss.png").exists()


def test_mfu_and_hfu_are_logged(text_data, tmp_path, capsys):
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"), train__steps=2,
                          train__recompute="full", log__peak_tflops=0.5)
    assert run_main([str(recipe)], capsys).code == 0
    row, made = metric_rows(tmp_path / "run")[-1], load_recipe(recipe)
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] * flops_per_token(made.model, 64) / 0.5e12)
    assert row["hfu"] == pytest.approx(row["tokens_per_second"] * executed_flops_per_token(made) / 0.5e12)
    assert row["hfu"] > 1.2 * row["mfu"]
