"""tools/bench_ham.py on the CPU: the shares that it sets are kept, and what it cannot do is refused by name."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from helpers import ROOT, run_tool

import hola_kernels.ham as ham

RECIPE = "recipes/ham_340m_share10.yaml"
SMALL = ["model.layers=1", "model.hidden_size=64", "model.heads=2", "model.key_dim=16", "model.value_dim=16",
         "model.mlp_hidden_size=64", "model.vocab_size=320", "train.precision=fp32", "train.sequence_length=64",
         "train.micro_batch_size=2"]


def loaded():
    spec = importlib.util.spec_from_file_location("tool_bench_ham", ROOT / "tools/bench_ham.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_row_for_every_share(capsys):
    words = [str(ROOT / RECIPE), *SMALL, "--shares", "0", "0.5", "--steps", "1", "--warmup", "0"]
    done = run_tool("bench_ham", words, capsys)
    assert done.code == 0, done.output
    rows = [line.split("|")[1:-1] for line in done.output.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:]] == ["0", "0.5"]
    assert all(float(row[1]) > 0 and float(row[2].replace(",", "")) > 0 for row in rows[2:])


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_uniform_scores_keep_the_share(monkeypatch, share):
    monkeypatch.setattr(ham, "routing_score", loaded().uniform_scores)
    g = torch.Generator().manual_seed(0)
    x = {name: torch.randn(1, 600, 4, 8, generator=g) for name in "qkv"}
    x |= {"log_decay": torch.zeros(1, 600, 4), "beta": torch.rand(1, 600, 4, generator=g),
          "mix": torch.zeros(1, 600, 4, 2), "gamma_q": torch.ones(8), "gamma_k": torch.ones(8)}
    torch.manual_seed(1)
    _, keep, _ = ham.ham_attention(**x, threshold=torch.tensor([1 - share]))
    assert float(keep.float().mean()) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(("words", "message"), [
    (["recipes/hola_tiny.yaml"], "has no ham layer"),
    ([RECIPE, "--shares", "2"], "--shares: must lie between 0 and 1")])
def test_what_it_cannot_do_is_said_in_one_line(words, message, capsys):
    done = run_tool("bench_ham", [str(ROOT / words[0]), *words[1:]], capsys)
    assert done.code == 2 and message in done.output and "Traceback" not in done.output
