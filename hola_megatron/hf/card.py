"""The model card (README.md) of an exported folder: what it is, how it was trained, and how to use it.

Everything in it is read from the checkpoint and from the files of the folder itself; unknown values are named as such.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from hola_megatron.checkpoint.folder import Checkpoint
from hola_megatron.data.phases import Phases
from hola_megatron.errors import RecipeError, UserError
from hola_megatron.hf.contained import read_json
from hola_megatron.layers.registry import distinct, expand
from hola_megatron.log.metrics import read_rows

CARD = "README.md"
TESTED = ("4.57.6", "5.24.0")  # releases of transformers; tests/hf/test_transformers_versions.py


def check_license(name: str | None) -> str | None:
    """RecipeError unless a licence is an identifier of model hubs."""
    if name is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name):
        raise RecipeError(f"--license: {name!r} is no licence identifier; give one such as apache-2.0 or cc-by-4.0")
    return name


def write_card(folder: Path, checkpoint: Checkpoint, *, license: str | None = None, agreement: Any = None) -> None:
    """Write README.md; agreement: what verification found, None where it was not run."""
    config, tokenizer = (read_json(folder, name) or {} for name in ("config.json", "tokenizer_config.json"))
    recipe = checkpoint.manifest["recipe"]
    parts = [
        _front(license), f"# {recipe['name']}\n", _about(config, checkpoint), _loading(), _tokens(config, tokenizer),
        "## Training\n", _training(checkpoint), "## Evaluation\n", _evaluation(checkpoint, agreement),
        "## Licence\n", license or "Not stated: whoever publishes the model fills in the `license` field above.",
        "\n## Recipe\n", "```yaml", yaml.safe_dump(recipe | {"run_dir": None}, sort_keys=False).rstrip(), "```"]
    (folder / CARD).write_text("\n".join(parts) + "\n", encoding="utf-8")


def write_import_card(folder: Path, source: str) -> None:
    """Write README.md of a model whose training is not known here."""
    config, tokenizer = (read_json(folder, name) or {} for name in ("config.json", "tokenizer_config.json"))
    parts = [_front(None), f"# {source}\n", f"Converted from `{source}`, in flash-linear-attention's layout. Its "
             "training data, evaluation and licence are those of the source, and not known here.\n", _loading(),
             _tokens(config, tokenizer, ours=False)]
    (folder / CARD).write_text("\n".join(parts), encoding="utf-8")


def _front(license: str | None) -> str:
    """The block of settings that model hubs read."""
    values: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    values["license"] = license or "other"
    if license is None:
        values["license_name"] = "not-stated"
    values["tags"] = ["hola", "linear-attention", "custom_code"]
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n"


def _about(config: dict[str, Any], checkpoint: Checkpoint) -> str:
    kinds = expand(config["layer_pattern"], config["num_hidden_layers"])
    layers = ", ".join(f"{kinds.count(kind)} {kind.title}" for kind in distinct(kinds))
    text = (f"A language model of {config['num_hidden_layers']} layers ({layers}), width {config['hidden_size']}, "
            f"vocabulary {config['vocab_size']:,}, weights in {config.get('dtype', config.get('torch_dtype'))}. ")
    text += "".join(kind.card_text(config) for kind in distinct(kinds))
    return text + f"Exported from step {checkpoint.step:,} of a run of HOLA-Megatron.\n"


def _loading() -> str:
    return f"""## Loading

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)  # the model's code is in this folder
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
```

Needs torch and transformers alone (tested with transformers {' and '.join(TESTED)}); with the package
`hola_kernels` it runs on GPU kernels. Documents packed into one row are kept apart by `position_ids`, `seq_idx`,
`cu_seq_lens_q` and `cu_seq_lens_k`, or `cu_seqlens`.
"""


def _tokens(config: dict[str, Any], tokenizer: dict[str, Any], *, ours: bool = True) -> str:
    """bos, eos and pad, and what follows from a pad that is eos."""
    named = {name: _text(tokenizer.get(f"{name}_token")) for name in ("bos", "eos", "pad")}
    shown = [f"{name} {'none' if token is None else f'`{token}`'} (id {config.get(f'{name}_token_id')})"
             for name, token in named.items()]
    text = f"## Tokens\n\n{', '.join(shown)}. Batches are padded on the {tokenizer.get('padding_side', 'right')}.\n"
    if ours and config.get("bos_token_id") is not None:
        text += ("In training every document begins with bos: put it before a prompt once, and only once. The "
                 "tokenizer does by default; lm-evaluation-harness does it itself in rolling tasks (WikiText), which "
                 "therefore want `add_bos_token=False`.\n")
    if ours:
        text += "In training every document ends with eos.\n"
    if config.get("pad_token_id") is not None and config.get("pad_token_id") == config.get("eos_token_id"):
        text += ("**The pad token is eos**: collators that give padding the label -100 by its id "
                 "(DataCollatorForLanguageModeling) leave every eos out of the loss too, and a model tuned so does not "
                 "learn to stop. Make labels from `attention_mask` instead.\n")
    return text


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _training(checkpoint: Checkpoint) -> str:
    manifest = checkpoint.manifest
    recipe, trainer = manifest["recipe"], manifest["trainer"]
    lines = [f"* step {checkpoint.step:,} of {recipe['train']['steps']:,}"]
    length, samples = recipe["train"]["sequence_length"], trainer.get("samples")
    if samples is not None:
        lines.append(_samples_read(samples, length, trainer.get("phases")))
    facts = {"data fingerprint": manifest.get("data_fingerprint"), "tokenizer": manifest.get("tokenizer"),
             "code": manifest.get("code")}
    lines += [f"* {name}: {'not known' if value is None else f'`{_compact(value)}`'}" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


def _samples_read(samples: int, length: int, phases: list[dict[str, Any]] | None) -> str:
    """The data's summary. length: of the last phase; earlier ones may differ. Old checkpoints have no phases."""
    lengths = {phase["sequence_length"] for phase in phases or ()}
    if len(lengths) < 2:
        return f"* {samples * length:,} tokens: {samples:,} samples of {length:,}"
    tokens = sum(tokens for _, tokens in Phases.from_dicts(phases).read(samples).values())
    return f"* {tokens:,} tokens: {samples:,} samples of {', '.join(f'{n:,}' for n in sorted(lengths))}"


def _compact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _evaluation(checkpoint: Checkpoint, agreement: Any) -> str:
    rows = _validation(checkpoint)
    lines = [f"* validation loss{name} at step {checkpoint.step:,}: {loss:.4f} nats a token"
             for name, loss in _last_of_each_set(rows).items()] or [
        "* validation loss: not known (no validation at this step)"]
    lines.append("* the logits have not been compared with the training model's" if agreement is None else
                 f"* compared with the training model: {agreement}")
    return "\n".join(lines) + "\n"


def _last_of_each_set(rows: list[dict[str, Any]]) -> dict[str, float]:
    """{" of NAME": loss}; the key of a set without a name is empty."""
    return {row["kind"].removeprefix("valid").replace("/", " of ", 1): row["loss"] for row in rows}


def _validation(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Validation rows of the checkpoint's step, where the run folder still has its metrics."""
    try:
        rows = read_rows(checkpoint.path.parent.parent / "metrics.jsonl")
    except UserError:
        return []
    return [row for row in rows if row["kind"].partition("/")[0] == "valid" and row.get("step") == checkpoint.step
            and isinstance(row.get("loss"), int | float)]
