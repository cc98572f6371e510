"""tools/profile.py: what it measures, refuses and sweeps."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import LONG, ROOT, run_tool, write_recipe

from hola_megatron.config import load_recipe
from hola_megatron.errors import RecipeError
from hola_megatron.model.flops import executed_flops_per_token, flops_per_token
from hola_megatron.profile import profiler
from hola_megatron.profile.memory_phases import MemoryPhases
from hola_megatron.profile.profile_report import report
from hola_megatron.profile.profiler import OutOfMemory, ProfileOptions, profile_recipe
from hola_megatron.profile.sweep import combinations, run_sweep, sweep_table
from hola_megatron.startup.start import start


def test_real_data_numbers_and_files(text_data, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "r.yaml", text_data / "train", log__peak_tflops=0.5, train__recompute="full")
    files = {name: tmp_path / name for name in ("n.json", "r.md", "t.json")}
    done = run_tool("profile", [
        str(recipe), "--data", "--steps", "3", "--warmup", "1", "--micro-batches", "2", "--json", str(files["n.json"]),
        "--markdown", str(files["r.md"]), "--trace", str(files["t.json"])], capsys)
    assert done.code == 0, done.output
    numbers = json.loads(files["n.json"].read_text())
    late = "Communication there includes waiting for ranks that launch later"
    assert late in report(numbers | {"cuda_graph": True, "ranks": 2})
    assert late not in report(numbers | {"cuda_graph": True}) and late not in report(numbers | {"ranks": 2})
    assert numbers["micro_batches"] == 2 and numbers["steps"] == 3
    assert numbers["tokens_per_second"] == pytest.approx(2 * 2 * 64 / (numbers["ms_per_step"] / 1e3))
    loaded = load_recipe(recipe)
    assert numbers["mfu"] == pytest.approx(
        numbers["tokens_per_second"] * flops_per_token(loaded.model, 64) / 0.5e12)
    assert numbers["hfu"] / numbers["mfu"] == pytest.approx(
        executed_flops_per_token(loaded) / flops_per_token(loaded.model, 64)) and numbers["hfu"] > numbers["mfu"]
    assert 0 < numbers["data_wait_ms"] == numbers["share"]["data wait"] < numbers["ms_per_step"]
    assert numbers["memory"] is None and "not measured, no CUDA device" in done.output
    assert "| state |" in files["r.md"].read_text() and files["r.md"].read_text() in done.output
    assert json.loads(files["t.json"].read_text())["traceEvents"]


def test_waiting_for_data_slows_the_measured_speed(text_data, tmp_path, monkeypatch, capsys):
    """A loader that takes 200 ms a step is in the step's time, and told apart from it."""
    import time

    real = profiler.BatchLoader.__next__

    def slow(self):
        time.sleep(0.2)
        return real(self)

    monkeypatch.setattr(profiler.BatchLoader, "__next__", slow)
    recipe = write_recipe(tmp_path / "r.yaml", text_data / "train")
    out = tmp_path / "n.json"
    run_tool("profile", [str(recipe), "--data", "--steps", "2", "--warmup", "1", "--micro-batches", "1", "--json",
                         str(out)], capsys)
    numbers = json.loads(out.read_text())
    assert 200 <= numbers["data_wait_ms"] <= numbers["ms_per_step"] < numbers["data_wait_ms"] + 1000


