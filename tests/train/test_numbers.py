"""Bad numbers: a step is skipped, a streak rewinds, a longer one stops with code 4; batches can be run again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import checkpoint_tensors, metric_rows, small_recipe
from train.faults import Fault, install

from hola_megatron.config import GuardConfig, load_recipe
from hola_megatron.control.guard import NumberGuard
from hola_megatron.errors import DivergedError
from hola_megatron.train.loop import train
from hola_megatron.train.replay import replay

GUARD = {"warmup": 8, "window": 16}


@pytest.fixture
def run(text_data, tmp_path, monkeypatch):
    """run(fault, guard options, steps) trains in this process, and gives the run folder."""
    def train_with(fault: Fault | None, steps: int = 6, every: int = 1, checkpoint__keep: int = 20, **guard) -> Path:
        path = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"),
                            train__steps=steps, guard={**GUARD, **guard}, log__tensorboard=True,
                            checkpoint={"every": every, "keep": checkpoint__keep, "background": False})
        with monkeypatch.context() as patch:
            if fault:
                install(fault, patch.setattr)
            train(load_recipe(path))
        return tmp_path / "run"
    train_with.recipe = lambda: load_recipe(tmp_path / "recipe.yaml")
    return train_with


def incidents(folder: Path) -> dict[str, list[dict]]:
    return {path.name.split("_sample_")[0]: json.loads((path / "incident.json").read_text())
            for path in (folder / "incidents").iterdir()}


@pytest.mark.parametrize(("kind", "reason", "place"), [
    ("nan_loss", "loss nan is not finite", None),
    ("nan_gradient", "grad_norm nan is not finite", "gradient of model.layers.1.mlp.gate_proj.weight")])
def test_one_bad_step_is_skipped_and_written_down(kind, reason, place, run):
    folder = run(Fault(kind, lambda n: n == 4))
    assert list(incidents(folder)) == ["step_00000004"]
    (bad,) = incidents(folder)["step_00000004"]
    assert (bad["reason"], bad["first_sample"], bad["last_sample"]) == (reason, 24, 31)
    if place:
        assert bad["first_nonfinite"] == place
    before, after, later = (checkpoint_tensors(folder / f"checkpoints/step_0000000{n}") for n in (3, 4, 5))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(after[name], later[name]) for name in before)
    assert [row["step"] for row in metric_rows(folder)] == [1, 2, 3, 4, 5, 6]
    manifest = json.loads((folder / "checkpoints/step_00000004/manifest.json").read_text())
    assert not manifest["healthy"] and manifest["trainer"]["bad_steps"] == 1


def test_a_spoiled_weight_is_healed_by_a_rewind(run, capsys):
    folder = run(Fault("nan_weight", lambda n: n == 4), steps=10, every=3, max_skips=1)
    said = capsys.readouterr().out
    assert "rewound | from step 5 to" in said and "step_00000003 | continuing with sample 40" in said
    bad = incidents(folder)["step_00000004"]
    assert [b["step"] for b in bad] == [4, 5]
    assert bad[0]["first_nonfinite"] == "weight model.layers.1.mlp.gate_proj.weight"
    rows = metric_rows(folder)
    assert [row["step"] for row in rows] == list(range(1, 11)) and all(math.isfinite(row["loss"]) for row in rows)
    assert rows[-1]["samples"] == 8 * 12  # ten steps, and the two undone
    assert not (folder / "rewind.json").exists()  # a checkpoint has been saved since
    manifest = json.loads((folder / "checkpoints/step_00000010/manifest.json").read_text())
    assert manifest["trainer"]["rewinds"] == 1 and manifest["healthy"]
    assert tensorboard_steps(folder) == list(range(1, 11))


def test_a_run_killed_after_a_rewind_does_not_go_back_to_the_bad_samples(run, monkeypatch):
    class Killed(Exception):
        pass

    def die(self) -> None:
        original(self)
        if self.state.rewinds:
            raise Killed

    from hola_megatron.train.loop import Run
    original = Run.step
    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", die)
        with pytest.raises(Killed):
            run(Fault("nan_weight", lambda n: n == 4), steps=6, every=3, max_skips=1)
    folder = run(None, steps=6, every=3, max_skips=1)
    assert metric_rows(folder)[-1]["samples"] == 8 * 8
    assert checkpoint_rewinds(folder) == 1


def test_what_a_rewind_undid_is_not_gone_on_from(run, monkeypatch, capsys):
    """Killed after a rewind past a checkpoint that was saved amid bad steps."""
    from hola_megatron.train.loop import Run
    original = Run.step

    def die(self) -> None:
        original(self)
        if self.state.rewinds:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", die)
        with pytest.raises(KeyboardInterrupt):  # bad are 3, 4 (saved) and 5; it goes back to 2
            run(Fault("nan_gradient", lambda n: n in (3, 4, 5)), steps=6, every=2, max_skips=2)
    assert "resuming at step 2" in after(run, capsys)
    assert metric_rows(run.recipe().folder)[-1]["samples"] == 8 * 9


def after(run, capsys) -> str:
    capsys.readouterr()
    run(None, steps=6, every=2, max_skips=2)
    return capsys.readouterr().out


@pytest.mark.parametrize(("kind", "tensor"), [
    ("nan_after", "weight of model.layers.1.mlp.gate_proj.weight"),
    ("inf_moment", "exp_avg_sq of model.layers.1.mlp.gate_proj.weight")])
def test_a_state_that_is_not_finite_is_not_saved_and_pushes_none_out(kind, tensor, run, capsys):
    """It goes bad after step 4's update, before any number shows it; only one checkpoint is kept."""
    folder = run(Fault(kind, lambda n: n == 4), steps=8, every=2, max_skips=1, checkpoint__keep=1)
    said = capsys.readouterr().out
    assert f"bad state | step 4 | {tensor} holds values that are not finite" in said
    assert "rewound | from step 4 to" in said and "step_00000002 | continuing with sample 32" in said
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000008"]
    assert incidents(folder)["step_00000004"][0]["first_nonfinite"] == tensor
    assert all(math.isfinite(row["loss"]) for row in metric_rows(folder))
    assert json.loads((folder / "checkpoints/step_00000008/manifest.json").read_text())["healthy"]


