"""Models as recipes describe them: sizes, start values, what their names promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hola_megatron.config import load_recipe
from hola_megatron.layers.hola.costs import mean_visible_pairs
from hola_megatron.model.flops import flops_per_token
from hola_megatron.startup.start import start

RECIPES = Path(__file__).parent.parent.parent / "recipes"


@pytest.fixture(scope="module", autouse=True)
def groups():
    start(load_recipe(RECIPES / "hola_tiny.yaml"))


def counts(name: str) -> dict[str, int]:
    from hola_megatron.model.build import build_model, count_parameters

    return count_parameters(build_model(load_recipe(RECIPES / f"{name}.yaml"), device=torch.device("meta")))


@pytest.mark.parametrize("path", sorted(p for p in RECIPES.glob("*_*m.yaml")), ids=lambda p: p.stem)
def test_a_recipe_has_the_size_its_name_says(path):
    """Names count what is not embedding, as the paper's do, except the Transformer's: 340M with its embedding."""
    found = counts(path.stem)
    named = float(path.stem.rpartition("_")[2].removesuffix("m")) * 1e6
    size = found["total"] - (0 if path.stem.startswith("transformer") else found["embedding"])
    assert size == pytest.approx(named, rel=0.05)


def test_340m_is_the_papers_model():
    hola, gdn = counts("hola_340m"), counts("gdn_340m")
    assert round(hola["total"] / 1e6, 1) == 366.8
    assert hola["exact_cache"] == hola["total"] - gdn["total"] == 12_480


def test_tiny_is_one_to_three_million():
    assert 1e6 < counts("hola_tiny")["total"] < 3e6


def test_matmul_parameters_are_those_of_the_built_model():
    """The formula against the model: every 2-d weight that a token is multiplied with, plus the tied output."""
    from hola_megatron.model.build import build_model
    from hola_megatron.model.flops import matmul_parameters
    from hola_megatron.model.parameters import param_shards

    for name in ("hola_340m", "gdn_46m", "transformer_340m", "hola_tiny"):
        recipe = load_recipe(RECIPES / f"{name}.yaml")
        built = param_shards(build_model(recipe, device=torch.device("meta")), 0, 1)
        counted = sum(p.shape[0] * p.shape[1] for p in built if len(p.shape) == 2 and "_conv" not in p.name)
        assert matmul_parameters(recipe.model) == counted


def test_flops_of_340m():
    assert flops_per_token(load_recipe(RECIPES / "hola_340m.yaml").model, 2048) == pytest.approx(2.37e9, rel=2e-3)


def test_visible_pairs_are_those_counted_one_by_one():
    for length, block, slots in ((300, 64, 16), (64, 64, 16), (2048, 256, 64), (70, 16, 40)):
        pairs = sum(t % block + 1 + min(slots, t // block * block) for t in range(length))
        assert mean_visible_pairs(length, block, slots) == pytest.approx(pairs / length)


def test_start_values_follow_the_method():
    from hola_megatron.model.build import build_model
    from hola_megatron.model.parameters import param_shards

    recipe = load_recipe(RECIPES / "hola_tiny.yaml")
    model = build_model(recipe, device=torch.device("cpu"))
    built = {p.name: p.of(p.parameter.data) for p in param_shards(model, 0, 1)}
    layer = {n.rpartition("layers.1.mixer.")[2]: x for n, x in built.items() if "layers.1.mixer." in n}
    assert torch.equal(layer["gate"], torch.full_like(layer["gate"], -4.0))
    assert torch.equal(layer["sink"], torch.zeros_like(layer["sink"]))
    assert torch.equal(layer["gamma_q"], torch.ones_like(layer["gamma_q"]))
    assert (layer["A_log"].exp() <= 16).all() and (layer["A_log"].exp() >= 1e-4).all()
    dt = torch.nn.functional.softplus(layer["dt_bias"])
    assert (dt >= 9.9e-4).all() and (dt <= 0.1001).all()
    assert layer["q_proj.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert layer["A_log"].dtype == layer["gamma_q"].dtype == torch.float32
    assert not torch.equal(layer["q_proj.weight"], layer["k_proj.weight"])


def test_start_values_depend_on_seed_and_name_only(monkeypatch):
    """Not on the other layers, nor on how many threads draw them."""
    from hola_megatron.model import parameters
    from hola_megatron.model.build import build_model
    from hola_megatron.model.parameters import param_shards

    def built(*overrides: str, threads: int = 5) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(parameters, "_threads", lambda: threads)
        recipe = load_recipe(RECIPES / "hola_tiny.yaml", list(overrides))
        return {p.name: p.of(p.parameter.data).clone()
                for p in param_shards(build_model(recipe, device=torch.device("cpu")), 0, 1)}

    hola, gdn, other = built(), built("model.pattern=G", threads=1), built("train.seed=7")
    assert all(torch.equal(hola[name], x) for name, x in gdn.items())
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(hola[name], other[name])
