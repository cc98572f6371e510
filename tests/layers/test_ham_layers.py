"""HAM layers in training: every layout as one process, thresholds included; bit for bit after a restart; refused where
not."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed.forked import run_on_ranks
from distributed.layout_rows import DP, PLAIN, PP, RECOMPUTE, SP, TP, ZERO2, Row, finished, run_rows, said
from distributed.same_run import assert_same_steps, assert_same_tensors
from helpers import checkpoint_tensors, run_main, run_tool, write_recipe

from hola_megatron.checkpoint.folder import find_checkpoint
from hola_megatron.config import build_recipe, load_recipe
from hola_megatron.engine.build import build_engine
from hola_megatron.errors import CheckpointError, RecipeError
from hola_megatron.hf.auto import load_model
from hola_megatron.hf.convert import to_hf
from hola_megatron.layers.ham.costs import mean_visible
from hola_megatron.layers.ham.health import FIELDS
from hola_megatron.log.memory_health import watch
from hola_megatron.plan.estimate import Machine, make_plan
from hola_megatron.plan.report import report
from hola_megatron.profile.profiler import _synthetic
from hola_megatron.startup.start import start

STEPS, LAST = 4, "checkpoints/step_00000004"
LEARNED = {"router": "learned", "share": 0.2, "threshold": 0.5, "rate": 0.05, "freeze_steps": 1, "router_width": 6}
COSINE = {"router": "cosine", "share": 0.4, "threshold": 1.0, "rate": 0.05}
MODEL = {"pattern": "ham, gdn, ham, ham", "ham": LEARNED}
# a row each, but for those of the cosine score, as a change of the router
ROWS = {"one": Row(1, PLAIN), "again": Row(1, PLAIN), "tp2": Row(2, TP), "tp2_sp": Row(2, SP), "pp2": Row(2, PP),
        "dp2": Row(2, DP), "deepspeed_dp2": Row(2, DP, ZERO2), "recompute_dp2": Row(2, DP, RECOMPUTE),
        "cosine_one": Row(1, PLAIN, {"model__ham": COSINE}), "cosine_tp2": Row(2, TP, {"model__ham": COSINE}),
        "resumed_tp2": Row(2, TP)}
CONTINUED = ("again", "resumed_tp2")
STATE = {f"model.layers.{layer}.mixer.controller.{name}" for layer in (0, 2, 3) for name in ("threshold", "updates")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_data) -> Path:
    """The folder of all runs; CONTINUED go on from the middle of `one`."""
    folder = tmp_path_factory.mktemp("ham")
    how = {f"model__{name}": value for name, value in MODEL.items()}
    how |= {"train__steps": STEPS, "checkpoint": {"every": 2, "keep": 9}}
    run_rows({name: row for name, row in ROWS.items() if name not in CONTINUED}, folder, text_data, **how)
    for name in CONTINUED:
        shutil.copytree(finished(folder, "one", ROWS["one"]), folder / name)
        shutil.rmtree(folder / name / LAST)
    for name in ("log1_0", "log2_0"):
        shutil.copy(folder / name, folder / f"first_{name}")
    for name in ("tp2", "dp2", "pp2", "tp2_sp", "deepspeed_dp2", "recompute_dp2", "cosine_tp2", "cosine_one"):
        finished(folder, name, ROWS[name])
    run_rows({name: ROWS[name] for name in CONTINUED}, folder, text_data, **how)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in ROWS if name not in ("one", "cosine_one", "again")])
def test_layouts_equal_one_process_and_move_the_threshold_alike(name, runs):
    run, one = runs / name, runs / ("cosine_one" if name.startswith("cosine") else "one")
    assert_same_steps(run, one, STEPS)
    assert_same_tensors(run / LAST, one / LAST)
    want, have = (checkpoint_tensors(path / LAST, "layer_state") for path in (one, run))
    assert have.keys() == want.keys() == STATE
    assert all(torch.equal(have[layer], tensor) for layer, tensor in want.items())
    start = (COSINE if name.startswith("cosine") else LEARNED)["threshold"]
    for layer, tensor in want.items():
        assert float(tensor) == STEPS if layer.endswith("updates") else 0 < abs(float(tensor) - start) < 0.2


def test_it_resumes_bit_for_bit(runs):
    finished(runs, "again", ROWS["again"])
    assert "resuming at step 2" in said(runs, "again", ROWS["again"])
    for kind in ("weight", "exp_avg", "exp_avg_sq", "layer_state"):
        want, have = (checkpoint_tensors(path / LAST, kind) for path in (runs / "one", runs / "again"))
        assert have.keys() == want.keys() and all(have[name].equal(tensor) for name, tensor in want.items())


ALONE = """
import sys, torch
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hola_kernels", "hola_megatron", "megatron"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Blocked())
from transformers import AutoModelForCausalLM
lm = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()
x, mask = torch.arange(40).view(2, 20), torch.ones(2, 20, dtype=torch.int64)
mask[0, :7] = 0
how = {"attention_mask": mask, "max_new_tokens": 70, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
found = lm.generate(x, **how)
assert torch.equal(found, lm.generate(x, use_cache=False, **how)) and found.shape == (2, 90)
cache = lm(x, attention_mask=mask, use_cache=True).past_key_values
before = cache.nbytes()
for _ in range(80):
    lm(x[:, :1], past_key_values=cache)
half = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.bfloat16)
torch.save({"grows": cache.nbytes() - before, "logits": lm(x).logits.detach(),
            "held": {n: b for n, b in half.named_buffers()}}, sys.argv[2])
