"""The checkpoint folder: whole or not there, damage named, the last healthy one never removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hola_megatron.checkpoint.folder import (
    FORMAT,
    file_digest,
    find_checkpoint,
    finish_writing,
    newest_usable,
    open_checkpoint,
    retire,
    start_writing,
)
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
    gone = retire(tmp_path, keep=2, keep_every=3)
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
