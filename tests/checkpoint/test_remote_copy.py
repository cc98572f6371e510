"""Copies of checkpoints at a URL: made while a run goes on, complete or not there, and fetched back to resume."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import fsspec
import pytest
from helpers import checkpoint_tensors, run_main, run_ranks, run_tool, small_recipe

from hola_megatron.checkpoint import remote_copy
from hola_megatron.checkpoint.folder import MANIFEST, _seal, file_digest, open_checkpoint, prune
from hola_megatron.checkpoint.remote_copy import Uploader, download, remote_steps, upload
from hola_megatron.errors import CheckpointError, DataError


def recipe_in(folder: Path, data: Path, url: str | None, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    return small_recipe(folder / "recipe.yaml", data / "train", run_dir=str(folder / "run"), **{
        "train__steps": 6, "train__global_batch_size": 4, "train__micro_batch_size": 2,
        "checkpoint": {"every": 2, "keep": 1, **({"upload": url} if url else {})}, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_data) -> Path:
    from hola_megatron.config import load_recipe
    from hola_megatron.train.loop import train

    folder = tmp_path_factory.mktemp("finished")
    train(load_recipe(recipe_in(folder, text_data, None, checkpoint={"every": 2, "keep": 9,
                                                                      "background": False})))
    return folder / "run"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_a_run_copies_its_checkpoints_and_resumes_from_a_copy(ranks, text_data, tmp_path, capsys):
    url = f"local://{tmp_path}/bucket/run"
    recipe = recipe_in(tmp_path / "a", text_data, url)
    done = run_ranks([str(recipe)], tmp_path / "log.txt", ranks=ranks)
    assert done.code == 0, done.output[-3000:]
    newest = Path(tmp_path / "bucket/run/step_00000006")
    assert open_checkpoint(newest).step == 6 and f"uploaded | {url}/step_00000006 | " in done.output
    assert done.output.index("uploaded | ") < done.output.index("finished: 6 steps")
    assert [path.name for path in (tmp_path / "a/run/checkpoints").iterdir()] == ["step_00000006"]
    shutil.rmtree(tmp_path / "a/run")
    fetched = run_tool("checkpoint", ["fetch", url, str(tmp_path / "a/run")], capsys)
    assert fetched.code == 0 and f"done: {tmp_path / 'a/run/checkpoints/step_00000006'}" in fetched.output
    more = run_main([str(recipe), "train.steps=8"], capsys)
    assert more.code == 0 and "resuming at step 6" in more.output, more.output[-2000:]
    assert remote_steps(url)[:2] == [8, 6]


def test_what_a_killed_upload_left_is_no_checkpoint_and_is_copied_after_the_next_start(text_data, tmp_path, capsys):
    url = f"local://{tmp_path}/bucket"
    recipe = recipe_in(tmp_path / "a", text_data, None)
    assert run_main([str(recipe)], capsys).code == 0
    (tmp_path / "bucket/step_00000006").mkdir(parents=True)
    source = tmp_path / "a/run/checkpoints/step_00000006"
    for name in os.listdir(source)[:2]:
        (tmp_path / "bucket/step_00000006" / name).write_bytes(b"half")
    (tmp_path / "bucket/step_00000006" / MANIFEST).unlink(missing_ok=True)
    assert remote_steps(url) == []
    done = run_main([str(recipe), f"checkpoint.upload={url}"], capsys)
    assert done.code == 0 and f"uploaded | {url}/step_00000006" in done.output, done.output
    assert remote_steps(url) == [6] and open_checkpoint(tmp_path / "bucket/step_00000006").step == 6


def test_a_storage_that_fails_does_not_end_the_run(text_data, tmp_path, capsys, monkeypatch):
    def fails(*_: object) -> None:
        raise OSError("no space left in the bucket")

    monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "put_file", fails)
    done = run_main([str(recipe_in(tmp_path / "a", text_data, f"local://{tmp_path}/bucket"))], capsys)
    assert done.code == 0 and "finished: 6 steps" in done.output, done.output[-2000:]
    assert "upload | not done: " in done.output and "no space left in the bucket" in done.output
    assert remote_steps(f"local://{tmp_path}/bucket") == []


def test_the_checkpoint_that_is_being_copied_is_not_removed(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    root, at_copy, go_on, said = tmp_path / "run/checkpoints", threading.Event(), threading.Event(), []

    def slow(path: Path, url: str, give_up) -> int | None:
        at_copy.set()
        assert go_on.wait(60)
        return upload(path, url, give_up)

    monkeypatch.setattr(remote_copy, "upload", slow)
    uploader = Uploader(root, f"local://{tmp_path}/bucket", said.append)
    uploader.copy_missing()
    assert at_copy.wait(60) and uploader.busy and uploader.copying == root / "step_00000006"
    shutil.copytree(root / "step_00000006", tmp_path / "kept")
    removed = prune(root, 1, None, spare=root / "step_00000002")
    assert removed == [root / "step_00000004"] and (root / "step_00000002").exists()
    go_on.set()
    while uploader.busy:
        threading.Event().wait(0.01)
    uploader.close()
    assert remote_steps(f"local://{tmp_path}/bucket") == [6, 2] and len(said) == 2


def copied(root: Path, url: str) -> list[str]:
    """What an uploader says that copies what is missing."""
    said: list[str] = []
    uploader = Uploader(root, url, said.append)
    uploader.copy_missing()
    while uploader.busy:
        threading.Event().wait(0.01)
    uploader.close()
    return said


def altered(path: Path, change) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    manifest["sha256"] = _seal(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def test_a_step_that_was_saved_again_is_copied_again(finished, tmp_path):
    """As after a rewind: the same name and sizes, another content."""
    url, root = f"local://{tmp_path}/bucket", Path(shutil.copytree(finished, tmp_path / "run")) / "checkpoints"
    assert len(copied(root, url)) == 3 and copied(root, url) == []
    path = root / "step_00000004"
    file = next(path.glob("weights-*"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    digest = file_digest(file)
    altered(path, lambda manifest: manifest["files"][file.name].update(sha256=digest))
    assert [line.split(" | ")[1] for line in copied(root, url)] == [f"{url}/step_00000004"]
    assert open_checkpoint(tmp_path / "bucket/step_00000004").manifest["files"][file.name]["sha256"] == digest


def test_a_folder_of_another_run_is_left_alone(finished, tmp_path):
    url, root = f"local://{tmp_path}/bucket", Path(shutil.copytree(finished, tmp_path / "run")) / "checkpoints"
    copied(root, url)
    for path in root.iterdir():
        altered(path, lambda manifest: manifest["recipe"].update(name="other"))
    (said,) = copied(root, url)
    assert said.startswith("upload | not done: ") and "is a checkpoint of another run ('micro')" in said
    assert download(url, tmp_path / "new").manifest["recipe"]["name"] == "micro"


def test_upload_and_download_verify(finished, tmp_path):
    url, path = f"local://{tmp_path}/bucket", finished / "checkpoints/step_00000004"
    assert upload(path, f"{url}/step_00000004") == sum(
        file["bytes"] for file in open_checkpoint(path).manifest["files"].values())
    found = download(url, tmp_path / "new")
    assert checkpoint_tensors(found.path).keys() == checkpoint_tensors(path).keys()
    with pytest.raises(CheckpointError, match="is there already"):
        download(url, tmp_path / "new")
    with pytest.raises(CheckpointError, match="has those of steps 4, and none of step 5"):
        download(url, tmp_path / "other", 5)
    file = next((tmp_path / "bucket/step_00000004").glob("weights-*"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        download(url, tmp_path / "other")
    assert not list((tmp_path / "other/checkpoints").iterdir())
    with pytest.raises(DataError, match="the storage failed|no such"):
        upload(path, "local:///proc/nowhere/step_00000004")


@pytest.mark.parametrize(("url", "code", "said"), [
    ("bucket/run", 2, "checkpoint.upload: bucket/run is no URL"),
    ("file:///x", 2, "checkpoint.upload: file:///x is no URL"),
    ("zzz://bucket", 2, "checkpoint.upload: zzz://bucket: unknown scheme zzz://"),
    ("local:///proc/nowhere", 2, "checkpoint.upload: local:///proc/nowhere: ")])
def test_a_place_that_cannot_be_written_is_one_line_at_the_start(url, code, said, text_data, tmp_path, capsys):
    done = run_main([str(recipe_in(tmp_path / "a", text_data, url))], capsys)
    assert done.code == code and said in done.output and "step 1/" not in done.output, done.output
    assert "Traceback" not in done.output


def test_fetch_of_nothing_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for words, said in (([f"local://{tmp_path}/empty", str(tmp_path / "r")], "has no whole checkpoint"),
                        ([str(tmp_path / "empty"), str(tmp_path / "r")], "is no URL"),
                        ([f"local://{tmp_path}/empty", "s3://x"], "is a URL")):
        done = run_tool("checkpoint", ["fetch", *words], capsys)
        assert done.code == 2 and said in done.output and len(done.output.strip().splitlines()) == 1, done.output
