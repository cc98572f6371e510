"""Any bytes in any file that the project reads: one line and a code of 2 or 3, or correct work; never a traceback.

Each program's own main runs in this process on a folder in which one file is mutated, byte by byte or in its
structure. Examples are drawn by hypothesis, the same ones every time.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from helpers import ROOT, Finished, examples, run_program, write_recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import export, recipe
from train.quick_launch import fork_program

from hola_megatron.data.tokenizer import load_tokenizer
from hola_megatron.errors import RecipeError, run_cli

DEEP = b"[" * 100_000
WHOLE_FILES = (b"", b" ", b"\0", b"{}", b"[]", b"null", b"0", b'"x"', b"NaN", b"[[]]", b'{"a": 1, "a": 2}', DEEP,
               b'{"a":' * 100_000, b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", b"9" * 5000, b'{"\\ud800": 1}', b"\x89PNG\r\n",
               b"PK\x03\x04", b"- " * 50_000, b"\xff" * 64, (2**62).to_bytes(8, "little") + b"{}")
VALUES = (None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, 10**400, 0.5, -1e308, "", "x", "../x", "/etc/passwd",
          "a\0b", "\ud800", "x" * 5000, "1", "nan", [], [1], ["x"], [[]], {}, {"a": 1}, {"": None}, [None] * 3)
CALM = settings(max_examples=examples(12), deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck))


def ended(main: Callable[[], Any]) -> Finished:
    """How a program's main ends; an exception that `run_cli` does not turn into a line is this test's failure."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            run_cli(main)
        except SystemExit as left:
            return Finished(left.code, output.getvalue())
    raise AssertionError("run_cli always leaves")


def tool(name: str) -> Callable[..., Finished]:
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: object) -> Finished:
        with mock.patch.object(sys, "argv", [f"tools/{name}.py", *map(str, arguments)]):
            return ended(module.main)

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory, text_data) -> Path:
    """A dataset, a run folder, an export, a folder of flash-linear-attention's, and the small files of a run."""
    from test_fla import their_folder

    from hola_megatron.hf.convert import from_hf

    root = tmp_path_factory.mktemp("place")
    shutil.copytree(text_data / "valid", root / "data")
    write_recipe(root / "recipe.yaml", root / "data")
    # a text as users write it, besides JSON
    (root / "plain.yaml").write_text(yaml.safe_dump(json.loads((root / "recipe.yaml").read_text())))
    from_hf(export(root / "export", recipe()), root / "run")
    their_folder(root / "theirs")
    load_tokenizer("bytes").save_pretrained(root / "tokenizer")
    step = {"step": 3, "reason": "loss nan", "loss": "nan", "grad_norm": "nan", "first_sample": 0, "last_sample": 7,
            "first_nonfinite": None}
    (root / "incident.json").write_text(json.dumps([step]))
    (root / "rewind.json").write_text(json.dumps({"step": 3, "samples": 24, "rewinds": 1}))
    rows = [{"step": n, "kind": kind, "loss": 3.0 / n} for n in (1, 2, 3) for kind in ("train", "valid")]
    (root / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "documents.jsonl").write_text("".join(json.dumps({"text": "word " * 60, "id": n}) + "\n" for n in range(9)))
    (root / "base.json").write_text(json.dumps([{"length": 8, "tokens_per_second_per_gpu": 1.0, "loss": 1.0,
                                                 "grad_norm": 1.0}]))
    return root


def verify_data(root: Path) -> Finished:
    return tool("prepare_data")("--verify", root / "data")


def prepare(root: Path) -> Finished:
    return tool("prepare_data")(root / "documents.jsonl", "--tokenizer", "bytes", "--sequence-length", 64, "--workers",
                                1, "--out", root / "made")


def plan(name: str) -> Callable[[Path], Finished]:
    return lambda root: tool("plan")(root / name, "--gpus", 8, "--memory", 80)


def to_hf(root: Path) -> Finished:
    return tool("convert")("to-hf", root / "run", root / "made", "--no-verify")


def from_hf(root: Path) -> Finished:
    return tool("convert")("from-hf", root / "export", root / "made", "--no-verify")


def from_fla(root: Path) -> Finished:
    return tool("convert")("from-fla", root / "theirs", root / "made")


def load_model(root: Path) -> Finished:
    from hola_megatron.evaluate.load import load

    return ended(lambda: load(root / "export", device="cpu") and None)


def read_tokenizer(root: Path) -> Finished:
    """As the data tools read it, and as evaluation does."""
    from hola_megatron.hf.tokenizer_files import tokenizer_of

    def main() -> None:
        load_tokenizer(str(root / "tokenizer" / "tokenizer.json")).encode("some text")
        tokenizer_of(root / "tokenizer")("some text")

    return ended(main)


