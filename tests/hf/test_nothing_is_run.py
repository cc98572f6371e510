"""Folders made by strangers: no code in them is run, and nothing outside them is read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers import run_tool
from test_fla import their_folder
from tiny import export, recipe, tokens

from hola_megatron.errors import CheckpointError, DataError
from hola_megatron.evaluate.load import load
from hola_megatron.evaluate.perplexity import perplexity
from hola_megatron.hf.auto import load_model
from hola_megatron.hf.convert import from_hf
from hola_megatron.hf.fla import from_fla
from hola_megatron.hf.tokenizer_files import tokenizer_of
from hola_megatron.hf.weights import INDEX, ModelReader

# every name under which transformers (or a Python that has the folder on its path) could come to run something
CODE = (
    "custom_generate/generate.py", "custom_generate/__init__.py", "generate.py", "bomb.py", "configuration_hola.py",
    "modeling_hola.py", "cache_hola.py", "decoding_hola.py", "packing_hola.py", "hola_ops.py", "tokenization_hola.py",
    "tokenizer.py", "processing_hola.py", "image_processing_hola.py", "video_processing_hola.py", "handler.py",
    "feature_extraction_hola.py", "quantizer.py", "kernels/__init__.py", "__init__.py", "__main__.py", "setup.py",
    "conftest.py", "sitecustomize.py", "usercustomize.py", "torch.py", "transformers.py", "hola_kernels.py",
    "additional_chat_templates/bomb.py", "remote_code.py", "bomb_tokenizer.py")
PICKLES = ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "vocab.pkl",
           "tokenizer.pkl", "model.ckpt", "tf_model.h5", "flax_model.msgpack")
CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor")


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return exec, (self.command,)


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which every bomb that goes off leaves its name."""
    folder = tmp_path / "marks"
    folder.mkdir()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "hf_modules"))
    return folder


def trap(folder: Path, marks: Path) -> Path:
    """Put a bomb into every file of `folder` that could be run, and references to them into every setting."""

    def command(name: str) -> str:
        return f"import pathlib; pathlib.Path({str(marks)!r}, {name!r}.replace('/', '_')).touch()"

    for name in CODE:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(command(name) + "\nclass X: pass\ngenerate = HolaConfig = HolaForCausalLM = X\n")
    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps(Bomb(command(name))))
    base = folder / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": dict.fromkeys(CLASSES, "bomb.X")}))
    (base / "bomb.py").write_text(command("base_bomb.py"))
    change(folder, "config.json", auto_map=dict.fromkeys(CLASSES, "bomb.X"), custom_generate=str(folder),
           attn_implementation=str(folder / "kernels"), _attn_implementation=str(folder / "kernels"),
           tokenizer_class="BombTokenizer", _name_or_path=str(base),
           custom_pipelines={"text-generation": {"impl": "bomb.X", "pt": ["AutoModelForCausalLM"]}},
           use_kernels=True, experts_implementation=str(folder / "kernels"),
           base_model_name_or_path=str(base))
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["bomb.X", "bomb.X"]},
           chat_template="{{ x.y() }}", tokenizer_class="BombTokenizer",
           tokenizer_file=str(marks / "outside.json"), name_or_path=str(base),
           vocab_file=str(folder / "vocab.pkl"), processor_class="BombProcessor")
    change(folder, "generation_config.json", custom_generate=str(folder), penalty_alpha=0.6, top_k=4, num_beams=3,
           dola_layers="high", cache_implementation="static", trust_remote_code=True, assistant_model=str(base))
    change(folder, "adapter_config.json", peft_type="LORA", base_model_name_or_path=str(base), auto_mapping={
        "parent_library": "bomb", "base_model_class": "X"}, task_type="CAUSAL_LM")
    change(folder, "processor_config.json", auto_map={"AutoProcessor": "bomb.X"})
    return folder


def change(folder: Path, name: str, **values: object) -> None:
    path = folder / name
    held = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(held | values))