def test_an_unknown_gpu_is_refused_until_its_peak_is_given(tmp_path, monkeypatch):
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tmp_path))
    monkeypatch.setattr(profiler, "start", lambda _: SimpleNamespace(device=torch.device("cuda", 0), world=1))
    monkeypatch.setattr(profiler, "device_name", lambda _: "NVIDIA Nameless")
    with pytest.raises(RecipeError, match="log.peak_tflops: the peak of NVIDIA Nameless is not known"):
        profile_recipe(recipe, ProfileOptions())


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_is_one_line_and_in_the_json(kind, tmp_path, monkeypatch, capsys):
    from hola_megatron.engine.megatron import MegatronEngine

    def full(*_, **__):
        raise kind("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(MegatronEngine, "train_step", full)
    recipe, out = write_recipe(tmp_path / "r.yaml", tmp_path), tmp_path / "n.json"
    done = run_tool("profile", [str(recipe), "--json", str(out)], capsys)
    assert done.code == OutOfMemory.exit_code and "Traceback" not in done.output
    assert "train.micro_batch_size: 2 x 64 tokens do not fit" in done.output
    assert "20 GiB" in json.loads(out.read_text())["out_of_memory"]


def test_another_error_is_not_called_out_of_memory(tmp_path, monkeypatch):
    from hola_megatron.engine.megatron import MegatronEngine

    def broken(*_, **__):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(MegatronEngine, "train_step", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        profile_recipe(load_recipe(write_recipe(tmp_path / "r.yaml", tmp_path)), ProfileOptions())


def test_peaks_are_those_of_their_phases(tmp_path, monkeypatch):
    """Two micro-batches: forward and backward alternate, and each phase keeps its largest peak."""
    from hola_megatron.engine import megatron

    held = iter([5, 105, 405])  # before and after the model is built; before the watched step
    peaks = iter([10, 30, 20, 25, 7, 40])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: next(held))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tmp_path, train__global_batch_size=4))
    layout, memory = start(recipe), MemoryPhases(torch.device("cuda", 0))
    with memory.weights_noted():
        engine = megatron.MegatronEngine(recipe, layout)
    with memory.watched(engine):
        engine.train_step(profiler._synthetic(recipe, layout), 1e-3)
    assert memory.bytes == {"weights": 100, "gradients and optimizer": 305, "peak of forward": 20,
                            "peak of backward": 30, "peak of gradient reduction": 7, "peak of optimizer": 40}
    assert next(peaks, None) is None
    cpu = MemoryPhases(torch.device("cpu"))
    with cpu.weights_noted(), cpu.watched(engine):
        pass
    assert cpu.bytes == {} and not cpu.measured


def test_combinations():
    assert combinations(["a.b=1,2", "c.d=x,y"]) == [
        {"a.b": "1", "c.d": "x"}, {"a.b": "1", "c.d": "y"}, {"a.b": "2", "c.d": "x"}, {"a.b": "2", "c.d": "y"}]
    with pytest.raises(RecipeError) as told:
        combinations(["a.b", "c.d=1", "c.d=2", "=3"])
    assert [problem.split(":")[0] for problem in told.value.problems] == [
        "--sweep 'a.b'", "--sweep 'c.d=2'", "--sweep '=3'"]
    with pytest.raises(RecipeError, match="400 combinations"):
        combinations([f"a.b={','.join(map(str, range(20)))}", f"c.d={','.join(map(str, range(20)))}"])


FAKE = """
import json, os, signal, sys, time
out, kind = sys.argv[sys.argv.index("--json") + 1], sys.argv[1].partition("=")[2]
if kind == "hangs":
    time.sleep(600)
if kind == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "refused":
    sys.exit(print("RecipeError: model.heads: 4 is not a multiple of 3", file=sys.stderr) or 2)
if kind == "memory":
    open(out, "w").write(json.dumps({"out_of_memory": "CUDA out of memory"}))
    sys.exit(1)
if kind == "raises":
    raise SystemExit(7)
if kind == "asserts":
    import atexit
    atexit.register(print, "a later word", file=sys.stderr)
    assert False
open(out, "w").write(json.dumps({"tokens_per_second_per_rank": 1310000, "ms_per_step": 12.0, "mfu": 0.4, "hfu": 0.5,
                                 "memory_gb": 61.0, "first_step_s": 3.0}))
"""


