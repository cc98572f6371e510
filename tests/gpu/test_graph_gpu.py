"""A micro-batch as one CUDA graph: bit for bit the same steps as without recording it, and the same run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import checkpoint_tensors, metric_rows, run_program, write_recipe

ROOT = Path(__file__).parent.parent.parent

# how: "graph"; "plain", on the graph's fixed tensors, records nothing
PROGRAM = """
import hola_megatron.quiet
import json, sys, torch
from hola_megatron.config import build_recipe
from hola_megatron.data.stream import Batch
from hola_megatron.engine import cuda_graph
from hola_megatron.engine.build import build_engine
from hola_megatron.engine.sampling import next_logits
from hola_megatron.startup.start import start, stop

def main():
    recipe, how = build_recipe(json.loads(sys.argv[1])), sys.argv[2]
    if "A" in recipe.model.pattern:  # flash attention's backward pass does not give the same bits twice
        for kind in ("flash", "mem_efficient", "cudnn"):
            getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)
    layout = start(recipe)
    engine = build_engine(recipe, layout)
    if how == "plain":
        engine.leave_graph()
    recorded, record = [], cuda_graph.MicroBatchGraph._capture
    cuda_graph.MicroBatchGraph._capture = lambda self: (recorded.append(step), record(self))
    generator = torch.Generator().manual_seed(5 + layout.data_rank)
    rows = []
    for step in range(recipe.train.steps):
        batches = []
        for _ in range(recipe.micro_batches(layout.world)):
            tokens = torch.randint(0, 264, (4, 513), generator=generator)
            inner = torch.randperm(2047, generator=generator)[: 40 if step == 6 else step % 4] + 1
            cu_seqlens = torch.cat([torch.tensor([0, 512, 1024, 1536, 2048]), inner]).unique().to(torch.int32)
            batches.append(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(4, 512),
                                 cu_seqlens if recipe.data.documents == "separate" else None))
        result = engine.train_step(batches, 1e-3, judge=lambda loss, norm: "refused" if step == 4 else None)
        rows.append([result.loss, result.grad_norm])
        if step in (0, 5):
            total, tokens = engine.evaluate(batches[:1])
            rows.append([total / tokens, 0.0])
            for length in range(1, 100):  # more shapes than tables are kept of
                logits = next_logits(engine, torch.arange(length))
            rows.append([float(logits.float().norm()), 0.0])  # a sum would cancel: near steps are compared too
            assert engine.work_seconds > 0
    if layout.is_main:
        print("ROWS " + json.dumps([rows, recorded]), flush=True)
    stop()

if __name__ == "__main__":
    main()
