"""Our model as lm-evaluation-harness asks it: equal to its own model `hf`, on the same records in two forms."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from helpers import run_tool
from task_files import hub, plain, write
from tiny import export, recipe

from hola_megatron.errors import DataError, RecipeError
from hola_megatron.evaluate import reader as reader_module
from hola_megatron.evaluate.harness.local_data import local_records
from hola_megatron.evaluate.load import load
from hola_megatron.evaluate.reader import ModelReader, Row

MISSING = [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]
needs_harness = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed (pip install "
                                                         "'lm-eval[hf]')")
PROMPT = "Question: what came first? " * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export(tmp_path_factory.mktemp("harness") / "out", recipe("HGA"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with records of both forms, by turns."""
    place = tmp_path_factory.mktemp("data")
    for number, (task, records) in enumerate(hub().items()):
        in_plain = number % 2 and task in plain()
        write(place, f"{task}_val.jsonl", plain()[task] if in_plain else records)
    return place


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@needs_harness
@pytest.mark.parametrize("tasks", [["arc_easy", "boolq", "hellaswag", "openbookqa"],
                                   ["piqa", "winogrande", "social_iqa", "lambada_openai"], ["wikitext"]])
def test_numbers_are_those_of_the_harness(tasks, folder, loaded, data, offline):
    """Every metric on the same items; contexts are cut at 96 tokens in both. wikitext as docs/evaluate.md says."""
    from lm_eval.models.huggingface import HFLM

    from hola_megatron.evaluate.harness.adapter import HarnessModel
    from hola_megatron.evaluate.harness.tasks import load_task, run_task

    rolling = {"add_bos_token": False} if tasks == ["wikitext"] else {}
    theirs = HFLM(pretrained=str(folder), trust_remote_code=True, dtype="float32", device="cpu", batch_size=3,
                  max_length=96, **rolling)
    ours = HarnessModel(ModelReader(*loaded, batch=3, window=96), loaded[1], 96)
    for task in tasks:
        expected, found = (run_task(model, task, load_task(task, data)) for model in (theirs, ours))
        assert found.items == expected.items == len(hub()[task]) and found.metrics.keys() == expected.metrics.keys()
        for metric, value in expected.metrics.items():
            exact = metric in ("acc", "acc_norm", "contains")
            assert found.metrics[metric] == (value if exact else pytest.approx(value, rel=1e-4)), (task, metric)
            if exact:
                assert found.values[metric] == expected.values[metric], (task, metric)


@needs_harness
def test_answers_are_those_of_the_harness(folder, loaded, tmp_path, offline):
    """Records whose values are, by turns, what the model says and not; contexts are cut to 40 tokens."""
    from lm_eval.models.huggingface import HFLM

    from hola_megatron.evaluate.harness.adapter import HarnessModel
    from hola_megatron.evaluate.harness.tasks import load_task, run_task

    theirs = HFLM(pretrained=str(folder), trust_remote_code=True, dtype="float32", device="cpu", batch_size=3,
                  max_length=96)
    ours = HarnessModel(ModelReader(*loaded, batch=2, window=96), loaded[1], 96)
    for task, most in (("fda", 48), ("swde", 48), ("squad_completion", 256)):
        theirs._max_length = ours.max_length = most + 40
        settings = {"until": ["\n"] if most == 48 else ["\n\n"], "max_gen_toks": most}
        said = ours.generate_until([SimpleNamespace(args=(record["text"], settings)) for record in hub()["fda"][:3]])
        assert len(set(said)) > 1
        write(tmp_path, f"{task}.jsonl", [record | {"value": answer[-3:] if n % 3 else "nowhere"}
                                          for n, (record, answer) in enumerate(zip(hub()["fda"], said, strict=False))])
        for model in (theirs, ours):
            found = run_task(model, task, load_task(task, tmp_path))
            assert found.values["contains"] == [0, 1, 1], (task, said)