def test_whatever_happens_to_a_combination_is_its_row(tmp_path):
    program = tmp_path / "fake.py"
    program.write_text(FAKE)
    said = []
    kinds = ["works", "memory", "refused", "killed", "raises", "asserts"]
    rows = run_sweep(program, [], combinations([f"kind={','.join(kinds)}"]), ranks=1, timeout_s=100, log=said.append)
    rows += run_sweep(program, [], combinations(["kind=hangs"]), ranks=1, timeout_s=3, log=said.append)
    assert [row.problem for row in rows] == [
        None, "out of memory", "model.heads: 4 is not a multiple of 3", "ended by SIGKILL", "ended with code 7",
        "ended with code 1: AssertionError", "no end within 3 s"]
    text = sweep_table(rows).splitlines()
    assert text[2] == "| works | 1.31M | 12.0 | 40.0 | 50.0 | 61.0 | 3.0 |  |"
    assert text[3] == "| memory | - | - | - | - | - | - | out of memory |"
    assert len(text) == 9 and len(said) == 7


@pytest.mark.distributed
def test_a_combination_on_several_ranks_is_started_by_our_launcher(tmp_path):
    program = tmp_path / "fake.py"
    program.write_text(FAKE + 'print("on ranks", os.environ["WORLD_SIZE"])\n')
    kinds = ["refused", "works"] if LONG else ["refused"]
    rows = run_sweep(program, [], combinations([f"kind={','.join(kinds)}"]), ranks=2, timeout_s=200, log=print)
    assert "model.heads: 4 is not a multiple of 3" in rows[0].problem
    assert not LONG or (rows[1].problem is None and rows[1].numbers["ms_per_step"] == 12.0)


@pytest.mark.long
@pytest.mark.distributed
def test_a_sweep_over_tensor_ranks(tmp_path, capsys, monkeypatch):
    """Fresh processes through our launcher: one layout runs, the other is refused, and the sweep ends well."""
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path, model__layers=1, model__pattern="H")
    out = tmp_path / "rows.json"
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    done = run_tool("profile", [str(recipe), "--ranks", "2", "--sweep", "parallel.tensor=2,3", "--steps", "1",
                                "--warmup", "1", "--micro-batches", "1", "--json", str(out)], capsys)
    assert done.code == 0, done.output
    works, refused = json.loads(out.read_text())
    assert works["settings"] == {"parallel.tensor": "2"} and works["numbers"]["ranks"] == 2
    assert "tensor 2" in works["numbers"]["layout"] and works["numbers"]["share"]["state"] > 0
    assert "model.heads: 2 is not a multiple of 3" in refused["problem"] and len(refused["problem"].split("; ")) < 9
    assert "| 3 | - |" in done.output


@pytest.mark.parametrize(("arguments", "said"), [
    (["--steps", "0"], "--steps: 0 must be at least 1"),
    (["--ranks", "2"], "hola_megatron.launch --nproc-per-node 2"),
    (["--sweep", "train.micro_batch_size=1,2", "--trace", "x"], "--trace: a sweep has no one trace"),
    (["--sweep", "train.micro_batch_size"], "is written section.key=value"),
    (["train.leaning_rate=3", "--sweep", "train.steps=1,2"], "did you mean train.learning_rate?"),
])
def test_wrong_arguments_are_named(tmp_path, capsys, arguments, said):
    done = run_tool("profile", [str(write_recipe(tmp_path / "r.yaml", tmp_path)), *arguments], capsys)
    assert done.code == 2 and said in done.output and "Traceback" not in done.output


def test_a_sweep_inside_a_launcher_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    done = run_tool("profile", [str(write_recipe(tmp_path / "r.yaml", tmp_path)), "--sweep", "train.steps=1,2"], capsys)
    assert done.code == 2 and "--sweep: starts processes itself" in done.output


def test_help_needs_no_torch():
    import subprocess

    code = ("import sys; sys.path.insert(0, 'tools'); import profile; sys.exit('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode == 0, done.stderr