"""

RECIPE = {
    "name": "gpu",
    "model": {"layers": 3, "hidden_size": 128, "pattern": "HGH", "heads": 2, "key_dim": 64, "value_dim": 64,
              "attention_heads": 2, "mlp_hidden_size": 256, "vocab_size": 264, "cache": {"block": 256, "slots": 64}},
    "data": {"train": "unused", "tokenizer": "bytes"},
    "train": {"sequence_length": 512, "global_batch_size": 12, "micro_batch_size": 4, "steps": 10,
              "learning_rate": 1e-3, "precision": "bf16", "cuda_graph": True},
}


def run(how: str, ranks: int = 1, **changes: dict) -> tuple[list[list[float]], list[int]]:
    """(loss and gradient norm of every step, steps that recorded)."""
    values = json.loads(json.dumps(RECIPE))
    for key, change in changes.items():
        values[key] = values.get(key, {}) | change
    program = [sys.executable, "-c", PROGRAM]
    if ranks > 1:
        launch = [sys.executable, "-m", "hola_megatron.launch", "--nproc-per-node", str(ranks), "--no-python"]
        program = [*launch, *program]
    done = subprocess.run([*program, json.dumps(values), how], capture_output=True, text=True, cwd=ROOT, check=False,
                          timeout=240, env={**os.environ, "TORCHDYNAMO_DISABLE": "1"})
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    rows, recorded = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("ROWS "))[5:])
    return rows, recorded


ONE = {"train": {"global_batch_size": 4}}  # micro-batch a step: text is written between the first and the second
JOINED = {"data": {"documents": "joined"}}
CASES = {"packed": {}, "joined": JOINED | ONE, "recomputed": {"train": {"recompute": "full"}},
         "attention layers": JOINED | {"model": {"pattern": "HA"}},
         "local": {"model": {"layer_spec": "local"}}, "fp32": {"train": {"precision": "fp32"}},
         "local, recomputed": {"model": {"layer_spec": "local"}, "train": {"recompute": "full"}},
         "logits in pieces": {"train": {"logits_budget_gb": 0.001}},
         "a window": {"model": {"cache": {"block": 256, "slots": 64, "local": "window", "window": 300}}},
         "no slots": {"model": {"cache": {"block": 256, "slots": 0}}},
         "muon": {"train": {"optimizer": "muon"}, "parallel": {"distributed_optimizer": False}}}


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_step_is_the_step(case):
    """One step is refused (4), one has micro-batches with more documents than there is room for (6): recorded anew."""
    want, _ = run("plain", **CASES[case])
    have, recorded = run("graph", **CASES[case])
    joined = "data" in CASES[case]
    assert have == want and recorded == ([0] if joined else [0, 7])


def test_it_is_near_a_step_without_one():
    """Chunks that are none leave no trace; sums over blocks are in another order."""
    for want, have in zip(run("eager", train={"cuda_graph": False})[0], run("graph")[0], strict=True):
        assert have == pytest.approx(want, rel=2e-3)


@pytest.mark.parametrize("parallel", [
    {"tensor": 2, "sequence": True}, {"tensor": 2, "recompute": "full"}, {}, {"distributed_optimizer": False},
    {"overlap": False}], ids=str)
def test_two_gpus(parallel):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    layout = {name: value for name, value in parallel.items() if name != "recompute"}
    changes = {"parallel": layout, "train": {"global_batch_size": 12 if "tensor" in parallel else 24,
                                             "recompute": parallel.get("recompute", "none")}}
    want, _ = run("plain", 2, **changes)
    have, recorded = run("graph", 2, **changes)
    assert have == want and recorded == [0, 7]


def test_four_gpus():
    """Tensor times data ranks: as the recipes of 3 and 7 billion parameters are laid out."""
    if torch.cuda.device_count() < 4:
        pytest.skip("fewer than four GPUs")
    changes = {"parallel": {"tensor": 2, "sequence": True}, "train": {"global_batch_size": 24}}
    want, _ = run("plain", 4, **changes)
    have, recorded = run("graph", 4, **changes)
    assert have == want and recorded == [0, 7]


def test_a_run_with_a_graph_resumes_bit_for_bit(text_data, tmp_path):
    """The whole program: banner, validation, sample text, checkpoints; stopped after step 4 and gone on with."""
    whole, again = tmp_path / "whole", tmp_path / "again"

    def train(folder: Path, name: str) -> str:
        recipe = write_recipe(
            tmp_path / f"{name}.yaml", text_data / "train", run_dir=str(folder), train__steps=8,
            train__cuda_graph=True, train__precision="bf16", model__pattern="HG", model__key_dim=64,
            model__value_dim=64, data__valid=str(text_data / "valid"), valid={"every": 3, "samples": 8},
            checkpoint={"every": 4, "keep": 5}, log={"every": 1, "sample_every": 3, "sample_tokens": 80})
        done = run_program(["-m", "hola_megatron.train", str(recipe)], tmp_path / f"{name}.log", timeout=240)
        assert done.code == 0, done.output[-3000:]
        return done.output

    said = train(whole, "whole")
    assert "is one CUDA graph" in said and "a micro-batch was captured in" in said and "sample | " in said
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step_00000008")
    assert "a micro-batch was captured in" in train(again, "again")
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        want, have = (checkpoint_tensors(folder / "checkpoints" / "step_00000008", kind) for folder in (whole, again))
        assert want.keys() == have.keys() and all(torch.equal(have[name], x) for name, x in want.items())
    assert metric_rows(whole)[-1]["loss"] == metric_rows(again)[-1]["loss"]


def test_a_graph_of_the_operation_serves_other_documents():
    """Recorded after a call with the same cu_seqlens, which is not written to in between; then replayed with others."""
    from hola_kernels import hola_attention, recording
    from hola_kernels.verify_cases import attention_inputs

    inputs = attention_inputs(1, 2048, 2, 64, 64, torch.bfloat16, 0, "cuda")
    cu_seqlens = torch.tensor([0, 700, 1024, 2048, 2048], device="cuda")
    dy = torch.randn(1, 2048, 2, 64, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()

    def call(cu_seqlens: torch.Tensor, **options: int) -> list[torch.Tensor]:
        y = hola_attention(**inputs, cu_seqlens=cu_seqlens, backend="triton", **options)
        return [y, *torch.autograd.grad(y, list(inputs.values()), dy)]

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(cu_seqlens, max_seqlen=2048)
    graph = torch.cuda.CUDAGraph()
    with recording() as tables, torch.cuda.graph(graph, stream=stream):
        found = call(cu_seqlens, max_seqlen=2048)
    for other in ([0, 700, 1024, 2048, 2048], [0, 1, 64, 100, 2048], [0, 2048, 2048, 2048, 2048]):
        cu_seqlens.copy_(torch.tensor(other))
        graph.replay()
        torch.cuda.synchronize()
        want = call(torch.tensor(other))
        for x, y, limit in zip(found, want, [5e-3, *[8e-3] * 3, *[2e-2] * 6], strict=True):
            assert (x.double() - y.double()).norm() <= limit * y.double().norm()
    assert tables.held