def test_a_trapped_folder_is_read_by_every_tool_and_nothing_in_it_runs(tmp_path, marks, capsys, monkeypatch):
    clean = export(tmp_path / "clean", recipe("HG"))
    run = from_hf(clean, tmp_path / "run").parent.parent
    trapped = trap(Path(shutil.copytree(clean, tmp_path / "trapped")), marks)
    monkeypatch.chdir(trapped)
    text = tmp_path / "text.txt"
    text.write_text("Shall I compare thee")
    for tool, arguments in (("convert", ["verify", str(run), str(trapped)]),
                            ("convert", ["from-hf", str(trapped), str(tmp_path / "again")]),
                            ("evaluate", [str(trapped), "--text", str(text), "--device", "cpu", "--prompt", "To be"]),
                            ("evaluate", [str(trapped), "--text", str(text), "--device", "cpu", "--stream",
                                          "--trust-remote-code"])):
        done = run_tool(tool, arguments, capsys)
        assert done.code == 0, done.output
        assert not left(marks), (tool, arguments)
    model, tokenizer = load(trapped, device="cpu")
    x = tokens(2, 30)
    assert torch.equal(model(x).logits, load_model(clean)(x).logits)
    assert model.generation_config.to_diff_dict().keys() <= {
        "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
    assert tokenizer("Ab", add_special_tokens=False)["input_ids"] == [65, 98] and tokenizer.bos_token_id == 256


def test_a_trapped_folder_of_flash_linear_attention_is_converted_without_its_code(tmp_path, marks, capsys):
    source = their_folder(tmp_path / "theirs")
    for file in export(tmp_path / "clean", recipe("G")).glob("*token*"):
        shutil.copy(file, source)
    imported = from_fla(trap(source, marks), tmp_path / "ours")
    done = run_tool("convert", ["to-fla", str(trap(imported, marks)), str(tmp_path / "back")], capsys)
    assert done.code == 0 and not left(marks), done.output
    for made in (imported, tmp_path / "back"):
        text = (made / "tokenizer_config.json").read_text()
        assert made is imported or "auto_map" not in text
    assert "auto_map names code, which is not copied" in done.output


def test_the_bombs_are_live(tmp_path, marks):
    """What the tests above would see if transformers loaded the folder."""
    from transformers import AutoModelForCausalLM

    trapped = trap(export(tmp_path / "out", recipe("G")), marks)
    (trapped / "adapter_config.json").unlink()
    # as if it were no model that this process knows
    change(trapped, "config.json", model_type="stranger", attn_implementation=None, _attn_implementation=None)
    with pytest.raises(Exception):  # noqa: B017  (the bombs define no model)
        AutoModelForCausalLM.from_pretrained(trapped, trust_remote_code=True)
    assert "bomb.py" in left(marks)
    with pytest.raises(CheckpointError, match=r"type 'stranger', not 'hola'.*pass --trust-remote-code if you trust it"):
        load(trapped, device="cpu")
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        load(trapped, device="cpu", trust_remote_code=True)


def left(marks: Path) -> set[str]:
    return {path.name for path in marks.iterdir()}


@torch.no_grad()
def test_another_architecture_is_measured_only_where_it_is_trusted(tmp_path, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path / "llama"
    model = LlamaForCausalLM(LlamaConfig(vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                         num_attention_heads=2, max_position_embeddings=64,
                                         initializer_range=0.3)).eval()
    model.save_pretrained(folder)
    for file in export(tmp_path / "ours", recipe("G")).glob("*token*"):
        shutil.copy(file, folder)
    text = tmp_path / "text.txt"
    text.write_text("Shall I compare thee to a summer's day? Thou art more lovely")
    refused = run_tool("evaluate", [str(folder), "--text", str(text), "--device", "cpu"], capsys)
    assert refused.code == 2 and "pass --trust-remote-code" in refused.output
    done = run_tool("evaluate", [str(folder), "--text", str(text), "--device", "cpu", "--trust-remote-code"], capsys)
    assert done.code == 0 and "windows of 64 tokens" in done.output, done.output
    loaded, tokenizer = load(folder, device="cpu", trust_remote_code=True)
    ids = torch.tensor([[256, *text.read_bytes()]])
    expected = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:], reduction="sum")
    for window in (64, None):
        assert perplexity(loaded, tokenizer, [text.read_text()], window=window).nats == pytest.approx(float(expected),
                                                                                                     rel=1e-5)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """An export whose index names one shard, and a stranger's file outside it."""
    folder = export(tmp_path / "out", recipe("G"))
    (tmp_path / "elsewhere").mkdir()
    shutil.move(folder / "model.safetensors", tmp_path / "elsewhere" / "x.safetensors")
    names = names_in(tmp_path / "elsewhere" / "x.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "x.safetensors")}))
    return folder


def names_in(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as held:
        return list(held.keys())


@pytest.mark.parametrize("name", ["../elsewhere/x.safetensors", "{outside}", "./../elsewhere/x.safetensors", "..", ".",
                                  "", "sub/../../elsewhere/x.safetensors", 7, None, "a\0b", ["x.safetensors"]])
def test_an_index_that_leads_out_of_the_folder_is_refused(name, sharded, tmp_path):
    outside = str(tmp_path / "elsewhere" / "x.safetensors")
    name = outside if name == "{outside}" else name
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map | {min(weight_map): name}}))
    for read in (ModelReader, load_model, lambda folder: from_hf(folder, tmp_path / "run")):
        with pytest.raises(CheckpointError, match="only plain file names are read") as caught:
            read(sharded)
        assert "\n" not in str(caught.value) and repr(name) in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "hola_export.json", "tokenizer.json",
                                  "tokenizer_config.json", INDEX])
