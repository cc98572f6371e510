"""hola_ops.py, the operations as one file: the numbers of hola_kernels, and independence from it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny import SHAPE, export, model, recipe

import hola_kernels
from hola_megatron.hf.auto import load_model
from hola_megatron.hf.bundle import PUBLIC, bundle
from hola_megatron.hf.code import write_code
from hola_megatron.layers.registry import KINDS, parse_pattern

LENGTH, HEADS, KEY, VALUE, BLOCK, SLOTS = 41, 2, 8, 12, 8, 3
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hola_kernels", "hola_megatron", "megatron"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Blocked())
"""
ALONE = BLOCKED + """
import torch, transformers
path = sys.argv[1]
model = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=True)
batch = tokenizer(["ROMEO: I am", "A"], padding=True, return_tensors="pt")
out = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=20, do_sample=False)
x = torch.arange(80).view(2, 40)
torch.save({"generated": out, "logits": model(x).logits.detach(), "prompt": batch["input_ids"]}, sys.argv[2])
assert type(model).__module__.endswith("modeling_hola") and "hola_kernels" not in sys.modules
print("TOKENIZER", type(tokenizer).__name__, tokenizer.padding_side, tokenizer.pad_token)
"""

# of every layer of a table, from the folder of an export's code: its output and the gradient of its input
LAYERS_ALONE = BLOCKED + """
import importlib, torch
from pathlib import Path
folder, cases = Path(sys.argv[1]), torch.load(sys.argv[2])
sys.path.insert(0, str(folder.parent))
configuration = importlib.import_module(folder.name + ".configuration_hola")
kinds = importlib.import_module(folder.name + ".kinds_hola")
found = {}
for name, case in cases.items():
    config = configuration.HolaConfig(**case["config"])
    mixer = kinds.kinds_of(config)[0].mixer(config).double()
    mixer.load_state_dict(case["weights"])
    x = case["x"].requires_grad_()
    y = mixer(x, None, None)
    found[name] = {"y": y.detach(), "dx": torch.autograd.grad(y.square().sum(), x)[0]}
torch.save(found, sys.argv[3])
assert not any(module.split(".")[0] == "hola_kernels" for module in sys.modules)
"""
LAYERS = {
    "hola": {"layer_pattern": "H"},
    "hola_window": {"layer_pattern": "H", "cache_local": "window", "cache_window": 11},
    "hola_window_alone": {"layer_pattern": "H", "cache_local": "window", "cache_window": 11, "cache_slots": 0},
    "hola_itself_and_cache": {"layer_pattern": "H", "cache_local": "none", "cache_read_norm": "none"},
    "hola_block_alone": {"layer_pattern": "H", "cache_slots": 0, "cache_sink": False, "cache_read_norm": "l2"},
    "hola_recency": {"layer_pattern": "H", "cache_score": "recency"},
    "hola_no_state": {"layer_pattern": "H", "rule": "none", "cache_score": "random", "cache_rope_theta": 300.0},
    "gdn": {"layer_pattern": "G"},
    "gdn_delta_negative": {"layer_pattern": "G", "rule": "delta", "beta_range": 2},
    "deltaproduct": {"layer_pattern": "deltaproduct", "delta_steps": 2, "beta_range": 2},
    "gdn_delayed_stream": {"layer_pattern": "G", "state_delay": 8},
    "gdn_delayed_chunk": {"layer_pattern": "G", "state_delay": 8, "state_delay_mode": "chunk"},
    "hola_late": {"layer_pattern": "H", "cache_local": "window", "cache_window": 11, "state_delay": 11},
    "attention": {"layer_pattern": "A", "num_attention_heads": 4, "num_key_value_heads": 2, "attention_qk_norm": True},
    "swa": {"layer_pattern": "W"},
    "ham_cosine": {"layer_pattern": "ham", "ham_router": "cosine", "ham_threshold": 1.0},
    "ham_learned": {"layer_pattern": "ham", "ham_router_width": 5},
    **{f"hqlt_{blend}": {"layer_pattern": "hqlt", "hqlt_blend": blend, "hqlt_window": 8}
       for blend in ("sync", "delayed_stream", "delayed_chunk")},
}


