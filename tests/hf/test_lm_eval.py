"""lm-evaluation-harness takes an export as it takes any other model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from test_exported_tokenizer import byte_level, with_tokenizer
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
LAST_WORD = """
task: tiny_last_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{passage.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+passage.split(' ')[-1]}}}}"
metric_list: [{{metric: perplexity}}, {{metric: acc}}]
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
    found = evaluate(folder, tmp_path, ["tiny_choice", "tiny_generate"])
    found |= evaluate(folder, tmp_path, ["tiny_text"], add_bos_token=False)
    picked = [int(score(model, q, "no way") > score(model, q, "yes")) for q in questions]
    assert found["tiny_choice"]["acc,none"] == pytest.approx(sum(p == n % 2 for n, p in enumerate(picked)) / 3)
    # bos before the text, which fits one window of 64
    nats = -sum(score(model, "", q) for q in questions)
    expected = nats / sum(len(q.encode()) for q in questions) / torch.tensor(2.0).log().item()
    assert found["tiny_text"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)
    assert found["tiny_generate"]["exact_match,none"] == 1.0  # batched and left-padded, as alone


def evaluate(folder: Path, tasks: Path, names: list[str], **settings: object) -> dict:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    settings = {"pretrained": folder, "trust_remote_code": True, "dtype": "float32"} | settings
    return simple_evaluate(
        model="hf", model_args=",".join(f"{name}={value}" for name, value in settings.items()), device="cpu",
        batch_size=3, tasks=names, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False))["results"]


TOKENIZERS = {"bytes": None, "bos without a template": ["<s>", "</s>"], "bos by a template": ["<s>", "</s>", "<s>"],
              "no bos": ["<|endoftext|>"]}
PAGE = (" = The play = \n \n The play is a \" tragedy \" , written in 1 @,@ 599 ; it 's well @-@ known . \n \n = = "
        "Plot = = \n \n The ghost ( a king ) returns . ")
# shorter than the window of 64 tokens: lm-eval cuts longer ones from the left, last_word does not
PASSAGES = ["To be, or not to be", "The ghost (a king) returns once more", "It is well known"]


@pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed (pip install 'lm-eval[hf]')")
@pytest.mark.parametrize("name", TOKENIZERS)
def test_our_numbers_are_theirs(name, tmp_path, monkeypatch):
    """The settings in tools/evaluate.py and docs/quality.md: WikiText, any text, LAMBADA; to more than four digits."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import lm_eval.tasks.wikitext as original

    from hola_megatron.evaluate.last_word import last_word
    from hola_megatron.evaluate.load import load
    from hola_megatron.evaluate.perplexity import perplexity
    from hola_megatron.evaluate.wikitext import wikitext

    made = recipe("HG")
    if TOKENIZERS[name]:
        special = list(dict.fromkeys(TOKENIZERS[name]))
        leading = special[0] if len(special) < len(TOKENIZERS[name]) else None
        made = with_tokenizer(byte_level(tmp_path / "tokenizer", special, leading), "HG")
    folder = export(tmp_path / "out", made)
    pages = [PAGE, PAGE[:70] + "\n", PAGE * 3]
    rows = [{"page": page, "question": page, "passage": text} for page, text in zip(pages, PASSAGES, strict=True)]
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, rows)))
    source = Path(original.__path__[0])
    (tmp_path / "preprocess_wikitext.py").write_text((source / "preprocess_wikitext.py").read_text())
    task = (source / "wikitext.yaml").read_text().replace("EleutherAI/wikitext_document_level", "json")
    here = f"dataset_kwargs: {{data_files: {{test: {tmp_path}/data.json}}}}"
    task = task.replace("dataset_name: wikitext-2-raw-v1", here)
    task = "\n".join(line for line in task.splitlines() if not line.startswith(("training_split", "validation_split")))
    (tmp_path / "wikitext.yaml").write_text(task)
    for kind, text in (("rolling", ROLLING), ("last", LAST_WORD)):
        (tmp_path / f"{kind}.yaml").write_text(text.format(data=tmp_path / "data.json"))
    theirs = evaluate(folder, tmp_path, ["wikitext", "tiny_text"], add_bos_token=False)
    theirs |= evaluate(folder, tmp_path, ["tiny_last_word"])

    model, tokenizer = load(folder, dtype=torch.float32, device="cpu")
    window = model.config.max_position_embeddings
    ours = perplexity(model, tokenizer, wikitext(pages), window=window, rolling=True)
    assert ours.per_word == pytest.approx(theirs["wikitext"]["word_perplexity,none"], rel=1e-5)
    assert ours.bits_per_byte == pytest.approx(theirs["wikitext"]["bits_per_byte,none"], rel=1e-5)
    plain = perplexity(model, tokenizer, pages, window=window, rolling=True)
    assert plain.bits_per_byte == pytest.approx(theirs["tiny_text"]["bits_per_byte,none"], rel=1e-5)
    words = last_word(model, tokenizer, PASSAGES)
    assert words.perplexity == pytest.approx(theirs["tiny_last_word"]["perplexity,none"], rel=1e-5)
    assert words.accuracy == theirs["tiny_last_word"]["acc,none"]


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
