"""A rank's memory: against measured peaks, and how it moves with what is changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from hola_kernels.hqlt import flash_window
from hola_megatron.config import load_recipe
from hola_megatron.layers.costs import Share
from hola_megatron.layers.gdn.costs import spans
from hola_megatron.layers.hola import HOLA
from hola_megatron.layers.hola.costs import read_workspace
from hola_megatron.layers.hqlt import HQLT, costs
from hola_megatron.plan.activations import saved_by_layer
from hola_megatron.plan.memory import GB, _moments, live_micro_batches, stage_memory, worst_stage

RECIPES = Path(__file__).parent.parent.parent / "recipes"
TENSOR = ["parallel.tensor=4", "parallel.sequence=true"]

# one H200, bf16, Transformer Engine 2.20.2, torch 2.11.0, triton 3.6.0, commit 29bd998: peak of
# torch.cuda.max_memory_allocated of tools/profile.py in 10^9 bytes. The figures of docs/plan.md.
# Then all logits were made at once, and the output gate of every layer was copied: 1024 bf16 numbers a token.
AT_ONCE = "train.logits_budget_gb=null"
GATES = 24 * 2048 * 1024 * 2
MEASURED = [("hola_340m", ["train.micro_batch_size=32", "train.global_batch_size=64", AT_ONCE], 92.4),
            ("hola_340m", ["train.micro_batch_size=16", "train.global_batch_size=16", AT_ONCE], 49.6)]

# the same at commit 31faf99, with nothing to add: other layers, of docs/plan.md
OTHER_LAYERS = [("gdn_340m", 32, 79.3), ("hqlt_sync_340m", 32, 104.0), ("hqlt_delayed_stream_340m", 32, 104.0),
                ("hqlt_delayed_chunk_340m", 16, 69.0), ("ham_340m_share10", 16, 52.2)]


def memory(name: str, *overrides: str, world: int = 1):
    return worst_stage(load_recipe(RECIPES / f"{name}.yaml", list(overrides)), world)


@pytest.mark.parametrize(("name", "overrides", "gb"), MEASURED)
def test_estimates_meet_measured_peaks(name, overrides, gb):
    gates = GATES * load_recipe(RECIPES / f"{name}.yaml", overrides).train.micro_batch_size
    assert (memory(name, *overrides).allocated + gates) / GB == pytest.approx(gb, rel=0.02)


@pytest.mark.parametrize(("name", "micro_batch", "gb"), OTHER_LAYERS)
def test_estimates_of_other_layers_meet_measured_peaks(name, micro_batch, gb):
    found = memory(name, f"train.micro_batch_size={micro_batch}", "train.global_batch_size=64")
    assert found.allocated / GB == pytest.approx(gb, rel=0.01)


def test_memory_grows_with_the_micro_batch_and_shrinks_with_every_cut():
    sizes = [memory("hola_1b", f"train.micro_batch_size={size}").total for size in (1, 2, 4, 8, 16)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    whole = memory("hola_7b", world=64).total
    tensor = memory("hola_7b", "parallel.tensor=4", world=64).total
    sequence = memory("hola_7b", *TENSOR, world=64).total
    stages = memory("hola_7b", *TENSOR, "parallel.pipeline=4", world=64).total
    assert whole > tensor > sequence > stages
    assert whole > memory("hola_7b", world=512).total  # optimizer state
    assert memory("hola_7b", *TENSOR, "parallel.distributed_optimizer=false", world=64).total > sequence


def test_layers_without_a_state_need_no_room_for_its_gradients():
    changes = ["model.key_dim=256", "model.value_dim=256", "model.cache.slots=0"]
    with_state, without = (Share(load_recipe(RECIPES / "hola_340m.yaml", [*changes, f"model.rule={rule}"]))
                           for rule in ("gdn", "none"))
    assert HOLA.workspace(without) == read_workspace(with_state, HOLA) < HOLA.workspace(with_state)


def test_small_chunks_of_hqlt_are_counted_as_bands():
    assert costs.LEAST_CHUNK == flash_window.LEAST_CHUNK
    by_window = {}
    for window in (15, 16):
        share = Share(load_recipe(RECIPES / "hqlt_delayed_chunk_340m.yaml", [f"model.hqlt.window={window}"]))
        by_window[window] = {term.name for term in costs.saved(share, HQLT)}
    assert by_window[15] ^ by_window[16] == {"bands of q k v and their softmax", "cosines and sines, mask",
                                             "rotated q and k", "v and output of the window"}


def test_recompute_keeps_inputs_and_one_layer():
    recipe = load_recipe(RECIPES / "hola_7b.yaml", [*TENSOR, "train.recompute=full"])
    share, found = Share(recipe), stage_memory(recipe, 64, 0)
    stream = share.norm_tokens * recipe.model.hidden_size * 2
    layer = sum(term.bytes for term in saved_by_layer(share, HOLA))
    assert found.moment == "backward"
    assert found.parts["activations"] + found.parts["kernels"] == pytest.approx(31 * stream + layer)


def test_long_context_is_cut_by_context_ranks():
    long = [*TENSOR, "train.sequence_length=65536", "train.global_batch_size=64"]
    alone, cut = (memory("hola_7b", *long, f"parallel.context={ranks}", world=64) for ranks in (1, 4))
    for part in ("activations", "logits"):
        assert cut.parts[part] == pytest.approx(alone.parts[part] / 4, rel=0.01)
    assert cut.parts["messages"] > alone.parts["messages"] / 4  # what is laid, gathered and sent


@pytest.mark.parametrize(("stages", "chunks", "stage", "held"), [
    (1, 1, 0, 1), (4, 1, 0, 4), (4, 1, 3, 1), (4, 2, 0, (2 * 3 + 4 + 1) / 2), (4, 2, 3, (0 + 4 + 1) / 2)])
def test_micro_batches_a_stage_holds(stages, chunks, stage, held):
    """1F1B: a stage runs ahead of the last by as many micro-batches as there are stages behind it."""
    recipe = load_recipe(RECIPES / "hola_7b.yaml",
                         [*TENSOR, f"parallel.pipeline={stages}", f"parallel.virtual_pipeline={chunks}"])
    assert live_micro_batches(recipe, 64, stage) == held


def test_few_micro_batches_are_all_a_stage_can_hold():
    recipe = load_recipe(RECIPES / "hola_7b.yaml", [*TENSOR, "parallel.pipeline=4", "train.global_batch_size=8"])
    assert live_micro_batches(recipe, 64, 0) == 2


def test_the_first_stage_holds_more_than_the_last_but_no_logits():
    recipe = load_recipe(RECIPES / "hola_13b.yaml", ["parallel.pipeline=4"])
    first, last = stage_memory(recipe, 64, 0), stage_memory(recipe, 64, 3)
    assert first.parts["logits"] == 0 < last.parts["logits"] or last.moment == "backward"
    assert first.parts["activations"] > 3 * last.parts["activations"]
    assert worst_stage(recipe, 64).stage == 0


def test_logits_keep_to_their_budget():
    """32 x 2048 tokens of 32,000 logits are 4.2 GB, and twice that in an uncut loss."""
    large = ["train.micro_batch_size=32", "train.global_batch_size=64"]
    sizes = {}
    for budget in ("null", "10", "1", "0.1"):
        recipe = load_recipe(RECIPES / "hola_340m.yaml", [*large, f"train.logits_budget_gb={budget}"])
        sizes[budget] = _moments(recipe, 1, 0)["loss"]["logits"] / GB
    gradients = (32 * 2048 * 1024 * 2 + 32000 * 1024 * (2 + 4)) / GB  # of the inputs and of the weight
    assert sizes["null"] == sizes["10"] > 8.3
    assert 0 < sizes["1"] - gradients <= 1.01 and 0 < sizes["0.1"] - gradients <= 0.11


def test_fp8_keeps_inputs_in_one_byte_and_weights_twice_more():
    recipes = [load_recipe(RECIPES / "hola_1b.yaml", [f"fp8.recipe={x}"]) for x in ("null", "current")]
    wide, narrow = (stage_memory(recipe, 8, 0).parts for recipe in recipes)
    share = Share(recipes[0])
    inputs = 24 * share.tokens * (2 * 2048 + 2048 + 5632)  # two norms, output projection, down projection
    assert wide["activations"] - narrow["activations"] == pytest.approx(inputs)
    linears = 24 * 2048 * (8 * (4 * 256 + 2) + 48 + 2048 + 3 * 5632)  # 48 rows of padding
    assert narrow["weights"] - wide["weights"] == 2 * linears


def test_muon_keeps_one_moment_of_a_matrix():
    """Against the state that the optimizer of a real model makes."""
    import torch

    from hola_megatron.engine.megatron import MegatronEngine
    from hola_megatron.startup.start import start

    for name in ("adamw", "muon"):
        if name == "muon":
            pytest.importorskip("emerging_optimizers")
        recipe = load_recipe(RECIPES / "hola_tiny.yaml", [f"train.optimizer={name}", "train.precision=bf16",
                                                          "parallel.distributed_optimizer=false"])
        engine = MegatronEngine(recipe, start(recipe))
        inner = engine.state.inner
        moments = sum(x.nbytes for state in inner.optimizer.state.values() for x in state.values()
                      if torch.is_tensor(x))
        masters = sum(x.nbytes for group in inner.fp32_from_float16_groups for x in group)
        assert stage_memory(recipe, 1, 0).parts["optimizer"] == moments + masters


def test_float32_has_no_second_copy_of_the_weights():
    narrow, wide = (stage_memory(load_recipe(RECIPES / "hola_340m.yaml", [f"train.precision={x}"]), 1, 0).parts
                    for x in ("bf16", "fp32"))
    assert wide["weights"] == pytest.approx(2 * narrow["weights"], rel=1e-3)
    assert wide["optimizer"] == pytest.approx(narrow["optimizer"] * 2 / 3, rel=1e-3)


def test_states_are_kept_where_the_kernels_keep_them():
    from hola_kernels.triton_config import keeps_states
    from hola_megatron.layers.gdn.limits import KERNEL_WIDTHS, SAVED_STATE_WIDTH

    assert [keeps_states(w, w, 2) for w in KERNEL_WIDTHS] == [w <= SAVED_STATE_WIDTH for w in KERNEL_WIDTHS]
    assert not any(keeps_states(w, w, 4) for w in KERNEL_WIDTHS)


@pytest.mark.parametrize("changes", [
    {}, {"slots": 0}, {"read_norm": "none"}, {"local": "none"}, {"local": "window", "window": 1},
    {"local": "window", "window": 257}, {"local": "window", "window": 9, "block": 100}, {"merge": "two"},
    {"local": "window", "window": 258, "slots": 0}, {"state_delay": 5}], ids=str)
def test_windows_of_recipes_are_those_of_the_kernels(changes):
    """A planner's recipe check and its costs restate four rules of hola_kernels, which it must not import."""
    from hola_kernels.exact_cache import block_refusal, fused_refusal
    from hola_kernels.exact_cache.read_configs import WINDOW_COLUMNS
    from hola_megatron.layers import hola
    from hola_megatron.layers.hola import costs
    from hola_megatron.layers.hola.mixer import cache_options

    overrides = [f"model.{'' if name == 'state_delay' else 'cache.'}{name}={value}" for name, value in changes.items()]
    model = load_recipe(RECIPES / "hola_340m.yaml", overrides).model
    options = cache_options(model)
    assert costs.reach(model.cache) == options.reach
    assert costs.window_blocks(model.cache) == options.window_blocks
    assert hola.is_fused(model) == (fused_refusal(options) is None)
    assert hola.is_fused_over_ranks(model) == (block_refusal(options) is None)
    assert hola.WINDOW_COLUMNS == WINDOW_COLUMNS


def test_a_long_sequence_is_split_where_the_kernels_split_it():
    pytest.importorskip("triton")
    from hola_kernels.gated_delta import triton_split
    from hola_megatron.layers.gdn import costs

    assert (costs.SPLIT_GAIN, costs.LEAST_SPAN) == (triton_split.GAIN, triton_split.LEAST_CHUNKS)
    assert spans(Share(load_recipe(RECIPES / "hola_340m.yaml")), HOLA) == 0  # 16 short sequences fill the GPU
    one = load_recipe(RECIPES / "hola_340m.yaml", ["train.sequence_length=32768", "train.micro_batch_size=1"])
    assert spans(Share(one), HOLA) == 16  # 8 programs walk a sequence, 132 multiprocessors
