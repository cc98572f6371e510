"""The checkpoint folder: whole or not there, damage named, the last healthy one never removed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hola_megatron.checkpoint import reading
from hola_megatron.checkpoint.folder import (
    FORMAT,
    file_digest,
    find_checkpoint,
    finish_writing,
    newest_usable,
    open_checkpoint,
    prune,
    start_writing,
)
from hola_megatron.checkpoint.reading import CheckpointUnreadable
from hola_megatron.checkpoint.tensors import TensorReader, shard_entry
from hola_megatron.errors import CheckpointError


def make(root: Path, step: int) -> Path:
    temporary = start_writing(root, step)
    save_file({"x": torch.full((8,), float(step))}, temporary / "weights-00000.safetensors")
    file = temporary / "weights-00000.safetensors"
    about = {file.name: {"bytes": file.stat().st_size, "sha256": file_digest(file)}}
    return finish_writing(temporary, {"format": FORMAT, "step": step, "files": about})


def flip_a_bit(file: Path, at: int = -3) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def test_the_newest_whole_checkpoint_wins(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step)
    found, passed_over = newest_usable(tmp_path)
    assert found.step == 3 and passed_over == []
    assert find_checkpoint(tmp_path).step == 3 and find_checkpoint(tmp_path / "step_00000002").step == 2


def test_damage_of_every_kind_is_named_and_passed_over(tmp_path):
    for step in range(1, 6):
        make(tmp_path, step)
    flip_a_bit(tmp_path / "step_00000005/weights-00000.safetensors")
    (tmp_path / "step_00000004/weights-00000.safetensors").unlink()
    (tmp_path / "step_00000003/manifest.json").unlink()
    (tmp_path / "step_00000002/manifest.json").write_text("{")
    found, passed_over = newest_usable(tmp_path)
    assert found.step == 1
    assert [said.split(":")[1].split("(")[0].strip() for said in passed_over] == [
        "damaged", "missing; use another checkpoint", "not a checkpoint", "damaged"]
    assert all("step_0000000" in said for said in passed_over)


def test_what_cannot_be_read_is_not_called_damaged_and_no_older_one_is_used(tmp_path, capsys):
    make(tmp_path, 1)
    path = make(tmp_path, 2) / "manifest.json"
    path.unlink()
    path.symlink_to("/proc/self/mem")  # the kernel answers EIO for the first page of a process
    with pytest.raises(CheckpointUnreadable, match=r"manifest.json: cannot be read .*tried 4 times.*may be complete"):
        newest_usable(tmp_path)
    assert capsys.readouterr().out.count(f"reading again | {path}: ") == 3


def test_a_refused_read_is_tried_again(tmp_path, monkeypatch):
    make(tmp_path, 1)
    path = make(tmp_path, 2) / "manifest.json"
    content = path.read_bytes()
    path.unlink()
    path.symlink_to("/proc/self/mem")

    def mend(seconds: float) -> None:
        path.unlink()
        path.write_bytes(content)

    monkeypatch.setattr(reading.time, "sleep", mend)
    assert newest_usable(tmp_path) == (open_checkpoint(path.parent), [])


def test_a_wrong_permission_is_not_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(reading.time, "sleep", lambda seconds: None)
    make(tmp_path, 1)
    make(tmp_path, 2)
    root = os.geteuid() == 0
    newest = tmp_path / "step_00000002"
    places = (newest / "weights-00000.safetensors", newest / "manifest.json", newest, tmp_path)
    for place in places:
        mode = place.stat().st_mode
        place.chmod(0)
        if root:  # who may read anything
            for folder in (tmp_path.parents[1], tmp_path.parent, tmp_path):
                folder.chmod(folder.stat().st_mode | 0o055 if folder != place else 0)
            os.seteuid(65534)
        try:
            for find in (newest_usable, find_checkpoint):
                with pytest.raises(CheckpointUnreadable, match="Permission denied"):
                    find(tmp_path)
        finally:
            if root:
                os.seteuid(0)
            place.chmod(mode)


def test_a_copy_under_another_name_is_not_the_newest_and_is_not_removed(tmp_path):
    for step in (15, 30):
        make(tmp_path, step)
    copies = [tmp_path / "step_00000099", tmp_path / "step_000000015", tmp_path / "step_00000003"]
    for copy in copies:
        shutil.copytree(tmp_path / "step_00000015", copy)
    found, passed_over = newest_usable(tmp_path)
    assert found.step == 30 and len(passed_over) == 1
    assert "step_00000099: holds step 15, so it is a copy under another name; rename it step_00000015" in passed_over[0]
    prune(tmp_path, 1, None)
    assert all(copy.exists() for copy in copies) and not (tmp_path / "step_00000015").exists()
    make(tmp_path, 99)
    assert newest_usable(tmp_path)[0].step == 99
    assert open_checkpoint(tmp_path / "step_00000099.copy-1").step == 15


def test_the_batch_script_counts_no_copy_as_progress(tmp_path):
    for step in (15, 30):
        make(tmp_path / "checkpoints", step)
    shutil.copytree(tmp_path / "checkpoints/step_00000015", tmp_path / "checkpoints/step_00000099")
    script = """eval "$(sed -n '/^newest_step()/,/^}/p' slurm/common.sh)"; newest_step"""
    done = subprocess.run(["bash", "-c", script], cwd=Path(__file__).parents[2], check=True,
                          env={**os.environ, "run": str(tmp_path)}, capture_output=True, text=True)
    assert done.stdout == "30\n" and not done.stderr


def test_a_reader_that_is_given_a_run_does_not_take_an_older_checkpoint_by_itself(tmp_path):
    for step in (1, 2):
        make(tmp_path, step)
    flip_a_bit(tmp_path / "step_00000002/weights-00000.safetensors")
    with pytest.raises(CheckpointError, match=r"step_00000002/weights.*: damaged.*the newest usable checkpoint is .*"
                                              r"step_00000001: give that folder"):
        find_checkpoint(tmp_path)
    assert find_checkpoint(tmp_path / "step_00000001").step == 1


def test_a_killed_save_leaves_nothing_that_counts(tmp_path):
    make(tmp_path, 1)
    half = start_writing(tmp_path, 2)
    (half / "weights-00000.safetensors").write_bytes(b"half")
    assert newest_usable(tmp_path)[0].step == 1
    make(tmp_path, 3)
    assert not half.exists()


def test_retention_keeps_newest_and_milestones(tmp_path):
    for step in range(1, 8):
        make(tmp_path, step)
    gone = prune(tmp_path, keep=2, keep_every=3)
    assert sorted(int(p.name[-1]) for p in gone) == [1, 2, 4, 5]
    assert sorted(int(p.name[-1]) for p in tmp_path.iterdir()) == [3, 6, 7]


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path):
    path = make(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    outside = {**manifest, "files": {"../elsewhere": {"bytes": 1, "sha256": ""}}}
    unlisted = {**manifest, "tensors": {"weight": {"x": {"shape": [8], "shards": [shard_entry("/x", "x", 0, 0, 8)]}}}}
    for altered, said in ((outside, "outside its folder"), (unlisted, "shard file it does not list")):
        with pytest.raises(CheckpointError, match=said):  # sealed again: altered by someone who knows how
            open_checkpoint(finish_writing(start_writing(tmp_path, 2), altered))


def test_no_checkpoint_is_a_named_error(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        find_checkpoint(tmp_path / "nothing")


def test_slices_are_found_in_shards_cut_another_way(tmp_path):
    whole = torch.arange(6 * 8, dtype=torch.float32).view(6, 8)
    index = {"w": {"shape": [6, 8], "shards": []}}
    for rank in range(4):  # cut in four along axis 1
        save_file({"w": whole[:, rank * 2: rank * 2 + 2].contiguous()}, tmp_path / f"{rank}.safetensors")
        index["w"]["shards"].append(shard_entry(f"{rank}.safetensors", "w", 1, rank * 2, 2))
    reader = TensorReader(tmp_path, index)
    assert torch.equal(reader.whole("w"), whole)
    assert torch.equal(reader.slice("w", 1, 3, 4), whole[:, 3:7])
    assert torch.equal(reader.slice("w", 0, 2, 3), whole[2:5])
    index["w"]["shards"].pop()
    with pytest.raises(CheckpointError, match="hold 36 of 48"):
        reader.whole("w")
    with pytest.raises(CheckpointError, match="has no tensor v"):
        reader.whole("v")
