"""Gated DeltaNet checkpoints of flash-linear-attention: their layout always, their logits where they can run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import run_tool
from safetensors.torch import load_file, save_file
from tiny import export, liven, recipe, tokens
from transformers import AutoTokenizer

from hola_megatron.config import CacheConfig
from hola_megatron.data.tokenizer import load_tokenizer
from hola_megatron.errors import CheckpointError
from hola_megatron.hf.auto import load_model
from hola_megatron.hf.convert import from_hf
from hola_megatron.hf.fla import from_fla, ours, theirs, to_fla

SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16, "expand_v": 1.5,
         "intermediate_size": 48, "tie_word_embeddings": False}
# written down from their model, not from our own table of names
LAYER = {"attn_norm.weight": (32,), "mlp_norm.weight": (32,), "attn.A_log": (2,), "attn.dt_bias": (2,),
         "attn.q_proj.weight": (32, 32), "attn.k_proj.weight": (32, 32), "attn.v_proj.weight": (48, 32),
         "attn.g_proj.weight": (48, 32), "attn.a_proj.weight": (2, 32), "attn.b_proj.weight": (2, 32),
         "attn.q_conv1d.weight": (32, 1, 4), "attn.k_conv1d.weight": (32, 1, 4), "attn.v_conv1d.weight": (48, 1, 4),
         "attn.o_norm.weight": (24,), "attn.o_proj.weight": (32, 48), "mlp.gate_proj.weight": (48, 32),
         "mlp.up_proj.weight": (48, 32), "mlp.down_proj.weight": (32, 48)}
TOP = {"model.embeddings.weight": (64, 32), "model.norm.weight": (32,), "lm_head.weight": (64, 32)}


def their_tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = TOP | {f"model.layers.{n}.{name}": shape for n in range(2) for name, shape in LAYER.items()}
    return {name: torch.randn(shape, generator=g) * 0.2 for name, shape in shapes.items()}


def their_folder(path: Path, tensors: dict[str, torch.Tensor] | None = None, **config: object) -> Path:
    path.mkdir()
    values = {"model_type": "gated_deltanet", "architectures": ["GatedDeltaNetForCausalLM"], **SHAPE, **config}
    (path / "config.json").write_text(json.dumps(values))
    save_file(their_tensors() if tensors is None else tensors, path / "model.safetensors")
    return path


def test_their_layout_comes_in_and_goes_out_bit_for_bit(tmp_path):
    source = their_folder(tmp_path / "theirs")
    imported = from_fla(source, tmp_path / "ours")
    model = load_model(imported)
    expected = their_tensors()
    assert model.config.layer_kinds == ("gdn", "gdn") and model.config.value_dim == 24
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[theirs(name)].reshape(tensor.shape)) and ours(theirs(name)) == name
    to_fla(imported, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == expected.keys() and all(torch.equal(back[name], expected[name]) for name in back)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: config[name] for name in SHAPE} == SHAPE and config["architectures"] == ["GatedDeltaNetForCausalLM"]


def test_their_tokenizer_gives_what_the_model_takes(tmp_path):
    """A copied tokenizer.json of transformers' generic class gave token_type_ids, of which generate died."""
    source = their_folder(tmp_path / "theirs")
    load_tokenizer("bytes").save_pretrained(source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    del settings["model_input_names"]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(from_fla(source, tmp_path / "ours"))
    assert list(tokenizer(["a", "bc"], padding=True)) == ["input_ids", "attention_mask"]


def test_hola_starts_from_their_weights_with_a_fresh_cache(tmp_path):
    imported = from_fla(their_folder(tmp_path / "theirs"), tmp_path / "ours", CacheConfig(block=8, slots=3))
    model = load_model(imported)
    mixer = model.model.layers[1].mixer
    assert model.config.layer_kinds == ("hola", "hola") and model.config.cache_block == 8
    assert mixer.gate.eq(-4).all() and mixer.sink.eq(0).all() and mixer.gamma_k.eq(1).all()
    assert torch.equal(mixer.A_log, their_tensors()["model.layers.1.attn.A_log"])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mixer.gate.fill_(-torch.inf)  # a shut cache leaves their model
    plain = load_model(from_fla(tmp_path / "theirs", tmp_path / "gdn"))
    torch.testing.assert_close(model(tokens(1, 30)).logits, plain(tokens(1, 30)).logits)


PUBLISHED = {"use_gdn_swa": True, "gdn_swa_evict": "betae", "gdn_swa_window": 3, "gdn_swa_chunk": 8,
             "gdn_swa_gate_init": -4.0, "gdn_swa_cache_norm": "rms"}


def published_tensors(names: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return their_tensors() | {f"model.layers.{n}.attn.{name}": torch.randn(shape, generator=g)
                              for n in range(2) for name, shape in names.items()}


@pytest.mark.parametrize("names", [
    {"gdn_swa_gate": "gate", "gdn_swa_sink": "sink", "gdn_swa_q_norm.weight": "gamma_q",
     "gdn_swa_k_norm.weight": "gamma_k"},
    {"swa_gate_logit": "gate", "swa_gamma_q": "gamma_q", "swa_gamma_k": "gamma_k"}, {"gdn_swa_lambda": "gate"}])
def test_a_published_hola_comes_in_with_its_cache(names, tmp_path, capsys):
    sizes = {"gate": (2,), "sink": (2,), "gamma_q": (16,), "gamma_k": (16,)}
    tensors = published_tensors({name: sizes[meaning] for name, meaning in names.items()})
    imported = from_fla(their_folder(tmp_path / "theirs", tensors, **PUBLISHED), tmp_path / "ours")
    model, said = load_model(imported), capsys.readouterr().out
    config = model.config
    assert (config.layer_kinds, config.cache_slots, config.cache_block) == (("hola", "hola"), 3, 8)
    assert (config.cache_score, config.cache_read_norm, config.cache_gate_init) == ("betae", "rms", -4.0)
    assert config.cache_sink == ("sink" in names.values())
    state = model.state_dict()
    for name, meaning in names.items():
        for n in range(2):
            assert torch.equal(state[f"model.layers.{n}.mixer.{meaning}"], tensors[f"model.layers.{n}.attn.{name}"])
        assert f"{name} is the {meaning}" in said
    for meaning in {"gamma_q", "gamma_k"} - set(names.values()):
        assert state[f"model.layers.0.mixer.{meaning}"].eq(1).all() and f"no {meaning}, so it is 1" in said
    with torch.no_grad():
        assert model(tokens(1, 40)).logits.isfinite().all()


def test_one_gate_for_all_heads_is_given_to_each(tmp_path):
    tensors = published_tensors({"gdn_swa_gate": (1,)})
    model = load_model(from_fla(their_folder(tmp_path / "theirs", tensors, **PUBLISHED), tmp_path / "ours"))
    gate = model.model.layers[1].mixer.gate
    assert gate.shape == (2,) and gate.eq(tensors["model.layers.1.attn.gdn_swa_gate"]).all()


@pytest.mark.parametrize(("change", "tensors", "named"), [
    ({"gdn_swa_evict": "fifo"}, {}, r"gdn_swa_evict is 'fifo', not one of betae, e, betav"),
    ({"gdn_swa_rope": True, "gdn_swa_window": 0}, {}, r"gdn_swa_rope is True, which is not.*; gdn_swa_window is 0"),
    ({"gdn_swa_cache_norm": None}, {}, "gdn_swa_cache_norm is missing"),
    ({}, {"gdn_swa_wedge": (3, 3)}, r"0.attn.gdn_swa_wedge \[3, 3\] has no counterpart here.*--tensor NAME="),
    ({}, {"gdn_swa_sink": (7,)}, r"gdn_swa_sink is \[7\], a sink is \[2\]"),
    ({}, {"swa_gate": (2,)}, "layers.0 has two tensors that mean gate"),
    ({"use_gdn_swa": False}, {}, r"gdn_swa_gate.* does not belong to this model|is not the Gated DeltaNet"),
])
def test_what_a_published_hola_has_and_ours_has_not_is_named(change, tensors, named, tmp_path):
    held = published_tensors({"gdn_swa_gate": (2,), **tensors})
    source = their_folder(tmp_path / "theirs", held, **PUBLISHED | change)
    with pytest.raises(CheckpointError, match=named) as caught:
        from_fla(source, tmp_path / "ours")
    assert "\n" not in str(caught.value) and not (tmp_path / "ours").exists()


def test_a_published_hola_is_not_given_a_second_cache_and_its_tensors_can_be_told(tmp_path, capsys):
    held = published_tensors({"gdn_swa_x1": (2,), "gdn_swa_x2": (16,)})
    source = their_folder(tmp_path / "theirs", held, **PUBLISHED)
    ours_at = str(tmp_path / "ours")
    done = run_tool("convert", ["from-fla", str(source), ours_at, "--exact-cache"], capsys)
    assert done.code == 2 and "have an exact cache of their own" in done.output
    done = run_tool("convert", ["from-fla", str(source), ours_at], capsys)
    assert done.code == 2 and "gdn_swa_x1 [2] has no counterpart" in done.output
    done = run_tool("convert", ["from-fla", str(source), ours_at, "--tensor", "gdn_swa_x1=lamda"], capsys)
    assert done.code == 2 and "must be NAME=MEANING with one of gate, sink" in done.output
    told = ["--tensor", "gdn_swa_x1=gate", "--tensor", "gdn_swa_x2=gamma_k"]
    done = run_tool("convert", ["from-fla", str(source), ours_at, *told, "--tensor", "typo=gate"], capsys)
    assert done.code == 2 and "--tensor typo: the folder has no tensor of this name" in done.output
    done = run_tool("convert", ["from-fla", str(source), ours_at, *told], capsys)
    assert done.code == 0 and "gdn_swa_x2 is the gamma_k" in done.output, done.output
    assert "flash-linear-attention" in (tmp_path / "ours" / "README.md").read_text()


def test_an_import_can_be_trained_on(tmp_path):
    imported = from_fla(their_folder(tmp_path / "theirs"), tmp_path / "ours", CacheConfig(block=16, slots=4))
    made = recipe("H", layers=2, key_dim=16, value_dim=24, mlp_hidden_size=48, vocab_size=64, tie_embeddings=False)
    from hola_megatron.hf.verify import verify

    assert from_hf(imported, tmp_path / "run", made, verify=verify).name == "step_00000000"


@pytest.mark.parametrize(("change", "named"), [
    ({"use_gate": False}, "use_gate is False"), ({"conv_bias": True}, "conv_bias is True"),
    ({"num_v_heads": 4}, "num_v_heads is 4"), ({"output_gate_activation": "sigmoid"}, "output_gate_activation"),
    ({"attn": {"layers": [0], "num_heads": 4, "num_kv_heads": 3}}, "attn.num_kv_heads is 3"),
    ({"attn": {"layers": [0], "num_heads": 4, "window_size": 64}}, "attn.window_size is 64"),
    ({"model_type": "gla"}, "type 'gla'"), ({"num_hidden_layers": 3}, r"model.layers.2.mixer.A_log is missing"),
])
def test_what_ours_cannot_be_is_refused(change, named, tmp_path):
    source = their_folder(tmp_path / "theirs", **change)
    with pytest.raises(CheckpointError, match=named):
        from_fla(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_only_gdn_goes_out(tmp_path):
    with pytest.raises(CheckpointError, match="its layers have an exact cache"):
        to_fla(export(tmp_path / "hola", recipe("HG")), tmp_path / "x")
    with pytest.raises(CheckpointError, match="its state does not decay"):
        to_fla(export(tmp_path / "delta", recipe("G", rule="delta")), tmp_path / "x")
    to_fla(export(tmp_path / "hybrid", recipe("GA")), tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["attn"]["layers"] == [1, 3] and from_fla(tmp_path / "x", tmp_path / "again")


def test_their_model_gives_our_logits(tmp_path, monkeypatch):
    """Their own model code, with their naive recurrence where the kernels would need a GPU."""
    if importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed (pip install flash-linear-attention)")
    try:
        from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
    except ImportError as error:
        pytest.skip(f"flash-linear-attention cannot be imported beside this transformers: {error}")
    use_naive_operations(monkeypatch)
    torch.manual_seed(0)
    model = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(
        **{**SHAPE, "expand_v": 2.0}, fuse_norm=False, fuse_swiglu=False, fuse_cross_entropy=False)).eval()
    liven_theirs(model)
    model.save_pretrained(tmp_path / "theirs")
    x = tokens(2, 90)
    with torch.no_grad():
        expected = model(x, use_cache=False).logits
        found = load_model(from_fla(tmp_path / "theirs", tmp_path / "ours"))(x, use_cache=False).logits
        print(f"largest logit {expected.abs().max():.3f}, max difference {(found - expected).abs().max():.2e}")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert expected.abs().max() > 1
        to_fla(tmp_path / "ours", tmp_path / "back")
        again = GatedDeltaNetForCausalLM.from_pretrained(tmp_path / "back", fuse_norm=False, fuse_swiglu=False).eval()
        assert torch.equal(again(x, use_cache=False).logits, expected)


def liven_theirs(model: torch.nn.Module) -> None:
    """Uneven norms, slow and fast decay, larger matrices than their start values."""
    renamed = {ours(name): p for name, p in model.named_parameters()}
    holder = torch.nn.Module()
    holder.named_parameters = lambda: renamed.items()
    liven(holder)


def use_naive_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch for the operations of their layer that are GPU kernels."""
    import fla.layers.gated_deltanet as layer
    import fla.modules.mlp as mlp
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    def rule(q, k, v, g, beta, A_log, dt_bias, **_):
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        decay = -A_log.exp() * F.softplus(g.float() + dt_bias)
        return naive_recurrent_gated_delta_rule(q=q, k=k, v=v, g=decay, beta=beta.float().sigmoid())

    def convolution(x, weight, **_):
        y = F.conv1d(x.mT, weight[:, None], padding=weight.shape[1] - 1, groups=weight.shape[0])
        return F.silu(y[..., : x.shape[1]]).mT, None

    def gated_norm(self, x, g, **_):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps) * F.silu(g)

    monkeypatch.setattr(layer, "chunk_gated_delta_rule", rule)
    monkeypatch.setattr(layer, "fused_recurrent_gated_delta_rule", rule)
    monkeypatch.setattr(layer, "causal_conv1d", convolution)
    monkeypatch.setattr(layer.FusedRMSNormGated, "forward", gated_norm)
    monkeypatch.setattr(mlp, "swiglu", lambda gate, y: F.silu(gate) * y)
