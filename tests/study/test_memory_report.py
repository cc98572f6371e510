"""The memory report: its numbers against the operations themselves, its page in a parser and in a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_tool
from tiny import export, recipe

from hola_kernels import exact_read, gated_delta_rule
from hola_megatron.evaluate.load import load
from hola_megatron.evaluate.perplexity import perplexity
from hola_megatron.layers.given_score import given_score
from hola_megatron.layers.registry import KINDS
from hola_megatron.study.memory.layers import (
    facts,
    layers_of,
    local_start,
    swap_names,
    swapped_losses,
)
from hola_megatron.study.memory.losses import token_losses, windows
from hola_megatron.study.memory.places import oracle_scores

TEXT = "the cat sat on the mat and the cat saw the rat on the mat; " * 9
LENGTH = 96  # six blocks of 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Exports of several patterns, made when they are asked for."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def of(pattern: str, **model) -> Path:
        key = json.dumps([pattern, model])
        if key not in made:
            made[key] = export(root / str(len(made)), recipe(pattern, **model))
        return made[key]
    return of


@pytest.fixture(scope="module")
def loaded(folders):
    model, tokenizer = load(folders("HG"), device="cpu")
    return model, windows(tokenizer, [TEXT], LENGTH, 300), tokenizer


def test_losses_are_those_of_the_perplexity_tool(loaded):
    model, tokens, tokenizer = loaded
    found = token_losses(model, tokens, 2)
    assert tokens.shape == (3, LENGTH + 1) and found.shape == (3, LENGTH)
    text = tokenizer.decode(tokens[:, 1:].ravel())
    assert found.sum() == pytest.approx(perplexity(model, tokenizer, [text], window=LENGTH).nats, rel=1e-6)


def test_swapped_caches(loaded, folders):
    """The trained score changes nothing; without slots it is the model without slots; afterwards all is as before."""
    model, tokens, _ = loaded
    layers, losses = layers_of(model), token_losses(model, tokens, 2)
    assert swap_names(layers) == ["score betae", "score recency", "score random", "score e", "score cosine",
                                  "0 slots", "16 slots", "64 slots", "256 slots", "oracle"]
    found = {name: swapped_losses(model, layers, tokens, name, 2) for name in swap_names(layers)}
    assert np.array_equal(found["score betae"], losses)
    without, _ = load(folders("HG", cache={"slots": 0}), device="cpu")  # the same weights
    np.testing.assert_allclose(found["0 slots"], token_losses(without, tokens, 2), rtol=1e-5, atol=1e-6)
    newest, _ = load(folders("HG", cache={"score": "recency"}), device="cpu")
    np.testing.assert_allclose(found["score recency"], token_losses(newest, tokens, 2), rtol=1e-5, atol=1e-6)
    assert all(np.abs(found[name] - losses).max() > 1e-4 for name in found if name != "score betae")
    assert np.array_equal(token_losses(model, tokens, 2), losses)


def test_an_oracle_keeps_the_tokens_that_come_again(loaded):
    model, tokens, _ = loaded
    layers = layers_of(model)
    _, module, mixer = layers[0]
    scores = oracle_scores(tokens, local_start(layers))
    slots = mixer.options.slots
    with module.swapped(mixer, module.swaps(mixer)["oracle"]), given_score(torch.from_numpy(scores)):
        read = module.recorded_read(mixer, torch.randn(3, LENGTH, model.config.hidden_size))
    memory = exact_read(**read)[1]
    best = [sorted(np.argsort(-row, kind="stable")[:slots]) for row in scores]
    assert memory.cache_position[:, 0].tolist() == best


def test_facts_of_a_layer_are_those_of_its_operations(loaded):
    model, tokens, _ = loaded
    layers, seen = layers_of(model), {}

    def note(_, given) -> None:
        seen.setdefault("hidden", given[0])

    hook = layers[0][2].register_forward_pre_hook(note)
    first, second, *_ = facts(model, layers, tokens, [32, 64, LENGTH])
    hook.remove()
    mixer = layers[0][2]
    with torch.no_grad():
        inputs = mixer.tokens(seen["hidden"])
        _, written, state = gated_delta_rule(**inputs)
        _, _, middle = gated_delta_rule(**{name: x[:, :64] for name, x in inputs.items()})
    norms = [float(x.norm(dim=(-2, -1)).mean()) for x in (middle, state)]
    assert first.norms[1:] == pytest.approx(norms, rel=1e-5) and len(second.norms) == 3
    assert first.scores[2] == pytest.approx(float(written[:, 64:].mean()), rel=1e-5)
    assert first.gates == pytest.approx(mixer.gate.sigmoid().tolist())
    assert sum(first.shares.values()) == pytest.approx(1, abs=1e-5) and min(first.shares.values()) > 0.01
    slots = mixer.options.slots
    best = [sorted(written[0, :, head].topk(slots).indices.tolist()) for head in range(first.heads)]
    assert [i for i, count in enumerate(first.kept) for _ in range(count)] == sorted(i for its in best for i in its)
    assert len(first.ages) == 3 * first.heads * slots and min(first.ages) >= 1
    assert second.shares is None and second.kept is None and second.gates is None


@pytest.mark.parametrize("changes", [{"cache": {"score": "learned"}}, {"cache": {"score": "cosine"}},
                                     {"cache": {"merge": "two", "rope_theta": 1e4}}, {"state_delay": 9}], ids=str)
def test_layers_with_other_options(folders, loaded, changes):
    """What they are trained with changes nothing, a swap does, and facts are found."""
    model, cache = load(folders("H", **changes), device="cpu")[0], changes.get("cache", {})
    tokens, layers = loaded[1], layers_of(model)
    losses = token_losses(model, tokens, 2)
    own = f"score {cache.get('score', 'betae')}"
    assert np.array_equal(swapped_losses(model, layers, tokens, own, 2), losses)
    assert not np.array_equal(swapped_losses(model, layers, tokens, "oracle", 2), losses)
    first, *_ = facts(model, layers, tokens, [32, LENGTH])
    assert (first.gates is None) == ("merge" in cache) and sum(first.shares.values()) == pytest.approx(1, abs=1e-5)


def test_a_layer_without_a_state(folders, loaded):
    """Its swaps are those that need none, and facts of a state are not there."""
    model = load(folders("H", rule="none", cache={"score": "betav"}), device="cpu")[0]
    tokens, layers = loaded[1], layers_of(model)
    losses = token_losses(model, tokens, 2)
    assert np.array_equal(swapped_losses(model, layers, tokens, "score betav", 2), losses)
    for name in set(swap_names(layers)) - {"score betav"}:
        swapped_losses(model, layers, tokens, name, 2)
    assert {"score recency", "score random", "0 slots", "oracle"} < set(swap_names(layers))
    assert not {"score betae", "score e", "score cosine"} & set(swap_names(layers))
    first, *_ = facts(model, layers, tokens, [32, LENGTH])
    assert first.gates is None and first.norms is None and len(first.scores) == 2
    assert sum(first.shares.values()) == pytest.approx(1, abs=1e-5) and len(first.ages) > 0


@pytest.mark.parametrize("ham", [{"router": "cosine", "threshold": 1.0}, {"router": "learned"}], ids=str)
def test_facts_of_a_ham_layer_are_what_decoding_keeps(folders, loaded, ham):
    model, _ = load(folders("ham", ham=ham), device="cpu")
    tokens, layers = loaded[1], layers_of(model)
    first, *_ = facts(model, layers, tokens, [32, LENGTH])
    with torch.no_grad():
        held = model(torch.as_tensor(tokens[:, :-1]), use_cache=True).past_key_values.layers[0].state.kept
    assert sum(first.kept) == int(held.count[0].sum()) and len(first.ages) == int(held.count.sum()) > 0
    assert first.shares is None and all(0 < gate < 1 for gate in first.gates) and len(first.norms) == 2


@pytest.mark.parametrize(("pattern", "model"), [
    ("H", {"cache": {"slots": 0}}), ("H", {"cache": {"slots": 0, "local": "window", "window": 9}}),
    ("H", {"cache": {"slots": 0, "local": "none"}}), ("W", {"attention_window": 7}), ("A", {})])
def test_local_parts_begin_where_tokens_are_read(pattern, model, folders):
    """A token before the start changes nothing in the exact part, the first one of it does."""
    whole, _ = load(folders(pattern, layers=1, **model), device="cpu")
    ((_, module, mixer),) = layers_of(whole)
    x, position = torch.randn(1, 40, whole.config.hidden_size), 37

    def exact(values) -> torch.Tensor:
        if hasattr(mixer, "options"):
            return exact_read(**{**read, "v": values})[0][0, position]
        return mixer(values, None, None)[0, position]

    with torch.no_grad():
        read = module.recorded_read(mixer, x) if hasattr(mixer, "options") else {"v": x}
        start = module.local_start(mixer, position)
        for at in {start - 1, start, position, 0} - {-1}:
            changed = read["v"].clone()
            changed[:, at] += 1
            assert exact(changed).allclose(exact(read["v"]), atol=1e-7) == (at < start), at


def test_local_parts_of_hqlt_layers_have_the_tokens_of_their_window(folders):
    for blend, count in (("sync", 6), ("delayed_chunk", 37 % 6 + 1)):
        model, _ = load(folders("hqlt", layers=1, hqlt={"window": 6, "blend": blend}), device="cpu")
        ((_, module, mixer),) = layers_of(model)
        assert 37 + 1 - module.local_start(mixer, 37) == count


class Structure(HTMLParser):
    """Checks that tags are closed in order; collects headings, pictures and text."""

    VOID = ("meta", "img", "br")

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.stack, self.headings, self.images, self.words, self.links = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        of = dict(attrs)
        if tag not in self.VOID:
            self.stack.append(tag)
        if tag == "img":
            assert of["alt"]
            self.images.append(of["src"])
        self.links += [value for name, value in attrs if name in ("href", "src") and not value.startswith("data:")]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] in ("h1", "h2"):
            self.headings.append(data)
        self.words.append(data)


def parsed(page: str) -> Structure:
    found = Structure()
    found.feed(page)
    found.close()
    assert found.stack == [] and found.links == [] and "<script" not in page
    return found


def report(folder: Path, capsys, tmp_path, *more: str):
    text = tmp_path / "text.txt"
    text.write_text(TEXT + "<b>&amp;")
    out = tmp_path / "page.html"
    done = run_tool("memory_report", [
        str(folder), "--text", str(text), "--out", str(out), "--json", str(tmp_path / "numbers.json"),
        "--tokens", "300", "--window", str(LENGTH), *more], capsys)
    assert done.code == 0, done.output
    return out.read_text(), json.loads((tmp_path / "numbers.json").read_text())


def test_a_report_of_a_model_with_every_part(folders, capsys, tmp_path):
    page, numbers = report(folders("HG"), capsys, tmp_path, "--second", str(folders("G")))
    found = parsed(page)
    assert found.headings[1:] == [
        "How the layers read", "Gain by place", "Gain by where the coming pair of tokens occurred last",
        "Another choice of tokens", "What is kept", "Where the exact part looks", "Weight of the exact part",
        "Size of the state", "Scores by position", "How it was made"]
    assert len(found.images) == 8 and all(url.startswith("data:image/png;base64,iVBOR") for url in found.images)
    words = "".join(found.words)
    assert f"{numbers['loss']['mean']:.4f} ± {numbers['loss']['error']:.4f}" in words
    for means in numbers["swaps"].values():
        assert f"{means['all']['mean']:.4f} ± {means['all']['error']:.4f}" in words
    assert numbers["block"] == 16 and numbers["baseline"] == str(folders("G"))
    gain = sum(m["mean"] * m["count"] for m in numbers["gain"]["by_category"].values() if m["count"])
    whole = (numbers["second"]["mean"] - numbers["loss"]["mean"]) * numbers["loss"]["count"]
    assert gain == pytest.approx(whole) and abs(whole) > 1
    assert "of 2 heads" in page and "the cat" not in page.split("What is kept")[0]
    layers = numbers["layers"]
    assert layers[0]["kept"] <= 2 * 4 and len(layers[0]["age_quantiles"]) == 3 and layers[1]["shares"] is None


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_a_report_which_says_what_does_not_apply(name, folders, capsys, tmp_path):
    said = {"gdn": "no layer keeps chosen tokens", "attention": "no layer has a state of fixed size",
            "swa": "no layer scores tokens", "hqlt": "no layer weighs an exact part",
            "deltaproduct": "no layer scores tokens", "hola": "How the layers read"}
    page, numbers = report(folders(name, layers=1), capsys, tmp_path)
    words = "".join(parsed(page).words)
    assert said.get(name, "What does not apply") in words and KINDS[name].title in words
    assert numbers["block"] == (16 if name == "hola" else None)
    assert bool(numbers["swaps"]) == (name == "hola") == (numbers["baseline"] is not None)


def test_a_model_of_another_architecture_shows_its_losses(folders, loaded):
    from transformers import LlamaConfig, LlamaForCausalLM

    from hola_megatron.evaluate.load import LogitsModel
    from hola_megatron.study.memory.make import numbers
    from hola_megatron.study.memory.page import page

    _, tokens, tokenizer = loaded
    other = LogitsModel(LlamaForCausalLM(LlamaConfig(
        vocab_size=264, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)).eval())
    found = numbers(other, tokens, batch=2)
    with torch.no_grad():
        rows = torch.from_numpy(tokens)
        logits = other._whole(rows[:, :-1]).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert found.loss.mean == pytest.approx(float(wanted), rel=1e-5) and found.kinds == []
    assert "This model is not of this project" in "".join(parsed(page(
        found, tokenizer, tokens[0, :-1].tolist(), {"model": "other", "text": "text"})).words)


def test_what_cannot_be_compared_is_refused(folders, capsys, tmp_path):
    base = [str(folders("HG")), "--out", str(tmp_path / "page.html")]
    (tmp_path / "short.txt").write_text("short")
    done = run_tool("memory_report", [*base, "--text", str(tmp_path / "short.txt")], capsys)
    assert done.code == 3 and "no document has the" in done.output
    done = run_tool("memory_report", base, capsys)
    assert done.code == 2 and "--text: give one of" in done.output
    done = run_tool("memory_report", [*base, "--bundled", "valid", "--second", str(tmp_path)], capsys)
    assert done.code in (2, 3) and "Traceback" not in done.output


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the program chromium")
def test_a_browser_shows_the_page(folders, capsys, tmp_path):
    from matplotlib.image import imread

    report(folders("HG"), capsys, tmp_path)
    picture = tmp_path / "page.png"
    subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,4000",
                    f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}",
                    (tmp_path / "page.html").as_uri()], check=True, capture_output=True, timeout=120)
    seen = imread(picture)[..., :3]
    blue = np.isclose(seen, np.array([0x1F, 0x77, 0xB4]) / 255, atol=0.02).all(-1)  # bars of the pictures
    assert seen.shape[:2] == (4000, 1000) and blue.sum() > 500 and seen.std() > 0.05
