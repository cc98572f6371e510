"""A process that has trained keeps neither the model nor the threads of its process groups."""

from __future__ import annotations

import gc
import os

from helpers import run_main, small_recipe


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_a_run_in_a_process_leaves_no_threads_behind(text_data, tmp_path, capsys):
    """Megatron's gradient hooks and the model refer to each other where the garbage collector does not see it."""
    before = threads()
    recipe = small_recipe(tmp_path / "recipe.yaml", text_data / "train", run_dir=str(tmp_path / "run"), train__steps=2)
    assert run_main([str(recipe)], capsys).code in (0, None)
    gc.collect()
    assert threads() <= before + 12, "60 threads belong to the process groups of one run"