def test_links_out_of_the_folder_are_refused_and_links_inside_are_followed(name, tmp_path):
    folder, outside = export(tmp_path / "out", recipe("G")), tmp_path / "outside"
    if name == INDEX:
        names = names_in(folder / "model.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    shutil.move(folder / name, outside)

    def read_all() -> None:
        load(folder, device="cpu")
        from_hf(folder, tmp_path / "run")
        shutil.rmtree(tmp_path / "run")

    (folder / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match=rf"{name}: is a link to .*outside, outside the folder"):
        read_all()
    (folder / name).unlink()
    shutil.move(outside, folder / "blob")
    (folder / name).symlink_to("blob")
    read_all()
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    with pytest.raises(CheckpointError, match=rf"{name}: "):
        read_all()
    (folder / name).unlink()
    os.mkfifo(folder / name)  # opening it would never end
    with pytest.raises(CheckpointError, match=rf"{name}: is not a regular file"):
        read_all()


def test_a_folder_that_is_itself_a_link_is_read(tmp_path):
    export(tmp_path / "out", recipe("G"))
    (tmp_path / "link").symlink_to("out")
    assert load(tmp_path / "link", device="cpu")


def test_files_are_not_copied_from_outside_on_the_way_from_and_to_fla(tmp_path):
    source, secret = their_folder(tmp_path / "theirs"), tmp_path / "secret"
    secret.write_text("private")
    (source / "vocab.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"vocab.json: is a link to .*secret"):
        from_fla(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_an_index_must_say_what_its_files_hold(sharded, tmp_path):
    shutil.copy(tmp_path / "elsewhere" / "x.safetensors", sharded)
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    del weight_map["model.norm.weight"]
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"x.safetensors: model.norm.weight is in this file, the index"):
        ModelReader(sharded)
    weight_map |= dict.fromkeys(("a", "model.norm.weight"), "x.safetensors")
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"a is not in this file"):
        ModelReader(sharded)


def test_a_tokenizer_is_read_from_each_of_its_forms(tmp_path):
    with pytest.raises(DataError, match="no usable tokenizer"):
        tokenizer_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(DataError, match="no usable tokenizer"):
        tokenizer_of(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    found = tokenizer_of(tmp_path)
    assert found("aba", add_special_tokens=False)["input_ids"] == [2, 0] and found.eos_token_id == 3
