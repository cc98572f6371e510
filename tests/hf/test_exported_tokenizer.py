"""What users do with an export's tokenizer: batches for generation, padding, training on with a standard collator."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tiny import export, recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, GenerationConfig

from hola_megatron.data.tokenizer import load_tokenizer
from hola_megatron.hf.convert import from_hf, to_hf

TEXTS = ["To be, or not to be", "A", "that is the question"]


def byte_level(folder: Path, special: list[str], leading: str | None = None, **settings: Any) -> Path:
    """A byte-level tokenizer.json with these special tokens; `leading` is put before texts by its template."""
    folder.mkdir(parents=True)
    names = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), *special]
    form = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    form.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    form.decoder = tokenizers.decoders.ByteLevel()
    form.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in special])
    if leading:
        form.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{leading} $A", special_tokens=[(leading, form.token_to_id(leading))])
    form.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def with_tokenizer(folder: Path, pattern: str = "HGA") -> Any:
    """MICRO with the tokenizer in `folder`."""
    made = recipe(pattern)
    return dataclasses.replace(made, data=dataclasses.replace(made.data, tokenizer=str(folder)))


TOKENIZERS = {
    "pad, bos without a template": ["<s>", "</s>", "<pad>"],
    "no pad": ["<s>", "</s>"],
    "no bos": ["<|endoftext|>"],
    "reserved": ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"],
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_call_that_everyone_writes(name, tmp_path):
    """model.generate(**tokenizer(texts, padding=True)) runs, and continues each text as alone and as trained."""
    source = byte_level(tmp_path / "tokenizer", TOKENIZERS[name])
    folder = export(tmp_path / "out", with_tokenizer(source))
    ours = load_tokenizer(str(source))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = model.generate(**tokenizer(TEXTS, return_tensors="pt", padding=True), max_new_tokens=8, do_sample=False)
    for text, row in zip(TEXTS, found, strict=True):
        start = [] if ours.bos_id is None else [ours.bos_id]
        alone = torch.tensor([start + ours.encode(text)])
        expected = model.generate(alone, attention_mask=torch.ones_like(alone), max_new_tokens=8, do_sample=False)
        assert row[-8:].tolist() == expected[0, alone.shape[1]:].tolist()


def test_bytes_too(tmp_path):
    folder = export(tmp_path / "out", recipe("HG"))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    batch = AutoTokenizer.from_pretrained(folder)(TEXTS, return_tensors="pt", padding=True)
    assert model.generate(**batch, max_new_tokens=4).shape[1] == batch["input_ids"].shape[1] + 4


@pytest.mark.parametrize(("name", "pad"), [("pad, bos without a template", "<pad>"), ("no pad", "</s>"),
                                           ("reserved", "<|reserved_special_token_0|>")])
def test_an_export_pads_with_a_token_of_its_own(name, pad, tmp_path):
    """Through a run: tokenizer, config.json and generation_config.json agree, and collators keep the label of eos."""
    source = byte_level(tmp_path / "tokenizer", TOKENIZERS[name])
    from_hf(export(tmp_path / "seed", with_tokenizer(source, "G")), tmp_path / "run")
    to_hf(tmp_path / "run", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.pad_token == pad
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / file).read_text())["pad_token_id"] == tokenizer.pad_token_id
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == tokenizer.eos_token_id
    rows = [{"input_ids": [*tokenizer(text).input_ids, tokenizer.eos_token_id]} for text in TEXTS]
    labels = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)["labels"]
    kept = int((labels == tokenizer.eos_token_id).sum())
    assert kept == (0 if pad == "</s>" else 3)
    assert ("**The pad token is eos**" in (tmp_path / "out" / "README.md").read_text()) == (kept == 0)
