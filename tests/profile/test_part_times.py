"""Which part of a step a piece of work is counted for: hand-made traces, and a real one of every kind of layer."""

from __future__ import annotations

import importlib
import json
from collections import Counter

import pytest
import torch
from helpers import MICRO
from torch.profiler import ProfilerActivity, profile, record_function

from hola_megatron.config import build_recipe
from hola_megatron.layers.registry import KINDS
from hola_megatron.profile.part_ranges import PREFIX, STEP, named_parts
from hola_megatron.profile.part_times import PartTimes, covered, part_times, read_trace
from hola_megatron.profile.profiler import _parts, _synthetic
from hola_megatron.startup.start import start

MAIN, ENGINE = 1, 2  # threads


class Trace:
    """A trace written by hand, in microseconds."""

    def __init__(self, length: float = 1000):
        self.events = []
        self.span(PREFIX.join(["", "step"]), 0, length, cat="user_annotation")

    def span(self, name, start, end, *, thread=MAIN, cat="cpu_op"):
        self.events.append({"ph": "X", "cat": cat, "name": name, "pid": 9, "tid": thread, "ts": start,
                            "dur": end - start})

    def part(self, name, start, end, thread=MAIN):
        self.span(PREFIX + name, start, end, thread=thread, cat="user_annotation")

    def arrow(self, forward, backward, number, threads=(MAIN, ENGINE)):
        for phase, at, thread in (("s", forward, threads[0]), ("f", backward, threads[1])):
            self.events.append({"ph": phase, "cat": "fwdbwd", "name": "fwdbwd", "id": number, "pid": 9, "tid": thread,
                                "ts": at})

    def kernel(self, launched, start, end, *, name="gemm", thread=MAIN, driver=False):
        number = len(self.events)
        self.events += [
            {"ph": "X", "cat": "cuda_driver" if driver else "cuda_runtime", "name": "launch", "pid": 9, "tid": thread,
             "ts": launched, "dur": 1, "args": {"correlation": number}},
            {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 7, "ts": start, "dur": end - start,
             "args": {"correlation": number, "stream": 7}}]

    def times(self):
        return part_times(self.events)


def test_one_kernel_name_in_two_parts_forward_and_backward():
    trace = Trace()
    trace.part("projections", 10, 40)
    trace.span("aten::mm", 20, 30)
    trace.kernel(21, 100, 150)
    trace.part("MLP", 50, 90)
    trace.span("aten::mm", 60, 70)
    trace.kernel(61, 150, 250, driver=True)
    trace.arrow(60, 305, 1)
    trace.arrow(20, 405, 2)
    for at in (300, 400):
        trace.span("autograd::engine::evaluate_function: MmBackward0", at, at + 50, thread=ENGINE)
        trace.span("MmBackward0", at + 5, at + 40, thread=ENGINE)
    trace.kernel(310, 500, 700, thread=ENGINE)
    trace.kernel(345, 700, 710, name="add", thread=ENGINE)  # the engine's sum of two uses' gradients
    trace.kernel(410, 710, 810, thread=ENGINE)
    times = trace.times()
    assert times.parts == pytest.approx({"MLP": 0.31, "projections": 0.15, "idle": 0.54})
    assert times.step == pytest.approx(sum(times.parts.values())) == pytest.approx(1.0)


def test_a_range_inside_a_backward_function_goes_before_its_forward():
    """One autograd function does the work of state and read; what is in neither range follows the forward."""
    trace = Trace()
    trace.part("gates and layout", 10, 90)
    trace.span("_HolaAttention", 20, 80)
    trace.arrow(20, 300, 1)
    trace.span("_HolaAttentionBackward", 300, 400, thread=ENGINE)
    trace.part("state", 310, 340, thread=ENGINE)
    trace.part("read", 350, 380, thread=ENGINE)
    for launched, begin, end in ((305, 500, 510), (320, 510, 530), (360, 530, 570)):
        trace.kernel(launched, begin, end, name="_backward_kernel", thread=ENGINE)
    parts = trace.times().parts
    assert {name: parts[name] for name in ("gates and layout", "state", "read")} == pytest.approx(
        {"gates and layout": 0.01, "state": 0.02, "read": 0.04})


def test_recomputed_work_belongs_to_its_own_range_and_so_does_its_backward():
    trace = Trace()
    trace.part("norms and residuals", 5, 50)
    trace.span("CheckpointFunction", 10, 40)
    trace.arrow(10, 200, 1)
    trace.span("CheckpointFunctionBackward", 200, 400, thread=ENGINE)
    trace.part("MLP", 210, 250, thread=ENGINE)
    trace.span("aten::mm", 220, 230, thread=ENGINE)
    trace.arrow(220, 310, 2, threads=(ENGINE, ENGINE))
    trace.span("MmBackward0", 310, 340, thread=ENGINE)
    trace.kernel(222, 500, 600, thread=ENGINE)
    trace.kernel(315, 600, 800, thread=ENGINE)
    parts = trace.times().parts
    assert parts["MLP"] == pytest.approx(0.3) and "norms and residuals" not in parts


def test_hidden_communication_is_neither_idle_nor_counted_twice():
    trace = Trace()
    trace.part("MLP", 10, 40)
    trace.kernel(20, 100, 300)
    trace.kernel(50, 200, 500, name="ncclDevKernel_ReduceScatter")
    times = trace.times()
    assert times.parts == pytest.approx({"MLP": 0.2, "communication": 0.2, "idle": 0.6})
    assert times.hidden_communication == pytest.approx(0.1)


