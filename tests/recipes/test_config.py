"""Recipes: what is refused and how it is said; what the shipped ones hold."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from hola_megatron.config import build_recipe, describe_fields, load_recipe, main
from hola_megatron.errors import RecipeError
from hola_megatron.plan.parameters import parameters_by_part
from hola_megatron.recipe.checks import check_recipe
from hola_megatron.train.recipe_changes import changes

RECIPES = sorted((Path(__file__).parent.parent.parent / "recipes").glob("*.yaml"))
TINY = RECIPES[0].parent / "hola_tiny.yaml"


def refused(*overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        load_recipe(TINY, list(overrides))
    assert error.value.exit_code == 2
    return error.value.problems


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_load_and_are_named_after_their_file(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert check_recipe(recipe, world_size=8) == [] or recipe.name == "hola_tiny"


# total, and what is neither embedding nor untied output: whole, so that any change of a shape shows
PARAMETERS = {
    "hola_tiny": (1_322_944, 1_280_704),
    "hola_46m": (60_564_672, 44_180_672),
    "hola_170m": (199_772_352, 167_004_352),
    "hola_340m": (366_775_680, 334_007_680),
    "hola_1b": (1_400_820_480, 1_335_284_480),
    "hola_1b_hybrid": (1_375_305_792, 1_309_769_792),
    "hola_3b": (3_143_833_728, 2_947_225_728),
    "hola_7b": (7_281_080_320, 7_018_936_320),
    "hola_13b": (14_075_123_840, 13_747_443_840),
    "ham_340m_share10": (373_269_792, 340_501_792),
    "ham_46m": (60_613_728, 44_229_728),
    "hqlt_sync_340m": (366_465_024, 333_697_024),
    "transformer_340m": (341_099_520, 308_331_520),
    "transformer_340m_gqa": (341_099_520, 308_331_520),
    "hola_340m_hybrid_3to1": (360_356_640, 327_588_640),
    "hola_340m_hybrid_6to1": (363_566_160, 330_798_160),
    "gdn_340m_hybrid_swa": (360_347_280, 327_579_280),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_shipped_recipes(name):
    counts = parameters_by_part(load_recipe(TINY.parent / f"{name}.yaml").model)
    assert (counts["total"], counts["total"] - counts["embedding"] - counts["output"]) == PARAMETERS[name]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_sizes_in_a_recipes_comment_are_true(path):
    """"14.08B parameters (13.75B without embeddings)" where a recipe says so, to the digits it gives."""
    said = re.search(r"([\d.]+)([MB]) parameters\b.*?([\d.]+)([MB]) without embedding",
                     " ".join(path.read_text().split("\nname:")[0].replace("#", " ").split()))
    if said is None:
        assert path.stem.startswith(("gdn", "transformer")) or path.stem == "hola_tiny"
        return
    counts = parameters_by_part(load_recipe(path).model)
    found = counts["total"], counts["total"] - counts["embedding"] - counts["output"]
    for number, (digits, unit) in zip(found, (said.group(1, 2), said.group(3, 4)), strict=True):
        places = len(digits.partition(".")[2])
        assert f"{number / {'M': 1e6, 'B': 1e9}[unit]:.{places}f}" == digits


@pytest.mark.parametrize("name", ["hola_13b", "hola_1b_hybrid", "hola_moe_7b_a1b"])
@pytest.mark.parametrize("world", [8, 64])
def test_large_recipes_divide_over_the_usual_machines(name, world):
    assert check_recipe(load_recipe(TINY.parent / f"{name}.yaml"), world_size=world) == []


def test_the_hybrid_has_one_layer_of_attention_in_four():
    kinds = load_recipe(TINY.parent / "hola_1b_hybrid.yaml").model.layer_kinds
    assert len(kinds) == 24 and all(kinds[i].label == ("A" if i % 4 == 3 else "H") for i in range(24))


@pytest.mark.parametrize(("name", "places"), [
    ("hola_340m_hybrid_3to1", range(3, 24, 4)), ("hola_340m_hybrid_6to1", range(6, 24, 7)),
    ("gdn_340m_hybrid_swa", range(3, 24, 4))])
def test_where_the_attention_layers_of_the_340m_hybrids_are(name, places):
    kinds = load_recipe(TINY.parent / f"{name}.yaml").model.layer_kinds
    assert [i for i, kind in enumerate(kinds) if kind.label in ("A", "W")] == list(places)


def test_every_field_is_described():
    rows = describe_fields()
    assert len(rows) > 60
    assert [key for key, _, text in rows if not text] == []


def test_the_program_prints_every_field(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [key for key, _, _ in describe_fields()]
    assert main(["train.schedule"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("train.schedule  \"cosine\"  shape after warm-up")
    with pytest.raises(RecipeError, match="zzz: no field has this text in its name"):
        main(["zzz"])


def test_overrides_change_values_and_aliases_work():
    recipe = load_recipe(TINY, ["train.lr=3e-4", "model.cache.slots=8", "data.valid=null", "parallel.overlap=false"])
    assert recipe.train.learning_rate == 3e-4
    assert recipe.model.cache.slots == 8 and recipe.data.valid is None and recipe.parallel.overlap is False


def test_unknown_keys_are_named_with_the_nearest_known_one():
    assert refused("train.leaning_rate=1") == [
        "train.leaning_rate: no such key (did you mean train.learning_rate?)"]
    assert refused("model.cache.slot=3") == ["model.cache.slot: no such key (did you mean model.cache.slots?)"]
    assert refused("zzz=3") == ["zzz: no such key"]


def test_all_problems_come_at_once():
    problems = refused("train.leaning_rate=1", "model.layers=none", "train.schedule=steps", "model.heads=0", "bad")
    assert len(problems) == 5
    text = "\n".join(problems)
    for part in ("train.leaning_rate", "model.layers: 'none'", "train.schedule: 'steps'",
                 "'cosine', 'linear', 'wsd' or 'constant'", "model.heads: 0", "greater than or equal to 1",
                 "'bad': an override is written"):
        assert part in text


def test_what_does_not_go_together_comes_with_them():
    problems = refused("train.leaning_rate=1", "parallel.tensor=4", "train.min_learning_rate=1.0", "train.beta1=2")
    assert [problem.split(":")[0] for problem in problems] == [
        "train.leaning_rate", "train.beta1", "model.heads", "train.min_learning_rate"], problems
    # the learning rate is not what the recipe says, so nothing is said of what goes with it
    assert len(refused("train.learning_rate=none", "train.min_learning_rate=1.0")) == 1


@pytest.mark.parametrize(("override", "path"), [
    ("model.layers=true", "model.layers"), ("model.layers=2.5", "model.layers"), ("model.pattern=HX", "model.pattern"),
    ("train.beta2=1.0", "train.beta2"), ("parallel.sequence=1", "parallel.sequence"), ("name=a/b", "name"),
    ("train.steps=-1", "train.steps"), ("data.train=[{pth: x}]", "data.train.0.path"), ("data.train=7", "data.train"),
    ("model.cache=3", "model.cache"), ("train.learning_rate=.nan", "train.learning_rate"),
    ("train.learning_rate=.inf", "train.learning_rate")])
def test_wrong_values_are_refused_not_changed(override, path):
    assert any(problem.startswith(f"{path}:") for problem in refused(override)), refused(override)


@pytest.mark.parametrize(("overrides", "said"), [
    (["parallel.tensor=4"], "model.heads: 2 is not a multiple of 4"),
    (["parallel.sequence=true"], "parallel.sequence: true needs parallel.tensor of at least 2"),
    (["parallel.pipeline=3"], "model.layers: 4 is not a multiple of 3"),
    (["train.warmup_steps=5000"], "train.warmup_steps: 5000 is more than"),
    (["parallel.virtual_pipeline=2"], "parallel.virtual_pipeline: needs parallel.pipeline"),
    (["model.vocab_size=265", "parallel.tensor=2"], "model.vocab_size: 265 is not a multiple of 2"),
    (["train.min_learning_rate=1.0"], "train.min_learning_rate: 1.0 is above")])
def test_sizes_that_do_not_divide_are_named(overrides, said):
    assert any(said in problem for problem in refused(*overrides)), refused(*overrides)


@pytest.mark.parametrize(("overrides", "said"), [
    (["train.precision=fp32"], "fp8.recipe: current needs train.precision of bf16"),
    (["model.layer_spec=local"], "fp8.recipe: current needs Transformer Engine's layers"),
    (["fp8.recipe=delayed", "fp8.last_layers_bf16=1"], "fp8.last_layers_bf16: 1 layers in bf16 are not possible"),
    (["fp8.first_layers_bf16=3", "parallel.pipeline=2"], "fp8.first_layers_bf16: 3 is more than the 2 layers"),
    (["model.hidden_size=168"], "model.hidden_size: 168 is not a multiple of 16"),
    (["model.mlp_hidden_size=440", "parallel.tensor=2"],
     "model.mlp_hidden_size: 440 over parallel.tensor = 2 is not a multiple of 16 on every rank"),
    (["model.value_dim=24", "parallel.tensor=2"], "model.heads x model.value_dim: 48 over parallel.tensor = 2"),
    (["train.sequence_length=260", "parallel.context=2"], "train.micro_batch_size x train.sequence_length: 1040")])
def test_fp8_needs_sizes_and_precision(overrides, said):
    problems = refused("train.precision=bf16", "fp8.recipe=current", *overrides)
    assert any(said in problem for problem in problems), problems


def test_fp8_takes_any_number_of_heads():
    """The fused projection of q, k, v, gate, b and a is padded: 2 x 64 x 4 + 4 rows are no multiple of 16."""
    recipe = load_recipe(TINY, ["train.precision=bf16", "fp8.recipe=blockwise", "parallel.tensor=2"])
    assert recipe.fp8.recipe == "blockwise"


def test_number_of_processes_must_fit():
    recipe = load_recipe(TINY, ["parallel.tensor=2"])
    assert "does not divide the 3 processes" in check_recipe(recipe, world_size=3)[0]
    assert "train.global_batch_size" in check_recipe(load_recipe(TINY, ["train.global_batch_size=12"]), world_size=4)[0]


def test_loading_for_a_number_of_processes_checks_what_depends_on_it():
    overrides = ["parallel.tensor=2"]
    assert load_recipe(TINY, overrides, world_size=2).parallel.tensor == 2
    with pytest.raises(RecipeError, match="does not divide the 3 processes"):
        load_recipe(TINY, overrides, world_size=3)


@pytest.mark.parametrize(("text", "said"), [
    ("a: [", "not valid YAML"), ("- 1", "a recipe is a mapping"), ("base: nothing.yaml\nname: x", "no such recipe"),
    ("name: a\ntrain:\n  steps: 1\n  steps: 2", "line 4: steps is given twice; keep one"),
    ("train: {steps: 1}\nname: a\ntrain: {}", "line 3: train is given twice; keep one"),
    ("base: self.yaml", "leads back to itself"), ("base: 3", "must be the file name")])
def test_files_that_are_no_recipe(text, said, tmp_path):
    (tmp_path / "self.yaml").write_text(text)
    with pytest.raises(RecipeError, match=said):
        load_recipe(tmp_path / "self.yaml")


def test_a_mistyped_path_is_met_with_the_nearest_recipe():
    with pytest.raises(RecipeError, match=r"did you mean .*hola_tiny\.yaml"):
        load_recipe(TINY.parent / "hola_tinny.yaml")


def test_a_recipe_survives_being_written_and_read():
    recipe = load_recipe(TINY)
    assert build_recipe(recipe.to_dict()) == recipe


LARGE = ["hola_1b", "hola_3b", "hola_7b", "hola_13b", "hola_1b_hybrid", "hola_moe_7b_a1b"]


@pytest.mark.parametrize("name", LARGE)
def test_every_field_of_a_large_recipe_says_where_it_comes_from(name):
    """Sourced (the paper, OLMoE) or marked a choice, on its own line."""
    lines = (TINY.parent / f"{name}.yaml").read_text().splitlines()
    fields = [line for line in lines if re.match(r"\s*\w+: +[^#\s]", line) and not re.match("(base|name):", line)]
    assert len(fields) > 3
    for line in fields:
        assert re.search(r"#.*(choice|OLMoE|paper)", line), line


@pytest.mark.parametrize("name", ["hola_340m", "hola_170m", "hola_46m", "hola_tiny", "transformer_340m"])
def test_the_others_say_it_at_their_head(name):
    head = (TINY.parent / f"{name}.yaml").read_text().split("\nname:")[0]
    assert re.search("arXiv|choice", head)


@pytest.mark.parametrize(("override", "said"), [
    ("parallel.pipeline=2", "parallel.pipeline: 2 is not possible with train.cuda_graph; set it to 1"),
    ("parallel.context=2", "parallel.context: 2 is not possible with train.cuda_graph; set it to 1"),
    ("fp8.recipe=current", "fp8.recipe: current is not possible with train.cuda_graph; set it to null"),
    ("engine=deepspeed", "engine: deepspeed is not possible with train.cuda_graph; set it to megatron"),
    ("model.backend=torch", "model.backend: torch is not possible with train.cuda_graph; set it to auto or triton"),
    ("model.key_dim=32", "model.key_dim: 32 is not possible with train.cuda_graph, whose kernels take 64, 128, 256"),
    ("train.cuda_graph_documents=3", "train.cuda_graph_documents: 3 is less than train.micro_batch_size = 4"),
    ("data.documents=joined train.cuda_graph_documents=8", "train.cuda_graph_documents: 8 belongs to"),
    ("train.cuda_graph=false train.cuda_graph_documents=8", "train.cuda_graph_documents: 8 belongs to"),
    ("model.conv_width=5", "model.conv_width: 5 is not possible with train.cuda_graph, whose kernels take 4 at most"),
    ("model.cache.score=random", "model.cache.score: random is not possible with train.cuda_graph; set it to betae")])
def test_what_cannot_be_captured_is_refused(override, said):
    assert any(problem.startswith(said) for problem in refused("train.cuda_graph=true", *override.split()))


def test_a_graph_over_data_and_tensor_ranks_is_taken():
    recipe = load_recipe(TINY, ["train.cuda_graph=true", "parallel.tensor=2", "parallel.sequence=true"])
    assert check_recipe(recipe, world_size=4) == []


def test_the_earlier_name_of_the_rule_still_loads():
    """model.decay of recipes, run folders and exports from before model.rule."""
    values = load_recipe(TINY).to_dict()
    del values["model"]["rule"]
    for decay, rule in ((True, "gdn"), (False, "delta")):
        assert load_recipe(TINY, [f"model.decay={str(decay).lower()}"]).model.rule == rule
        values["model"]["decay"] = decay
        assert build_recipe(values).model.rule == rule and values["model"]["decay"] is decay
    assert refused("model.decay=true", "model.rule=gdn") == [
        "model.decay: True is given beside model.rule, which takes its place; leave model.decay out"]
    assert refused("model.decay=3") == ["model.decay: 3 is not allowed; give model.rule: gdn or delta"]
    assert refused("model.rule=null") == [
        "model.rule: None is not allowed; input should be 'gdn', 'delta' or 'none'"]
    assert refused("model.beta_range=3")[0].startswith("model.beta_range: 3 is not allowed")


@pytest.mark.parametrize(("overrides", "said"), [
    ("model.cache.merge=two model.cache.gate_init=-3.0",
     "model.cache.gate_init: -3.0 has no effect without model.cache.merge = add; leave it out (its default is -4.0)"),
    ("model.cache.router_width=8",
     "model.cache.router_width: 8 has no effect without model.cache.score = learned; leave it out (its default is 64)"),
    ("model.delta_steps=3", "model.delta_steps: 3 has no effect without a deltaproduct layer in model.pattern; leave "
                            "it out (its default is 2)"),
    ("model.rule=none model.cache.score=recency model.cache.gate_init=-3.0", "model.cache.gate_init: -3.0 has no "
     "effect without model.rule = gdn or delta; leave it out (its default is -4.0)"),
    ("model.rule=none model.cache.score=recency model.beta_range=2", "model.beta_range: 2 has no effect without "
     "model.rule = gdn or delta; leave it out (its default is 1)"),
    ("model.state_delay_mode=chunk model.pattern=G", "model.state_delay_mode: chunk has no effect without "
     "model.state_delay of 1 or more; leave it out (its default is stream)")])
def test_a_field_without_effect_is_refused(overrides, said):
    assert refused(*overrides.split()) == [said]


def test_a_checkpoint_s_field_without_effect_is_taken_and_free():
    recipe = load_recipe(TINY)
    values = recipe.to_dict()
    values["model"]["delta_steps"] = 3
    assert build_recipe(values, stored=True).model.delta_steps == 3
    saved = SimpleNamespace(run_manifest=lambda: {"recipe": values}, manifest={})
    assert [(change.key, change.free) for change in changes(recipe, saved, "", {})] == [("model.delta_steps", True)]


def test_fields_with_effect_and_defaults_are_taken():
    for overrides in (["model.cache.score=learned", "model.cache.router_width=8"], ["model.cache.gate_init=-3.0"],
                      ["model.pattern=deltaproduct", "model.delta_steps=3"], ["model.cache.merge=two"],
                      ["model.pattern=A", "model.cache.router_width=8"]):
        load_recipe(TINY, overrides)


STATELESS = ("model.rule=none", "model.cache.score=recency")


def test_layers_without_a_state_are_taken_with_scores_that_need_none():
    for score in ("recency", "random", "betav", "learned"):
        assert load_recipe(TINY, ["model.rule=none", f"model.cache.score={score}"]).model.rule == "none"
    load_recipe(TINY, ["model.rule=none", "model.cache.slots=0"])  # nothing is ranked
    load_recipe(TINY, [*STATELESS, "model.pattern=HWA", "parallel.tensor=2", "parallel.pipeline=2"])
    for score in ("betae", "e", "cosine"):
        assert refused("model.rule=none", f"model.cache.score={score}") == [
            f"model.cache.score: {score} is made from a state, and model.rule is none; set it to recency, random, "
            "betav or learned, or model.cache.slots to 0"]


@pytest.mark.parametrize(("override", "said"), [
    ("model.cache.merge=two", "model.cache.merge: two is not possible with model.rule = none; set it to add"),
    ("model.cache.slots=0 model.cache.local=none model.cache.sink=false", "model.cache.sink: false, and a token would "
     "read itself alone (no state, no slots, no local part), its q and k without effect; give model.cache.slots or a "
     "local part"),
    ("model.cache.slots=0 model.cache.block=1 model.cache.sink=false", "model.cache.sink: false, and a token would "
     "read itself alone (no state, no slots, no local part), its q and k without effect; give model.cache.slots or a "
     "local part"),
    ("model.state_delay=4", "model.state_delay: 4 is not possible with model.rule = none; set it to 0"),
    ("parallel.context=2", "parallel.context: 2 is not possible with model.rule = none; set it to 1"),
    ("train.cuda_graph=true", "model.rule: none is not possible with train.cuda_graph; set train.cuda_graph to false"),
    *((f"model.pattern={pattern}", f"model.rule: none is for hola layers, and {pattern[2:]} layers read a state; "
       f"{first}model.pattern to H, W and A without {pattern[2:]}") for pattern, first in (
        ("H,gdn", "set it to gdn or delta, or "), ("W,deltaproduct", "set it to gdn or delta, or "),
        ("A,ham", "set it to gdn or delta, or "), ("H,hqlt", "leave it out, or set ")))])
def test_what_does_not_go_without_a_state_is_refused(override, said):
    assert refused(*STATELESS, *override.split(" ")) == [said]


def test_a_delayed_state_is_refused_where_it_is_not_possible():
    assert load_recipe(TINY, ["model.pattern=G", "model.state_delay=64"]).model.state_delay_mode == "stream"
    assert refused("model.state_delay=64", "model.pattern=deltaproduct")[0].startswith(
        "model.state_delay: 64 is for gdn and hola layers")
    assert refused("model.cache.slots=0", "model.cache.score=learned")[0].startswith(
        "model.cache.score: learned selects nothing with model.cache.slots = 0")
    assert load_recipe(TINY, ["model.state_delay=64"]).model.state_delay == 64
    assert refused("model.state_delay=64", "model.state_delay_mode=chunk") == [
        "model.state_delay_mode: chunk is for gdn layers; set it to stream with hola layers"]
    for pattern in "GH":
        assert refused(f"model.pattern={pattern}", "model.state_delay=64", "parallel.context=2")[0].startswith(
            "model.state_delay: 64 is not possible with parallel.context = 2")
        assert any("model.state_delay: 64 is not possible with train.cuda_graph" in problem for problem in refused(
            f"model.pattern={pattern}", "model.state_delay=64", "train.cuda_graph=true"))
