"""The model card of an export says what its files and its checkpoint say."""

from __future__ import annotations

import json

import pytest
import yaml
from helpers import run_tool
from tiny import export, recipe

from hola_megatron.data.order import CYCLE
from hola_megatron.errors import RecipeError
from hola_megatron.hf.convert import ExportOptions, from_hf, to_hf


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of which everything that a card tells is known."""
    folder = tmp_path_factory.mktemp("card")
    source = export(folder / "out", recipe("HGHA"))
    record = json.loads((source / "hola_export.json").read_text())
    record |= {"step": 4, "trainer": {"step": 4, "samples": 32, "bad_steps": 0}}
    (source / "hola_export.json").write_text(json.dumps(record))
    made = from_hf(source, folder / "run").parent.parent
    rows = [{"step": 2, "kind": "valid", "loss": 9.0, "tokens": 64}, {"step": 4, "kind": "train", "loss": 8.0},
            {"step": 4, "kind": "valid", "loss": 2.34567, "tokens": 64}]
    (made / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def parts(text: str) -> tuple[dict, str]:
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_card_holds_recipe_data_tokens_evaluation_licence_and_how_to_load(run, tmp_path, capsys):
    out = tmp_path / "out"
    done = run_tool("convert", ["to-hf", str(run), str(out), "--license", "apache-2.0"], capsys)
    assert done.code == 0, done.output
    front, body = parts((out / "README.md").read_text())
    assert front["license"] == "apache-2.0" and "license_name" not in front and front["library_name"] == "transformers"
    config = json.loads((out / "config.json").read_text())
    settings = json.loads((out / "tokenizer_config.json").read_text())
    named = [f"{name} `{settings[f'{name}_token']}` (id {config[f'{name}_token_id']})" for name in
             ("bos", "eos", "pad")]
    for said in ("# micro", "4 layers (2 HOLA, 1 Gated DeltaNet, 1 softmax attention)",
                 "validation loss at step 4: 2.3457", "2,048 tokens: 32 samples of 64", "data fingerprint: ",
                 "compared with the training model: logits", "trust_remote_code=True", *named):
        assert said in body, said
    assert ("**The pad token is eos**" in body) == (config["pad_token_id"] == config["eos_token_id"])
    held = yaml.safe_load(body.rpartition("```yaml\n")[2].removesuffix("```\n"))
    assert held == json.loads((out / "hola_export.json").read_text())["recipe"] and held["run_dir"] is None
    assert str(run) not in body


def test_what_is_not_known_is_said_so(run, tmp_path):
    metrics = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text('{"step": 2, "kind": "valid", "loss": 1.0}\nnot json\n')
    front, body = parts((to_hf(run, tmp_path / "out") / "README.md").read_text())
    (run / "metrics.jsonl").write_text(metrics)
    assert front["license"] == "other" and front["license_name"] == "not-stated" and "Not stated" in body
    assert "validation loss: not known" in body and "have not been compared" in body
    with pytest.raises(RecipeError, match="--license: 'My own' is no licence identifier"):
        to_hf(run, tmp_path / "x", ExportOptions(license="My own"))


def test_tokens_of_a_run_whose_samples_became_longer(run, tmp_path):
    """20 samples of 16 tokens, then 12 of 64: not 32 of 64."""
    source = tmp_path / "source"
    to_hf(run, source)
    record = json.loads((source / "hola_export.json").read_text())
    stream = {"dataset": "f", "name": "a", "number": 0, "first": 0, "share": CYCLE}
    phases = [{"first_sample": 0, "seed": 1, "sequence_length": 16, "streams": [stream]},
              {"first_sample": 20, "seed": 1, "sequence_length": 64, "streams": [stream | {"first": 20}]}]
    record["trainer"]["phases"] = phases
    (source / "hola_export.json").write_text(json.dumps(record))
    to_hf(from_hf(source, tmp_path / "run"), tmp_path / "out")
    assert "* 1,088 tokens: 32 samples of 16, 64\n" in (tmp_path / "out/README.md").read_text()
