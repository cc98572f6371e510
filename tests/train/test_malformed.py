"""Fifty malformed recipes and twenty malformed datasets: a named error each, the right code, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import MICRO, run_main, write_recipe

# (override, what the message must contain)
RECIPES = [
    ("train.stps=3", "did you mean train.steps"), ("trian.steps=3", "trian"),
    ("model.cache.slot=3", "model.cache.slots"), ("steps=3", "did you mean train.steps"),
    ("model.heads", "section.key=value"), ("=3", "section.key=value"), ("model.heads.x=3", "heads is a value"),
    ("train.steps=ten", "train.steps: 'ten'"), ("train.steps=0", "train.steps: 0"),
    ("train.steps=-5", "train.steps: -5"), ("train.steps=2.5", "train.steps: 2.5"),
    ("train.steps=true", "train.steps"), ("train.steps=null", "train.steps: None"),
    ("train.steps=[1]", "train.steps"), ("train.steps={a: 1}", "train.steps"),
    ("train.learning_rate=0", "greater than 0"), ("train.learning_rate=.nan", "train.learning_rate"),
    ("train.learning_rate=.inf", "train.learning_rate"), ("train.learning_rate=fast", "train.learning_rate: 'fast'"),
    ("train.min_learning_rate=1", "above train.learning_rate"), ("train.lr=-1", "train.learning_rate"),
    ("train.beta1=1.0", "less than 1"), ("train.beta2=-0.1", "train.beta2"), ("train.adam_eps=0", "train.adam_eps"),
    ("train.warmup_steps=99", "more than train.steps"), ("train.schedule=steps", "'wsd' or 'constant'"),
    ("train.precision=fp16", "train.precision"), ("train.recompute=some", "train.recompute"),
    ("train.seed=-1", "train.seed"), ("train.global_batch_size=7", "not a multiple of micro_batch_size"),
    ("train.micro_batch_size=0", "micro_batch_size"), ("train.sequence_length=0", "train.sequence_length"),
    ("train.clip_grad_norm=-1", "train.clip_grad_norm"), ("model.layers=0", "model.layers"),
    ("model.pattern=HX", "model.pattern"), ("model.pattern=''", "model.pattern"),
    ("model.key_dim=4", "model.key_dim"), ("model.attention_heads=5", "model.hidden_size"),
    ("model.rope_theta=-1", "model.rope_theta"), ("model.cache.slots=-1", "model.cache.slots"),
    ("model.cache.score=best", "model.cache.score"), ("model.cache=7", "model.cache"),
    ("model.backend=cuda", "model.backend"), ("parallel.tensor=3", "not a multiple of 3"),
    ("parallel.tensor=2", "does not divide the 1 processes"),
    ("parallel.sequence=true", "parallel.tensor of at least 2"), ("parallel.sequence=1", "parallel.sequence"),
    ("parallel.virtual_pipeline=2", "needs parallel.pipeline"), ("parallel.pipeline=3", "model.layers: 4"),
    ("parallel.hang_seconds=0", "parallel.hang_seconds"), ("checkpoint.keep=0", "checkpoint.keep"),
    ("guard.warmup=64", "more than guard.window"), ("guard.loss_mads=0", "guard.loss_mads"),
    ("log.every=0", "log.every"), ("name=a/b", "name: 'a/b'"), ("data.train=7", "data.train"),
    ("data.train=[{pth: x}]", "data.train.0.path"), ("data.train=[{path: x, weight: 0}]", "weight"),
    ("data.documents=split", "data.documents"), ("data.tokenizer=null", "data.tokenizer")
]


@pytest.fixture
def place(text_data, tmp_path) -> Path:
    write_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"), guard={"window": 32},
                 train__steps=2)
    return tmp_path


def test_fifty_malformed_recipes(place, capsys):
    assert len({override for override, _ in RECIPES}) == len(RECIPES) >= 50
    for override, said in RECIPES:
        done = run_main([str(place / "recipe.yaml"), override], capsys)
        assert done.code == 2, (override, done)
        assert said in done.output and done.output.startswith("RecipeError: "), (override, done.output)
        assert all(line.startswith("RecipeError: ") for line in done.output.splitlines()), (override, done.output)
    assert not (place / "run").exists()


@pytest.mark.parametrize(("content", "said"), [
    (b"", "a recipe is a mapping"), (b"[1, 2]", "a recipe is a mapping"), (b"name: [", "not valid YAML"),
    (b"\xff\xfe\x00", "cannot be read as text"), (b"name: x\n", "model: missing"),
    (b"base: none.yaml", "no such recipe"), (b"1: 2", "a recipe is a mapping"),
    (b"!!python/object/apply:os.system ['true']", "not valid YAML")],
    ids=["empty", "list", "torn", "binary", "missing", "base", "keys", "object"])
def test_files_that_are_no_recipe(content, said, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_bytes(content)
    done = run_main([str(tmp_path / "recipe.yaml")], capsys)
    assert done.code == 2 and said in done.output and "Traceback" not in done.output


def _index(change: Callable[[dict], None], name: str = "index.json") -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))
    return edit


def _shard(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = next(folder.glob("*.mds"))
        path.write_bytes(change(path.read_bytes()))
    return edit


def _flip(at: int) -> Callable[[Path], None]:
    return _shard(lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])


def _shard0(content: dict) -> dict:
    return content["shards"][0]


DATASETS: dict[str, Callable[[Path], None]] = {
    "no folder": shutil.rmtree,
    "empty folder": lambda f: (shutil.rmtree(f), f.mkdir()),
    "no index": lambda f: (f / "index.json").unlink(),
    "no dataset.json": lambda f: (f / "dataset.json").unlink(),
    "index is no JSON": lambda f: (f / "index.json").write_text("{"),
    "index is a list": lambda f: (f / "index.json").write_text("[]"),
    "index is binary": lambda f: (f / "index.json").write_bytes(b"\xff\x00"),
    "no shards": _index(lambda c: c.update(shards=[])),
    "pickled column": _index(lambda c: _shard0(c).update(column_encodings=["pkl", "pkl", "pkl"])),
    "shard outside": _index(lambda c: _shard0(c)["raw_data"].update(basename="../../x.mds")),
    "no hash": _index(lambda c: _shard0(c)["raw_data"].update(hashes={})),
    "wrong sample count": _index(lambda c: _shard0(c).update(samples=3)),
    "dataset.json torn": lambda f: (f / "dataset.json").write_text((f / "dataset.json").read_text()[:40]),
    "other version": _index(lambda c: c.update(format_version=99), "dataset.json"),
    "no counts": _index(lambda c: c.pop("tokens"), "dataset.json"),
    "other tokenizer": _index(lambda c: c["tokenizer"].update(vocab_size=7), "dataset.json"),
    "other length": _index(lambda c: c.update(sequence_length=32), "dataset.json"),
    "shard missing": lambda f: next(f.glob("*.mds")).unlink(),
    "shard empty": _shard(lambda data: b""),
    "shard cut": _shard(lambda data: data[:-1]),
    "shard longer": _shard(lambda data: data + b"x"),
    "first bit flipped": _flip(0),
    "middle bit flipped": _flip(100_000),
    "last bit flipped": _flip(-1),
    "a picture": lambda f: [p.write_bytes(b"\x89PNG") for p in f.iterdir()],
}


LEAST = ("model.layers=1", "model.pattern=G", "train.micro_batch_size=8")


def test_twenty_malformed_datasets(place, text_data, capsys):
    assert len(DATASETS) >= 20
    for name, damage in DATASETS.items():
        shutil.rmtree(place / "data", ignore_errors=True)
        shutil.copytree(text_data / "train", place / "data")
        damage(place / "data")
        done = run_main([str(place / "recipe.yaml"), f"data.train={place / 'data'}", *LEAST], capsys)
        assert done.code == 3, (name, done)
        errors = [line for line in done.output.splitlines() if "Error" in line]
        assert len(errors) == 1 and errors[0].startswith(f"DataError: {place / 'data'}"), (name, done.output)
        assert not list((place / "run").glob("checkpoints/*")), name


def test_the_undamaged_ones_run(place, capsys):
    assert run_main([str(place / "recipe.yaml")], capsys).code == 0
    assert MICRO["data"]["train"] == ""  # the shared recipe is not changed by tests