"""


def test_a_trained_threshold_is_exported_and_read_again(runs, tmp_path, capsys):
    """The tool compares logits, whole and token by token; the folder's own code runs without our packages; training
    goes on from the folder with the same thresholds."""
    for dtype in ("fp32", "bf16"):
        done = run_tool("convert", ["to-hf", str(runs / "one"), str(tmp_path / dtype), "--dtype", dtype], capsys)
        assert done.code == 0 and "greedy tokens equal 160 of 160" in done.output, done.output
    trained = checkpoint_tensors(runs / "one" / LAST, "layer_state")
    done = run_tool("convert", ["from-hf", str(tmp_path / "bf16"), str(tmp_path / "run")], capsys)
    assert done.code == 0, done.output
    back = checkpoint_tensors(find_checkpoint(tmp_path / "run").path, "layer_state")
    assert back.keys() == trained.keys() and all(torch.equal(back[name], x) for name, x in trained.items())
    assert not STATE & checkpoint_tensors(find_checkpoint(tmp_path / "run").path).keys()
    ran = subprocess.run([sys.executable, "-c", ALONE, str(tmp_path / "fp32"), str(tmp_path / "found.pt")],
                         capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
                         env={**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""})
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    assert found["grows"] > 0
    torch.testing.assert_close(found["logits"], load_model(tmp_path / "fp32")(torch.arange(40).view(2, 20)).logits)
    assert found["held"].keys() == STATE  # bit for bit, also in a model of 16 bits
    assert all(torch.equal(found["held"][name], x) for name, x in trained.items())


def test_a_new_run_and_a_mean_take_the_thresholds_along(runs, text_data, tmp_path, capsys):
    trained = checkpoint_tensors(runs / "one" / LAST, "layer_state")
    to_hf(runs / "one", tmp_path / "out")
    for name, source in (("of_run", runs / "one"), ("of_export", tmp_path / "out")):
        path = write_recipe(
            tmp_path / f"{name}.yaml", text_data / "train", run_dir=str(tmp_path / name), train__steps=1,
            train__warmup_steps=0, init={"from": str(source)}, model__pattern=MODEL["pattern"],
            model__ham=LEARNED | {"rate": 0.0})
        done = run_main([str(path)], capsys)
        assert done.code == 0, done.output[-3000:]
        found = checkpoint_tensors(tmp_path / name / "checkpoints/step_00000001", "layer_state")
        assert all(torch.equal(found[layer], x + layer.endswith("updates")) for layer, x in trained.items()), name
    done = run_tool("checkpoint", ["average", str(runs / "one"), "--last", "2", "--out",
                                   str(tmp_path / "mean")], capsys)
    assert done.code == 0, done.output
    earlier = checkpoint_tensors(runs / "one/checkpoints/step_00000002", "layer_state")
    mean = checkpoint_tensors(find_checkpoint(tmp_path / "mean").path, "layer_state")
    assert mean.keys() == STATE
    assert all(torch.allclose(mean[layer], (x + earlier[layer]) / 2) for layer, x in trained.items())


def test_it_can_be_refused_where_not(text_data, tmp_path):
    path = write_recipe(tmp_path / "r.yaml", text_data / "train", **{f"model__{n}": x for n, x in MODEL.items()})
    for override, problem in (("parallel.context=2", "parallel.context: 2 is not possible with ham layers"),
                              ("train.cuda_graph=true", "train.cuda_graph: true is not possible with ham layers"),
                              ("model.state_delay=3", "model.state_delay: 3 is for gdn and hola layers"),
                              ("model.ham.router=mean", "model.ham.router: 'mean' is not allowed"),
                              ("model.ham.share=1.5", "model.ham.share: 1.5 is not allowed"),
                              ("model.ham.share=-0.1", "model.ham.share: -0.1 is not allowed"),
                              ("model.ham.freeze_steps=-1", "model.ham.freeze_steps: -1 is not allowed"),
                              ("model.ham.slots=4", "model.ham.slots: no such key")):
        with pytest.raises(RecipeError, match=problem.replace("(", r"\(")):
            load_recipe(path, [override])
    plan = report(make_plan(load_recipe(path), Machine(1, 80.0, 989e12, 0.4)))
    assert "3ham" in plan.replace(" ", "")


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [1, 2, 40])
def test_the_mean_of_what_is_read_is_counted(length, share):
    assert mean_visible(length, share) == pytest.approx(sum(1 + share * t for t in range(length)) / length)


def recipe(**changes):
    """On synthetic tokens, without files."""
    model = {"layers": 2, "hidden_size": 32, "pattern": "ham", "heads": 2, "key_dim": 16, "value_dim": 16,
             "mlp_hidden_size": 64, "vocab_size": 264, "ham": LEARNED | {"share": 0.1, "rate": 0.5} | changes}
    train = {"sequence_length": 32, "global_batch_size": 8, "micro_batch_size": 2, "steps": 5, "warmup_steps": 1,
             "learning_rate": 3e-3, "precision": "fp32"}
    return build_recipe({"name": "ham", "model": model, "data": {"train": "unused", "tokenizer": "bytes"},
                         "train": train})


def train_and_compare(rank: int, ranks: int, folder: Path) -> None:
    from hola_megatron.parallel.cpu import adapt_to_cpu

    adapt_to_cpu()
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    made = recipe()
    layout = start(made)
    engine, shares = build_engine(made, layout), []
    mixers = engine.layer_states._mixers.values()
    for _ in range(60):
        # the judge is asked after the passes: what this rank has counted by then
        engine.train_step(_synthetic(made, layout), 1e-3, judge=lambda loss, norm: shares.append(
            [mixer.step_counts().tolist() for mixer in mixers]))
    everyone: list = [None] * ranks
    dist.all_gather_object(everyone, (engine.layer_states.tensors(), shares))
    first, second = everyone
    assert all(torch.equal(tensor, second[0][name]) for name, tensor in first[0].items())
    assert first[1] != second[1]  # they see other tokens
    for layer in range(2):  # the last ten steps of both ranks
        kept, every = (sum(rank[1][step][layer][i] for rank in everyone for step in range(50, 60)) for i in (0, 1))
        assert abs(kept / every - 0.1) < 0.02, (layer, kept / every)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_data_ranks_move_the_threshold_to_the_share_together(tmp_path):
    run_on_ranks(train_and_compare, 2, tmp_path)


def test_a_refused_step_leaves_the_threshold_and_forgets_its_counts():
    made = recipe(freeze_steps=0)
    engine = build_engine(made, start(made))
    batches = _synthetic(made, engine.layout)
    before = {name: x.clone() for name, x in engine.layer_states.tensors().items()}
    assert engine.train_step(batches, 0.0, judge=lambda loss, norm: "no").problem == "no"
    engine.evaluate(batches)
    assert all(x.equal(before[name]) for name, x in engine.layer_states.tensors().items())
    assert all(not mixer.step_counts().any() for mixer in engine.layer_states._mixers.values())
    engine.train_step(batches, 0.0)
    moved = engine.layer_states.tensors()
    assert all(not x.equal(before[name]) for name, x in moved.items())
    with pytest.raises(CheckpointError, match="has no model.layers.0.mixer.controller.threshold of shape"):
        engine.layer_states.restore({})


def test_the_memory_panel_shows_the_share_and_the_threshold():
    made = recipe(threshold=0.499, router="cosine")
    engine = build_engine(made, start(made))
    with watch(engine.model) as seen:
        engine.evaluate(_synthetic(made, engine.layout)[:1])
    assert set(seen) == {1, 2} and all(tuple(values) == FIELDS for values in seen.values())
    for values in seen.values():
        assert values["threshold"] == pytest.approx(0.499) and values["score_median"] <= values["score_p99"]
        assert 0.5 < values["kept"] < 1  # the median is above the threshold, and a repeated token's score below
        assert values["score_median"] > 0.499
        assert 0.3 < values["gate_state"] < 0.7 and 0.3 < values["gate_exact"] < 0.7
