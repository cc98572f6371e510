"""tools/checkpoint.py: what it prints, the mean, and what it removes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import checkpoint_tensors, run_main, run_tool, small_recipe

from hola_megatron.checkpoint.folder import MANIFEST, _seal, open_checkpoint
from hola_megatron.files.ownership import inside, owned


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_data) -> Path:
    """A run with checkpoints at steps 2, 4, 6, 8."""
    from hola_megatron.config import load_recipe
    from hola_megatron.train.loop import train

    folder = tmp_path_factory.mktemp("finished")
    train(load_recipe(small_recipe(folder / "recipe.yaml", text_data / "train", run_dir=str(folder / "run"),
                                   train__steps=8, train__global_batch_size=4,
                                   checkpoint={"every": 2, "keep": 9, "background": False})))
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))


def damage(checkpoint: Path) -> None:
    file = next(checkpoint.glob("weights-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def altered(checkpoint: Path, change) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    change(manifest)
    manifest["sha256"] = _seal(manifest)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def test_inspect_a_run(run, capsys):
    damage(run / "checkpoints/step_00000004")
    altered(run / "checkpoints/step_00000006", lambda manifest: manifest.update(healthy=False))
    done = run_tool("checkpoint", ["inspect", str(run)], capsys)
    lines = done.output.strip().splitlines()
    assert done.code == 0 and len(lines) == 5
    assert lines[1].split()[:2] == ["2", "512"] and lines[1].endswith("healthy, every hash is right")
    assert "not usable: " in lines[2] and "damaged (sha256" in lines[2]
    assert "saved during bad steps" in lines[3] and lines[4].split()[1] == "2,048"
    quick = run_tool("checkpoint", ["inspect", str(run), "--no-verify"], capsys).output
    assert "not usable" not in quick and "healthy, sizes are right" in quick


def test_inspect_one_checkpoint(run, text_data, capsys):
    path = run / "checkpoints/step_00000008"
    done = run_tool("checkpoint", ["inspect", str(path), "--tensors"], capsys)
    weights = checkpoint_tensors(path)
    assert done.code == 0
    for said in ("recipe  micro", "step  8", "tokens  2,048", "origin  its own first step", "healthy  yes",
                 "updates  8 of the optimizer", "stream  train: 2,048 tokens", "layout  context 1, data 1",
                 f"parameters  {sum(w.numel() for w in weights.values()):,} in {len(weights)} tensors",
                 f"sha256  {open_checkpoint(path).manifest['sha256']}"):
        assert said in done.output, said
    assert all(name in done.output for name in weights)


def test_the_mean_is_the_mean_and_a_run_starts_from_it(run, text_data, tmp_path, capsys):
    paths = [run / f"checkpoints/step_{step:08d}" for step in (4, 6, 8)]
    done = run_tool("checkpoint", ["average", str(run), "--last", "3", "--out", str(tmp_path / "mean")], capsys)
    assert done.code == 0 and [line.split(" | ")[1] for line in done.output.splitlines()[:3]] == list(map(str, paths))
    made = tmp_path / "mean/checkpoints/step_00000008"
    found, parts = checkpoint_tensors(made), [checkpoint_tensors(path) for path in paths]
    for name, value in found.items():
        wanted = torch.stack([part[name].double() for part in parts]).mean(0)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-7, atol=1e-9)
        assert not torch.equal(value, parts[0][name])
    assert all((m == 0).all() for m in checkpoint_tensors(made, "exp_avg").values())
    by_name = run_tool("checkpoint", ["average", *map(str, paths), "--out", str(tmp_path / "named")], capsys)
    assert by_name.code == 0
    named = checkpoint_tensors(tmp_path / "named/checkpoints/step_00000008")
    assert all(torch.equal(named[name], found[name]) for name in found)
    recipe = small_recipe(tmp_path / "r.yaml", text_data / "train", run_dir=str(tmp_path / "new"), train__steps=2,
                          train__global_batch_size=4, train__learning_rate=1e-30)
    started = run_main([str(recipe), f"init.from={tmp_path / 'mean'}"], capsys)
    assert started.code == 0 and "streams go on after 2.05k tokens" in started.output, started.output
    after = checkpoint_tensors(tmp_path / "new/checkpoints/step_00000002")
    assert all(torch.equal(after[name], found[name]) for name in found)
    assert "origin  mean of " in run_tool("checkpoint", ["inspect", str(made)], capsys).output


def test_the_mean_is_exported(run, tmp_path, capsys):
    words = ["average", str(run), "--last", "2", "--out", str(tmp_path / "mean")]
    assert run_tool("checkpoint", words, capsys).code == 0
    done = run_tool("convert", ["to-hf", str(tmp_path / "mean"), str(tmp_path / "hf")], capsys)
    assert done.code == 0 and "greedy tokens equal" in done.output, done.output


def test_prune(run, capsys):
    words = ["prune", str(run), "--keep", "1", "--keep-every", "4"]
    dry = run_tool("checkpoint", [*words, "--dry-run"], capsys)
    assert dry.code == 0 and steps(run) == [2, 4, 6, 8] and "done: 2 would go, 2 kept" in dry.output
    done = run_tool("checkpoint", words, capsys)
    assert done.code == 0 and steps(run) == [4, 8] and "done: 2 removed, 2 kept" in done.output
    assert f"removed | {run / 'checkpoints/step_00000006'}" in done.output
    assert run_tool("checkpoint", words, capsys).output == "done: 0 removed, 2 kept\n"


def test_prune_keeps_the_last_healthy_one(run, capsys):
    for step in (6, 8):
        altered(run / f"checkpoints/step_{step:08d}", lambda manifest: manifest.update(healthy=False))
    assert run_tool("checkpoint", ["prune", str(run), "--keep", "1"], capsys).code == 0
    assert steps(run) == [4, 6, 8]


def test_prune_leaves_a_run_that_goes_on_alone(run, capsys):
    with owned(inside(run, "test")):
        pid = os.fork()
        if not pid:  # another process: the lock is this one's
            done = run_tool("checkpoint", ["prune", str(run), "--keep", "1"], capsys)
            os._exit(0 if done.code == 2 and "a run removes its own old checkpoints" in done.output else 1)
        assert os.waitpid(pid, 0)[1] == 0
    assert steps(run) == [2, 4, 6, 8]


WRONG = [
    (["inspect", "{tmp}"], "no checkpoint here"), (["inspect", "{tmp}/step_00000001"], "not a checkpoint"),
    (["prune", "{tmp}", "--keep", "1"], "no checkpoint here"),
    (["prune", "{run}", "--keep", "0"], "must be at least 1"),
    (["average", "{run}", "--out", "{tmp}/m"], "one checkpoint is its own mean"),
    (["average", "{run}", "{run}", "--out", "{tmp}/m"], "is there twice"),
    (["average", "{run}", "--last", "9", "--out", "{tmp}/m"], "has 4 checkpoints, 9 are to be averaged"),
    (["average", "{run}", "{tmp}", "--last", "2", "--out", "{tmp}/m"], "name one run folder, or leave --last out"),
    (["average", "{run}", "--last", "2", "--out", "{run}"], "exists; choose another name"),
    (["average", "{run}", "--last", "2", "--out", "s3://b/m"], "is a URL"), (["average", "{run}"], "--out"),
]


@pytest.mark.parametrize(("words", "said"), WRONG)
def test_wrong_words_are_one_line(words, said, finished, tmp_path, capsys):
    done = run_tool("checkpoint", [word.format(run=finished, tmp=tmp_path) for word in words], capsys)
    assert done.code == 2 and said in done.output and len(done.output.strip().splitlines()) == 1, done.output
    assert not (tmp_path / "m").exists()


def test_what_is_of_another_model_is_not_averaged(run, text_data, tmp_path, capsys):
    other = small_recipe(tmp_path / "o.yaml", text_data / "train", run_dir=str(tmp_path / "other"), train__steps=1,
                         train__warmup_steps=0, model__mlp_hidden_size=32)
    assert run_main([str(other)], capsys).code == 0
    words = ["average", str(run), str(tmp_path / "other"), "--out", str(tmp_path / "m")]
    done = run_tool("checkpoint", words, capsys)
    assert done.code == 2 and "only checkpoints of one model can be averaged" in done.output
    damage(run / "checkpoints/step_00000008")
    done = run_tool("checkpoint", ["average", str(run), "--last", "2", "--out", str(tmp_path / "m")], capsys)
    assert done.code == 2 and "damaged (sha256" in done.output
    assert not (tmp_path / "m").exists()