def as_older_versions(monkeypatch) -> None:
    """They saved such a state as a checkpoint that is not healthy, and went on."""
    from hola_megatron.train.checkpoint_schedule import CheckpointSchedule

    monkeypatch.setattr(CheckpointSchedule, "_nonfinite", lambda self, held: [])


def test_a_moment_that_is_not_finite_in_the_newest_checkpoint_is_named_at_resume(run, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        as_older_versions(patch)
        folder = run(Fault("inf_moment", lambda n: n == 4), steps=6, every=2)
    assert not json.loads((folder / "checkpoints/step_00000006/manifest.json").read_text())["healthy"]
    capsys.readouterr()
    run(None, steps=8, every=2)
    said = capsys.readouterr().out
    assert "bad state | step 6 | exp_avg_sq of model.layers.1.mlp.gate_proj.weight holds values" in said
    assert "rewound | from step 6 to" in said and "step_00000002 | continuing with sample 48" in said
    assert json.loads((folder / "checkpoints/step_00000008/manifest.json").read_text())["healthy"]


def test_a_moment_that_is_not_finite_with_nothing_to_go_back_to_is_code_4(run, monkeypatch):
    with monkeypatch.context() as patch:
        as_older_versions(patch)
        run(Fault("inf_moment", lambda n: n == 1), steps=2, every=2)
    with pytest.raises(DivergedError, match=r"at step 2 exp_avg_sq of model.layers.1.mlp.gate_proj.weight holds"):
        run(None, steps=4, every=2)


def checkpoint_rewinds(folder: Path) -> int:
    return json.loads((folder / "checkpoints/step_00000006/manifest.json").read_text())["trainer"]["rewinds"]


def test_numbers_that_stay_bad_stop_the_run_and_can_be_run_again(run, capsys):
    with pytest.raises(DivergedError, match="after 1 rewinds") as stopped:
        run(Fault("nan_gradient", lambda n: n >= 4), steps=20, every=3, max_skips=1, max_rewinds=1)
    assert stopped.value.exit_code == 4
    folder = run.recipe().folder
    # after the rewind step 4 comes again, with other samples, and is bad again: both streaks are kept
    assert sorted(p.name for p in (folder / "incidents").iterdir()) == [
        f"step_00000004_sample_{sample}" for sample in (24, 40)]
    capsys.readouterr()
    replay(run.recipe(), folder / "incidents/step_00000004_sample_40")
    assert "first non-finite: none" in capsys.readouterr().out  # the fault was not in weights or data


def test_records_that_cannot_be_written_do_not_end_the_run(run, tmp_path, capsys):
    """Skipped steps and a rewind, with a file where incidents/ would be."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/incidents").write_text("in the way")
    folder = run(Fault("nan_gradient", lambda n: n in (4, 5)), every=3, max_skips=1)
    said = capsys.readouterr().out
    assert said.count("not saved | ") == 3 and "rewound | from step 5 to " in said  # two steps and the state
    assert (folder / "checkpoints/step_00000006/manifest.json").exists()
    assert (folder / "incidents").read_text() == "in the way"


def test_noise_in_the_data_is_a_spike_and_replays_to_the_same_bits(run, capsys, monkeypatch):
    fault = Fault("noise", lambda n: n >= 20)
    with pytest.raises(DivergedError, match="deviations over the median"):
        run(fault, steps=40, every=100, loss_mads=3.0, max_skips=0, max_rewinds=0)
    folder = run.recipe().folder
    (bad,) = incidents(folder)["step_00000020"]
    assert bad["first_nonfinite"] is None
    capsys.readouterr()
    with monkeypatch.context() as patch:
        install(Fault("noise", lambda n: True), patch.setattr)
        replay(run.recipe(), folder / "incidents/step_00000020_sample_152")
    said = capsys.readouterr().out
    assert f"recorded loss {bad['loss']} gnorm {bad['grad_norm']} | now loss {bad['loss']} gnorm {bad['grad_norm']}" \
        in said
    replay(run.recipe(), folder / "incidents/step_00000020_sample_152")  # the same batch without the noise is another
    assert f"now loss {bad['loss']}" not in capsys.readouterr().out


def test_the_guard_never_lets_outliers_in():
    guard = NumberGuard(GuardConfig(window=16, warmup=8))
    for n in range(40):
        loss, norm = 3.0 + 0.01 * math.sin(n), 1.0 + 0.1 * math.cos(n)
        assert guard.judge(loss, norm) is None
        guard.accept(loss, norm)
    history = guard.history
    for _ in range(20):
        assert "loss 4 is above" in guard.judge(4.0, 1.0)
        assert "grad_norm 50 is above" in guard.judge(3.0, 50.0)
    assert guard.history == history
    assert guard.judge(2.0, 0.1) is None  # better is never bad
    assert NumberGuard(GuardConfig(window=16, warmup=8), history).judge(4.0, 1.0)
    assert NumberGuard(GuardConfig(window=16, warmup=8, loss_mads=None), history).judge(4.0, 1.0) is None
    assert NumberGuard(GuardConfig(window=16, warmup=8), None).judge(400.0, 1.0) is None  # too little history


def tensorboard_steps(folder: Path) -> list[int]:
    """Steps as TensorBoard itself shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]
