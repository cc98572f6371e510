"""Known-bad combinations: each is found by name where it is, and not where it is not."""

from __future__ import annotations

import dataclasses

import pytest

from hola_megatron.doctor import facts as facts_module
from hola_megatron.doctor.facts import Facts, numbers_of
from hola_megatron.doctor.known_bad import RULES, find_known_bad

GOOD_PACKAGES = {
    "torch": "2.11.0+cu130", "triton": "3.6.0", "megatron-core": "0.19.2", "transformer-engine": "2.20.2",
    "transformer-engine-cu13": "2.20.2", "transformer-engine-torch": "2.20.2+cu13torch2.11.0",
    "nvidia-cublas": "13.1.0.3", "numpy": "2.1.3", "transformers": "4.57.6", "mosaicml-streaming": "0.13.0",
    "torchvision": "0.26.0"}
GOOD = Facts(python=(3, 12), packages=GOOD_PACKAGES, cuda="13.0", devices=("NVIDIA H200",), capability=(9, 0),
             gpu_file=True)


def with_packages(**changed: str | None) -> Facts:
    packages = {**GOOD_PACKAGES, **{name.replace("_", "-"): version for name, version in changed.items()}}
    return dataclasses.replace(GOOD, packages={name: x for name, x in packages.items() if x is not None})


def engine(version: str) -> dict[str, str]:
    return {"transformer_engine": version, "transformer_engine_cu13": version, "transformer_engine_torch": version}


def bad(facts: Facts) -> list[str]:
    return [finding.name for finding in find_known_bad(facts) if finding.level == "bad"]


def notes(facts: Facts) -> list[str]:
    return [finding.name for finding in find_known_bad(facts) if finding.level == "note"]


def test_the_checked_installation_has_no_bad_combination():
    assert bad(GOOD) == [] and notes(GOOD) == ["triton on Hopper"]
    assert find_known_bad(with_packages(torch="2.13.0+cu130", triton="3.7.1")) == []


@pytest.mark.parametrize(("facts", "name"), [
    (dataclasses.replace(GOOD, python=(3, 11)), "python"),
    (dataclasses.replace(GOOD, apex_optimizers=False), "apex"),
    (dataclasses.replace(GOOD, load_errors={"transformer-engine": "OSError: undefined symbol"}), "transformer-engine"),
    (with_packages(**engine("2.13.0")), "transformer-engine and cuBLAS"),
    (with_packages(**engine("2.16.1"), nvidia_cublas="13.1.1.3"), "transformer-engine and cuBLAS"),
    (with_packages(transformer_engine_torch="2.19.0"), "transformer-engine's parts"),
    (dataclasses.replace(GOOD, cuda="12.8"), "transformer-engine and CUDA"),
    (dataclasses.replace(GOOD, devices=(), capability=None), "torch and the driver"),
    (dataclasses.replace(with_packages(torch="2.11.0+cpu", torchvision=None), devices=(), capability=None, cuda=None),
     "torch"),
    (dataclasses.replace(with_packages(torch="2.13.0+cpu"), devices=(), capability=None, cuda=None, gpu_file=False),
     "torchvision"),
    (with_packages(triton="3.7.0"), "triton on Hopper"), (with_packages(triton="3.4.0"), "triton on Hopper"),
    (with_packages(triton="3.5.1"), "triton"), (with_packages(megatron_core="0.16.1"), "megatron-core"),
    (with_packages(megatron_core=None), "megatron-core")], ids=lambda x: x if isinstance(x, str) else "")
def test_a_bad_combination_is_found_by_name(facts, name):
    found = [finding for finding in find_known_bad(facts) if finding.name == name]
    assert [finding.level for finding in found] == ["bad"]
    assert found[0].what and found[0].fix


@pytest.mark.parametrize("facts", [
    with_packages(**engine("2.12.0")), with_packages(**engine("2.17.0")),
    with_packages(**engine("2.15.0"), nvidia_cublas="13.4.1.3"),
    dataclasses.replace(GOOD, apex_optimizers=True), with_packages(triton="3.7.1", torch="2.13.0+cu130"),
    dataclasses.replace(with_packages(triton="3.7.0"), capability=(8, 0), devices=("NVIDIA A100",))])
def test_what_is_beside_a_bad_combination_is_not_called_bad(facts):
    assert bad(facts) == []


@pytest.mark.parametrize(("facts", "name"), [
    (with_packages(triton="3.9.0", torch="2.15.0+cu132"), "triton"),
    (with_packages(triton="3.7.1"), "triton and torch"),
    (with_packages(numpy="2.4.6"), "triton and numpy"), (with_packages(numpy="2.4.6"), "mosaicml-streaming"),
    (with_packages(transformers="5.17.0"), "mosaicml-streaming"),
    (with_packages(nvidia_cudnn_frontend="1.26.0"), "cudnn-frontend"),
    (dataclasses.replace(GOOD, load_errors={"cudnn": "RuntimeError: compiled against 9.19, found 9.14"}), "cudnn")])
def test_notes_are_told_and_are_not_bad(facts, name):
    assert name in notes(facts) and bad(facts) == []


def test_every_rule_can_be_silent():
    """On a machine with nothing but Python and Megatron no rule fails for want of a package."""
    bare = Facts(python=(3, 12), packages={"megatron-core": "0.19.2"})
    assert [finding for rule in RULES if (finding := rule(bare))] == []


def test_versions_are_compared_as_numbers():
    assert numbers_of("2.20.2+cu13") == (2, 20, 2) > numbers_of("2.9")
    assert numbers_of("3.6.0.post1") == (3, 6, 0) and numbers_of("13.1.0.3") < (13, 2, 0, 9)


def test_a_package_called_apex_without_optimizers_is_not_nvidias(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert facts_module._apex_optimizers() is False
    (tmp_path / "apex" / "optimizers").mkdir()
    assert facts_module._apex_optimizers() is True