def read_base(root: Path) -> Finished:
    spec = importlib.util.spec_from_file_location("tool_bench_context", ROOT / "tools" / "bench_context.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    numbers = {"ranks": 1, "length": 8, "problem": "x"}
    return ended(lambda: module.result_line(numbers, module.read_base(root / "base.json")) and None)


def read_incident(root: Path) -> Finished:
    from hola_megatron.control.incident import read_incident as read

    return ended(lambda: read(root) and None)


def read_rewind(root: Path) -> Finished:
    from hola_megatron.train import run_folder

    return ended(lambda: run_folder._noted(root, 3) and None)


def read_metrics(root: Path) -> Finished:
    from hola_megatron.log.metrics import read_rows

    def main() -> None:
        for row in read_rows(root / "metrics.jsonl"):
            assert row["step"] >= 0 and isinstance(row["kind"], str)
            assert row["kind"] not in ("train", "valid") or row["loss"] is None or row["loss"] + 1.0

    return ended(main)


MANIFEST, WEIGHTS = (f"run/checkpoints/step_00000000/{name}" for name in ("manifest.json", "weights-00000.safetensors"))
# file -> the program that reads it; a key after # names another way to read or to mutate it
READERS: dict[str, Callable[[Path], Finished]] = {
    "data/dataset.json": verify_data, "data/index.json": verify_data, "documents.jsonl": prepare,
    "recipe.yaml": plan("recipe.yaml"), "plain.yaml": plan("plain.yaml"), MANIFEST: to_hf, f"{MANIFEST}#sealed": to_hf,
    WEIGHTS: to_hf, f"{WEIGHTS}#sealed": to_hf, "export/config.json": from_hf, "export/hola_export.json": from_hf,
    "export/model.safetensors": from_hf, "export/config.json#loaded": load_model,
    "tokenizer/tokenizer.json": read_tokenizer, "tokenizer/tokenizer_config.json": read_tokenizer,
    "tokenizer/special_tokens_map.json": read_tokenizer, "theirs/config.json": from_fla, "incident.json": read_incident,
    "base.json": read_base,
    "rewind.json": read_rewind, "metrics.jsonl": read_metrics}


def places_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places_of(inner, (*path, key))


def mutated_structure(draw: Callable[[Any], Any], value: Any) -> Any:
    """One key or element removed, renamed, or given another value."""
    value = copy.deepcopy(value)
    path = draw(st.sampled_from(sorted(places_of(value), key=lambda p: (len(p), str(p)))))
    at = value
    for part in path[:-1]:
        at = at[part]
    how = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "nest")))
    if how == "remove":
        del at[path[-1]]
    elif how == "rename" and isinstance(at, dict):
        at[f"{path[-1]}x"] = at.pop(path[-1])
    elif how == "nest":
        at[path[-1]] = [at[path[-1]]]
    else:
        at[path[-1]] = draw(st.sampled_from(VALUES))
    return value


def mutated_bytes(draw: Callable[[Any], Any], data: bytes) -> bytes:
    """A bit flipped, a part removed, doubled or overwritten, or something else altogether."""
    how = draw(st.sampled_from(("flip", "flip", "cut", "remove", "insert", "whole")))
    at = draw(st.integers(0, min(len(data), 4000) - 1))
    if how == "whole":
        return draw(st.sampled_from(WHOLE_FILES))
    if how == "cut":
        return data[:at]
    if how == "remove":
        return data[:at] + data[at + draw(st.integers(1, 40)):]
    if how == "insert":
        return data[:at] + draw(st.sampled_from((b"\0", b'"', b"[", b"{", b",", b"\xff", b"9" * 400, b"-", b"\n", b":"))
                                ) + data[at:]
    return data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1:]


def mutated(draw: Callable[[Any], Any], data: bytes, file: str) -> bytes:
    is_json = file.endswith((".json", "recipe.yaml"))
    if is_json and draw(st.booleans()):
        return json.dumps(mutated_structure(draw, json.loads(data))).encode()
    return mutated_bytes(draw, data)


def sealed(folder: Path, manifest: dict[str, Any]) -> bytes:
    """A manifest whose seal and sums fit again: altered by someone who knows how."""
    for name, about in manifest["files"].items():
        if isinstance(about, dict) and isinstance(name, str) and "\0" not in name and (folder / name).is_file():
            data = (folder / name).read_bytes()
            about |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": seal}).encode()


