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
from tiny import export, recipe

import hola_kernels
from hola_megatron.hf.auto import load_model
from hola_megatron.hf.bundle import PUBLIC, bundle

LENGTH, HEADS, KEY, VALUE, BLOCK, SLOTS = 41, 2, 8, 12, 8, 3
ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hola_kernels", "hola_megatron", "megatron"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Blocked())
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
        assert all(torch.equal(x, getattr(kept, name)) for name, x in vars(state).items())
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
