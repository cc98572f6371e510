"""lm-evaluation-harness takes an export as it takes any other model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny import export, recipe

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
GENERATE = """
task: tiny_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{reply}}}}"
generation_kwargs: {{until: ["~~"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


MISSING = [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed (pip install 'lm-eval[hf]')")
def test_lm_eval_runs_on_an_export(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    folder = export(tmp_path / "out", recipe("HG"))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    questions = ["A question of some length?", "Short?", "Yes or no, then? " * 3]
    rows = [{"question": q, "choices": ["yes", "no way"], "answer": n % 2, "reply": reply(model, q)}
            for n, q in enumerate(questions)]
    data = tmp_path / "data.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("generate", GENERATE)):
        (tmp_path / f"{name}.yaml").write_text(text.format(data=data))
    found = evaluate(folder, tmp_path)
    picked = [int(score(model, q, "no way") > score(model, q, "yes")) for q in questions]
    assert found["tiny_choice"]["acc,none"] == pytest.approx(sum(p == n % 2 for n, p in enumerate(picked)) / 3)
    # bos before the text, which fits one window of 64
    nats = -sum(score(model, "", q) for q in questions)
    expected = nats / sum(len(q.encode()) for q in questions) / torch.tensor(2.0).log().item()
    assert found["tiny_text"]["bits_per_byte,none"] == pytest.approx(expected, rel=0.05)
    assert found["tiny_generate"]["exact_match,none"] == 1.0  # batched and left-padded, as alone


def evaluate(folder: Path, tasks: Path) -> dict:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model="hf", model_args=f"pretrained={folder},trust_remote_code=True,dtype=float32", device="cpu", batch_size=3,
        tasks=["tiny_choice", "tiny_text", "tiny_generate"], bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False))["results"]


@torch.no_grad()
def score(model, before: str, text: str) -> float:
    """Log likelihood of bytes after bos and `before`."""
    start = [256, *before.encode()]
    row = torch.tensor([start + list(text.encode())])
    logs = model(row[:, :-1]).logits[0].log_softmax(-1)[len(start) - 1:]
    return float(logs.gather(1, row[0, len(start):, None]).sum())


def reply(model, question: str) -> str:
    row = torch.tensor([[256, *question.encode()]])
    out = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=6, do_sample=False)
    return bytes(i for i in out[0, row.shape[1]:].tolist() if i < 256).decode("utf-8", errors="replace")