@pytest.mark.parametrize("name", READERS)
@pytest.mark.timeout(300)
def test_any_mutation_is_one_line_or_correct_work(name, place):
    file, _, sealing = name.partition("#")
    path, manifest = place / file, place / MANIFEST
    before, manifest_before = path.read_bytes(), manifest.read_bytes()
    shutil.rmtree(place / "made", ignore_errors=True)
    assert READERS[name](place).code in (0, 1), "the undamaged file must do"

    @CALM
    @given(st.data())
    def check(data: st.DataObject) -> None:
        shutil.rmtree(place / "made", ignore_errors=True)
        try:
            if sealing == "sealed" and file == MANIFEST:
                try:
                    path.write_bytes(sealed(path.parent, mutated_structure(data.draw, json.loads(before))))
                except (AttributeError, KeyError, ValueError):  # nothing left to seal
                    path.write_bytes(before)
            else:
                path.write_bytes(mutated(data.draw, before, file))
            if sealing == "sealed" and file == WEIGHTS:
                manifest.write_bytes(sealed(path.parent, json.loads(manifest_before)))
            done = READERS[name](place)
        finally:
            path.write_bytes(before)
            manifest.write_bytes(manifest_before)
        check_said(done)

    check()


def test_token_ids_far_apart_do_not_hang(place):
    """The library lists all missing ids, two thousand million of them, when the tokenizer is copied."""
    path = place / "tokenizer" / "tokenizer.json"
    before = path.read_bytes()
    form = json.loads(before)
    form["model"]["vocab"][min(form["model"]["vocab"])] = 2**31
    try:
        path.write_text(json.dumps(form))
        done = read_tokenizer(place)
    finally:
        path.write_bytes(before)
    assert done.code == 3 and "a token has the id 2,147,483,648" in done.output and done.output.count("\n") == 1, done


def check_said(done: Finished) -> None:
    assert done.code in (0, 1, 2, 3), done
    assert "Traceback" not in done.output
    errors = [line for line in done.output.splitlines() if "Error: " in line]
    if done.code in (2, 3):
        assert errors and all(len(line) < 2500 for line in errors), done
        assert len(errors) == 1 or all(line.startswith(("RecipeError: ", "DataError: ")) for line in errors), done


@pytest.mark.parametrize("name", ["data/index.json", "recipe.yaml", MANIFEST, "export/config.json", "incident.json",
                                  "metrics.jsonl", "tokenizer/tokenizer.json", "export/model.safetensors"])
def test_a_folder_a_pipe_or_a_device_in_a_files_place(name, place):
    path = place / name
    before = path.read_bytes()
    try:
        for make in (path.mkdir, lambda: path.symlink_to("/dev/zero"), lambda: path.symlink_to(path.name)):
            path.unlink(missing_ok=True)
            make()
            done = READERS[name](place)
            assert done.code in (2, 3) and "Traceback" not in done.output, (name, done)
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(before)


PROGRAMS = {
    "prepare_data": (["tools/prepare_data.py", "--verify", "data"], "data/index.json", 3),
    "plan": (["tools/plan.py", "recipe.yaml", "--gpus", "8", "--memory", "80"], "recipe.yaml", 2),
    "convert": (["tools/convert.py", "to-hf", "run", "made"], MANIFEST, 2),
    "evaluate": (["tools/evaluate.py", "export", "--bundled", "valid"], "export/config.json", 2),
    "train": (["-m", "hola_megatron.train", "recipe.yaml"], "data/dataset.json", 3)}


IMPORTS_MUCH = ("convert", "evaluate", "train")


@pytest.mark.parametrize(("name", "run"), [
    *((name, fork_program if name in IMPORTS_MUCH else run_program) for name in PROGRAMS),
    *(pytest.param(name, run_program, marks=pytest.mark.long) for name in IMPORTS_MUCH)])
def test_one_process_of_each_program(name, run, place, tmp_path):
    """Real ones, or forked from one that has imported what takes seconds."""
    arguments, file, code = PROGRAMS[name]
    shutil.copytree(place, tmp_path / "place", ignore=shutil.ignore_patterns("made"))
    (tmp_path / "place" / file).write_bytes(DEEP)
    given_paths = [str(tmp_path / "place" / word) if (place / word).exists() else word for word in arguments]
    overrides = [f"data.train={tmp_path / 'place' / 'data'}", f"run_dir={tmp_path / 'new'}"] if name == "train" else []
    done = run([*given_paths, *overrides], tmp_path / "log")
    errors = [line for line in done.output.splitlines() if "Error" in line]
    assert done.code == code and len(errors) == 1 and "deep" in errors[0] and "Traceback" not in done.output, done


def test_recipes_drawn_from_nothing():
    """Sections, lists and values of every type, not near any real recipe."""
    from hola_megatron.recipe.loading import build_recipe

    keys = st.sampled_from(("name", "model", "data", "train", "cache", "steps", "lr", "learning_rate", "path", ""))
    values = st.recursive(st.sampled_from(VALUES[:12] + VALUES[12:14]), lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=4)), max_leaves=12)

    @settings(CALM, max_examples=examples(60))
    @given(st.dictionaries(keys, values, max_size=6))
    def check(recipe_values: dict[str, Any]) -> None:
        with pytest.raises(RecipeError) as caught:
            build_recipe(recipe_values)
        assert all("\n" not in problem and len(problem) < 1000 for problem in caught.value.problems)

    check()
