"""The programs of docs/fine_tuning.md and docs/serving.md run as they stand there, on a tiny export."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import export, recipe

from hola_megatron.hf.auto import load_model

DOCS = Path(__file__).parents[2] / "docs"


def programs(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S)


WHOLE, LORA, MERGE = programs("fine_tuning.md")
(SERVE,) = programs("serving.md")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with what the page starts from: an export and a text."""
    export(tmp_path / "out/tiny", recipe("HGHA"))
    texts = [f"note {n}: " + "some words to learn. " * (1 + n % 3) for n in range(12)]
    (tmp_path / "notes.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return tmp_path


def run(program: str, place: Path) -> str:
    environment = os.environ | {"HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                                "CUDA_VISIBLE_DEVICES": ""}
    program = program.replace("max_steps=20", "max_steps=2")
    done = subprocess.run([sys.executable, "-c", program], cwd=place, env=environment, capture_output=True, text=True,
                          timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def moved(place: Path, name: str) -> set[str]:
    """Last words of the parameters that differ between the export and another folder."""
    before, after = (load_model(place / "out" / folder).state_dict() for folder in ("tiny", name))
    assert before.keys() == after.keys()
    return {key.removesuffix(".weight").rpartition(".")[2] for key in before
            if not torch.equal(before[key], after[key])}


def test_all_weights_are_tuned(place):
    run(WHOLE, place)
    assert {"q_proj", "a_proj", "A_log", "gate", "sink", "q_conv", "gate_proj", "embed_tokens"} <= moved(place, "tuned")


def test_lora_moves_its_targets_and_nothing_else(place):
    pytest.importorskip("peft", reason="PEFT is not installed")
    before, trainer = WHOLE.split("arguments =")
    run(before + LORA + "arguments =" + trainer.replace("out/tuned", "out/adapter") + MERGE, place)
    targets = set(re.search(r"TARGETS = \[(.*)\]", LORA).group(1).replace('"', "").split(", "))
    assert moved(place, "merged") == targets


def test_a_batch_of_prompts_is_continued(place):
    shown = run(SERVE, place)
    assert shown.startswith("ROMEO:") and "\nJULIET:\nO Romeo" in shown
