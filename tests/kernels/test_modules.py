"""The layers as plain torch modules: packing, decoding, grouped value heads, names, and the package by itself."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hola_kernels import KernelError
from hola_kernels.modules import GatedDeltaNet, HolaAttention, LayerCache

KERNELS = Path(__file__).parent.parent.parent / "kernels"


def layer(kind: str, **changes) -> GatedDeltaNet:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_heads": 2, "key_dim": 8, "value_dim": 12} | changes
    if kind == "gdn":
        return GatedDeltaNet(**sizes)
    return HolaAttention(**{"block": 8, "slots": 3, "gate_init": 0.5} | sizes)


KINDS = pytest.mark.parametrize("kind", ["gdn", "hola"])


@KINDS
def test_packed_documents_are_what_each_is_alone(kind):
    made, x = layer(kind), torch.randn(1, 50, 24)
    packed = made(x, cu_seqlens=torch.tensor([0, 13, 13, 50]))
    alone = torch.cat([made(x[:, :13]), made(x[:, 13:])], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)


@KINDS
@pytest.mark.parametrize("groups", [1, 3])
def test_prefill_and_steps_are_the_whole_call(kind, groups):
    made, x = layer(kind, num_value_heads=2 * groups), torch.randn(2, 40, 24)
    whole, cache = made(x), LayerCache()
    with torch.no_grad():
        parts = [made(x[:, :21], cache=cache), *(made(x[:, t: t + 1], cache=cache) for t in range(21, 40))]
    held = cache.nbytes()
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        made(x[:, :1], cache=cache)
    assert cache.nbytes() == held


@KINDS
def test_decoding_from_nothing_is_the_whole_call(kind):
    made, x, cache = layer(kind), torch.randn(2, 12, 24), LayerCache()
    with torch.no_grad():
        steps = torch.cat([made(x[:, t: t + 1], cache=cache) for t in range(12)], 1)
    torch.testing.assert_close(steps, made(x), rtol=1e-4, atol=1e-5)


@KINDS
def test_grouped_value_heads_are_repeated_key_heads(kind):
    grouped, full = layer(kind, num_value_heads=6), layer(kind, num_heads=6, num_value_heads=6)
    weights = grouped.state_dict()
    for name in ("q", "k"):
        for part in ("proj", "conv"):
            rows = weights[f"{name}_{part}.weight"].unflatten(0, (2, 8))
            weights[f"{name}_{part}.weight"] = rows.repeat_interleave(3, 0).flatten(0, 1)
    full.load_state_dict(weights)
    x = torch.randn(2, 20, 24)
    torch.testing.assert_close(grouped(x), full(x))


@KINDS
def test_every_parameter_gets_a_gradient_and_start_values_are_drawn(kind):
    made = layer(kind)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    made(torch.randn(1, 30, 24)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(torch.nan)
    torch.manual_seed(1)
    made.reset_parameters()
    assert all(value.isfinite().all() and value.shape == before[name].shape
               for name, value in made.state_dict().items())


def test_value_heads_that_do_not_divide_are_refused():
    with pytest.raises(KernelError, match="num_value_heads: 3 is not a multiple of num_heads = 2"):
        layer("hola", num_value_heads=3)


def test_the_package_installs_by_itself_and_needs_torch_only(tmp_path):
    """`pip install ./kernels` as a user does, and the README's example without anything of the training stack."""
    source, site = tmp_path / "kernels", tmp_path / "site"
    shutil.copytree(KERNELS, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    done = run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation",
               "--target", str(site), str(source))
    assert done.returncode == 0, done.stderr[-2000:]
    example = (KERNELS / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    program = (f"import sys; sys.path.insert(0, {str(site)!r})\n{example}\n"
               "import hola_kernels; print(hola_kernels.__file__)\n"
               "packages = {name.split('.')[0] for name in sys.modules}\n"
               "print(sorted(packages & {'megatron', 'transformers', 'streaming', 'hola_megatron'}))")
    done = run("-I", "-c", program)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("True ") and str(site) in lines[-2] and lines[-1] == "[]"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("path", sorted(KERNELS.glob("hola_kernels/**/*.py")), ids=lambda p: p.stem)
def test_the_package_is_python_3_10(path):
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))


@pytest.mark.parametrize(("kind", "mode"), [("gdn", "stream"), ("gdn", "chunk"), ("hola", "stream")])
@torch.no_grad()
def test_a_delayed_state_goes_on_from_any_cut(kind, mode):
    """Rows of one length, and sequences of unequal length packed."""
    made, x = layer(kind, state_delay=7, state_delay_mode=mode), torch.randn(3, 50, 24)
    whole = made(x)
    assert not torch.allclose(whole, layer(kind)(x))
    for lengths in ([1] * 50, [20, 1, 1, 3, 25], [7, 7, 36], [5, 40, 5]):
        cache = LayerCache()
        parts = [made(part, cache=cache) for part in x.split(lengths, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    cache, at = LayerCache(), [0, 0, 0]
    for lengths in ([9, 0, 14], [4, 16, 1]):
        rows = torch.cat([x[n, at[n]: at[n] + lengths[n]] for n in range(3)])[None]
        parts = made(rows, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0), cache=cache)[0].split(lengths)
        for n, part in enumerate(parts):
            torch.testing.assert_close(part, whole[n, at[n]: at[n] + lengths[n]], rtol=1e-4, atol=1e-5)
        at = [start + length for start, length in zip(at, lengths, strict=True)]
    held = cache.nbytes()
    for step in range(20):
        index = torch.tensor([start + step for start in at])
        one = made(x[torch.arange(3), index][:, None], cache=cache)[:, 0]
        torch.testing.assert_close(one, whole[torch.arange(3), index], rtol=1e-4, atol=1e-5)
    assert cache.nbytes() == held
    with pytest.raises(KernelError, match="state_delay_mode: 'chunk' is for GatedDeltaNet"):
        layer("hola", state_delay=7, state_delay_mode="chunk")