@pytest.fixture(scope="module")
def ops(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    path = tmp_path_factory.mktemp("ops") / "hola_ops.py"
    path.write_text(bundle())
    spec = importlib.util.spec_from_file_location("hola_ops", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["hola_ops"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def arguments(batch: int = 2) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    return {"q": normal(batch, LENGTH, HEADS, KEY), "k": normal(batch, LENGTH, HEADS, KEY),
            "v": normal(batch, LENGTH, HEADS, VALUE), "log_decay": -normal(batch, LENGTH, HEADS).abs() / 50,
            "beta": normal(batch, LENGTH, HEADS).sigmoid(), "gamma_q": 1 + normal(KEY) / 5,
            "gamma_k": 1 + normal(KEY) / 5, "gate": normal(HEADS), "sink": normal(HEADS)}


def test_the_bundle_computes_what_the_package_computes(ops):
    given, shape = arguments(), {"block": BLOCK, "slots": SLOTS}
    for backend in ("torch", "reference"):
        expected, state = hola_kernels.hola_attention(**given, **shape, return_state=True, backend=backend)
        found, kept = ops.hola_attention(**given, **shape, return_state=True, backend=backend)
        assert torch.equal(found, expected)
        assert all(torch.equal(x, getattr(kept, name)) for name, x in state.tensors().items())
    one = {name: x[:, 0] if x.ndim > 2 else x for name, x in given.items()}
    for _ in range(BLOCK + 1):
        expected = hola_kernels.hola_attention_step(**one, state=state)
        assert torch.equal(ops.hola_attention_step(**one, state=kept), expected)
    plain = {name: given[name] for name in ("q", "k", "v", "log_decay", "beta")}
    for found, expected in zip(ops.gated_delta_rule(**plain), hola_kernels.gated_delta_rule(**plain, backend="torch"),
                               strict=True):
        assert torch.equal(found, expected)
    rows = {name: x[:, 0] for name, x in plain.items()}
    states = [torch.zeros(2, HEADS, KEY, VALUE) for _ in range(2)]
    assert torch.equal(ops.gated_delta_step(**rows, state=states[0])[0],
                       hola_kernels.gated_delta_step(**rows, state=states[1])[0])
    assert torch.equal(*states)


def test_the_bundle_convolves_and_norms_as_the_package(ops):
    x, weight, norm = torch.randn(2, LENGTH, VALUE), torch.randn(VALUE, 4), torch.randn(VALUE)
    for found, expected in zip(ops.short_conv(x=x, weight=weight, return_tail=True),
                               hola_kernels.short_conv(x=x, weight=weight, return_tail=True, backend="torch"),
                               strict=True):
        assert torch.equal(found, expected)
    tails = [torch.randn(2, 3, VALUE)] * 2
    step = [run(x=x[:, 0], weight=weight, tail=tail.clone())
            for run, tail in zip((ops.short_conv_step, hola_kernels.short_conv_step), tails, strict=True)]
    assert torch.equal(*step)
    assert torch.equal(ops.gated_rms_norm(x=x, gate=x, weight=norm),
                       hola_kernels.gated_rms_norm(x=x, gate=x, weight=norm, backend="torch"))


def test_the_bundle_names_what_it_cannot_do(ops):
    assert set(PUBLIC) <= set(vars(ops))
    with pytest.raises(ops.KernelError, match="'triton' is not one of auto, reference, torch"):
        ops.gated_rms_norm(x=torch.ones(2), gate=torch.ones(2), weight=torch.ones(2), backend="triton")
    with pytest.raises(ops.KernelError, match=r"must be the same \[B, T, H, K\]"):
        ops.gated_delta_rule(**{n: torch.ones(1, 2, 1, 4 + (n == "k")) for n in ("q", "k", "v", "log_decay", "beta")})


def test_every_name_in_the_bundle_is_defined(tmp_path):
    (tmp_path / "hola_ops.py").write_text(bundle())
    ruff = Path(sys.executable).parent / "ruff"
    if not ruff.exists():
        pytest.skip("ruff is not installed")
    done = subprocess.run([ruff, "check", "--isolated", "--select", "F821,F811,E9", str(tmp_path / "hola_ops.py")],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "hola_kernels." not in "".join(line for line in bundle().splitlines() if line.startswith(("import", "from")))


def test_an_export_runs_where_only_torch_and_transformers_are(tmp_path):
    folder = export(tmp_path / "out", recipe())
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", ALONE, str(folder), str(tmp_path / "found.pt")], env=environment,
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "left <|eos|>" in done.stdout
    found = torch.load(tmp_path / "found.pt")
    here = load_model(folder)
    torch.testing.assert_close(found["logits"], here(torch.arange(80).view(2, 40)).logits.detach())
    assert found["prompt"][1].tolist()[:11] == [257] * 10 + [256]  # padded on the left with eos, then bos


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """Of every row of LAYERS, what the package's layer and the bundled one give."""
    folder = tmp_path_factory.mktemp("layers")
    cases, here = {}, {}
    for name, changes in LAYERS.items():
        options = {name: value for name, value in changes.items() if name != "layer_pattern"}
        made = model(changes["layer_pattern"], **options, num_hidden_layers=1)
        mixer, x = made.model.layers[0].mixer, torch.randn(2, LENGTH, SHAPE["hidden_size"], dtype=torch.float64)
        cases[name] = {"config": {**SHAPE, **changes, "num_hidden_layers": 1}, "weights": mixer.state_dict(), "x": x}
        here[name] = _output_and_gradient(mixer, x.clone())
    torch.save(cases, folder / "cases.pt")
    (folder / "exported").mkdir()
    (folder / "exported/__init__.py").touch()
    write_code(folder / "exported")
    done = subprocess.run([sys.executable, "-c", LAYERS_ALONE, *map(str, (folder / "exported", folder / "cases.pt",
                                                                          folder / "found.pt"))],
                          env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return {"package": here, "bundle": torch.load(folder / "found.pt")}


def _output_and_gradient(mixer: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    y = mixer(x.requires_grad_(), None, None)
    return {"y": y.detach(), "dx": torch.autograd.grad(y.square().sum(), x)[0]}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_alone_gives_what_the_packages_layer_gives(name, layers):
    expected, found = layers["package"][name], layers["bundle"][name]
    assert expected["y"].abs().max() > 1e-3 and expected["dx"].abs().max() > 1e-3
    for part, value in expected.items():
        torch.testing.assert_close(found[part], value, rtol=1e-6, atol=1e-8, msg=part)


def test_the_layers_are_of_every_kind():
    assert {kind.name for changes in LAYERS.values() for kind in parse_pattern(changes["layer_pattern"])} == set(KINDS)