@needs_harness
def test_both_forms_are_the_same_items(data, tmp_path, offline):
    """Prompts and choices that the harness makes of plain records and of the hub's."""
    from hola_megatron.evaluate.harness.tasks import load_task

    for task, records in plain().items():
        write(tmp_path / "plain", f"{task}.jsonl", records)
        write(tmp_path / "hub", f"{task}.jsonl", hub()[task])
        asked = []
        for form in ("plain", "hub"):
            one = load_task(task, tmp_path / form)
            one.build_all_requests(limit=None, rank=0, world_size=1)
            asked.append([(instance.args, instance.doc_id) for instance in one.instances])
            targets = [one.doc_to_target(doc) for doc in one.eval_docs]
            asked.append(targets)
        assert asked[0] == asked[2] and asked[1] == asked[3] and len(asked[0]) >= 10, task


@needs_harness
def test_the_harness_knows_our_model_by_name(folder, data, offline):
    """simple_evaluate(model="hola"), a checkpoint's tokenizer and all."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import hola_megatron.evaluate.harness.adapter  # noqa: F401
    from hola_megatron.evaluate.harness.tasks import load_task

    found = simple_evaluate(model="hola", model_args={"pretrained": str(folder), "dtype": "float32"}, device="cpu",
                            batch_size=4, tasks=[load_task("piqa", data)], bootstrap_iters=0,
                            task_manager=TaskManager(include_defaults=False))
    assert 0 <= found["results"]["piqa"]["acc,none"] <= 1
    with pytest.raises(RecipeError, match="dtype: 'int8' is none of float32"):
        simple_evaluate(model="hola", model_args={"pretrained": str(folder), "dtype": "int8"}, tasks=["x"],
                        task_manager=TaskManager(include_defaults=False))


@torch.no_grad()
def test_rows_are_scored_as_alone_and_in_pieces(loaded, monkeypatch):
    model, tokenizer = loaded
    rows = [Row([256, *text.encode()], n) for text, n in ((PROMPT, 5), ("ab", 2), (PROMPT * 2, 150), ("To be or", 3))]
    expected = []
    for row in rows:
        logs = model(torch.tensor([row.ids[:-1]])).logits[0].log_softmax(-1)[-row.predicted:]
        labels = torch.tensor(row.ids[-row.predicted:])
        expected.append((float(logs.gather(1, labels[:, None]).sum()), bool((logs.argmax(-1) == labels).all())))
    for chunk, batch in ((4096, 3), (4096, 1), (7, 1), (64, 2)):
        monkeypatch.setattr(reader_module, "CHUNK", chunk)
        monkeypatch.setattr(reader_module, "LOGIT_ROWS", 40 if chunk == 64 else 1024)
        found = ModelReader(model, tokenizer, batch=batch, window=1).scores(rows)
        assert [score.log_likelihood for score in found] == pytest.approx([nats for nats, _ in expected], rel=1e-5)
        assert [score.greedy for score in found] == [greedy for _, greedy in expected]
    said = model.generate(torch.tensor([rows[0].ids]), max_new_tokens=4, do_sample=False)[0].tolist()
    assert ModelReader(model, tokenizer).scores([Row(said, 4)])[0].greedy


@torch.no_grad()
def test_answers_are_those_of_generate(loaded, monkeypatch):
    model, tokenizer = loaded
    prompts = [[256, *text.encode()] for text in (PROMPT, "ab", PROMPT * 2, "To be or")]
    expected = [model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=6,
                               do_sample=False)[0, len(ids):].tolist() for ids in prompts]
    for chunk, batch in ((4096, 4), (16, 3), (5, 1)):
        monkeypatch.setattr(reader_module, "CHUNK", chunk)
        reader = ModelReader(model, tokenizer, batch=batch)
        assert reader.answers(prompts, 6, lambda n, ids: False) == expected, (chunk, batch)
        assert reader.answers(prompts, 6, lambda n, ids: len(ids) == 2) == [ids[:2] for ids in expected]


def test_local_files_are_found_by_the_tasks_name(tmp_path):
    records = plain()["piqa"]
    write(tmp_path, "piqa_train.jsonl", records)
    with pytest.raises(DataError, match=r"has no file of the task piqa; put its records there as piqa\.jsonl"):
        local_records(tmp_path, "piqa")
    write(tmp_path, "piqa_val.jsonl", records)
    assert len(local_records(tmp_path, "piqa")) == 10 and "sol1" in local_records(tmp_path, "piqa")[0]
    write(tmp_path, "piqa.2.jsonl", records)
    with pytest.raises(DataError, match="has 2 files of the task piqa"):
        local_records(tmp_path, "piqa")
    write(tmp_path, "siqa.jsonl", plain()["social_iqa"])
    assert local_records(tmp_path, "social_iqa")[3]["answerB"] == plain()["social_iqa"][3]["choices"][1]
    (tmp_path / "wiki.test.raw.txt").write_text(" = One = \n \n Text . \n = Two = \n \n More . \n")
    assert [record["page"][:8] for record in local_records(tmp_path, "wikitext")] == [" = One =", " = Two ="]
    with pytest.raises(DataError, match="is no folder"):
        local_records(tmp_path / "none", "piqa")


@pytest.mark.parametrize(("task", "change", "said"), [
    ("piqa", {"gold": 2}, "plain fields: damaged (gold is 2, and there are 2 choices"),
    ("piqa", {"choices": ["a", "b", "c"]}, "choices"), ("arc_easy", {"gold": "1"}, "gold"),
    ("winogrande", {"sentence": "No gap."}, "sentence"), ("boolq", {"answer": "maybe"}, "answer"),
    ("hellaswag", {"query": "no label"}, "query"), ("lambada_openai", {"continuation": ""}, "continuation")])
def test_records_of_another_form_are_named(task, change, said, tmp_path):
    records = plain()[task]
    write(tmp_path, f"{task}.jsonl", [*records[:3], records[3] | change])
    with pytest.raises(DataError) as error:
        local_records(tmp_path, task)
    assert f"line 4: no record of {task}: hub fields: " in str(error.value) and said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@needs_harness
def test_the_program(folder, data, tmp_path, capsys, offline):
    numbers = tmp_path / "numbers.json"
    done = run_tool("evaluate", [str(folder), "--tasks", "arc_easy,piqa", "--data", str(data), "--limit", "4",
                                 "--window", "200", "--json", str(numbers), "--device", "cpu"], capsys)
    assert done.code == 0 and "1/2 arc_easy: acc 0." in done.output and "(4 items, " in done.output, done.output
    assert set(json.loads(numbers.read_text())["tasks"]["piqa"]) == {"acc", "acc_norm"}
    done = run_tool("evaluate", [str(folder), "--tasks", "arc_easy,sciq", "--data", str(data)], capsys)
    assert done.code == 3 and "has no file of the task sciq" in done.output and "--tasks arc_easy: these" in done.output
    done = run_tool("evaluate", [str(folder), "--tasks", "sciq"], capsys)
    assert done.code == 3 and "sciq: its data cannot be had from the Hugging Face hub" in done.output
    assert "give local files by --data FOLDER" in done.output and "Traceback" not in done.output
    done = run_tool("evaluate", [str(folder), "--tasks", "arc_easy,,piqa"], capsys)
    assert done.code == 2 and "has an empty name" in done.output
    done = run_tool("evaluate", [str(folder), "--bundled", "valid", "--limit", "3"], capsys)
    assert done.code == 2 and "--limit: applies to --tasks and --suite" in done.output


@needs_harness
@pytest.mark.long
def test_an_unknown_task_is_named(folder, capsys):
    """The harness's index of all tasks takes ten seconds to read."""
    done = run_tool("evaluate", [str(folder), "--tasks", "arc_esy"], capsys)
    assert done.code == 2 and "did you mean arc_easy?" in done.output


@needs_harness
def test_what_the_window_does_not_hold_is_refused(loaded, tmp_path, offline):
    from hola_megatron.evaluate.harness.adapter import HarnessModel
    from hola_megatron.evaluate.harness.tasks import load_task, run_task

    write(tmp_path, "fda.jsonl", hub()["fda"])
    write(tmp_path, "piqa.jsonl", [{"goal": "x", "choices": ["a " * 40, "b"], "gold": 0}])
    small = HarnessModel(ModelReader(*loaded), loaded[1], 32)
    with pytest.raises(RecipeError, match="--window: 32 tokens leave no context before an answer of 48"):
        run_task(small, "fda", load_task("fda", tmp_path))
    with pytest.raises(RecipeError, match="--window: a continuation has 81 tokens"):
        run_task(small, "piqa", load_task("piqa", tmp_path))
