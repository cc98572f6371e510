"""Studies in a temporary folder, small enough for a test."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "hf"))

MODEL = {
    "name": "small",
    "model": {"layers": 1, "hidden_size": 16, "heads": 2, "key_dim": 8, "value_dim": 8, "attention_heads": 2,
              "mlp_hidden_size": 16, "vocab_size": 64, "cache": {"block": 8, "slots": 4}},
    "data": {"train": "generated", "tokenizer": "bytes", "documents": "joined"},
    "train": {"sequence_length": 64, "global_batch_size": 2, "micro_batch_size": 2, "steps": 3, "learning_rate": 1e-3,
              "precision": "fp32"}}
STUDY = {
    "name": "small", "title": "A small study", "question": "Does it run?", "recipe": "model.yaml", "seeds": [1, 2],
    "task": {"pairs": [2], "test_pairs": [2, 4], "test_samples": 4, "every": 2},
    "arms": [{"name": "gdn", "overrides": {"model.pattern": "G"}},
             {"name": "betae", "note": "beta|e|"},
             {"name": "later", "overrides": {"model.cache.score": "nothing"}, "if_supported": True},
             {"name": "oracle", "overrides": {"model.cache.score": "recency"}, "given_score": "task"}],
    "rules": [{"name": "pays", "arm": "betae", "than": ["gdn"], "measure": "accuracy/length_64/pairs_2", "by": 2.0,
               "in_seeds": 2}]}


@pytest.fixture
def make(tmp_path) -> Callable[..., Path]:
    """Write a study with changed fields; returns the path of its file."""

    def write(**changes: Any) -> Path:
        (tmp_path / "model.yaml").write_text(json.dumps(MODEL))
        path = tmp_path / "study.yaml"
        path.write_text(json.dumps({**copy.deepcopy(STUDY), **changes}))
        return path

    return write