def test_kernels_side_by_side_share_the_moment():
    trace = Trace()
    trace.part("MLP", 10, 40)
    trace.part("state", 50, 90)
    trace.kernel(20, 100, 300)
    trace.kernel(60, 200, 400)
    assert trace.times().parts == pytest.approx({"MLP": 0.15, "state": 0.15, "idle": 0.7})


def test_what_spans_cover_together():
    assert covered([]) == 0.0
    assert covered([(5, 9), (0, 2), (1, 4), (6, 7), (9, 10)]) == 4 + 5


def test_parts_without_the_profiler():
    """A step of 10 ms of which 2 wait for data, the device busy for 3/4 of the rest; traced it was busy for 4 of 9."""
    traced = PartTimes(9.0, {"MLP": 3.0, "communication": 1.0, "idle": 5.0}, 0.5, [])
    found = _parts(traced, {"ms_per_step": 10.0, "data_wait_ms": 2.0}, 0.75)
    assert found["share"] == pytest.approx({"MLP": 4.5, "communication": 1.5, "idle": 2.0, "data wait": 2.0})
    assert found["stretched"] == 1.5 and found["profiled_step_ms"] == 9.0
    assert _parts(traced, {"ms_per_step": 10.0}, None)["share"] == traced.parts


def test_gradients_added_up_and_work_nobody_launched():
    trace = Trace()
    trace.span("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 100, 200, thread=ENGINE)
    trace.kernel(150, 300, 320, thread=ENGINE, name="vectorized_add")
    trace.events.append({"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "pid": 0, "tid": 7, "ts": 400,
                         "dur": 30, "args": {"correlation": 12345}})
    parts = trace.times().parts
    assert parts["gradient accumulation"] == pytest.approx(0.02) and parts["rest"] == pytest.approx(0.03)


def test_work_outside_the_step_does_not_count():
    trace = Trace()
    trace.part("MLP", 10, 40)
    trace.kernel(20, 900, 1100)
    trace.kernel(20, -50, -10)
    assert trace.times().parts == pytest.approx({"MLP": 0.1, "idle": 0.9})


def test_every_named_function_is_there():
    """One that was renamed would be counted for another part, silently."""
    for module, name, _ in (found for kind in KINDS.values() for found in kind.timed_functions()):
        assert callable(getattr(importlib.import_module(module), name, None)), f"{module}.{name}"


@pytest.fixture(scope="module")
def engine_of():
    from hola_megatron.engine.megatron import MegatronEngine

    def make(recompute: str, **model):
        values = json.loads(json.dumps(MICRO))
        values["train"] |= {"recompute": recompute, "global_batch_size": 2}
        values["model"] |= model
        recipe = build_recipe(values)
        return MegatronEngine(recipe, start(recipe)), recipe

    return make


def traced(engine, recipe, path):
    batches = _synthetic(recipe, engine.layout)
    with named_parts(engine), profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(STEP):
        engine.train_step(batches, 1e-3)
    profiler.export_chrome_trace(str(path))
    return part_times(read_trace(path))


@pytest.mark.parametrize(("recompute", "passes"), [("none", 3), ("full", 4)])
def test_a_real_step_of_every_kind_of_layer(engine_of, tmp_path, recompute, passes):
    """Matrix products by part are the model's: a linear has one forward and two backward, one more recomputed."""
    engine, recipe = engine_of(recompute)
    times = traced(engine, recipe, tmp_path / "trace.json")
    layers = recipe.model.layers
    counted = Counter(part for _, part in {(w.number, w.part) for w in times.work if w.name == "aten::mm"})
    assert counted["projections"] == counted["MLP"] == 2 * layers * passes
    assert counted["head and loss"] == 3
    assert set(counted) == {"projections", "MLP", "head and loss"}
    assert {"convolution", "state", "selection", "read", "output norm", "softmax attention", "embedding", "optimizer",
            "gates and layout", "norms and residuals", "gradient accumulation"} <= set(times.parts)
    assert times.parts.get("rest", 0) < 0.1 * times.busy
    assert sum(times.parts.values()) == pytest.approx(times.step)


@pytest.mark.parametrize("local", [{}, {"local": "window", "window": 12}], ids=["block", "window"])
def test_the_softmax_of_a_hola_layer_is_part_of_its_read(engine_of, tmp_path, local):
    """A training step keeps no memory after it: the layer reads by `exact_read_only`."""
    cache = {**MICRO["model"]["cache"], **local}
    engine, recipe = engine_of("none", layers=1, pattern="H", cache=cache)
    times = traced(engine, recipe, tmp_path / "trace.json")
    assert {w.part for w in times.work if w.name == "aten::_softmax"} == {"read"}


def test_names_leave_nothing_behind(engine_of, tmp_path):
    """After the profile the engine is as it was: no hook, no replaced function."""
    import hola_megatron.layers.gdn.mixer as mixer

    engine, recipe = engine_of("none")
    before = (mixer.short_conv, engine.config.finalize_model_grads_func, dict(vars(engine.optimizer)))
    traced(engine, recipe, tmp_path / "trace.json")
    assert before == (mixer.short_conv, engine.config.finalize_model_grads_func, dict(vars(engine.optimizer)))
    assert "_update" not in vars(engine)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in engine.model[0].module.modules()
                   if type(m).__name__ in ("GPTModel", "MLP", "GatedDeltaMixer", "HolaMixer", "TransformerLayer"))


@pytest.fixture(scope="module", autouse=True)
def plain():
    torch.set_num_threads(1)
